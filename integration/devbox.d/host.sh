# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../devbox and the other parts
# What devboxes share with the rest of the machine: port, subnets, firewall chains, /run/containerd.
#
# Every devbox that is up has a claim, /run/vz-devbox/<id>, so that two never choose the same port or subnet. The
# first one records how the machine looked (baseline); the last one puts that back.

claims=/run/vz-devbox

with_claims() ( # with_claims COMMAND...: run it while no other devbox joins or leaves
  mkdir -p "$claims"
  exec 8>"$claims/lock"
  flock 8
  "$@"
)

claim_value() { sed -n "s/^$2=//p" "$1"; }

live_claims() { # files of the other devboxes that are up; forgets those from before a reboot or with no directory
  local file
  for file in "$claims"/claim.*; do
    [[ -f $file && $file != "$claims/claim.$devbox_id" ]] || continue
    if [[ $(claim_value "$file" boot) == "$(</proc/sys/kernel/random/boot_id)" && -d $(claim_value "$file" dir) ]]; then
      echo "$file"
    else
      rm -f -- "$file"
    fi
  done
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

net_is_free() { # net_is_free A.B: no address or route of this machine overlaps A.B.0.0/16, the default route aside
  local prefix length a b mask
  local -i wanted found
  wanted=$((${1%.*} << 8 | ${1#*.}))
  while IFS=/ read -r prefix length; do
    [[ $prefix =~ ^[0-9]+\.[0-9]+\. ]] || continue
    IFS=. read -r a b _ <<<"$prefix"
    found=$((a << 8 | b)); length=${length:-32}
    mask=$((length >= 16 ? 0xffff : (0xffff << (16 - length)) & 0xffff))
    (((wanted & mask) != (found & mask))) || return 1
  done < <(
    ip -4 -o addr show | awk -v n="$bridge_net" -v p="$bridge_pod" '$2 != n && $2 != p { print $4 }'
    ip -4 route show table main | awk -v n="$bridge_net" -v p="$bridge_pod" \
      '$1 != "default" && !index($0, " dev " n " ") && !index($0, " dev " p " ") { print $1 }'
  )
}

# choose_identity: set registry_port and net. The values of the last time are kept when they are still free.
choose_identity() {
  local claim taken_ports=" " taken_nets=" " i seed
  while read -r claim; do
    taken_ports+="$(claim_value "$claim" port) "; taken_nets+="$(claim_value "$claim" net) "
  done < <(live_claims)
  seed=$((16#$devbox_id))
  registry_port=
  for i in "$(saved port)" $(seq "$((seed % 10000))" "$((seed % 10000 + 200))"); do
    [[ -n $i ]] || continue
    ((i >= 20000)) || i=$((21000 + i % 10000))
    if [[ $taken_ports != *" $i "* ]] && port_is_free "$i"; then registry_port=$i; break; fi
  done
  [[ -n $registry_port ]] || die "no free TCP port for the registry between 21000 and 31000"
  net=${VZ_DEVBOX_NET:-}
  if [[ -n $net ]]; then
    [[ $net =~ ^[0-9]+\.[0-9]+$ ]] || die "VZ_DEVBOX_NET must be the first two numbers of a /16, for example 10.77"
    return
  fi
  for i in "$(saved net)" $(seq "$((seed % 64))" "$((seed % 64 + 63))"); do
    [[ -n $i ]] || continue
    [[ $i == *.* ]] || i=10.$((64 + i % 64))
    if [[ $taken_nets != *" $i "* ]] && net_is_free "$i"; then net=$i; break; fi
  done
  [[ -n $net ]] || die "every range from 10.64.0.0/16 to 10.127.0.0/16 is in use here: choose one with VZ_DEVBOX_NET=A.B"
}

saved() { # saved KEY: from this devbox's last claim
  [[ ! -f $state_dir/identity ]] || claim_value "$state_dir/identity" "$1"
}

join_host() { # to be run by with_claims
  choose_identity
  if [[ -z $(live_claims) && ! -f $claims/claim.$devbox_id ]]; then
    firewall_save >"$claims/firewall"
    : >"$claims/dirs"
    local dir
    for dir in "${shared_dirs[@]}"; do [[ ! -d $dir ]] || echo "$dir" >>"$claims/dirs"; done
  fi
  printf '%s\n' "dir=$state_dir" "boot=$(</proc/sys/kernel/random/boot_id)" "port=$registry_port" "net=$net" \
    >"$state_dir/identity"
  cp "$state_dir/identity" "$claims/claim.$devbox_id"
}

leave_host() { # to be run by with_claims
  local dir
  rm -f -- "$claims/claim.$devbox_id"
  [[ -z $(live_claims) ]] || return 0
  if [[ -f $claims/firewall ]]; then firewall_restore "$claims/firewall"; fi
  if [[ -f $claims/dirs ]] && ! grep -qxF /run/containerd/fifo "$claims/dirs"; then
    # of ctr clients whose task was lost
    find /run/containerd/fifo -type p -delete 2>/dev/null || true
  fi
  for dir in "${shared_dirs[@]}"; do
    # made while devboxes were up: only what is empty goes, whoever else made it
    if [[ -d $dir && -f $claims/dirs ]] && ! grep -qxF "$dir" "$claims/dirs"; then
      find "$dir" -depth -type d -empty -delete
    fi
  done
  # ctr and nerdctl put a container's cgroup below one named after the namespace; an empty one is of no use to anyone
  while read -r dir; do
    for dir in /sys/fs/cgroup/"$dir" /sys/fs/cgroup/*/"$dir"; do
      if [[ -d $dir ]]; then find "$dir" -depth -type d -exec rmdir --ignore-fail-on-non-empty {} + 2>/dev/null || true; fi
    done
  done < <({ echo default; echo k8s.io; cat "$claims/namespaces" 2>/dev/null || true; } | sort -u)
  rm -rf -- "$claims"
}
# programs that know no other place: ctr's fifos and runc's state, nerdctl's port reservations, libcni's results
shared_dirs=(/run/containerd/fifo /run/containerd/runc /run/containerd/s /run/containerd /run/nerdctl /var/lib/cni /run/runc)

# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../devbox and the other parts
# containerd and the registry: start, readiness, stop; and what a devbox leaves behind when its shims were killed.

# Every process that a devbox's daemon starts inherits this variable, so that leftovers can be told from
# everybody else's; `exec` does not set it.
marker() { echo "VZ_DEVBOX_DAEMON=$state_dir"; }

is_marked() { grep -qzxF -- "$(marker)" "/proc/$1/environ" 2>/dev/null; }

daemon_pid() { # of a daemon of this devbox that runs
  local pid
  [[ -f $state_dir/run/$1.pid ]] || return 1
  pid=$(<"$state_dir/run/$1.pid")
  [[ -n $pid ]] && is_marked "$pid" && echo "$pid"
}

start_daemon() { # start_daemon NAME COMMAND...
  local name=$1; shift
  [[ ! -f $state_dir/log/$name.log ]] || mv -- "$state_dir/log/$name.log" "$state_dir/log/$name.log.1"
  # shims inherit all of this; VZ_CONFIG, where it is set, too
  env "$(marker)" PATH="$bin_dir:$vz_bin_dir:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    VZ_LINUX_DIR="$vz_linux_dir" OTEL_TRACES_EXPORTER=none setsid "$@" >"$state_dir/log/$name.log" 2>&1 </dev/null 9>&- &
  echo $! >"$state_dir/run/$name.pid"
}

daemon_failed() {
  local child
  tail -n 20 "$state_dir/log/$1.log" | cut -c1-300 | sed 's/^/  | /' >&2
  # containerd asks each runtime's shim for its -info before it serves
  for child in $(pgrep -P "$(<"$state_dir/run/$1.pid")"); do
    say "$1 waits for: $(tr '\0' ' ' <"/proc/$child/cmdline")"
  done
  die "$1 $2; the end of $state_dir/log/$1.log is above"
}

# wait_for NAME SECONDS COMMAND...: until the command succeeds; at once an error when the daemon has died
wait_for() {
  local name=$1 limit=$((SECONDS + $2 * patience)); shift 2
  until "$@" >/dev/null 2>&1; do
    # the marker is not visible between fork and exec: only the process counts
    kill -0 "$(<"$state_dir/run/$name.pid")" 2>/dev/null || daemon_failed "$name" "did not start"
    ((SECONDS < limit)) || daemon_failed "$name" "runs but does not answer"
    sleep 0.02
  done
}

registry_answers() {
  exec 3<>"/dev/tcp/127.0.0.1/$registry_port" || return 1
  printf 'GET /v2/ HTTP/1.0\r\n\r\n' >&3
  grep -q 'registry/2.0' <&3
}
containerd_answers() { ctr_ --connect-timeout "$((10 * patience))s" version; }
ctr_() { "$bin_dir/ctr" -a "$sock" "$@"; }

start_daemons() {
  local fingerprint
  if ! daemon_pid registry >/dev/null; then
    start_daemon registry "$bin_dir/registry" serve "$state_dir/registry.yml"
  fi
  local -a files
  mapfile -t files < <(find "$state_dir/conf.d" -name '*.toml' | sort)
  fingerprint=$(hash_of "$bin_dir" "$vz_bin_dir" "$vz_linux_dir" "${VZ_CONFIG:-}" -- "$state_dir/containerd.toml" "${files[@]}")
  if daemon_pid containerd >/dev/null && [[ $(cat "$state_dir/run/fingerprint" 2>/dev/null) != "$fingerprint" ]]; then
    say "configuration changed: restarting containerd (tasks keep running)"
    stop_daemon containerd
  fi
  if ! daemon_pid containerd >/dev/null; then
    rm -f -- "$sock" "$sock.ttrpc"
    start_daemon containerd "$bin_dir/containerd" -c "$state_dir/containerd.toml" \
      --root "$state_dir/data/root" --state "$state_dir/state" --address "$sock"
    echo "$fingerprint" >"$state_dir/run/fingerprint"
  fi
  # generous for a machine that is emulated; a daemon that dies is noticed at once
  wait_for containerd 120 containerd_answers
  wait_for registry 60 eval '(registry_answers)'
}

wait_gone() { # wait_gone SECONDS PID...: until none of them runs; they are not our children, so there is no event to wait for
  local limit=$((SECONDS + $1 * patience)) pid; shift
  for pid; do
    while [[ -d /proc/$pid && $(awk '$1 == "State:" { print $2 }' "/proc/$pid/status" 2>/dev/null) != [ZX] ]]; do
      ((SECONDS < limit)) || return 1
      sleep 0.02
    done
  done
}

stop_daemon() {
  local pid
  if pid=$(daemon_pid "$1"); then
    kill "$pid"
    wait_gone 15 "$pid" || { say "warning: $1 ignored SIGTERM for $((15 * patience)) s: killing it"; kill -9 "$pid"; wait_gone 5 "$pid"; }
  fi
  rm -f -- "$state_dir/run/$1.pid"
}

# ---- taking everything down --------------------------------------------------
# A runtime under development may hang: every call has a deadline, and what it did not do is done by hand.
polite() { timeout -k 5 "$(($1 * patience))" "${@:2}" >/dev/null 2>&1; }

listed() { # listed CTR-ARGUMENTS: names, or a warning when containerd does not answer
  timeout "$((20 * patience))" "$bin_dir/ctr" -a "$sock" "$@" -q 2>/dev/null || say "warning: containerd does not answer 'ctr $*'"
}

remove_containers() {
  local ns id
  for ns in $(listed namespaces ls); do
    echo "$ns" >>"$claims/namespaces"
    if [[ $ns == k8s.io ]] && command -v "$cri_bin_dir/crictl" >/dev/null; then
      polite 60 "$cri_bin_dir/crictl" -r "unix://$sock" -t 50s rmp -fa || say "warning: crictl could not remove all pods"
    fi
    for id in $(listed -n "$ns" containers ls); do
      # nerdctl also takes its networks, names and volumes apart; it removes other clients' containers too
      [[ $ns == k8s.io ]] || NERDCTL_TOML=$state_dir/nerdctl.toml polite 30 "$bin_dir/nerdctl" -n "$ns" rm -f -v "$id" || true
      if polite 10 "$bin_dir/ctr" -a "$sock" -n "$ns" containers info "$id"; then
        polite 20 "$bin_dir/ctr" -a "$sock" -n "$ns" tasks rm -f "$id" || true
        polite 10 "$bin_dir/ctr" -a "$sock" -n "$ns" containers rm "$id" ||
          say "warning: could not remove container $ns/$id the proper way"
      fi
      release_network "$ns" "$id"
    done
  done
}

# What only a container's poststop hook removes, which does not run when its shim was killed: the process with which
# nerdctl reserves a published port, and libcni's note of the network's result.
release_network() { # release_network NAMESPACE CONTAINER
  local file=/run/nerdctl/$1/$2/port-reserver.pid pid
  if [[ -f $file ]]; then
    pid=$(<"$file")
    if [[ $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) == "sleep infinity " ]]; then kill "$pid"; fi
    rm -rf -- "${file%/*}"
  fi
  # only nerdctl's and pods' ids are unique among devboxes
  if [[ $2 =~ ^[0-9a-f]{64}$ ]]; then rm -f -- /var/lib/cni/results/*"-$2"-*; fi
}

leftovers() { # this devbox's processes, daemons aside, and all that descend from them
  local pid ppid more=1 dir=${state_dir//./\\.}
  local -A ours=() parent=()
  while read -r pid ppid; do parent[$pid]=$ppid; done < <(ps -eo pid=,ppid=)
  # by what they inherited; or by their /: a file system of this devbox is a container's, or an anchor's
  while IFS=/ read -r _ _ pid _; do ours[$pid]=1; done < <(
    grep -lszxF -- "$(marker)" /proc/[0-9]*/environ
    grep -lsE -- "^([^ ]+ ){3}$dir/[^ ]* / |^([^ ]+ ){4}/ .*$dir/" /proc/[0-9]*/mountinfo
  )
  for pid in "$(daemon_pid containerd || true)" "$(daemon_pid registry || true)"; do
    [[ -z $pid ]] || unset "ours[$pid]"
  done
  while ((more)); do
    more=0
    for pid in "${!parent[@]}"; do
      if [[ -z ${ours[$pid]:-} && -n ${ours[${parent[$pid]}]:-} ]]; then ours[$pid]=1; more=1; fi
    done
  done
  for pid in "${!ours[@]}"; do echo "$pid"; done
}

kill_leftovers() {
  local -a pids
  mapfile -t pids < <(leftovers)
  ((${#pids[@]} > 0)) || return 0
  say "killing ${#pids[@]} leftover process(es): $(ps -o comm= -p "$(IFS=,; echo "${pids[*]}")" | sort | uniq -c | xargs)"
  kill -9 "${pids[@]}" 2>/dev/null || true
  wait_gone 10 "${pids[@]}" || say "warning: some of them cannot be killed: ${pids[*]}"
}

unmount_all() { # mounts below the state directory, the last one first
  local target
  awk -v dir="$state_dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac | while read -r target; do
    printf -v target %b "${target//\\/\\0}" # \040 and the like
    umount "$target" || umount -l "$target"
  done
}

conflist_values() { # conflist_values JQ-FILTER: from every CNI network of this devbox
  find "$state_dir/cni" -name '*.conflist' -exec jq -r "$1" {} +
}

remove_links() { # bridges, and networks made with `nerdctl network create`
  local name file
  for name in "$bridge_net" "$bridge_pod" $(conflist_values '.plugins[0].bridge // empty'); do
    [[ ! -e /sys/class/net/$name ]] || ip link del "$name"
  done
  find "$state_dir/cni" -name 'nerdctl-*.conflist' ! -name nerdctl-bridge.conflist | while read -r file; do
    # nerdctl keeps these networks' addresses in host-local's own place
    rm -rf -- "/var/lib/cni/networks/$(jq -r .name "$file")" "$file"
  done
}

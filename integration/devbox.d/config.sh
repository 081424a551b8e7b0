# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../devbox and the other parts
# Configuration files. Written at every `up`; containerd is restarted when what it reads has changed.

# Where overlayfs cannot be used on the state directory (its file system is itself an overlay, as in a host VM
# or a container), the data goes to a tmpfs; a snapshotter that is asked for by name is taken as it is.
prepare_storage() {
  mkdir -p "$state_dir"/{run,log,tmp,conf.d,data}
  chmod 711 "$state_dir"
  snapshotter=${VZ_DEVBOX_SNAPSHOTTER:-overlayfs}
  if [[ $snapshotter == overlayfs ]] && ! mountpoint -q "$state_dir/data" && ! overlay_works "$state_dir/data"; then
    say "overlayfs does not work on $state_dir ($(stat -f -c %T "$state_dir")): using a tmpfs for images and containers"
    mount -t tmpfs -o mode=711,size=75% vz-devbox "$state_dir/data"
    overlay_works "$state_dir/data" ||
      die "overlayfs does not work here, not even on a tmpfs: try VZ_DEVBOX_SNAPSHOTTER=native"
  fi
  [[ -z ${VZ_DEVBOX_SEED:-} ]] || plant "$VZ_DEVBOX_SEED"
  mkdir -p "$state_dir"/data/{root,registry,nerdctl,ipam,loaded} "$state_dir"/{certs.d/_default,cni/pods,cni/nerdctl}
}

overlay_works() { # what a snapshotter needs: writing, whiteouts, opaque directories
  local dir rc=0
  dir=$(mktemp -d "$1/probe.XXXXXX")
  mkdir -p "$dir"/{lower/sub,upper,work,merged}
  : >"$dir/lower/file"
  if mount -t overlay -o "lowerdir=$dir/lower,upperdir=$dir/upper,workdir=$dir/work" probe "$dir/merged" 2>/dev/null; then
    { rm "$dir/merged/file" && rmdir "$dir/merged/sub" && mkdir "$dir/merged/sub" && [[ -c $dir/upper/file ]]; } 2>/dev/null || rc=1
    umount "$dir/merged"
  else
    rc=1
  fi
  rm -rf -- "$dir"
  return "$rc"
}

configure() {
  # every registry's name is served by the loopback registry, and nothing else is tried
  cat >"$state_dir/certs.d/_default/hosts.toml" <<T
server = "http://127.0.0.1:$registry_port"
[host."http://127.0.0.1:$registry_port"]
  capabilities = ["pull", "resolve", "push"]
T
  cat >"$state_dir/registry.yml" <<Y
version: 0.1
log: { level: warn }
storage: { filesystem: { rootdirectory: $state_dir/data/registry }, delete: { enabled: true } }
http: { addr: "127.0.0.1:$registry_port" }
Y
  configure_networks
  cat >"$state_dir/nerdctl.toml" <<T
address = "unix://$sock"
data_root = "$state_dir/data/nerdctl"
cni_path = "$bin_dir"
cni_netconfpath = "$state_dir/cni/nerdctl"
hosts_dir = ["$state_dir/certs.d"]
snapshotter = "$snapshotter"
cgroup_manager = "cgroupfs"
T
  # crictl gives a pod 2 s to start
  printf 'runtime-endpoint: unix://%s\nimage-endpoint: unix://%s\ntimeout: %d\n' "$sock" "$sock" "$((60 * patience))" \
    >"$state_dir/crictl.yaml"
  configure_containerd >"$state_dir/containerd.toml"
  configure_env >"$state_dir/env"
}

configure_containerd() {
  local oom=false
  # without CAP_SYS_RESOURCE nobody can have a lower oom_score_adj than ours, and pods ask for that
  (echo -998 >/proc/self/oom_score_adj) 2>/dev/null || oom=true
  cat <<T
version = 4
imports = ["$state_dir/conf.d/*.toml"]   # for experiments: then run "devbox up" again
[plugins.'io.containerd.cri.v1.images']
  snapshotter = '$snapshotter'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'vz.test/pause:1'
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '$state_dir/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = $oom
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['$bin_dir']
    conf_dir = '$state_dir/cni/pods'
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = 'runc'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.vz]
    runtime_type = 'io.containerd.vz.v2'
    pod_annotations = ['io.containerd.vz/*']
    container_annotations = ['io.containerd.vz/*']
    privileged_without_host_devices = true   # a VM has devices of its own
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.vz-sandbox]
    runtime_type = 'io.containerd.vz.v2'
    sandboxer = 'shim'
    pod_annotations = ['io.containerd.vz/*']
    container_annotations = ['io.containerd.vz/*']
    privileged_without_host_devices = true   # a VM has devices of its own
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/amd64'
  snapshotter = '$snapshotter'
[plugins.'io.containerd.nri.v1.nri']
  disable = true   # its socket's path is the same for all containerds
[plugins.'io.containerd.internal.v1.opt']
  path = '$state_dir/data/opt'
T
  if ((patience > 1)); then
    # containerd gives up on a shim that is as slow as the rest of an emulated machine
    printf '[timeouts]\n'
    printf "  'io.containerd.timeout.%s' = '%ss'\n" shim.cleanup "$((5 * patience))" shim.load "$((5 * patience))" \
      shim.shutdown "$((3 * patience))" task.state "$((2 * patience))" metrics.shimstats "$((2 * patience))"
  fi
  # a shim socket's path is this directory and 65 characters
  if ((${#state_dir} + 6 <= 42)); then
    printf "[plugins.'io.containerd.shim.v1.manager']\n  socket_dir = '%s'\n" "$state_dir/run/s"
  fi
}

# nerdctl would call its default network's bridge nerdctl0 and keep its addresses in /var/lib/cni in every devbox, so
# the network is given: as nerdctl itself writes it, with names and places of this devbox.
configure_networks() {
  local ipam
  ipam='"dataDir": "'$state_dir/data/ipam'", "routes": [ { "dst": "0.0.0.0/0" } ]'
  cat >"$state_dir/cni/nerdctl/nerdctl-bridge.conflist" <<J
{ "cniVersion": "1.0.0", "name": "bridge", "nerdctlID": "$(printf bridge | sha256sum | cut -d' ' -f1)",
  "nerdctlLabels": { "nerdctl/default-network": "true" }, "plugins": [
  { "type": "bridge", "bridge": "$bridge_net", "isGateway": true, "ipMasq": true, "hairpinMode": true,
    "ipam": { "type": "host-local", $ipam, "ranges": [ [ { "subnet": "$net.128.0/24", "gateway": "$net.128.1" } ] ] } },
  { "type": "portmap", "capabilities": { "portMappings": true } },
  { "type": "firewall", "ingressPolicy": "same-bridge" }, { "type": "tuning" } ] }
J
  cat >"$state_dir/cni/pods/10-vz-devbox.conflist" <<J
{ "cniVersion": "1.0.0", "name": "pods-$devbox_id", "plugins": [
  { "type": "bridge", "bridge": "$bridge_pod", "isGateway": true, "ipMasq": true, "hairpinMode": true,
    "ipam": { "type": "host-local", $ipam, "ranges": [ [ { "subnet": "$net.0.0/17" } ] ] } },
  { "type": "portmap", "capabilities": { "portMappings": true } },
  { "type": "firewall" }, { "type": "tuning" } ] }
J
}

configure_env() { # what `env` prints and `exec` sets
  cat <<E
export PATH="$bin_dir:$vz_bin_dir:$(cri_dir)/bin:\$PATH"
export CONTAINERD_ADDRESS="$sock"
export CONTAINERD_NAMESPACE="\${CONTAINERD_NAMESPACE:-default}"
export CONTAINERD_SNAPSHOTTER="$snapshotter"
export CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1
export NERDCTL_TOML="$state_dir/nerdctl.toml"
export CONTAINER_RUNTIME_ENDPOINT="unix://$sock"
export IMAGE_SERVICE_ENDPOINT="unix://$sock"
export CRI_CONFIG_FILE="$state_dir/crictl.yaml"
export VZ_DEVBOX="$state_dir"
export VZ_DEVBOX_HOSTS_DIR="$state_dir/certs.d"
export VZ_DEVBOX_REGISTRY="127.0.0.1:$registry_port"
export VZ_BIN_DIR="$vz_bin_dir"
E
}

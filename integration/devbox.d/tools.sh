# shellcheck shell=bash disable=SC2154 # variables of ../devbox and versions.sh
# The programs of the devbox, built from the Go module proxy into the cache.

go_build_env() {
  export GOTOOLCHAIN=local CGO_ENABLED=0 GOFLAGS="-mod=mod -trimpath -buildvcs=false"
  unset GOBIN
}

# Which Go builds the programs. Starting it takes a second on an emulated machine: `up` asks once, ahead of all who need it.
go_key() {
  if [[ -n ${known_go_key:-} ]]; then echo "$known_go_key"; return; fi
  need go:golang-go
  GOTOOLCHAIN=local go env GOVERSION GOARCH
}

tools_dir() {
  local key
  key=$(go_key)
  echo "$(cache_root)/gotools/$(hash_of tools "$key" -- \
    "$devbox_d/versions.sh" "$devbox_d/tools.sh")"
}

ensure_tools() {
  local dir; dir=$(tools_dir)
  [[ ! -d $dir ]] || return 0
  say "building the devbox's programs into $dir (about 4 min on 2 cores, once)"
  go_build_env
  mkdir -p "$(dirname "$dir")"
  # One cache entry for all: the parts go into a shared temporary directory, one step each.
  local tmp; tmp=$(mktemp -d "$(dirname "$dir")/.tmp.XXXXXX")
  # shellcheck disable=SC2064 # the path is to be expanded now
  trap "rm -rf -- '$tmp'" EXIT
  mkdir "$tmp/bin"; chmod 755 "$tmp"
  step "[1/4] containerd, ctr, containerd-shim-runc-v2 $containerd_version" build_containerd "$tmp/bin"
  step "[2/4] nerdctl $nerdctl_version" build_nerdctl "$tmp/bin"
  step "[3/4] CNI plugins $cni_version" build_cni "$tmp/bin"
  step "[4/4] registry $registry_version" build_registry "$tmp/bin"
  mv -T -- "$tmp" "$dir" 2>/dev/null || [[ -d $dir ]] || die "cannot create $dir"
  rm -rf -- "$tmp"
  trap - EXIT
}

build_containerd() {
  local m=github.com/containerd/containerd/v2
  GOBIN=$1 go install -ldflags "-s -w -X $m/version.Version=$containerd_version" \
    "$m/cmd/containerd@$containerd_version" \
    "$m/cmd/ctr@$containerd_version" \
    "$m/cmd/containerd-shim-runc-v2@$containerd_version"
}

build_cni() {
  local p list=() m=github.com/containernetworking/plugins/plugins
  for p in "${cni_plugins[@]}"; do
    case $p in
      host-local) list+=("$m/ipam/$p@$cni_version") ;;
      bridge | loopback) list+=("$m/main/$p@$cni_version") ;;
      *) list+=("$m/meta/$p@$cni_version") ;;
    esac
  done
  # nerdctl asks the plugins for their version
  GOBIN=$1 go install -ldflags "-s -w -X ${m%/plugins}/pkg/utils/buildversion.BuildVersion=$cni_version" "${list[@]}"
}

build_registry() {
  GOBIN=$1 go install -ldflags '-s -w' "github.com/distribution/distribution/v3/cmd/registry@$registry_version"
}

# nerdctl's go.mod replaces a module by a directory, which `go install module@version` refuses and which the
# module's zip does not contain. Only tests use that module: drop the file that does, and make the rest of it empty.
build_nerdctl() {
  local bin=$1 m=github.com/containerd/nerdctl/v2 src work
  src=$(go mod download -json "$m@$nerdctl_version" | jq -r .Dir)
  work=$(mktemp -d)
  cp -R --no-preserve=mode "$src/." "$work"
  rm "$work/cmd/nerdctl/helpers/testing_linux.go"
  mkdir -p "$work/mod/tigron"
  printf 'module github.com/containerd/nerdctl/mod/tigron\n' >"$work/mod/tigron/go.mod"
  (cd "$work" && go build -ldflags "-s -w -X $m/pkg/version.Version=$nerdctl_version" -o "$bin/nerdctl" ./cmd/nerdctl)
  rm -rf -- "$work"
}

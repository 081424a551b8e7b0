# shellcheck shell=bash disable=SC2154 # variables of ../devbox and versions.sh
# crictl, critest and ginkgo, for Kubernetes' side of containerd: only on request.

cri_dir() {
  # a devbox that never had Go can be taken down without it
  command -v go >/dev/null || return 0
  echo "$(cache_root)/gotools/$(hash_of cri "$(go_key)" -- \
    "$devbox_d/versions.sh" "$devbox_d/cri.sh")"
}

ensure_cri() {
  need go:golang-go
  go_build_env
  cached "$(cri_dir)" "crictl, critest $cri_tools_version and ginkgo" build_cri
}

# cri-tools is used through a module of our own, because its list of versions is not served everywhere and
# `go install module@version` asks for it.
build_cri() {
  local out=$1 work m=sigs.k8s.io/cri-tools
  work=$(mktemp -d)
  mkdir "$out/bin"
  (
    cd "$work" || exit
    printf 'module devbox\ngo 1.26\nrequire %s %s\n' "$m" "$cri_tools_version" >go.mod
    go build -ldflags "-s -w -X $m/pkg/version.Version=$cri_tools_version" -o "$out/bin/crictl" "$m/cmd/crictl"
    go test -c -o "$out/bin/critest" "$m/cmd/critest"
    # critest --parallel runs the ginkgo program of the version that it was built with
    GOFLAGS=-mod=mod go build -ldflags '-s -w' -o "$out/bin/ginkgo" github.com/onsi/ginkgo/v2/ginkgo
  )
  rm -rf -- "$work"
}

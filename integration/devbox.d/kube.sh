# shellcheck shell=bash disable=SC2154 # variables of ../devbox and versions.sh
# Kubernetes' own programs, for ../kubebox: built from the Go module proxy into the cache.

kube_programs=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)

kube_dir() {
  echo "$(cache_root)/gotools/$(hash_of kube "$(go_key)" -- "$devbox_d/kube.sh")"
}

ensure_kube() {
  need go:golang-go jq:jq
  go_build_env
  cached "$(kube_dir)" "Kubernetes $kube_version, etcd $etcd_version and CoreDNS $coredns_version (about 15 min, once)" build_kube
}

kube_version=v1.36.1
etcd_version=v3.6.4
coredns_version=v1.12.4

# Kubernetes replaces its staging modules by directories that are not in the module's zip. They are modules of their own
# too, of the same release with 0 as the major version: a module that requires those has all that the programs need.
build_kube() {
  local out=$1 work m=k8s.io/kubernetes src program
  work=$(mktemp -d)
  mkdir "$out/bin"
  (
    cd "$work" || exit
    src=$(go mod download -json "$m@$kube_version" | jq -r .Dir)
    {
      printf 'module kubebox\n'
      sed -n 's/^go .*/&/p; s/^godebug .*/&/p' "$src/go.mod"
      printf 'require %s %s\n' "$m" "$kube_version"
      sed '/^module /d; /^go /d; /^godebug /d; /^\/\//d' "$src/go.mod" |
        sed -E "s@(k8s.io/[a-z0-9-]+) v0\.0\.0\$@\1 v0${kube_version#v1}@
          s@=> ./staging/src/(k8s.io/[a-z0-9-]+)@=> \1 v0${kube_version#v1}@"
    } >go.mod
    cp --no-preserve=mode "$src/go.sum" go.sum
    for program in "${kube_programs[@]}"; do
      go build -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$kube_version -X k8s.io/client-go/pkg/version.gitVersion=$kube_version" \
        -o "$out/bin/$program" "$m/cmd/$program"
    done
  )
  GOBIN=$out/bin go install -ldflags '-s -w' "github.com/coredns/coredns@$coredns_version"
  mkdir "$work/etcd"
  (
    cd "$work/etcd" || exit
    printf 'module kubebox\ngo 1.24\nrequire go.etcd.io/etcd/server/v3 %s\n' "$etcd_version" >go.mod
    go build -ldflags '-s -w' -o "$out/bin/etcd" go.etcd.io/etcd/server/v3
  )
  rm -rf -- "$work"
}

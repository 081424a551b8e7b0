# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../lib.sh
# vz.test/pause:1: the process that keeps a pod's namespaces; the only image that is not made of Debian's files.
base=
packages=()
config='{"Entrypoint":["/pause"]}'

root() { # root ROOT
  (cd "$recipe" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS="-trimpath -buildvcs=false" \
    go build -ldflags '-s -w -buildid=' -o "$1/pause" pause.go)
}

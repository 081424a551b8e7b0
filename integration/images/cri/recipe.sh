# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../lib.sh
# vz.test/cri:1: what the images of CRI's conformance tests have, in one; ../../cri gives it their names and settings.
#
# The users and groups are those that the tests expect. pgrep and ipcs are the real ones: busybox lacks some options.
base=nginx
packages=(procps libproc2-0 libsystemd0 libncursesw6 libtinfo6 util-linux util-linux-extra libsmartcols1 liblzma5 libzstd1
  liblz4-1 libcap2 libgcrypt20 libgpg-error0 libc6)
config='{"Cmd":["sh"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}'

root() { # root ROOT UNPACKED-PACKAGES
  local root=$1 debs=$2
  mkdir -p "$root"/{bin,etc/nginx,www}
  cp_program "$root" "$debs" /usr/bin/pgrep /bin/pgrep
  cp_program "$root" "$debs" /usr/bin/ipcs /bin/ipcs
  (cd "$recipe" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS="-trimpath -buildvcs=false" \
    go build -ldflags '-s -w -buildid=' -o "$root/nnp" nnp.go)
  chmod 4755 "$root/nnp"
  echo hello >"$root/www/index.html"
  cat >"$root/etc/nginx/hostnet.conf" <<'NGINX'
pid /run/nginx.pid;
error_log /dev/stderr;
events {}
http { access_log off; server { listen 127.0.0.1:12003; root /www; } }
NGINX
  printf '%s\n' root:x:0:0:root:/root:/bin/sh www-data:x:33:33:www-data:/var/www:/bin/sh \
    default-user:x:1000:1000::/home:/bin/sh nobody:x:65534:65534:nobody:/:/bin/sh >"$root/etc/passwd"
  printf '%s\n' root:x:0: tty:x:5: www-data:x:33: default-user:x:1000: \
    group-defined-in-image:x:50000:default-user nogroup:x:65534: >"$root/etc/group"
}

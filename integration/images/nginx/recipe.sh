# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../lib.sh
# vz.test/nginx:1: a real server on port 80, one layer above busybox.
base=busybox
packages=(nginx nginx-common libc6 libcrypt1 libpcre2-8-0 libssl3 zlib1g)
config='{"Cmd":["nginx","-g","daemon off;"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"ExposedPorts":{"80/tcp":{}},"StopSignal":"SIGQUIT"}'

root() { # root ROOT UNPACKED-PACKAGES
  local root=$1 debs=$2
  mkdir -p "$root"/{etc/nginx,var/log/nginx,var/lib/nginx,var/www/html,bin,usr}
  # the layer below has these as links: a directory of this layer would replace them
  rmdir "$root/usr"
  cp_program "$root" "$debs" /usr/sbin/nginx /bin/nginx
  cp "$debs/etc/nginx/mime.types" "$root/etc/nginx/"
  cat >"$root/etc/nginx/nginx.conf" <<'NGINX'
user www-data;
worker_processes auto;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events {}
http {
  include mime.types;
  access_log /dev/stdout;
  server { listen 80 default_server; root /var/www/html; }
}
NGINX
  printf '<!doctype html>\n<title>vz</title>\n<p>hello from nginx\n' >"$root/var/www/html/index.html"
}

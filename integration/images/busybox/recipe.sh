# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../lib.sh
# vz.test/busybox:1: a shell and the usual small programs; a few MiB.
#
# Debian's dynamic busybox, not busybox-static: the static one runs its own applets whatever is mounted over
# /bin/ls. Applets are hard links for the same reason: hiding one file must not hide the shell.
base=
packages=(busybox libc6)
config='{"Cmd":["sh"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}'

root() { # root ROOT UNPACKED-PACKAGES
  local root=$1 debs=$2 applet
  mkdir -p "$root"/{bin,sbin,etc,root,proc,sys,dev,run,var/log,var/spool,usr,home/user,mnt,srv,tmp,lib,lib64}
  ln -s ../bin ../sbin "$root/usr/"
  ln -s /run "$root/var/run"
  chmod 1777 "$root/tmp"; chmod 700 "$root/root"
  cp_program "$root" "$debs" /bin/busybox
  "$debs/lib64/ld-linux-x86-64.so.2" --library-path "$debs/lib/x86_64-linux-gnu" "$debs/bin/busybox" --list |
    while read -r applet; do
      [[ $applet == busybox ]] || ln "$root/bin/busybox" "$root/bin/$applet"
    done
  printf '%s\n' root:x:0:0:root:/root:/bin/sh www-data:x:33:33:www-data:/var/www:/bin/sh \
    user:x:1000:1000:user:/home/user:/bin/sh nobody:x:65534:65534:nobody:/:/bin/sh >"$root/etc/passwd"
  printf '%s\n' root:x:0: tty:x:5: www-data:x:33: user:x:1000: extra:x:50000:user nogroup:x:65534: >"$root/etc/group"
  printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$root/etc/nsswitch.conf"
  chown 1000:1000 "$root/home/user"
}

# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../lib.sh
# vz.test/debian:12: a real distribution: glibc, bash, apt, Python, procps, iproute2, iptables, nftables, iperf3, stress-ng.
base=
packages=()
config='{"Cmd":["bash"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}'

root() { # root ROOT
  local root=$1
  debootstrap --variant=minbase --keyring="$debian_keyring" \
    --include=python3,procps,iproute2,stress-ng,iptables,nftables,iperf3 "$debian_suite" "$root" "$debian_mirror"
  # Nothing here is read by a program: documentation, translations, package lists, logs.
  rm -rf "$root"/usr/share/{doc,doc-base,info,lintian,locale,man,bug}/* "$root"/var/lib/apt/lists/* \
    "$root"/var/cache/{apt,debconf,ldconfig}/* "$root"/var/log/* "$root"/debootstrap "$root"/tmp/*
  find "$root" -depth -type d -name __pycache__ -exec rm -rf {} +
  # a container gets its own /dev
  rm -rf "${root:?}"/dev/*
  # debootstrap copies these from the machine it runs on
  rm -f "$root"/etc/{resolv.conf,hostname}
  printf '%s\n' "deb $debian_mirror $debian_suite main" >"$root/etc/apt/sources.list"
  chroot "$root" useradd --uid 1000 --create-home --shell /bin/bash user
}

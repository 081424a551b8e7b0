# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../hostvm and the other parts
# What the host VM is made of: the kernel, from Debian's package, and virtiofsd, from the Cargo registry; both in the cache.

virtiofsd_version=1.14.0

unfit() { # says why the host VM cannot run here, or fails
  local item missing=()
  if [[ $(uname -m) != x86_64 ]]; then echo "the host VM is for x86_64, and this is $(uname -m)"; return; fi
  if ((EUID != 0)); then echo "the host VM needs root, for its namespaces and to share all files: run it with sudo -E"; return; fi
  for item in qemu-system-x86_64 busybox cpio depmod setpriv unshare apt-get dpkg-deb cargo; do
    command -v "$item" >/dev/null || missing+=("$item")
  done
  if ((${#missing[@]} > 0)); then echo "the host VM needs ${missing[*]}: run 'make setup'"; return; fi
  if ! unshare --mount --pid --fork --mount-proc true 2>/dev/null; then
    echo "the host VM needs mount and pid namespaces, which this environment does not allow"
    return
  fi
  return 1
}

kernel_dir() { echo "$(cache_root)/hostvm-kernel/$(hash_of kernel "$debian_suite" "${VZ_DEBIAN_MIRROR:-}" -- "$hostvm_d/parts.sh")"; }

virtiofsd_dir() { echo "$(cache_root)/virtiofsd/$(hash_of "$virtiofsd_version" "$(rustc -vV)" -- "$hostvm_d/parts.sh")"; }

# Who comes second waits: two builds at once would only take longer.
prepare() {
  local kernel virtiofsd
  kernel=$(kernel_dir) virtiofsd=$(virtiofsd_dir)
  [[ ! -d $kernel || ! -d $virtiofsd ]] || return 0
  mkdir -p "$(cache_root)/tmp"
  exec 9>"$(cache_root)/tmp/hostvm.lock"
  flock -n 9 || { say "waiting for another hostvm to prepare it"; flock 9; }
  cached "$kernel" "fetching the host VM's kernel" fetch_kernel
  cached "$virtiofsd" "building virtiofsd $virtiofsd_version (about 2 min on 2 cores, once)" build_virtiofsd
  exec 9>&-
}

# Unpacked, not installed: a kernel in /boot would be this machine's next one.
fetch_kernel() { # fetch_kernel OUT
  local work package
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # the path is to be expanded now
  trap "rm -rf -- '$work'" EXIT
  # shellcheck source=/dev/null
  . "$here/images/lib.sh"
  private_apt "$work/apt"
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
  (cd "$work" && apt-get -q download "$package")
  dpkg-deb -x "$work"/linux-image-*.deb "$work/x"
  mv "$work"/x/boot/vmlinuz-* "$1/vmlinuz"
  mv "$work"/x/lib/modules/* "$1/modules"
  echo "${package#linux-image-}" >"$1/release"
  # depmod wants the modules where a system has them
  mkdir -p "$work/root/lib/modules"
  ln -s "$1/modules" "$work/root/lib/modules/$(<"$1/release")"
  depmod -b "$work/root" "$(<"$1/release")"
}

build_virtiofsd() { # build_virtiofsd OUT
  # A build of its own: nothing of the caller's flags reaches it.
  env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET -u MAKEFLAGS CARGO_TARGET_DIR="$1/target" \
    cargo install virtiofsd --version "=$virtiofsd_version" --locked --root "$1/root" --no-track
  mv "$1/root/bin/virtiofsd" "$1/virtiofsd"
  rm -rf -- "$1/target" "$1/root"
}

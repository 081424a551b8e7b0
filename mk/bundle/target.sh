# shellcheck shell=bash disable=SC2034 # Sourced by the scripts beside it, which use what is set here.
# What a program for the guest is built for and with. ARCH is x86_64 (default: this machine's) or arm64.
#
# need_target WHO: says what is missing to build for it, all at once, and exits.

case ${ARCH:-$(uname -m)} in
    x86_64 | amd64) arch=x86_64 rust_arch=x86_64 debian_arch=amd64 ;;
    arm64 | aarch64) arch=arm64 rust_arch=aarch64 debian_arch=arm64 ;;
    *) echo "bundle: error: there is no guest for ARCH=$ARCH: there are x86_64 and arm64" >&2; exit 1 ;;
esac
target=$rust_arch-unknown-linux-gnu
target_variable=$(tr 'a-z-' 'A-Z_' <<<"$target")
libraries=/usr/lib/$rust_arch-linux-gnu
linker=cc linker_package=gcc
if [ "$rust_arch" != "$(uname -m)" ]; then
    linker=$rust_arch-linux-gnu-gcc linker_package=gcc-${rust_arch/_/-}-linux-gnu
fi

need_target() {
    local missing=()
    command -v cargo >/dev/null || missing+=("cargo (rustup: https://rustup.rs)")
    if command -v rustc >/dev/null && [ ! -d "$(rustc --print target-libdir --target "$target")" ]; then
        missing+=("Rust's standard library for $target: rustup target add $target")
    fi
    command -v "$linker" >/dev/null || missing+=("the compiler $linker: apt-get install $linker_package")
    # Debian's cross compilers have a libc of their own.
    [ -f "$libraries/libc.a" ] || [ -f "/usr/$rust_arch-linux-gnu/lib/libc.a" ] ||
        missing+=("a static libc: apt-get install libc6-dev-$debian_arch-cross")
    [ -f "$libraries/libseccomp.a" ] ||
        missing+=("$libraries/libseccomp.a: apt-get install libseccomp-dev:$debian_arch")
    [ ${#missing[@]} -eq 0 ] && return
    printf "%s\n" "${missing[@]/#/$1: error: missing for ARCH=$arch: }" >&2
    if [ "$rust_arch" != "$(uname -m)" ]; then
        echo "$1: packages of another architecture need: dpkg --add-architecture $debian_arch && apt-get update" >&2
    fi
    exit 1
}

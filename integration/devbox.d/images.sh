# shellcheck shell=bash disable=SC2034,SC2154 # variables of ../devbox and the other parts
# The images: built into the cache from ../images, loaded into containerd, pushed to the loopback registry.

# NAME:TAG in the order in which they are made; a base comes before what stands on it
read -ra images <<<"${VZ_DEVBOX_IMAGES:-busybox:1 pause:1 nginx:1 debian:12}"

image_base() { sed -n 's/^base=//p' "$images_d/$1/recipe.sh"; }

image_hash() { # the recipe, those of its bases, and what they are made with
  local base files
  files=("$images_d/lib.sh" "$images_d/$1/recipe.sh")
  base=$(image_base "$1")
  while [[ -n $base ]]; do
    files+=("$images_d/$base/recipe.sh")
    base=$(image_base "$base")
  done
  # shellcheck disable=SC2154 # from versions.sh
  hash_of image "$1" "$debian_suite" "${VZ_DEBIAN_MIRROR:-}" -- "${files[@]}"
}

image_archive() { echo "$(cache_root)/images/$(image_hash "$1")/image.tar"; }

make_image() { # make_image NAME TAG OUT-DIR; runs in a subshell
  # shellcheck source=/dev/null
  . "$images_d/lib.sh"
  local base; base=$(image_base "$1")
  build_image "$1" "$2" "$images_d/$1" "${base:+$(image_archive "$base")}" "$3"
}

ensure_image() { # ensure_image NAME:TAG
  local name=${1%%:*} archive base
  [[ -f $images_d/$name/recipe.sh && $1 == *:* ]] || die "VZ_DEVBOX_IMAGES: there is no recipe for '$1'"
  base=$(image_base "$name")
  [[ -z $base ]] || ensure_image "$base:1"
  archive=$(image_archive "$name")
  [[ ! -f $archive ]] || return 0
  need apt-get:apt dpkg-deb:dpkg jq:jq tar:tar gzip:gzip debootstrap:debootstrap
  [[ -f /usr/share/keyrings/debian-archive-keyring.gpg ]] ||
    die "not found: /usr/share/keyrings/debian-archive-keyring.gpg
  on Debian: apt-get install debian-archive-keyring"
  cached "$(dirname "$archive")" "image vz.test/$1" make_image "$name" "${1##*:}"
}

# load_images: into containerd's namespaces and the registry, once per image; again when someone has removed one
load_images() {
  local image name mark ns have
  have=$(for ns in default k8s.io; do ctr_ -n "$ns" images ls -q | sed "s#^#$ns #"; done)
  for image in "${images[@]}"; do
    name=${image%%:*}; mark=$state_dir/data/loaded/$name
    if [[ $(cat "$mark" 2>/dev/null) == "$(image_hash "$name")" ]] &&
      grep -qxF "default vz.test/$image" <<<"$have" && grep -qxF "k8s.io vz.test/$image" <<<"$have"; then
      continue
    fi
    step "loading vz.test/$image" load_image "$image" "$(image_archive "$name")"
    image_hash "$name" >"$mark"
  done
}

load_image() { # load_image NAME:TAG ARCHIVE
  local ns
  for ns in default k8s.io; do
    ctr_ -n "$ns" images import --snapshotter "$snapshotter" "$2"
  done
  ctr_ -n default images push --hosts-dir "$state_dir/certs.d" "vz.test/$1"
}

# shellcheck shell=bash disable=SC2154 # variables of ../devbox and the other parts
# A devbox's data with the images loaded, made once, in the cache: loading one on an emulated machine takes minutes.

seed_snapshots=data/root/io.containerd.snapshotter.v1.overlayfs

seed_dir() {
  local image words=("$(basename "$(tools_dir)")")
  for image in "${images[@]}"; do words+=("$image" "$(image_hash "${image%%:*}")"); done
  echo "$(cache_root)/devbox-seed/$(hash_of "${words[@]}" -- "$devbox_d"/{seed,images,config}.sh)"
}

seed() {
  need_root seed
  cached "$(seed_dir)" "loading ${images[*]} into a devbox, once" make_seed
  seed_dir
}

make_seed() { # make_seed OUT: by a devbox of its own
  local box
  box=$(mktemp -d /var/tmp/vzs.XXXXXX)
  # shellcheck disable=SC2064 # the path is to be expanded now
  trap "VZ_DEVBOX='$box' '$here/devbox' clean" EXIT
  export VZ_DEVBOX_SNAPSHOTTER=overlayfs
  unset VZ_DEVBOX_SEED
  VZ_DEVBOX=$box "$here/devbox" up
  VZ_DEVBOX=$box "$here/devbox" down
  # a data directory that is a file system of its own is gone now
  [[ -d $box/$seed_snapshots/snapshots ]] || die "overlayfs does not work on /var/tmp here"
  mv -- "$box/data" "$1/data"
}

# plant SEED: nothing is copied. The data is an overlay of the seed; snapshots cannot be on one, so they are on a tmpfs, which
# has those of the seed bound.
plant() {
  local data=$state_dir/data dir
  [[ ! -e $data/root && $snapshotter == overlayfs ]] || return 0
  [[ -d $1/$seed_snapshots ]] || die "VZ_DEVBOX_SEED: $1 is not what 'devbox seed' prints"
  mkdir -p "$state_dir/seed"
  mount -t tmpfs -o mode=711,size=75% vz-devbox "$state_dir/seed"
  mkdir "$state_dir"/seed/{upper,work,snapshotter}
  mount -t overlay -o "lowerdir=$1/data,upperdir=$state_dir/seed/upper,workdir=$state_dir/seed/work" vz-devbox "$data"
  mount --bind "$state_dir/seed/snapshotter" "$state_dir/$seed_snapshots"
  cp "$1/$seed_snapshots/metadata.db" "$state_dir/$seed_snapshots/"
  mkdir "$state_dir/$seed_snapshots/snapshots"
  for dir in "$1/$seed_snapshots/snapshots"/*; do
    mkdir "$state_dir/$seed_snapshots/snapshots/${dir##*/}"
    mount --bind "$dir" "$state_dir/$seed_snapshots/snapshots/${dir##*/}"
  done
}

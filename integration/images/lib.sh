# shellcheck shell=bash
# Makes OCI image archives from Debian packages with tar, gzip and jq. Recipes: <name>/recipe.sh, each with
#   base      name of the image whose layers come below, or nothing
#   packages  Debian packages to unpack (not to install)
#   config    the image's "config" object
#   root()    fills a directory with the layer's files: root ROOT UNPACKED-PACKAGES
# The same package versions give the same bytes.

# shellcheck disable=SC2154 # from versions.sh
debian_mirror=${VZ_DEBIAN_MIRROR:-http://deb.debian.org/debian}
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
image_epoch=1700000000
export SOURCE_DATE_EPOCH=$image_epoch # for useradd's date in /etc/shadow

# An apt of our own: independent of the host's release and lists. Proxy settings of the host's apt.conf stay in force.
private_apt() { # private_apt DIR: afterwards `apt-get download` there gives packages of the suite
  mkdir -p "$1"/{state/lists/partial,cache/archives/partial,debs}
  cat >"$1/apt.conf" <<CONF
Dir::State "$1/state";
Dir::State::status "/dev/null";
Dir::Cache "$1/cache";
Dir::Etc::sourcelist "$1/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Update::Error-Mode "any";
CONF
  # shellcheck disable=SC2154 # from versions.sh
  echo "deb [signed-by=$debian_keyring] $debian_mirror $debian_suite main" >"$1/sources.list"
  export APT_CONFIG=$1/apt.conf
  apt-get -q update
}

# cp_program ROOT UNPACKED PROGRAM [AS]: a program of an unpacked package, with the libraries it needs.
# The packages' own dynamic linker resolves them, so that nothing of this machine gets into an image.
cp_program() {
  local root=$1 debs=$2 program=$3 as=${4:-$3} lib list
  install -D "$debs$program" "$root$as"
  list=$("$debs/lib64/ld-linux-x86-64.so.2" --library-path "$debs/lib/x86_64-linux-gnu:$debs/usr/lib/x86_64-linux-gnu" \
    --list "$debs$program")
  if grep 'not found' <<<"$list"; then return 1; fi
  install -D "$debs/lib64/ld-linux-x86-64.so.2" "$root/lib64/ld-linux-x86-64.so.2"
  while read -r lib; do
    install -D -m 644 "$lib" "$root/lib/x86_64-linux-gnu/$(basename "$lib")"
  done < <(grep -o "$debs/[^ ]*\.so[^ ]*" <<<"$list" | grep -v /lib64/ | sort -u)
}

# put_blob LAYOUT FILE: move FILE in as a blob, print its digest
put_blob() {
  local digest; digest=$(sha256sum "$2" | cut -d' ' -f1)
  mv -- "$2" "$1/blobs/sha256/$digest"
  echo "sha256:$digest"
}

descriptor() { # descriptor LAYOUT DIGEST MEDIA-TYPE
  jq -cn --arg d "$2" --arg m "$3" --argjson s "$(stat -c %s "$1/blobs/sha256/${2#sha256:}")" \
    '{mediaType: $m, digest: $d, size: $s}'
}

# build_image NAME TAG RECIPE-DIR BASE-ARCHIVE OUT-DIR: writes OUT-DIR/image.tar, an OCI archive named vz.test/NAME:TAG
build_image() {
  local name=$1 tag=$2 recipe=$3 base_archive=$4 out=$5
  local work oci layers='[]' diff_ids='[]' history='[]' digest file base packages config
  work=$(mktemp -d "${TMPDIR:-/var/tmp}/vz-image.XXXXXX")
  # shellcheck disable=SC2064 # the path is to be expanded now
  trap "rm -rf -- '$work'" EXIT
  oci=$work/oci
  mkdir -p "$oci/blobs/sha256" "$work/root" "$work/x"
  chmod 755 "$work/root"
  # shellcheck source=/dev/null
  . "$recipe/recipe.sh"

  if [[ -n $base ]]; then
    mkdir "$work/base"; tar -xf "$base_archive" -C "$work/base"
    mv "$work"/base/blobs/sha256/* "$oci/blobs/sha256/"
    file=$oci/blobs/sha256/$(jq -r '.manifests[0].digest' "$work/base/index.json" | cut -d: -f2)
    layers=$(jq -c .layers "$file")
    diff_ids=$(jq -c .rootfs.diff_ids "$oci/blobs/sha256/$(jq -r .config.digest "$file" | cut -d: -f2)")
    history=$(jq -c '[.[] | {created_by: "base"}]' <<<"$diff_ids")
  fi
  if ((${#packages[@]} > 0)); then
    private_apt "$work/apt"
    (cd "$work/apt/debs" && apt-get -q download "${packages[@]}")
    for file in "$work"/apt/debs/*.deb; do dpkg-deb -x "$file" "$work/x"; done
  fi
  root "$work/root" "$work/x"

  tar -C "$work/root" --sort=name --mtime="@$image_epoch" --clamp-mtime --numeric-owner --format=posix \
    --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' --xattrs --xattrs-include='security.capability' \
    -cf "$work/layer.tar" .
  diff_ids=$(jq -c --arg d "sha256:$(sha256sum "$work/layer.tar" | cut -d' ' -f1)" '. + [$d]' <<<"$diff_ids")
  history=$(jq -c --arg n "$name" '. + [{created_by: ("vz image recipe " + $n)}]' <<<"$history")
  gzip -n "$work/layer.tar"
  digest=$(put_blob "$oci" "$work/layer.tar.gz")
  layers=$(jq -c --argjson l "$(descriptor "$oci" "$digest" application/vnd.oci.image.layer.v1.tar+gzip)" \
    '. + [$l]' <<<"$layers")

  jq -cn --argjson config "$config" --argjson diff_ids "$diff_ids" --argjson history "$history" \
    --arg created "$(date -u -d "@$image_epoch" +%FT%TZ)" \
    '{created: $created, architecture: "amd64", os: "linux", config: $config,
      rootfs: {type: "layers", diff_ids: $diff_ids}, history: $history}' >"$work/config.json"
  digest=$(put_blob "$oci" "$work/config.json")
  jq -cn --argjson layers "$layers" --argjson config "$(descriptor "$oci" "$digest" application/vnd.oci.image.config.v1+json)" \
    '{schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", config: $config, layers: $layers}' \
    >"$work/manifest.json"
  digest=$(put_blob "$oci" "$work/manifest.json")
  jq -cn --argjson m "$(descriptor "$oci" "$digest" application/vnd.oci.image.manifest.v1+json)" \
    --arg ref "vz.test/$name:$tag" \
    '{schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json", manifests: [
      $m + {annotations: {"io.containerd.image.name": $ref, "org.opencontainers.image.ref.name": $ref},
            platform: {architecture: "amd64", os: "linux"}}]}' >"$oci/index.json"
  printf '{"imageLayoutVersion":"1.0.0"}\n' >"$oci/oci-layout"
  # a base's manifest and config are not this image's
  prune_blobs "$oci"
  tar -C "$oci" --sort=name --mtime="@$image_epoch" --owner=0 --group=0 --numeric-owner -cf "$out/image.tar" .
}

prune_blobs() { # keep only what the index refers to
  local oci=$1 manifest keep blob
  manifest=$oci/blobs/sha256/$(jq -r '.manifests[0].digest' "$oci/index.json" | cut -d: -f2)
  keep=$(jq -r '.config.digest, .layers[].digest' "$manifest"; basename "$manifest")
  for blob in "$oci"/blobs/sha256/*; do
    grep -q "$(basename "$blob")" <<<"$keep" || rm -- "$blob"
  done
}

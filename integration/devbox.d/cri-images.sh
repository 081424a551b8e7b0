# shellcheck shell=bash disable=SC2154 # variables of ../devbox and the other parts
# The images of CRI's conformance tests: vz.test/cri:1 and vz.test/pause:1 under the names, and with the settings, that the
# tests know. The registry of the devbox serves them; nothing is pulled from elsewhere.

# NAME IMAGE CHANGE: CHANGE is a jq filter on the image's "config"
cri_variants() {
  local i
  cat <<'V'
e2e-test-images/busybox:1.29-2 cri .
e2e-test-images/nginx:1.14-2 cri .Cmd=["nginx","-g","daemon off;"]
e2e-test-images/httpd:2.4.39-4 cri .Cmd=["sh","-c","echo httpd is up; exec httpd -f -h /www"]
e2e-test-images/nonewprivs:1.3 cri .Entrypoint=["/nnp"]|.Cmd=null
k8s-staging-cri-tools/hostnet-nginx-amd64:latest cri .Cmd=["nginx","-c","/etc/nginx/hostnet.conf","-g","daemon off;"]
k8s-staging-cri-tools/test-image-user-uid:latest cri .User="1002"
k8s-staging-cri-tools/test-image-user-username:latest cri .User="www-data"
k8s-staging-cri-tools/test-image-user-uid-group:latest cri .User="1003:1004"
k8s-staging-cri-tools/test-image-user-username-group:latest cri .User="www-data:1004"
k8s-staging-cri-tools/test-image-predefined-group:latest cri .User="1000"
k8s-staging-cri-tools/test-image-tag:test cri .Labels={test:"tag"}
k8s-staging-cri-tools/test-image-tag:all cri .Labels={test:"all"}
pause:3.9 pause .Labels={version:"3.9"}
V
  # Each has an id of its own.
  for i in 1 2 3 latest digest; do
    echo "k8s-staging-cri-tools/test-image-$i:latest cri .Labels={test:\"$i\"}"
  done
  # These are one image with three names.
  for i in 1 2 3; do echo "k8s-staging-cri-tools/test-image-tags:$i cri .Labels={test:\"tags\"}"; done
}

cri_images_dir() {
  echo "$(cache_root)/images/$(hash_of cri-images "$(image_hash cri)" "$(image_hash pause)" -- "$devbox_d/cri-images.sh")"
}

ensure_cri_images() {
  ensure_image cri:1
  ensure_image pause:1
  cached "$(cri_images_dir)" "images of CRI's tests" make_cri_images
}

# make_cri_images OUT: OUT/images.tar, an OCI archive of all, and OUT/digest, that of the image that tests name by its digest
make_cri_images() {
  (
    # shellcheck source=/dev/null
    . "$images_d/lib.sh"
    local out=$1 work oci image name change file config manifest digest manifests='[]'
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # the path is to be expanded now
    trap "rm -rf -- '$work'" EXIT
    oci=$work/oci
    mkdir -p "$oci/blobs/sha256"
    for image in cri pause; do
      mkdir "$work/$image"
      tar -xf "$(image_archive "$image")" -C "$work/$image"
      cp "$work/$image"/blobs/sha256/* "$oci/blobs/sha256/"
    done
    while read -r name image change; do
      file=$work/$image/blobs/sha256/$(jq -r '.manifests[0].digest' "$work/$image/index.json" | cut -d: -f2)
      config=$work/$image/blobs/sha256/$(jq -r .config.digest "$file" | cut -d: -f2)
      jq -c "(.config |= ($change))" "$config" >"$work/config"
      digest=$(put_blob "$oci" "$work/config")
      jq -c --argjson config "$(descriptor "$oci" "$digest" application/vnd.oci.image.config.v1+json)" '.config = $config' "$file" \
        >"$work/manifest"
      digest=$(put_blob "$oci" "$work/manifest")
      manifest=$(descriptor "$oci" "$digest" application/vnd.oci.image.manifest.v1+json)
      [[ $name != */test-image-digest:* ]] || echo "${digest#sha256:}" >"$out/digest"
      manifests=$(jq -c --argjson m "$manifest" --arg ref "vz.test/$name" '. + [$m + {annotations:
        {"io.containerd.image.name": $ref}, platform: {architecture: "amd64", os: "linux"}}]' <<<"$manifests")
    done < <(cri_variants)
    jq -cn --argjson m "$manifests" \
      '{schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json", manifests: $m}' >"$oci/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}\n' >"$oci/oci-layout"
    tar -C "$oci" -cf "$out/images.tar" .
  )
}

# Serves them from the devbox's registry, once.
push_cri_images() {
  local mark=$state_dir/data/loaded/cri-images name
  [[ $(cat "$mark" 2>/dev/null) != "$(cri_images_dir)" ]] || return 0
  ctr_ -n cri-images images import --no-unpack "$(cri_images_dir)/images.tar" >/dev/null
  while read -r name _; do
    ctr_ -n cri-images images push --hosts-dir "$state_dir/certs.d" "vz.test/$name" >/dev/null
    ctr_ -n cri-images images rm "vz.test/$name" >/dev/null
  done < <(cri_variants)
  cri_images_dir >"$mark"
}

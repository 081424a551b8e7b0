# shellcheck shell=bash
# Messages, caches and the preflight. Sourced by ../devbox; everything here is used by more than one part.

# $program is whose messages these are.
say() { printf '%s: %s\n' "${program:-devbox}" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# step LABEL COMMAND...: run a long command with its output kept; on failure, show the end of it.
step() {
  local label=$1 log start=$SECONDS rc=0; shift
  say "$label ..."
  log=$(mktemp)
  # `|| rc=$?` would switch errexit off in the command. For the same reason never call step in a condition.
  set +e
  (set -e; "$@") >"$log" 2>&1
  rc=$?
  set -e
  if ((rc != 0)); then
    tail -n 25 "$log" | sed 's/^/  | /' >&2
    rm -f "$log"
    die "$label failed (exit code $rc)"
  fi
  rm -f "$log"
  say "$label: done in $((SECONDS - start)) s"
}

cache_root() { echo "${XDG_CACHE_HOME:-$HOME/.cache}/vz"; }

# hash_of WORD... [-- FILE...]: one short hash over words and the contents of files
hash_of() {
  local -a words=()
  while (($# > 0)) && [[ $1 != -- ]]; do words+=("$1"); shift; done
  (($# == 0)) || shift
  { printf '%s\n' "${words[@]}"; if (($# > 0)); then cat -- "$@"; fi; } | sha256sum | cut -c1-16
}

# cached DIR LABEL COMMAND...: make DIR once, by running COMMAND with a temporary directory as its last
# argument and renaming that into place. Whoever loses a race throws its own result away.
cached() {
  local dir=$1 label=$2 tmp; shift 2
  [[ ! -d $dir ]] || return 0
  mkdir -p "$(dirname "$dir")"
  tmp=$(mktemp -d "$(dirname "$dir")/.tmp.XXXXXX")
  chmod 755 "$tmp"
  # not `if ! step ...`: errexit would be off in all that runs below it
  # shellcheck disable=SC2064 # the path is to be expanded now
  trap "rm -rf -- '$tmp'" EXIT
  step "$label" "$@" "$tmp"
  mv -T -- "$tmp" "$dir" 2>/dev/null || rm -rf -- "$tmp"
  trap - EXIT
  [[ -d $dir ]] || die "cannot create $dir"
}

# need PROGRAM:PACKAGE...: name everything that is missing at once, and how to install it
need() {
  local item missing=() packages=()
  for item; do
    command -v "${item%%:*}" >/dev/null || { missing+=("${item%%:*}"); packages+=("${item#*:}"); }
  done
  ((${#missing[@]} == 0)) || die "not installed: ${missing[*]}
  on Debian: apt-get install ${packages[*]}"
}

need_root() {
  ((EUID == 0)) || die "'devbox $1' needs root (containerd mounts file systems and makes namespaces): run it as root or with sudo -E"
}

need_dev_fd() {
  [[ -e /dev/fd/0 ]] || die "there is no /dev/fd, which bash needs: ln -s /proc/self/fd /dev/fd"
}

need_cgroups() {
  local type
  type=$(stat -f -c %T /sys/fs/cgroup 2>/dev/null) || type=missing
  if [[ $type == cgroup2fs ]]; then
    [[ -n $(</sys/fs/cgroup/cgroup.controllers) ]] ||
      die "/sys/fs/cgroup is cgroup v2 without any controller: this environment was given none"
    return
  fi
  local name missing=()
  for name in memory pids cpu devices; do
    [[ -e /sys/fs/cgroup/$name/cgroup.procs ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || die "cgroups are not usable: /sys/fs/cgroup is '$type' and has no ${missing[*]} hierarchy
  to have cgroup v2: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
}

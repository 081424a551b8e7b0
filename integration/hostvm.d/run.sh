# shellcheck shell=bash disable=SC2154 # variables of ../hostvm and the other parts
# From the start of the host VM to its end.

boot_limit=180 # seconds from QEMU's start to the host VM's word that it is up; 8 on a machine with nothing else to do
beat=10        # seconds from one sign of life to the next
silence=180    # seconds without one that make a hang
console_lines=25

failed() { say "error: $*"; exit 125; }

# The outer half only waits: for the inner one, or for a signal. Killing `unshare` kills pid 1 of the namespace and thereby all in
# it; that also happens when we are killed ourselves. The pipe is open for as long as any of them lives.
run() { # run SCRIPT ARG...
  local script inner='' last rc=0
  script=$(readlink -f -- "$1"); shift
  [[ -x $script && -f $script ]] || die "$script is no executable file"
  if [[ -n $out ]]; then mkdir -p "$out"; out=$(readlink -f "$out"); fi
  if [[ -n $console ]]; then : >"$console"; console=$(readlink -f "$console"); fi
  exec 8> >(trap '' INT TERM HUP; exec cat >/dev/null)
  last=$!
  setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc --propagation slave \
    "$0" -c "$cpus" -m "$memory" -t "$limit" -o "$out" -k "$console" ${instructions:+-i} ${verbose:+"$verbose"} -- --inside "$script" "$@" </dev/null &
  inner=$!
  exec 8>&-
  # shellcheck disable=SC2064 # the values of now
  trap "kill -KILL $inner 2>/dev/null || true; wait $inner $last 2>/dev/null || true" EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  wait "$inner" || rc=$?
  exit "$rc"
}

# The inner half: pid 1 of a pid namespace, in a mount namespace. Its files are on a tmpfs where nobody has files and nothing here needs any.
inside() { # inside SCRIPT ARG...
  local work=/sys token qemu status word value reason='' rc=125 until now wait
  mount --make-rprivate /
  mount -t tmpfs -o mode=700 hostvm "$work"
  mkdir "$work"/{root,out}
  share_root "$work/root"
  [[ -z $out ]] || mount --bind "$out" "$work/out"
  ulimit -Sn "$(ulimit -Hn)" # virtiofsd has a descriptor for each file that is known in there
  token=$(tr -d - </proc/sys/kernel/random/uuid)
  make_initrd "$work" "$token" "$@"
  start_virtiofsd "$work" root --readonly --cache=always
  start_virtiofsd "$work" out --cache=auto

  # QEMU opens both ends of them; so do we of the one where its own end is told as well.
  mkfifo "$work"/{stdout,stderr,status}.{in,out}
  exec {status}<>"$work/status.out"
  copy "$token" "$work/stdout.out" &
  local copies=($!)
  copy "$token" "$work/stderr.out" >&2 &
  copies+=($!)
  qemu_command "$work"
  ("${command[@]}" >"$work/qemu.log" 2>&1 </dev/null || true; printf '\ngone\n' >&"$status") 2>/dev/null &
  qemu=$!

  # Where it counts instructions, its seconds are ten of ours or more.
  [[ -z $instructions ]] || silence=1800
  until=$((SECONDS + boot_limit)) reason="did not come up within $boot_limit s"
  while :; do
    now=$SECONDS wait=$((until < limit ? until - now : limit - now))
    if ((wait <= 0)) || ! read -r -t "$wait" -u "$status" word value; then
      # the time limit is the one thing that is not the host VM's fault
      if ((SECONDS >= limit)); then rc=124 reason="stopped at the time limit of $limit s"; fi
      break
    fi
    case $word in
      up) reason="hangs: no sign of life for $silence s" ;;
      exit) rc=$value reason=''; break ;;
      gone) reason="died before its script ended"; break ;;
    esac
    until=$((SECONDS + silence))
  done
  # what the script has written comes before its end, but on another way
  [[ -n $reason ]] || wait "${copies[@]}"
  kill -KILL "$(pgrep -P "$qemu" || echo "$qemu")" 2>/dev/null || true
  if [[ -n $verbose ]]; then
    wait "$qemu" || true
    times >"$work/times"
    say "$SECONDS s, of CPU time: $(tail -n 1 "$work/times")"
  fi
  [[ -z $console ]] || cp "$work/console" "$console" 2>/dev/null || true
  [[ -n $reason ]] || exit "$rc"
  for word in stdout stderr; do : <>"$work/$word.out"; done # in case that QEMU never opened them
  wait "${copies[@]}" || true
  explain "$work"
  say "error: the host VM $reason"
  exit "$rc"
}

explain() { # explain WORK: what may be the cause
  local log
  for log in qemu.log virtiofsd-root.log virtiofsd-out.log console; do
    [[ -s $1/$log ]] || continue
    say "the end of ${log%.log}'s messages:"
    tr -d '\r' <"$1/$log" | tail -n "$console_lines" | cut -c1-200 | sed 's/^/  | /' >&2
  done
}

# copy TOKEN FIFO: up to the line that ends in the token
copy() { exec sed -u "/^$1\$/Q; /$1\$/{s///;q}" <"$2"; }

# The machine's disks. Not in one recursive bind: what is below /proc, /sys, /dev and /run is this kernel's, and the host VM has its own.
share_root() { # share_root TARGET
  local target
  mount --bind / "$1"
  while read -r _ _ _ _ target _; do
    case $target in / | /proc | /proc/* | /sys | /sys/* | /dev | /dev/* | /run | /run/*) continue ;; esac
    printf -v target %b "${target//\\/\\0}" # \040 and the like
    # some may be gone by now: others mount and unmount at the same time
    mount --bind "$target" "$1$target" 2>/dev/null || true
  done </proc/self/mountinfo
}

start_virtiofsd() { # start_virtiofsd WORK NAME OPTION...
  local work=$1 name=$2 pid limit=$((SECONDS + 20)); shift 2
  "$(virtiofsd_dir)/virtiofsd" --socket-path="$work/$name.sock" --shared-dir="$work/$name" --sandbox=none --log-level=warn \
    --rlimit-nofile=0 "$@" >"$work/virtiofsd-$name.log" 2>&1 </dev/null &
  pid=$!
  until [[ -S $work/$name.sock ]]; do
    if ! kill -0 "$pid" 2>/dev/null || ((SECONDS > limit)); then explain "$work"; failed "virtiofsd did not start"; fi
    sleep 0.02
  done
}

qemu_command() { # qemu_command WORK: sets `command`
  local work=$1 name thread=single
  ((cpus == 1)) || thread=multi
  local cpu=max,+svm
  # A counted clock has a string instruction cost as much for a byte as for eight, and kernels copy and clear by bytes where that is said to be
  # fast: more than half of a VM's launch was that.
  [[ -z $instructions ]] || cpu+=,-erms,-fsrm
  # shellcheck disable=SC2054 # commas are QEMU's
  command=(qemu-system-x86_64 -nodefaults -no-user-config -display none -monitor none -no-reboot
    -M q35,memory-backend=memory -accel "tcg,thread=$thread" -cpu "$cpu" -smp "$cpus" -m "$memory"
    -object "memory-backend-memfd,id=memory,size=${memory}M,share=on"
    -kernel "$(kernel_dir)/vmlinuz" -initrd "$work/initrd"
    # nohz=off highres=off: QEMU's loop keeps the vector of an interrupt that VMRUN has injected, and delivers it once more, with interrupts
    # off, where it is left before the nested guest's next exit. The guest then waits for ever for a lock that it holds itself: one boot in
    # five to ten with one-shot timers. A periodic tick makes that rare, and the shortest sleep 4 ms. Counting instructions leaves the loop
    # more often: a measurement that says nothing for half an hour has met it.
    # no_timer_check: the check counts ticks in a loop of fixed length, and fails where this machine is busy with other things.
    -append "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nowatchdog no_timer_check nohz=off highres=off"
    -serial "file:$work/console" -device virtio-rng-pci -device virtio-serial-pci)
  # One instruction is one nanosecond, and idle time is skipped.
  [[ -z $instructions ]] || command+=(-icount shift=0,sleep=off)
  for name in root out; do
    command+=(-chardev "socket,id=$name,path=$work/$name.sock" -device "vhost-user-fs-pci,chardev=$name,tag=$name")
  done
  for name in stdout stderr status; do
    command+=(-chardev "pipe,id=$name,path=$work/$name" -device "virtserialport,chardev=$name,name=$name")
  done
}

make_initrd() { # make_initrd WORK TOKEN SCRIPT ARG...
  local work=$1 token=$2 tree=$1/initrd.d kernel release module
  shift 2
  kernel=$(kernel_dir); release=$(<"$kernel/release")
  mkdir -p "$tree"/{bin,proc,sys,dev,new,ro,rw,lib} "$work/modules/lib/modules"
  cp "$(command -v busybox)" "$tree/bin/busybox"
  ln -s busybox "$tree/bin/sh"
  ln -s "$kernel/modules" "$work/modules/lib/modules/$release"
  for module in virtio_pci virtiofs overlay; do
    modprobe -d "$work/modules" -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
  done | awk '!seen[$0]++' | while read -r module; do
    cp "$module" "$tree/lib/"
    basename "$module" >>"$tree/modules"
  done
  init >"$tree/init"
  chmod +x "$tree/init"
  stage2 "$kernel/modules" "$release" "$token" "$@" >"$tree/stage2"
  (cd "$tree" && find . | cpio -o -H newc --quiet >"$work/initrd")
  rm -rf -- "$tree" "$work/modules"
}

init() { # the initrd's /init
  cat <<'I'
#!/bin/sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
while read module; do $b insmod /lib/$module; done </modules
$b mount -t virtiofs -o ro root /ro && $b mount -t tmpfs -o size=90% rw /rw && $b mkdir /rw/upper /rw/work &&
  $b mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /new || exit 1
$b mount -t tmpfs -o mode=755 run /new/run
$b cp /stage2 /new/run/hostvm
for dir in proc sys dev; do $b mount --move /$dir /new/$dir; done
exec $b switch_root /new /bin/bash /run/hostvm
I
}

stage2() { # stage2 MODULES RELEASE TOKEN SCRIPT ARG...: what runs as pid 1 on the host VM's root
  local modules=$1 release=$2 token=$3 name; shift 3
  for name in HOME PATH XDG_CACHE_HOME ${!VZ_@}; do
    [[ -z ${!name+set} ]] || printf 'export %s=%q\n' "$name" "${!name}"
  done
  printf 'modules=%q release=%q token=%q beat=%q\n' "$modules" "$release" "$token" "$beat"
  cat <<'B'
export TERM=dumb
echo hostvm >/proc/sys/kernel/hostname
mkdir -p "/lib/modules/$release" /out /dev/pts /dev/shm
mount --bind "$modules" "/lib/modules/$release"
mount -t devpts -o ptmxmode=666,gid=5 pts /dev/pts
for dir in /dev/shm /var/tmp; do mount -t tmpfs -o mode=1777,size=90% tmpfs "$dir"; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t virtiofs out /out
ln -s /proc/self/fd /dev/fd
for fd in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${fd%:*}" "/dev/${fd#*:}"; done
for module in virtio_console virtio-rng kvm-amd vhost_vsock vhost_net tun br_netfilter loop; do
  modprobe "$module" || echo "hostvm: no module $module" >/dev/kmsg
done
ip link set lo up
port() { local dir; for dir in /sys/class/virtio-ports/*; do [ "$(<"$dir/name")" != "$1" ] || echo "/dev/${dir##*/}"; done; }
exec 7>"$(port status)"
echo up >&7
{
  mkfifo /run/hostvm.beat
  exec 6<>/run/hostvm.beat
  while echo alive >&7; do read -r -t "$beat" -u 6; done
} &
exec 3> >(exec cat >"$(port stdout)") 4> >(exec cat >"$(port stderr)")
B
  printf 'cd %q\n%s >&3 2>&4 3>&- 4>&- 7>&- </dev/null\n' "$PWD" "$(printf '%q ' "$@")"
  cat <<'B'
rc=$?
echo "$token" >&3
echo "$token" >&4
echo "exit $rc" >&7
sleep infinity
B
}

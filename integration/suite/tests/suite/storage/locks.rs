//! Files that several containers, in VMs of their own, and the host use at the same time: locks, appends, a database,
//! access control lists; and more files than a process can have open.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use vz_suite::{
    Lab, Verdict,
    container::Container,
    host::{self, Role, await_process},
    lab::{BUSYBOX, DEBIAN},
    poll::{patiently, until},
    tests,
};

tests![
    locks_hold_in_other_containers_and_on_the_host,
    who_waits_for_a_lock_can_be_killed,
    appends_of_many_are_whole,
    a_database_has_two_writers,
    a_file_that_locks_is_believed_by_all,
    access_lists_count,
    more_files_are_known_than_can_be_open,
];

/// What holds and tries locks of each kind: the file has a letter for the kind, and one for shared or exclusive.
const LOCKS: &str = r#"
import errno, fcntl, os, struct, sys, time
def ofd(f, kind, wait): fcntl.fcntl(f, 38 if wait else 37, struct.pack('hhqqi4x', kind, 0, 0, 0, 0))
def take(f, name, shared, wait):
    if name[0] == 'f': fcntl.flock(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    if name[0] == 'p': fcntl.lockf(f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB), 10, 5)
    if name[0] == 'o': ofd(f, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, wait)
NAMES = ['fx', 'fs', 'px', 'ps', 'ox', 'os']
def tried(path, name, shared):
    f = open(path + name, 'r+')
    try: take(f, name, shared, False)
    except OSError as e: return 'busy' if e.errno in (errno.EAGAIN, errno.EACCES) else errno.errorcode[e.errno]
    return 'free'
what, path = sys.argv[1:3]
if what == 'hold':
    held = [open(path + name, 'r+') for name in NAMES]
    for f, name in zip(held, NAMES): take(f, name, name[1] == 's', False)
    print('held', flush=True)
    time.sleep(1000)
if what == 'try':
    for name in NAMES: print(name, tried(path, name, True), tried(path, name, False))
    # Of a file's ten bytes that are locked, and the others.
    f = open(path + 'px', 'r+')
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)
    found = struct.unpack('hhqqi4x', fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0)))
    print('found', found[0] == fcntl.F_WRLCK, found[2:4])
if what == 'wait':
    f = open(path + sys.argv[3], 'r+')
    print('waits', flush=True)
    take(f, sys.argv[3], False, True)
    print('has it', flush=True)
"#;

/// All locks held by another: exclusive ones are busy, of shared ones only exclusive attempts.
const HELD: &str =
    "fx busy busy\nfs free busy\npx busy busy\nps free busy\nox busy busy\nos free busy\nfound True (5, 10)";
const FREE: &str = "fx free free\nfs free free\npx free free\nps free free\nox free free\nos free free";

fn make_locked(dir: &Path) {
    for name in ["fx", "fs", "px", "ps", "ox", "os"] {
        fs::write(dir.join(name), "").expect("write a file");
    }
}

fn lock(file: &File, kind: i32) -> bool {
    let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 5, l_len: 10, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

fn locks_hold_in_other_containers_and_on_the_host(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    make_locked(dir.path());
    let volume = format!("{}:/v", dir.path().display());
    let holder = Container::start(lab, "holder", &["-v", &volume, DEBIAN, "python3", "-c", LOCKS, "hold", "/v/"]);
    let other = Container::start(lab, "other", &["-v", &volume, DEBIAN, "sleep", "1000"]);
    until("the locks are held", patiently(Duration::from_secs(60)), || holder.logs().contains("held").then_some(()));
    let tried =
        |container: &Container<'_>| container.exec(&["python3", "-c", LOCKS, "try", "/v/"]).deadline(120).run().ok();
    assert_eq!(tried(&holder), HELD, "another process of the container");
    assert_eq!(tried(&other), HELD, "another container");
    let open = |name| OpenOptions::new().read(true).write(true).open(dir.path().join(name)).expect("open a file");
    assert!(open("fx").try_lock_shared().is_err() && open("fs").try_lock_shared().is_ok());
    assert!(open("fs").try_lock().is_err());
    for (name, shared) in [("px", false), ("ps", true), ("ox", false), ("os", true)] {
        assert_eq!(lock(&open(name), libc::F_RDLCK), shared, "{name} on the host");
        assert!(!lock(&open(name), libc::F_WRLCK), "{name} on the host");
    }
    // Those of the host.
    let host = open("fs");
    host.try_lock_shared().expect("lock a file");
    // Who waits gets them when the holder is gone, however.
    let waiting: Vec<_> = ["fx", "px", "ox"]
        .map(|name| other.exec(&["python3", "-c", LOCKS, "wait", "/v/", name]).deadline(300).start())
        .into_iter()
        .collect();
    for one in &waiting {
        one.expect("waits");
    }
    match lab.is_vz() {
        true => host::kill(&await_process(&holder.id, Role::Vmm)),
        false => holder.remove(),
    }
    for one in waiting {
        assert_eq!(one.wait().ok(), "waits\nhas it");
    }
    let now = tried(&other);
    assert!(now.contains("fs free busy"), "the host's: {now}");
    host.unlock().expect("unlock a file");
    assert!(tried(&other).starts_with(FREE), "{now}");
    // The clients of what was killed leave theirs.
    holder.remove();
    lab.remove_clients_fifos();
    Ok(())
}

/// One process holds a lock, another one waits for it: it is killed, and one with a time limit gives up.
const KILLED: &str = r#"
import fcntl, os, signal, sys, time
path = sys.argv[1]
held = open(path, 'w'); fcntl.flock(held, fcntl.LOCK_EX); fcntl.lockf(held, fcntl.LOCK_EX)
class Late(Exception): pass
def late(*_): raise Late
for wait in (fcntl.flock, fcntl.lockf):
    pid = os.fork()
    if pid == 0:
        held.close(); wait(open(path, 'r+'), fcntl.LOCK_EX); os._exit(1)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    pid = os.fork()
    if pid == 0:
        held.close(); signal.signal(signal.SIGALRM, late); signal.alarm(1)
        try: wait(open(path, 'r+'), fcntl.LOCK_EX)
        except Late: os._exit(7)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;

fn who_waits_for_a_lock_can_be_killed(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let container = Container::start(lab, "killed", &["-v", &volume, DEBIAN, "sleep", "1000"]);
    for path in ["/v/file", "/file"] {
        let said = container.exec(&["python3", "-c", KILLED, path]).deadline(120).run().ok();
        assert_eq!(said, "-9\n7\n-9\n7", "{path}");
    }
    Ok(())
}

/// Appends lines: one write each, of sizes around a page and of 100 KiB; O_APPEND is set later for every second.
const APPENDS: &str = r#"
import fcntl, os, sys
who, path = sys.argv[1:]
fd, later = os.open(path, os.O_WRONLY | os.O_APPEND), os.open(path, os.O_WRONLY)
fcntl.fcntl(later, fcntl.F_SETFL, fcntl.fcntl(later, fcntl.F_GETFL) | os.O_APPEND)
for i in range(200):
    size = (13, 1021, 4093, 4099, 9001, 101_399)[i % 6]
    line = f'{who} {i} '.encode().ljust(size - 1, b'=') + b'\n'
    assert os.write((fd, later)[i % 2], line) == size
"#;

fn appends_of_many_are_whole(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let log = dir.path().join("log");
    let mut host = OpenOptions::new().append(true).create(true).open(&log).expect("open a log");
    let containers = ["a", "b"].map(|who| Container::start(lab, who, &["-v", &volume, DEBIAN, "sleep", "1000"]));
    let running: Vec<_> = ["a", "b"]
        .iter()
        .zip(&containers)
        .map(|(who, container)| container.exec(&["python3", "-c", APPENDS, who, "/v/log"]).deadline(300).start())
        .collect();
    until("the first line", patiently(Duration::from_secs(60)), || (fs::metadata(&log).ok()?.len() > 0).then_some(()));
    for number in 0..200 {
        let line = format!("{:=<2999}\n", format!("h {number} "));
        host.write_all(line.as_bytes()).expect("append to the log");
        // Among the others' lines.
        thread::sleep(Duration::from_millis(10));
    }
    for one in running {
        one.wait().ok();
    }
    let text = fs::read_to_string(&log).expect("read the log");
    for who in ["a", "b", "h"] {
        let sizes: Vec<usize> = text.lines().filter(|line| line.starts_with(who)).map(|line| line.len() + 1).collect();
        let wanted: Vec<usize> =
            (0..200).map(|i| if who == "h" { 3000 } else { [13, 1021, 4093, 4099, 9001, 101_399][i % 6] }).collect();
        assert_eq!(sizes, wanted, "lines of {who}");
    }
    assert_eq!(text.lines().count(), 600);
    Ok(())
}

/// Counts up in one database, which is locked for each step.
const COUNTS: &str = r#"
import sqlite3, sys
db = sqlite3.connect('/v/db', timeout=120, isolation_level=None)
db.execute('pragma journal_mode=delete')
db.execute('create table if not exists counts (who text, number integer)')
for i in range(40):
    db.execute('begin immediate')
    number = db.execute('select coalesce(max(number), 0) from counts').fetchone()[0]
    db.execute('insert into counts values (?, ?)', (sys.argv[1], number + 1))
    db.execute('commit')
print(db.execute('pragma integrity_check').fetchone()[0])
"#;

fn a_database_has_two_writers(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let containers = ["a", "b"].map(|who| Container::start(lab, who, &["-v", &volume, DEBIAN, "sleep", "1000"]));
    let count =
        |container: &Container<'_>| container.exec(&["python3", "-c", COUNTS, &container.name]).deadline(300).start();
    let running: Vec<_> = containers.iter().map(count).collect();
    for one in running {
        assert_eq!(one.wait().ok(), "ok");
    }
    let all = "import sqlite3; print(*sqlite3.connect('/v/db').execute('select count(*), max(number) from counts').fetchone())";
    assert_eq!(containers[0].exec(&["python3", "-c", all]).run().ok(), "80 80");
    Ok(())
}

/// Counts up in one file, which is replaced under a lock that is a name: a file, a directory, a link.
const NAMED_LOCKS: &str = r#"
import os, sys, time
how, who = sys.argv[1:3]
def make():
    if how == 'file': os.close(os.open('/v/lock', os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    if how == 'directory': os.mkdir('/v/lock')
    if how == 'link': os.link('/v/of-' + who, '/v/lock')
    if how == 'symlink': os.symlink(who, '/v/lock')
open('/v/of-' + who, 'w').close()
for i in range(60):
    while True:
        try: make(); break
        except FileExistsError: time.sleep(0.003)
    number = int(open('/v/' + how).read())
    with open('/v/new-' + who, 'w') as new: new.write(str(number + 1))
    os.rename('/v/new-' + who, '/v/' + how)
    os.rmdir('/v/lock') if how == 'directory' else os.unlink('/v/lock')
"#;

fn a_file_that_locks_is_believed_by_all(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let containers = ["a", "b"].map(|who| Container::start(lab, who, &["-v", &volume, DEBIAN, "sleep", "1000"]));
    for how in ["file", "directory", "link", "symlink"] {
        fs::write(dir.path().join(how), "0").expect("write a file");
        let count = |container: &Container<'_>| {
            container.exec(&["python3", "-c", NAMED_LOCKS, how, &container.name]).deadline(300).start()
        };
        let running: Vec<_> = containers.iter().map(count).collect();
        for one in running {
            one.wait().ok();
        }
        assert_eq!(fs::read_to_string(dir.path().join(how)).expect("read the count"), "120", "under a {how}");
    }
    Ok(())
}

/// Lists that give and take rights, on the root file system and a volume; and those that the host has made.
const LISTS: &str = r#"
import errno, os, stat, struct
UO, U, GO, G, M, O = 1, 2, 4, 8, 16, 32
def acl(*e): return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', t, p, 0xffffffff if i is None else i) for t, p, i in e)
def as_user(uid, f):
    pid = os.fork()
    if pid == 0:
        os.setgroups([]); os.setgid(uid); os.setuid(uid)
        try: f(); os._exit(0)
        except OSError as e: os._exit(e.errno)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(code, 'ok')
def read(path): return lambda: open(path).read()
def mode(path): return oct(stat.S_IMODE(os.stat(path).st_mode))
os.umask(0o022)
for d in ('/acl', '/v/acl'):
    os.mkdir(d); os.chmod(d, 0o755)
    os.setxattr(d, 'system.posix_acl_default', acl((UO, 7, None), (GO, 7, None), (O, 7, None)))
    os.close(os.open(d + '/f', os.O_CREAT | os.O_WRONLY, 0o666)); os.mkdir(d + '/sub', 0o777)
    print(mode(d + '/f'), mode(d + '/sub'), 'system.posix_acl_default' in os.listxattr(d + '/sub'))
    s = d + '/secret'; open(s, 'w').write('x'); os.chmod(s, 0o600)
    os.setxattr(s, 'system.posix_acl_access', acl((UO, 6, None), (U, 4, 1000), (GO, 0, None), (M, 4, None), (O, 0, None)))
    print(mode(s), as_user(1000, read(s)), as_user(1001, read(s)))
    os.chmod(s, 0o600); print(as_user(1000, read(s)))
print(as_user(1000, read('/v/denied')), as_user(1001, read('/v/denied')))
"#;

fn access_lists_count(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let denied = dir.path().join("denied");
    fs::write(&denied, "x").expect("write a file");
    // Owner 6, user 1000 nothing, group 4, mask 4, others 4.
    let entries = [(1u16, 6u16, u32::MAX), (2, 0, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
    }
    let hex: String = list.iter().map(|byte| format!("{byte:02x}")).collect();
    let set = "import os, sys; os.setxattr(sys.argv[1], 'system.posix_acl_access', bytes.fromhex(sys.argv[2]))";
    let python = vz_suite::command::Program::new("python3");
    python.args(["-c", set, &denied.display().to_string(), &hex]).run().ok();
    let said = lab.nerdctl_run(&["--rm", "-v", &volume, DEBIAN, "python3", "-c", LISTS]).deadline(180).run().ok();
    let each = "0o666 0o777 True\n0o640 ok EACCES\nEACCES\n";
    assert_eq!(said, format!("{each}{each}EACCES ok"));
    Ok(())
}

fn more_files_are_known_than_can_be_open(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    // More than the limit of open files that most hosts have, or as many as can be made in a while.
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("read a limit").1;
    let count = usize::try_from(limit).unwrap_or(usize::MAX).saturating_add(5000).min(40_000);
    for number in 0..count {
        let parent = dir.path().join(format!("d{}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir(&parent).expect("make a directory");
        }
        File::create(parent.join(format!("f{number}"))).expect("make a file");
    }
    let container = Container::start(lab, "many", &["-v", &volume, BUSYBOX, "sleep", "1000"]);
    // Each is looked at twice, and the programs are found afterwards.
    for _ in 0..2 {
        let found = container.exec(&["sh", "-c", "find /v -type f -links 1 -user 0 | wc -l"]).deadline(900).run().ok();
        assert_eq!(found, count.to_string());
    }
    assert_eq!(
        container.sh("ls /v | wc -l; cat /v/d0/f7; ls -d /etc/passwd"),
        format!("{}\n/etc/passwd", count.div_ceil(1000))
    );
    Ok(())
}

use std::{
    cell::OnceCell,
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use arbitrary::Arbitrary;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use vz_virtio::{
    Backend,
    fs::{Config, Fs, Threads},
};

use crate::{
    guest::{Ask, Device, Worker},
    values::{Bytes, Number},
};

thread_local! {
    static ROOM: OnceCell<Result<OwnedFd, String>> = const { OnceCell::new() };
}

/// A small file system of this thread's own: what a guest creates, and allocates, stays in there. It is attached
/// nowhere, so that it hides nothing, and ends with its descriptor.
fn room() -> Result<PathBuf, String> {
    let make = || {
        let failed = |e: rustix::io::Errno| format!("a share needs a tmpfs of its own: {e}");
        let made = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        fsconfig_set_string(&made, "size", "16m").map_err(failed)?;
        fsconfig_set_string(&made, "nr_inodes", "4k").map_err(failed)?;
        fsconfig_create(&made).map_err(failed)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        fsmount(&made, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)
    };
    ROOM.with(|room| match room.get_or_init(make) {
        Ok(room) => Ok(format!("/proc/self/fd/{}", room.as_raw_fd()).into()),
        Err(why) => Err(why.clone()),
    })
}

pub(crate) struct Guest {
    dir: PathBuf,
    workers: Vec<Worker>,
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Data {
    Request(Request),
    Raw(Bytes),
}

/// Opcodes, those more than once that others need, each with what its request consists of: `i` an inode, `h` a handle,
/// `w` and `W` a number of 32 and 64 bits, `s` the size of the data, `m` a mode, `f` flags of open, `p` nothing, `n` a
/// name, `a` that of a list of access rights, `d` data, `o` an owner of locks, `l` a lock's type, `k` whether it is of
/// flock(2), `u` the number of all requests.
const REQUESTS: [(u32, &str); 54] = [
    (1, "n"),
    (1, "n"),
    (1, "n"),
    (2, "W"),
    (3, "wph"),
    (4, "wphWWWWWwwwmpwwp"),
    (5, ""),
    (6, "nn"),
    (8, "mwwpn"),
    (9, "mwn"),
    (10, "n"),
    (11, "n"),
    (12, "inn"),
    (13, "in"),
    (14, "fp"),
    (14, "fp"),
    (14, "fp"),
    (15, "hWwwWfp"),
    (15, "hWwwWfp"),
    (16, "hWswWfpd"),
    (16, "hWswWfpd"),
    (16, "hWswWfpd"),
    (17, ""),
    (18, "hfwW"),
    (20, "hwp"),
    (21, "swwpnd"),
    (21, "swnd"),
    (22, "wpn"),
    (23, "wp"),
    (24, "n"),
    (25, "hwpW"),
    (27, "fp"),
    (27, "fp"),
    (28, "hWwwWfp"),
    (29, "hfwW"),
    (34, "mp"),
    (35, "fmpwn"),
    (35, "fmpwn"),
    (35, "fmpwn"),
    (42, "wpiWiW"),
    (43, "hWWwp"),
    (44, "hWwwWfp"),
    (45, "iwpnn"),
    (46, "hWwp"),
    (47, "hWihWWW"),
    (INIT, "wwwwpppppppppppp"),
    // Locks, those that wait, and what interrupts them.
    (31, "hoWWlwkp"),
    (32, "hoWWlwkp"),
    (32, "hoWWlwkp"),
    (33, "hoWWlwkp"),
    (33, "hoWWlwkp"),
    (INTERRUPT, "W"),
    (INTERRUPT, "u"),
    // Access control lists.
    (21, "swwpad"),
];
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const UNIQUE: u64 = 77;
const LISTS: [&[u8]; 2] = [b"system.posix_acl_access\0", b"system.posix_acl_default\0"];

/// What creates and opens is asked for most.
const FLAGS: [i32; 8] = [
    libc::O_RDONLY,
    libc::O_WRONLY,
    libc::O_RDWR,
    libc::O_RDWR | libc::O_CREAT,
    libc::O_RDWR | libc::O_TRUNC,
    libc::O_RDWR | libc::O_APPEND,
    libc::O_DIRECTORY,
    libc::O_PATH,
];
const MODES: [u32; 8] = [0o100_644, 0o40_755, 0o10_600, 0o20_666, 0o60_666, 0o120_777, 0o140_700, 0o107_777];

#[derive(Debug)]
pub(crate) struct Request {
    opcode: u32,
    inode: u64,
    owner: u32,
    body: Vec<u8>,
    len: Option<u32>,
}

impl<'a> Arbitrary<'a> for Request {
    fn arbitrary(u: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        let known = usize::from(u8::arbitrary(u)?);
        // Some with what belongs to another.
        let (opcode, form) = REQUESTS[known % REQUESTS.len()];
        let other = u8::arbitrary(u)?;
        let opcode = if other >= 0xfc { u32::from(other) * u32::try_from(known).unwrap() % 64 } else { opcode };
        // Numbers that are given out start from the bottom.
        let small = |u: &mut arbitrary::Unstructured<'a>| -> arbitrary::Result<u64> {
            Ok(match u8::arbitrary(u)? {
                number @ 0..=0xfb => (number % 4).into(),
                _ => Number::arbitrary(u)?.0.min(u64::MAX - 1),
            })
        };
        let inode = small(u)? + 1;
        let data = if form.contains('d') { Bytes::arbitrary(u)?.0 } else { Vec::new() };
        let mut body = Vec::new();
        for field in form.chars() {
            match field {
                'i' => body.extend((small(u)? + 1).to_le_bytes()),
                'h' => body.extend(small(u)?.to_le_bytes()),
                'w' => body.extend(Number::arbitrary(u)?.u32().to_le_bytes()),
                'W' => body.extend(Number::arbitrary(u)?.0.to_le_bytes()),
                's' => body.extend(u32::try_from(data.len()).unwrap().to_le_bytes()),
                'm' => body.extend(MODES[usize::from(u8::arbitrary(u)? % 8)].to_le_bytes()),
                'f' => body.extend(FLAGS[usize::from(u8::arbitrary(u)? % 8)].to_le_bytes()),
                'p' => body.extend([0; 4]),
                'o' => body.extend((small(u)? % 3).to_le_bytes()),
                'l' => body.extend(u32::from(u8::arbitrary(u)? % 4).to_le_bytes()),
                'k' => body.extend(u32::from(u8::arbitrary(u)? % 2).to_le_bytes()),
                'u' => body.extend(UNIQUE.to_le_bytes()),
                'a' => body.extend(LISTS[usize::from(u8::arbitrary(u)? % 2)]),
                'n' => body.extend([Name::arbitrary(u)?.bytes(), vec![0]].concat()),
                'd' => body.extend(&data),
                other => unreachable!("no field {other}"),
            }
        }
        match u8::arbitrary(u)? {
            0xf0..=0xf7 => body.truncate(u8::arbitrary(u)?.into()),
            0xf8..=0xff => body.extend(Bytes::arbitrary(u)?.0),
            _ => {}
        }
        let len = if u8::arbitrary(u)? >= 0xf8 { Some(Number::arbitrary(u)?.u32()) } else { None };
        let owner = if u8::arbitrary(u)? >= 0xe0 { 1000 } else { 0 };
        Ok(Self { opcode, inode, owner, body, len })
    }
}

impl Request {
    fn bytes(self) -> Vec<u8> {
        let len = self.len.unwrap_or_else(|| u32::try_from(40 + self.body.len()).unwrap());
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(self.opcode.to_le_bytes());
        bytes.extend(UNIQUE.to_le_bytes());
        bytes.extend(self.inode.to_le_bytes());
        bytes.extend(self.owner.to_le_bytes());
        bytes.extend(self.owner.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(self.body);
        bytes
    }
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Name {
    File,
    Dir,
    Link,
    New,
    Other,
    Up,
    Here,
    Empty,
    Outside,
    Absolute,
    Below,
    Attribute,
    Any(Bytes),
}

impl Name {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::File => b"file".to_vec(),
            Self::Dir => b"dir".to_vec(),
            Self::Link => b"link".to_vec(),
            Self::New => b"new".to_vec(),
            Self::Other => b"other".to_vec(),
            Self::Up => b"..".to_vec(),
            Self::Here => b".".to_vec(),
            Self::Empty => Vec::new(),
            Self::Outside => b"../secret".to_vec(),
            Self::Absolute => b"/etc/passwd".to_vec(),
            Self::Below => b"dir/x".to_vec(),
            Self::Attribute => b"user.x".to_vec(),
            Self::Any(bytes) => bytes.0,
        }
    }
}

impl Device for Guest {
    type Data = Data;
    type Host = ();

    fn new() -> Result<Self, String> {
        let dir = room()?.join("vz-fuzz-fs");
        let failed = |e: std::io::Error| format!("make share: {e}");
        let root = dir.join("share");
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(failed)?;
        }
        fs::create_dir_all(root.join("dir")).map_err(failed)?;
        fs::write(root.join("file"), "inside").map_err(failed)?;
        std::os::unix::fs::symlink("../secret", root.join("link")).map_err(failed)?;
        fs::write(dir.join("secret"), "outside").map_err(failed)?;
        let config = Config {
            root: root.to_str().unwrap_or_default().to_owned(),
            tag: "vz".into(),
            request_queues: 1,
            proc_self_fd: None,
            cache: Duration::from_secs(1),
            // So few that some are given back.
            fd_limit: 48,
            lock_threads: Threads::new(|work| std::thread::Builder::new().spawn(work).map(drop)),
        };
        let mut queues = Fs::new(config).map_err(|e| e.to_string())?.split();
        for queue in &mut queues {
            queue.enter_thread().map_err(|e| e.to_string())?;
        }
        Ok(Self { dir, workers: queues.into_iter().map(Worker::new).collect() })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn greeting() -> Option<Data> {
        let fields = [7, 38, 0x2_0000, u32::MAX, u32::MAX];
        let mut body: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        body.resize(64, 0);
        Some(Data::Request(Request { opcode: INIT, inode: 0, owner: 0, body, len: None }))
    }

    fn ask(data: Data) -> Ask {
        let bytes = match data {
            // On the queue of high priority, without a reply.
            Data::Request(request) if request.opcode == INTERRUPT => {
                return Ask { queue: 0, bytes: request.bytes(), room: Vec::new() };
            }
            Data::Request(request) => request.bytes(),
            Data::Raw(bytes) => bytes.0,
        };
        Ask { queue: 1, bytes, room: vec![16, 8192] }
    }

    fn host(&mut self, (): ()) {}

    fn check(&mut self) {
        let names = |dir: &Path| -> Vec<_> {
            let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.dir), ["secret", "share"]);
        assert_eq!(fs::read(self.dir.join("secret")).unwrap(), b"outside");
        assert_eq!(names(self.dir.parent().unwrap()), ["vz-fuzz-fs"]);
    }
}

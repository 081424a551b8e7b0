//! Names that lead elsewhere, inodes and handles that were never given out. All of it is refused, and what an honest
//! guest may do still works.

use super::{must_do, must_refuse, refuse};
use crate::{
    Guest,
    fuse::{Answer, Fuse, HEADER, ROOT, op},
    machine::{MEMORY, poke, say},
    virtio::FS,
};

/// Bytes that a name may have, as text and in a request.
const NAME: usize = 256;
/// Types and permissions of files: a FIFO, a block device, a character device, a directory, a regular file.
const FIFO: u32 = 0o010_666;
const BLOCK: u32 = 0o060_666;
const CHARACTER: u32 = 0o020_666;
const DIRECTORY: u32 = 0o777;
const REGULAR: u32 = 0o100_666;
/// `O_RDWR`, `O_CREAT`.
const READ_WRITE: u32 = 2;
const MAKE: u32 = 0o100;
/// Bytes that prove that a file is the one.
const TEXT: &[u8; 16] = b"metal was here.\n";

/// A name, put together.
struct Name([u8; NAME], usize);

impl Name {
    fn of(parts: &[&str]) -> Self {
        let mut name = Self([0; NAME], 0);
        for byte in parts.iter().flat_map(|part| part.bytes()).take(NAME) {
            name.0[name.1] = byte;
            name.1 += 1;
        }
        name
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.0[..self.1]).unwrap_or("?")
    }
}

pub fn play(guest: &Guest<'_>) {
    let Some(mut fuse) = guest.device(FS).and_then(|device| Fuse::start(device, 0, MEMORY)) else {
        return say!("WRONG: no share");
    };
    let Some(home) = fuse.home(guest.own) else { return };
    let dir = home.rootfs;
    let Some((file, handle)) = honest(&mut fuse, dir) else { return };
    let up = Name::of(&["../../", guest.victim, "/share/planted"]);
    let log = Name::of(&["../../", guest.victim, "/console.log"]);
    for name in [
        "..",
        "../x",
        "../..",
        "../planted",
        "/etc/passwd",
        "/planted",
        "a/b",
        "./a",
        "a/",
        "/",
        "",
        ".",
        "./..",
        "a/../../planted",
    ] {
        named(&mut fuse, dir, name, file);
    }
    named(&mut fuse, dir, up.text(), file);
    named(&mut fuse, dir, log.text(), file);
    dots(&mut fuse);
    unended(&mut fuse, dir);
    devices(&mut fuse, dir);
    links(&mut fuse, dir);
    inodes(&mut fuse, dir, file);
    handles(&mut fuse, dir, file, handle);
    let begun = fuse.call(op::READ, file, &[&read(handle, 0, 16)]);
    if must_do(begun, "the file once more") && (fuse.field(0), fuse.field(8)) != halves() {
        say!("WRONG: the file is another");
    }
}

fn halves() -> (u64, u64) {
    let number = u128::from_le_bytes(*TEXT);
    (number as u64, (number >> 64) as u64)
}

/// Makes a file, by which everything else is measured; its inode and a handle for it.
fn honest(fuse: &mut Fuse, dir: u64) -> Option<(u64, u64)> {
    let make = [READ_WRITE | MAKE, REGULAR, 0, 0].map(u32::to_le_bytes);
    if !must_do(fuse.call(op::CREATE, dir, &[make.as_flattened(), b"metal\0"]), "create") {
        return None;
    }
    // The entry has 128 bytes: inode first; then comes what OPEN says, the handle first.
    let (file, handle) = (fuse.field(0), fuse.field(128));
    must_do(fuse.call(op::WRITE, file, &[&read(handle, 0, 16), TEXT]), "write");
    must_do(fuse.call(op::READ, file, &[&read(handle, 0, 16)]), "read");
    must_do(fuse.call(op::LOOKUP, dir, &[b"metal\0"]), "lookup");
    must_do(fuse.call(op::MKDIR, dir, &[[0o777u32, 0].map(u32::to_le_bytes).as_flattened(), b"directory\0"]), "mkdir");
    Some((file, handle))
}

/// Body of READ, and of WRITE before the data.
fn read(handle: u64, offset: u64, size: u32) -> [u8; 40] {
    let mut body = [0; 40];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[8..16].copy_from_slice(&offset.to_le_bytes());
    body[16..20].copy_from_slice(&size.to_le_bytes());
    body
}

/// Everything that takes a name, with this one.
fn named(fuse: &mut Fuse, dir: u64, name: &str, file: u64) {
    let bytes = name.as_bytes();
    let end = [0u8];
    // Those two stay inside; see `dots`.
    if name != "." && name != ".." {
        refuse!(fuse.call(op::LOOKUP, dir, &[bytes, &end]), "lookup {name:?}");
    }
    for (kind, mode) in [("fifo", FIFO), ("block", BLOCK), ("character", CHARACTER), ("regular", REGULAR)] {
        let body = [mode, 0x0800, 0, 0].map(u32::to_le_bytes);
        refuse!(fuse.call(op::MKNOD, dir, &[body.as_flattened(), bytes, &end]), "mknod {kind} {name:?}");
    }
    let mode = [DIRECTORY, 0].map(u32::to_le_bytes);
    refuse!(fuse.call(op::MKDIR, dir, &[mode.as_flattened(), bytes, &end]), "mkdir {name:?}");
    for flags in [READ_WRITE | MAKE, READ_WRITE] {
        let body = [flags, REGULAR, 0, 0].map(u32::to_le_bytes);
        refuse!(fuse.call(op::CREATE, dir, &[body.as_flattened(), bytes, &end]), "create {flags:o} {name:?}");
    }
    refuse!(fuse.call(op::SYMLINK, dir, &[bytes, &end, b"/etc/passwd\0"]), "symlink {name:?}");
    refuse!(fuse.call(op::LINK, dir, &[&file.to_le_bytes(), bytes, &end]), "link {name:?}");
    refuse!(fuse.call(op::UNLINK, dir, &[bytes, &end]), "unlink {name:?}");
    refuse!(fuse.call(op::RMDIR, dir, &[bytes, &end]), "rmdir {name:?}");
    let here = dir.to_le_bytes();
    refuse!(fuse.call(op::RENAME, dir, &[&here, b"metal\0", bytes, &end]), "rename to {name:?}");
    refuse!(fuse.call(op::RENAME, dir, &[&here, bytes, &end, b"stolen\0"]), "rename from {name:?}");
    // Exchanged, replacing nothing, leaving a whiteout.
    for flags in [0u64, 1, 2, 4] {
        let body = [dir, flags].map(u64::to_le_bytes);
        refuse!(
            fuse.call(op::RENAME2, dir, &[body.as_flattened(), b"metal\0", bytes, &end]),
            "rename {flags} to {name:?}"
        );
        refuse!(
            fuse.call(op::RENAME2, dir, &[body.as_flattened(), bytes, &end, b"stolen\0"]),
            "rename {flags} from {name:?}"
        );
    }
}

/// `.` and `..` of the root are the root.
fn dots(fuse: &mut Fuse) {
    if !must_do(fuse.call(op::GETATTR, ROOT, &[&[0; 16]]), "attributes") {
        return;
    }
    // After how long they hold, 16 bytes; the host's inode number is first.
    let root = fuse.field(16);
    for name in ["..", "."] {
        match fuse.call(op::LOOKUP, ROOT, &[name.as_bytes(), &[0]]) {
            // An entry has 40 bytes before its attributes.
            Answer::Done(_) if fuse.field(40) == root => say!("fine {name} is the root"),
            Answer::Refused(error) => say!("refused lookup {name:?} {error}"),
            Answer::Done(_) => say!("WRONG: {name} of the root is inode {}", fuse.field(40)),
            _ => say!("WRONG: no answer for {name}"),
        }
    }
}

/// Names without an end, with several, and of 64 KiB.
fn unended(fuse: &mut Fuse, dir: u64) {
    refuse!(fuse.call(op::LOOKUP, dir, &[b"metal"]), "lookup of a name without an end");
    refuse!(fuse.call(op::LOOKUP, dir, &[]), "lookup of nothing");
    refuse!(fuse.call(op::LOOKUP, dir, &[b"metal\0/../x\0"]), "lookup of two names");
    refuse!(fuse.call(op::UNLINK, dir, &[b"metal"]), "unlink of a name without an end");
    refuse!(fuse.call(op::UNLINK, dir, &[b"metal\0..\0"]), "unlink of two names");
    refuse!(fuse.call(op::SYMLINK, dir, &[b"lonely\0"]), "symlink without a target");
    refuse!(fuse.call(op::SYMLINK, dir, &[b"lonely\0to"]), "symlink to a target without an end");
    refuse!(fuse.call(op::RENAME, dir, &[&dir.to_le_bytes(), b"metal\0"]), "rename to nothing");
    refuse!(fuse.call(op::RENAME, dir, &[&dir.to_le_bytes(), b"metal"]), "rename without an end");
    let long = fuse.prepare(op::LOOKUP, dir, &[&[b'x'; 1024]]);
    for at in long..HEADER + 0x1_0000 {
        poke(fuse.request + u64::from(at), b'x');
    }
    poke(fuse.request + u64::from(HEADER + 0x1_0000), 0u8);
    let length = HEADER + 0x1_0001;
    for opcode in [op::LOOKUP, op::UNLINK, op::RMDIR] {
        fuse.head(fuse.request, length, opcode, dir);
        refuse!(fuse.send(length, 4096), "name of 64 KiB by opcode {opcode}");
    }
}

/// Device files, for somebody on the host to open.
fn devices(fuse: &mut Fuse, dir: u64) {
    for (kind, mode, numbers) in [("disk", BLOCK, 0x0800), ("mem", CHARACTER, 0x0101), ("kvm", CHARACTER, 0x0ae8)] {
        let body = [mode, numbers, 0, 0].map(u32::to_le_bytes);
        refuse!(fuse.call(op::MKNOD, dir, &[body.as_flattened(), kind.as_bytes(), &[0]]), "device {kind}");
    }
}

/// Links that lead out may be made: they are the guest's to follow. The host does not.
fn links(fuse: &mut Fuse, dir: u64) {
    for (name, target) in [("out\0", "/etc\0"), ("up\0", "../../../../../../etc\0"), ("fds\0", "/proc/self/fd\0")] {
        if !must_do(fuse.call(op::SYMLINK, dir, &[name.as_bytes(), target.as_bytes()]), "symlink") {
            continue;
        }
        let link = fuse.field(0);
        refuse!(fuse.call(op::LOOKUP, link, &[b"passwd\0"]), "lookup behind a link");
        refuse!(fuse.call(op::LOOKUP, link, &[b"..\0"]), "parent of a link");
        for flags in [0, READ_WRITE, 0o200_000] {
            refuse!(
                fuse.call(op::OPEN, link, &[[flags, 0].map(u32::to_le_bytes).as_flattened()]),
                "open {flags:o} of a link"
            );
        }
        refuse!(fuse.call(op::OPENDIR, link, &[&[0; 8]]), "open a link as a directory");
        let make = [READ_WRITE | MAKE, REGULAR, 0, 0].map(u32::to_le_bytes);
        refuse!(fuse.call(op::CREATE, link, &[make.as_flattened(), b"planted\0"]), "create behind a link");
        refuse!(fuse.call(op::CREATE, dir, &[make.as_flattened(), name.as_bytes()]), "create a link");
        let mode = [DIRECTORY, 0].map(u32::to_le_bytes);
        refuse!(fuse.call(op::MKDIR, link, &[mode.as_flattened(), b"planted\0"]), "mkdir behind a link");
    }
}

/// Inodes that were never given out.
fn inodes(fuse: &mut Fuse, dir: u64, file: u64) {
    for node in [0, file + 100, 0xdead_beef, 1 << 32, 1 << 63, u64::MAX, u64::MAX - 1] {
        refuse!(fuse.call(op::GETATTR, node, &[&[0; 16]]), "attributes of inode {node:#x}");
        refuse!(fuse.call(op::LOOKUP, node, &[b"metal\0"]), "lookup in inode {node:#x}");
        refuse!(fuse.call(op::LOOKUP, node, &[b"..\0"]), "parent of inode {node:#x}");
        refuse!(fuse.call(op::OPEN, node, &[&[0; 8]]), "open inode {node:#x}");
        refuse!(fuse.call(op::OPENDIR, node, &[&[0; 8]]), "open directory of inode {node:#x}");
        refuse!(fuse.call(op::READLINK, node, &[]), "read link of inode {node:#x}");
        refuse!(fuse.call(op::ACCESS, node, &[&[0; 8]]), "access to inode {node:#x}");
        refuse!(fuse.call(op::STATFS, node, &[]), "file system of inode {node:#x}");
        refuse!(fuse.call(op::UNLINK, node, &[b"metal\0"]), "unlink in inode {node:#x}");
        refuse!(fuse.call(op::LINK, dir, &[&node.to_le_bytes(), b"stolen\0"]), "link inode {node:#x}");
        refuse!(
            fuse.call(op::RENAME, dir, &[&node.to_le_bytes(), b"metal\0", b"stolen\0"]),
            "rename into inode {node:#x}"
        );
        refuse!(
            fuse.call(op::RENAME, node, &[&dir.to_le_bytes(), b"metal\0", b"stolen\0"]),
            "rename out of inode {node:#x}"
        );
        refuse!(fuse.call(op::GETXATTR, node, &[&256u64.to_le_bytes(), b"user.x\0"]), "attribute of inode {node:#x}");
        refuse!(fuse.call(op::LISTXATTR, node, &[&256u64.to_le_bytes()]), "attributes' names of inode {node:#x}");
        refuse!(
            fuse.call(op::SETXATTR, node, &[&1u64.to_le_bytes(), b"user.x\0y"]),
            "set attribute of inode {node:#x}"
        );
        // Its size, to none.
        let mut size = [0; 88];
        size[0] = 1 << 3;
        refuse!(fuse.call(op::SETATTR, node, &[&size]), "cut off inode {node:#x}");
    }
}

/// Handles that were never given out, or for another inode.
fn handles(fuse: &mut Fuse, dir: u64, file: u64, handle: u64) {
    for (node, forged) in [
        (file, handle + 100),
        (file, handle.wrapping_sub(1)),
        (file, u64::MAX),
        (file, 1 << 63),
        (dir, handle),
        (file + 100, handle),
        (0, handle),
        (u64::MAX, u64::MAX),
    ] {
        let bytes = forged.to_le_bytes();
        let padded = |length: usize| -> [u8; 64] {
            let mut body = [0; 64];
            body[..8].copy_from_slice(&bytes[..8.min(length)]);
            body
        };
        let what = (node, forged);
        refuse!(fuse.call(op::READ, node, &[&read(forged, 0, 4096)]), "read {what:x?}");
        refuse!(fuse.call(op::WRITE, node, &[&read(forged, 0, 16), &[b'x'; 16]]), "write {what:x?}");
        refuse!(fuse.call(op::READDIR, node, &[&read(forged, 0, 4096)]), "list {what:x?}");
        refuse!(fuse.call(op::READDIRPLUS, node, &[&read(forged, 0, 4096)]), "list in full {what:x?}");
        refuse!(fuse.call(op::FSYNC, node, &[&padded(8)[..16]]), "sync {what:x?}");
        refuse!(fuse.call(op::FLUSH, node, &[&padded(8)[..24]]), "flush {what:x?}");
        refuse!(fuse.call(op::RELEASE, node, &[&padded(8)[..24]]), "release {what:x?}");
        refuse!(fuse.call(op::LSEEK, node, &[&padded(8)[..24]]), "seek {what:x?}");
        let mut allocate = padded(8);
        allocate[16] = 16;
        refuse!(fuse.call(op::FALLOCATE, node, &[&allocate[..32]]), "allocate {what:x?}");
        let copy = [forged, 0, file, handle, 0, 16, 0].map(u64::to_le_bytes);
        refuse!(fuse.call(op::COPY_FILE_RANGE, node, &[copy.as_flattened()]), "copy from {what:x?}");
    }
    refuse!(fuse.call(op::READDIR, file, &[&read(handle, 0, 4096)]), "list a file");
}

//! The share's own directories are the host's: nothing in them can be made, renamed, removed or changed. What is
//! mounted there can be written, as its mount says.

use super::{must_do, must_refuse, refuse};
use crate::{
    Guest,
    fuse::{Answer, Fuse, Home, ROOT, op},
    machine::{MEMORY, say},
    virtio::FS,
};

/// Types and permissions of what is made.
const REGULAR: u32 = 0o100_666;
const FIFO: u32 = 0o010_666;
const BLOCK: u32 = 0o060_666;
const CHARACTER: u32 = 0o020_666;
const DIRECTORY: u32 = 0o755;
const TYPE: u32 = 0o170_000;
const IS_DIRECTORY: u32 = 0o040_000;
/// `O_RDWR`, `O_CREAT`, `O_NONBLOCK`, `O_TMPFILE`.
const READ_WRITE: u32 = 2;
const MAKE: u32 = 0o100;
const NONBLOCK: u32 = 0o4000;
const TEMPORARY: u32 = 0o20_200_000;
/// `RENAME_EXCHANGE`, `EROFS`.
const EXCHANGE: u64 = 2;
const READ_ONLY: i32 = 30;
/// Flags of RENAME2: none, NOREPLACE, EXCHANGE, WHITEOUT.
const RENAMES: [u64; 4] = [0, 1, 2, 4];
/// Fields of SETATTR that are valid: mode, uid, gid, size, atime, mtime.
const ATTRIBUTES: [u32; 6] = [1, 2, 4, 8, 16, 32];
/// Most mounts that a container's directory is searched for; they are named `mount0` and so on.
const MOUNTS: u32 = 24;
/// Names that a flood asks for, in each directory and of each kind.
const FLOOD: u32 = 2000;

/// `PREFIX` and a number, with a zero at the end.
struct Numbered([u8; 24], usize);

impl Numbered {
    fn of(prefix: &str, number: u32) -> Self {
        let mut name = Self([0; 24], 0);
        name.1 = prefix.len();
        name.0[..prefix.len()].copy_from_slice(prefix.as_bytes());
        let digits = number.checked_ilog10().unwrap_or(0) + 1;
        for place in (0..digits).rev() {
            name.0[name.1] = b'0' + u8::try_from(number / 10u32.pow(place) % 10).unwrap_or(0);
            name.1 += 1;
        }
        name
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.0[..self.1]).unwrap_or("?")
    }
}

fn begin(guest: &Guest<'_>) -> Option<(Fuse, Home)> {
    let Some(mut fuse) = guest.device(FS).and_then(|device| Fuse::start(device, 0, MEMORY)) else {
        say!("WRONG: no share");
        return None;
    };
    let home = fuse.home(guest.own)?;
    Some((fuse, home))
}

/// A request whose body is numbers and then texts, each with a zero at its end.
fn ask<const N: usize>(fuse: &mut Fuse, opcode: u32, node: u64, numbers: [u32; N], texts: &[&str]) -> Answer {
    let numbers = numbers.map(u32::to_le_bytes);
    let mut parts: [&[u8]; 6] = [&[]; 6];
    parts[0] = numbers.as_flattened();
    let mut at = 1;
    for text in texts.iter().take(2) {
        parts[at] = text.as_bytes();
        parts[at + 1] = &[0];
        at += 2;
    }
    fuse.call(opcode, node, &parts[..at])
}

fn rename(fuse: &mut Fuse, from: (u64, &str), to: (u64, &str), flags: u64) -> Answer {
    let body = [to.0, flags].map(u64::to_le_bytes);
    fuse.call(op::RENAME2, from.0, &[body.as_flattened(), from.1.as_bytes(), &[0], to.1.as_bytes(), &[0]])
}

fn symlink(fuse: &mut Fuse, dir: u64, name: &str, target: &str) -> Answer {
    fuse.call(op::SYMLINK, dir, &[name.as_bytes(), &[0], target.as_bytes(), &[0]])
}

fn link(fuse: &mut Fuse, node: u64, dir: u64, name: &str) -> Answer {
    fuse.call(op::LINK, dir, &[&node.to_le_bytes(), name.as_bytes(), &[0]])
}

fn set_attribute(fuse: &mut Fuse, node: u64, valid: u32) -> Answer {
    let mut body = [0; 88];
    body[..4].copy_from_slice(&valid.to_le_bytes());
    // The mode; everything else is 0.
    body[68..72].copy_from_slice(&0o777u32.to_le_bytes());
    fuse.call(op::SETATTR, node, &[&body])
}

fn set_xattr(fuse: &mut Fuse, node: u64, name: &str) -> Answer {
    let body = [1u32, 0].map(u32::to_le_bytes);
    fuse.call(op::SETXATTR, node, &[body.as_flattened(), name.as_bytes(), &[0], b"x"])
}

/// Everything that changes a directory, with a name that is there and one that is not. All of it is refused.
fn changes(fuse: &mut Fuse, dir: u64, there: &str, file: u64, what: &str) {
    for (kind, mode) in [("regular", REGULAR), ("fifo", FIFO), ("block", BLOCK), ("character", CHARACTER)] {
        refuse!(ask(fuse, op::MKNOD, dir, [mode, 0x0700, 0, 0], &["planted"]), "mknod {kind} in {what}");
    }
    refuse!(ask(fuse, op::MKDIR, dir, [DIRECTORY, 0], &["planted"]), "mkdir in {what}");
    refuse!(ask(fuse, op::CREATE, dir, [READ_WRITE | MAKE, REGULAR, 0, 0], &["planted"]), "create in {what}");
    refuse!(ask(fuse, op::TMPFILE, dir, [READ_WRITE | TEMPORARY, REGULAR, 0, 0], &["planted"]), "tmpfile in {what}");
    refuse!(symlink(fuse, dir, "planted", "/etc"), "symlink in {what}");
    refuse!(link(fuse, file, dir, "planted"), "link in {what}");
    refuse!(fuse.call(op::UNLINK, dir, &[there.as_bytes(), &[0]]), "unlink in {what}");
    refuse!(fuse.call(op::RMDIR, dir, &[there.as_bytes(), &[0]]), "rmdir in {what}");
    let target = dir.to_le_bytes();
    refuse!(fuse.call(op::RENAME, dir, &[&target, there.as_bytes(), &[0], b"planted\0"]), "rename in {what}");
    for flags in RENAMES {
        refuse!(rename(fuse, (dir, there), (dir, "planted"), flags), "rename with {flags} in {what}");
    }
    attributes(fuse, dir, what);
}

/// Everything that changes a directory itself.
fn attributes(fuse: &mut Fuse, node: u64, what: &str) {
    for valid in ATTRIBUTES {
        refuse!(set_attribute(fuse, node, valid), "attribute {valid} of {what}");
    }
    for name in ["user.x", "trusted.overlay.opaque", "security.capability", "system.posix_acl_access"] {
        refuse!(set_xattr(fuse, node, name), "{name} of {what}");
        refuse!(fuse.call(op::REMOVEXATTR, node, &[name.as_bytes(), &[0]]), "no {name} of {what}");
    }
}

/// What the mounts let be done, and nothing of it goes beyond them.
fn writes(fuse: &mut Fuse, dir: u64, what: &str) {
    say!("writing to {what}");
    must_do(ask(fuse, op::CREATE, dir, [READ_WRITE | MAKE, REGULAR, 0, 0], &["made"]), "create");
    let (file, handle) = (fuse.field(0), fuse.field(128));
    let mut body = [0; 40];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[16] = 5;
    must_do(fuse.call(op::WRITE, file, &[&body, b"metal"]), "write");
    must_do(ask(fuse, op::MKDIR, dir, [DIRECTORY, 0], &["directory"]), "mkdir");
    must_do(symlink(fuse, dir, "out", "/etc"), "symlink");
    must_do(link(fuse, file, dir, "second"), "link");
    must_do(rename(fuse, (dir, "out"), (dir, "moved"), 0), "rename");
    must_do(rename(fuse, (dir, "moved"), (dir, "made"), EXCHANGE), "exchange");
    must_do(set_attribute(fuse, file, 1), "mode");
    must_do(fuse.call(op::UNLINK, dir, &[b"second\0"]), "unlink");
    must_do(fuse.call(op::RMDIR, dir, &[b"directory\0"]), "rmdir");
}

/// Asks for many names, all of which are refused.
fn flood(fuse: &mut Fuse, dir: u64, what: &str) {
    let mut counts = [0u32; 2];
    for number in 0..FLOOD {
        let name = Numbered::of("flood", number);
        let name = name.text();
        for answer in [
            ask(fuse, op::CREATE, dir, [READ_WRITE | MAKE, REGULAR, 0, 0], &[name]),
            ask(fuse, op::MKDIR, dir, [DIRECTORY, 0], &[name]),
            ask(fuse, op::MKNOD, dir, [REGULAR, 0, 0, 0], &[name]),
            symlink(fuse, dir, name, "/etc"),
        ] {
            counts[usize::from(matches!(answer, Answer::Refused(_)))] += 1;
        }
    }
    match counts {
        [0, refused] => say!("fine {refused} names refused in {what}"),
        [done, _] => say!("WRONG: {done} names made in {what}"),
    }
}

pub fn play(guest: &Guest<'_>) {
    let Some((mut fuse, home)) = begin(guest) else { return };
    let fuse = &mut fuse;
    let Some(file) = fuse.lookup(home.rootfs, "bin") else { return say!("WRONG: no bin") };
    changes(fuse, ROOT, guest.own, file, "the root");
    changes(fuse, home.dir, "rootfs", file, "the container's directory");
    for flags in RENAMES {
        let own = (ROOT, guest.own);
        refuse!(rename(fuse, (home.dir, "rootfs"), (ROOT, "planted"), flags), "rename {flags} of rootfs to the root");
        refuse!(rename(fuse, (home.dir, "rootfs"), own, flags), "rename {flags} of rootfs to its parent");
        refuse!(rename(fuse, own, (home.dir, "planted"), flags), "rename {flags} of the directory to below itself");
        refuse!(rename(fuse, (home.rootfs, "bin"), (home.dir, "planted"), flags), "rename {flags} out of rootfs");
        refuse!(rename(fuse, (home.rootfs, "bin"), (ROOT, "planted"), flags), "rename {flags} out of rootfs, up");
        refuse!(rename(fuse, own, (home.rootfs, "planted"), flags), "rename {flags} of the directory into rootfs");
    }
    writes(fuse, home.rootfs, "rootfs");
    mounts(fuse, home);
    flood(fuse, ROOT, "the root");
    flood(fuse, home.dir, "the container's directory");
}

/// The volumes. A file in each says what its mount is: `writable` or `readonly`. Single files are as their mode says.
fn mounts(fuse: &mut Fuse, home: Home) {
    let (mut writable, mut readonly, mut files) = (0, 0, 0);
    for number in 0..MOUNTS {
        let name = Numbered::of("mount", number);
        let Some(volume) = fuse.lookup(home.dir, name.text()) else { continue };
        let mode = fuse.entry_mode();
        for flags in RENAMES {
            refuse!(rename(fuse, (home.dir, name.text()), (home.dir, "rootfs"), flags), "rename {flags} of a mount");
            refuse!(rename(fuse, (home.dir, name.text()), (ROOT, "planted"), flags), "rename {flags} of a mount, up");
        }
        refuse!(fuse.call(op::UNLINK, home.dir, &[name.text().as_bytes(), &[0]]), "unlink a mount");
        refuse!(fuse.call(op::RMDIR, home.dir, &[name.text().as_bytes(), &[0]]), "rmdir a mount");
        if mode & TYPE != IS_DIRECTORY {
            files += 1;
        } else if fuse.lookup(volume, "readonly").is_some() {
            readonly += 1;
            changes(fuse, volume, "readonly", volume, "a read-only volume");
            match ask(fuse, op::MKDIR, volume, [DIRECTORY, 0], &["planted"]) {
                Answer::Refused(READ_ONLY) => {}
                _ => say!("WRONG: a read-only volume is none"),
            }
        } else if fuse.lookup(volume, "writable").is_some() {
            writable += 1;
            writes(fuse, volume, "a volume");
        }
    }
    say!("fine volumes: {writable} writable, {readonly} read-only, {files} files");
}

/// Puts a link to a directory of the host in the place of the container's directory.
pub fn swap(guest: &Guest<'_>) {
    let Some((mut fuse, home)) = begin(guest) else { return };
    let fuse = &mut fuse;
    refuse!(symlink(fuse, ROOT, "trap", guest.planted), "link to the host in the root");
    refuse!(rename(fuse, (ROOT, guest.own), (ROOT, "trap"), EXCHANGE), "exchange of the directory");
    refuse!(rename(fuse, (ROOT, guest.own), (ROOT, "away"), 0), "rename of the directory");
    refuse!(rename(fuse, (ROOT, guest.own), (home.rootfs, "away"), 0), "rename of the directory into rootfs");
    refuse!(symlink(fuse, ROOT, guest.own, guest.planted), "link in the directory's place");
}

/// The same with what is in the container's directory.
pub fn swap_below(guest: &Guest<'_>) {
    let Some((mut fuse, home)) = begin(guest) else { return };
    let fuse = &mut fuse;
    displace(fuse, home, "rootfs", guest.planted);
    // Those that are there, and those that a later mount would get.
    for number in 0..MOUNTS {
        displace(fuse, home, Numbered::of("mount", number).text(), guest.planted);
    }
}

fn displace(fuse: &mut Fuse, home: Home, name: &str, target: &str) {
    refuse!(rename(fuse, (home.dir, name), (home.dir, "away"), 0), "rename of {name}");
    refuse!(rename(fuse, (home.dir, name), (home.rootfs, "away"), 0), "rename of {name} into rootfs");
    refuse!(fuse.call(op::UNLINK, home.dir, &[name.as_bytes(), &[0]]), "unlink {name}");
    refuse!(symlink(fuse, home.dir, name, target), "link in the place of {name}");
}

/// Device nodes that the image has, below `/nodes`: none of them is opened on the host.
pub fn nodes(guest: &Guest<'_>) {
    let Some((mut fuse, home)) = begin(guest) else { return };
    let fuse = &mut fuse;
    let Some(nodes) = fuse.lookup(home.rootfs, "nodes") else { return say!("WRONG: no nodes") };
    for name in ["disk", "random", "zero"] {
        let Some(node) = fuse.lookup(nodes, name) else {
            say!("WRONG: no node {name}");
            continue;
        };
        for flags in [0, READ_WRITE, READ_WRITE | NONBLOCK] {
            refuse!(ask(fuse, op::OPEN, node, [flags, 0], &[]), "open {flags:o} of {name}");
            refuse!(ask(fuse, op::CREATE, nodes, [flags | MAKE, REGULAR, 0, 0], &[name]), "create {flags:o} of {name}");
        }
        // By another name, that the guest gives it.
        must_do(link(fuse, node, nodes, "again"), "link");
        if let Some(again) = fuse.lookup(nodes, "again") {
            refuse!(ask(fuse, op::OPEN, again, [0, 0], &[]), "open of a link to {name}");
        }
        must_do(fuse.call(op::UNLINK, nodes, &[b"again\0"]), "unlink");
    }
}

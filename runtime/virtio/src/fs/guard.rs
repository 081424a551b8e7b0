//! What stands between the guest and virtiofsd: names are checked, opened files get their caching options, and what the
//! guest may remember of names is said.
//!
//! FUSE names one component at a time, and a directory is an inode number. A kernel never sends a name that is empty,
//! `.`, `..` or has a slash; a guest that writes its own requests does, and `../x` then means a file of the host.

use std::{
    ffi::CStr,
    fs::File,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use virtiofsd::{
    filesystem::{
        Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
        SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
    },
    fuse::{Attr, FsOptions, SetattrIn},
    oslib::ReadvFlags,
};

use nix::fcntl::OFlag;

use super::{
    cache,
    locks::{Files, Locks},
    nobody,
    nodes::{Live, Nodes},
};

/// A file system behind the guard. Clones are the same file system.
#[derive(Debug)]
pub struct Guarded<F>(Arc<Behind<F>>);

#[derive(Debug)]
struct Behind<F> {
    fs: F,
    nodes: Nodes,
    locks: Locks,
    absent: Duration,
}

impl<F> Clone for Guarded<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> Guarded<F> {
    /// Puts `fs` behind the guard. For `absent` the guest believes that a name is not there.
    /// Its inodes and open files have `fd_limit` descriptors.
    pub(super) fn new(fs: F, absent: Duration, locks: Locks, fd_limit: u64) -> Self {
        Self(Arc::new(Behind { fs, nodes: Nodes::new(fd_limit), locks, absent }))
    }
}

impl<F: FileSystem> Guarded<F> {
    /// What virtiofsd has for the guest's inode.
    fn live(&self, inode: impl Into<u64>) -> io::Result<Arc<Live>> {
        self.0.nodes.get(&self.0.fs, inode.into())
    }

    /// Makes the guest's of an entry of virtiofsd's.
    fn found(&self, parent: u64, name: &CStr, mut entry: Entry) -> io::Result<Entry> {
        self.0.nodes.found(&self.0.fs, parent, name, &mut entry, 0)?;
        Ok(entry)
    }

    fn make_room(&self, wanted: u64) {
        self.0.nodes.make_room(&self.0.fs, wanted);
    }
}

/// Lends the file that it is to be filled from, in place of being filled.
struct Borrow<'a, R, G> {
    with: Option<G>,
    got: &'a mut Option<R>,
}

impl<R, G: FnOnce(&File) -> io::Result<R>> ZeroCopyWriter for Borrow<'_, R, G> {
    fn read_from_file_at(
        &mut self,
        f: &File,
        _count: usize,
        _off: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        if let Some(with) = self.with.take() {
            *self.got = Some(with(f)?);
        }
        Ok(0)
    }
}

impl<F: FileSystem> Files for Guarded<F> {
    /// virtiofsd has no other way to an open file than to read from it.
    fn with<R>(&self, inode: u64, handle: u64, f: impl FnOnce(&File) -> io::Result<R>) -> io::Result<R> {
        let live = self.live(inode)?;
        let mut got = None;
        let borrow = Borrow { with: Some(f), got: &mut got };
        self.0.fs.read(nobody(), live.number().into(), handle.into(), borrow, 1, 0, None, 0)?;
        got.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn reopen(&self, inode: u64, flags: OFlag) -> io::Result<File> {
        self.make_room(1);
        let live = self.live(inode)?;
        let flags = (flags | OFlag::O_NONBLOCK).bits().cast_unsigned();
        let (handle, _) = self.0.fs.open(nobody(), live.number().into(), false, flags)?;
        let handle = handle.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?.into();
        let file = self.with(inode, handle, File::try_clone);
        self.0.fs.release(nobody(), live.number().into(), 0, handle.into(), false, false, None)?;
        file
    }
}

/// A file system that has no access control lists has none for a file. The guest's kernel, which asks before it lets
/// anyone but the owner and root at a file, would take any other error for its answer to them.
fn without_lists(name: &CStr, e: io::Error) -> io::Error {
    let of_list = matches!(name.to_bytes(), b"system.posix_acl_access" | b"system.posix_acl_default");
    match e.raw_os_error() {
        Some(libc::EOPNOTSUPP) if of_list => io::Error::from_raw_os_error(libc::ENODATA),
        _ => e,
    }
}

/// One component that a directory can hold.
fn entry(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => component(name),
    }
}

/// One component that can be looked up: `.` and `..` too, which stay inside the share (virtiofsd resolves them beneath
/// its root).
fn component(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}

impl<F: FileSystem> FileSystem for Guarded<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.0.locks.clear();
        let options = self.0.fs.init(capable)?;
        self.0.nodes.start();
        // An inode's link text never changes: another text is another inode.
        Ok(options | FsOptions::CACHE_SYMLINKS | FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS)
    }

    fn destroy(&self) {
        self.0.locks.clear();
        self.0.nodes.clear();
        self.0.fs.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.make_room(1);
        let number = parent.into();
        let live = self.live(number)?;
        match self.0.fs.lookup(ctx, live.number().into(), name) {
            Ok(entry) => self.found(number, name, entry),
            // No inode is a name that is not there, and may be remembered for a while.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && !self.0.absent.is_zero() => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: Attr::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: self.0.absent,
            }),
            Err(e) => Err(e),
        }
    }

    fn forget(&self, _ctx: Context, inode: Self::Inode, count: u64) {
        self.0.nodes.forget(&self.0.fs, inode.into(), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>) -> io::Result<(Attr, Duration)> {
        let live = self.live(inode)?;
        self.0.fs.getattr(ctx, live.number().into(), handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        attr: SetattrIn,
        handle: Option<Self::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let live = self.live(inode)?;
        self.0.fs.setattr(ctx, live.number().into(), attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>> {
        let live = self.live(inode)?;
        self.0.fs.readlink(ctx, live.number().into())
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: Self::Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry(name)?;
        self.make_room(1);
        let number = parent.into();
        let live = self.live(number)?;
        let made = self.0.fs.symlink(ctx, linkname, live.number().into(), name, extensions)?;
        self.found(number, name, made)
    }

    #[allow(clippy::too_many_arguments)]
    fn mknod(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry(name)?;
        self.make_room(1);
        let number = inode.into();
        let live = self.live(number)?;
        let made = self.0.fs.mknod(ctx, live.number().into(), name, mode, rdev, umask, extensions)?;
        self.found(number, name, made)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Self::Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry(name)?;
        self.make_room(1);
        let number = parent.into();
        let live = self.live(number)?;
        let made = self.0.fs.mkdir(ctx, live.number().into(), name, mode, umask, extensions)?;
        self.found(number, name, made)
    }

    fn unlink(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        entry(name)?;
        let number = parent.into();
        let live = self.live(number)?;
        self.0.fs.unlink(ctx, live.number().into(), name)?;
        self.0.nodes.removed(&self.0.fs, number, name);
        Ok(())
    }

    fn rmdir(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        entry(name)?;
        let number = parent.into();
        let live = self.live(number)?;
        self.0.fs.rmdir(ctx, live.number().into(), name)?;
        self.0.nodes.removed(&self.0.fs, number, name);
        Ok(())
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: Self::Inode,
        oldname: &CStr,
        newdir: Self::Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        entry(oldname)?;
        entry(newname)?;
        let (old, new) = (olddir.into(), newdir.into());
        let (old_live, new_live) = (self.live(old)?, self.live(new)?);
        self.0.fs.rename(ctx, old_live.number().into(), oldname, new_live.number().into(), newname, flags)?;
        let exchanged = flags & libc::RENAME_EXCHANGE != 0;
        self.0.nodes.renamed(&self.0.fs, (old, oldname), (new, newname), exchanged);
        Ok(())
    }

    fn link(&self, ctx: Context, inode: Self::Inode, newparent: Self::Inode, newname: &CStr) -> io::Result<Entry> {
        entry(newname)?;
        self.make_room(2);
        let number = newparent.into();
        let (live, parent) = (self.live(inode)?, self.live(number)?);
        let made = self.0.fs.link(ctx, live.number().into(), parent.number().into(), newname)?;
        self.found(number, newname, made)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        self.0.nodes.make_room_to_open(&self.0.fs)?;
        let number = inode.into();
        let live = self.live(number)?;
        // Before it is opened: a change after that will show the next time.
        let attributes = self.0.fs.getattr(ctx, live.number().into(), None);
        let (handle, mut options) = self.0.fs.open(ctx, live.number().into(), kill_priv, flags)?;
        self.0.nodes.opened(number);
        if let Ok((attr, _)) = attributes {
            let keep = |known: &mut _| cache::options(known, flags, &attr, SystemTime::now());
            options |= self.0.nodes.with_stamp(number, keep).unwrap_or(OpenOptions::empty());
        }
        Ok((handle, options))
    }

    #[allow(clippy::too_many_arguments)]
    fn create(
        &self,
        ctx: Context,
        parent: Self::Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        entry(name)?;
        self.0.nodes.make_room_to_open(&self.0.fs)?;
        let number = parent.into();
        let live = self.live(number)?;
        let (mut made, handle, options) =
            self.0.fs.create(ctx, live.number().into(), name, mode, kill_priv, flags, umask, extensions)?;
        // Open from the start: it is not given back in between.
        self.0.nodes.found(&self.0.fs, number, name, &mut made, 1)?;
        Ok((made, handle, options))
    }

    #[allow(clippy::too_many_arguments)]
    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        place(offset)?;
        let live = self.live(inode)?;
        self.0.fs.read(ctx, live.number().into(), handle, w, size, offset, lock_owner, flags)
    }

    #[allow(clippy::too_many_arguments)]
    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        place(offset)?;
        let live = self.live(inode)?;
        let inode = live.number().into();
        self.0.fs.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64) -> io::Result<()> {
        let number = inode.into();
        let live = self.live(number)?;
        let flushed = self.0.fs.flush(ctx, live.number().into(), handle, lock_owner);
        self.0.locks.flushed(number, lock_owner);
        flushed
    }

    fn fsync(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.fsync(ctx, live.number().into(), datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.fallocate(ctx, live.number().into(), handle, mode, offset, length)
    }

    #[allow(clippy::too_many_arguments)]
    fn release(
        &self,
        ctx: Context,
        inode: Self::Inode,
        flags: u32,
        handle: Self::Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (number, open) = (inode.into(), handle.into());
        let live = self.live(number)?;
        self.0.fs.release(ctx, live.number().into(), flags, open.into(), flush, flock_release, lock_owner)?;
        self.0.nodes.closed(number);
        self.0.locks.released(number, open);
        Ok(())
    }

    fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64> {
        let live = self.live(inode)?;
        self.0.fs.statfs(ctx, live.number().into())
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.setxattr(ctx, live.number().into(), name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let live = self.live(inode)?;
        self.0.fs.getxattr(ctx, live.number().into(), name, size).map_err(|e| without_lists(name, e))
    }

    fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply> {
        let live = self.live(inode)?;
        self.0.fs.listxattr(ctx, live.number().into(), size)
    }

    fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.removexattr(ctx, live.number().into(), name)
    }

    fn opendir(&self, ctx: Context, inode: Self::Inode, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        self.0.nodes.make_room_to_open(&self.0.fs)?;
        let number = inode.into();
        let live = self.live(number)?;
        let opened = self.0.fs.opendir(ctx, live.number().into(), flags)?;
        self.0.nodes.opened(number);
        Ok(opened)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        let live = self.live(inode)?;
        self.0.fs.readdir(ctx, live.number().into(), handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.fsyncdir(ctx, live.number().into(), datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle) -> io::Result<()> {
        let number = inode.into();
        let live = self.live(number)?;
        self.0.fs.releasedir(ctx, live.number().into(), flags, handle)?;
        self.0.nodes.closed(number);
        Ok(())
    }

    fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.access(ctx, live.number().into(), mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let live = self.live(inode)?;
        self.0.fs.lseek(ctx, live.number().into(), handle, offset, whence)
    }

    #[allow(clippy::too_many_arguments)]
    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Self::Inode,
        handle_in: Self::Handle,
        offset_in: u64,
        inode_out: Self::Inode,
        handle_out: Self::Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (from, to) = (self.live(inode_in)?, self.live(inode_out)?);
        let (from, to) = (from.number().into(), to.number().into());
        self.0.fs.copyfilerange(ctx, from, handle_in, offset_in, to, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()> {
        let live = self.live(inode)?;
        self.0.fs.syncfs(ctx, live.number().into())
    }

    // Locks are served before virtiofsd's server would ask for them.
    fn getlk(&self) -> io::Result<()> {
        self.0.fs.getlk()
    }

    fn setlk(&self) -> io::Result<()> {
        self.0.fs.setlk()
    }

    fn setlkw(&self) -> io::Result<()> {
        self.0.fs.setlkw()
    }

    fn ioctl(&self) -> io::Result<()> {
        self.0.fs.ioctl()
    }

    fn bmap(&self) -> io::Result<()> {
        self.0.fs.bmap()
    }

    fn poll(&self) -> io::Result<()> {
        self.0.fs.poll()
    }

    fn notify_reply(&self) -> io::Result<()> {
        self.0.fs.notify_reply()
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        self.0.fs.tmpfile()
    }
}

/// A place in a file that the host's system calls can name; virtiofsd panics at others.
fn place(offset: u64) -> io::Result<()> {
    match i64::try_from(offset) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_are_no_lists_no_file_has_one() {
        let asked = |name, errno| without_lists(name, io::Error::from_raw_os_error(errno)).raw_os_error();
        assert_eq!(asked(c"system.posix_acl_access", libc::EOPNOTSUPP), Some(libc::ENODATA));
        assert_eq!(asked(c"system.posix_acl_default", libc::EOPNOTSUPP), Some(libc::ENODATA));
        assert_eq!(asked(c"system.posix_acl_access", libc::EIO), Some(libc::EIO));
        assert_eq!(asked(c"user.x", libc::EOPNOTSUPP), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn only_single_components_pass() {
        for name in [c"a", c"...", c".a", c"a.", c"..a", c"a b", c"\xff"] {
            entry(name).unwrap();
            component(name).unwrap();
        }
        for name in [c"", c"/", c"a/b", c"../a", c"/a", c"a/", c"./a"] {
            assert_eq!(entry(name).unwrap_err().raw_os_error(), Some(libc::EINVAL));
            assert_eq!(component(name).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
        for name in [c".", c".."] {
            assert_eq!(entry(name).unwrap_err().raw_os_error(), Some(libc::EINVAL));
            component(name).unwrap();
        }
    }
}

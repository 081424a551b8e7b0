//! What stands between the guest and virtiofsd: names are checked, opened files get their caching options, and what the
//! guest may remember of names is said.
//!
//! FUSE names one component at a time, and a directory is an inode number. A kernel never sends a name that is empty,
//! `.`, `..` or has a slash; a guest that writes its own requests does, and `../x` then means a file of the host.

use std::{
    ffi::CStr,
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
};

use super::cache::Opened;

/// A file system behind the guard. Clones are the same file system.
#[derive(Debug)]
pub struct Guarded<F>(Arc<Behind<F>>);

#[derive(Debug)]
struct Behind<F> {
    fs: F,
    opened: Opened,
    absent: Duration,
}

impl<F> Clone for Guarded<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> Guarded<F> {
    /// Puts `fs` behind the guard. For `absent` the guest believes that a name is not there.
    pub fn new(fs: F, absent: Duration) -> Self {
        Self(Arc::new(Behind { fs, opened: Opened::default(), absent }))
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
        // An inode's link text never changes: another text is another inode.
        Ok(self.0.fs.init(capable)? | FsOptions::CACHE_SYMLINKS)
    }

    fn destroy(&self) {
        self.0.opened.clear();
        self.0.fs.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        match self.0.fs.lookup(ctx, parent, name) {
            // No inode is a name that is not there, and may be remembered for a while.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && !self.0.absent.is_zero() => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: Attr::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: self.0.absent,
            }),
            other => other,
        }
    }

    fn forget(&self, ctx: Context, inode: Self::Inode, count: u64) {
        let number = inode.into();
        self.0.opened.forget(number);
        self.0.fs.forget(ctx, number.into(), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>) -> io::Result<(Attr, Duration)> {
        self.0.fs.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Self::Inode,
        attr: SetattrIn,
        handle: Option<Self::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.0.fs.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>> {
        self.0.fs.readlink(ctx, inode)
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
        self.0.fs.symlink(ctx, linkname, parent, name, extensions)
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
        self.0.fs.mknod(ctx, inode, name, mode, rdev, umask, extensions)
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
        self.0.fs.mkdir(ctx, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        entry(name)?;
        self.0.fs.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()> {
        entry(name)?;
        self.0.fs.rmdir(ctx, parent, name)
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
        self.0.fs.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: Context, inode: Self::Inode, newparent: Self::Inode, newname: &CStr) -> io::Result<Entry> {
        entry(newname)?;
        self.0.fs.link(ctx, inode, newparent, newname)
    }

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        let number = inode.into();
        // Before it is opened: a change after that will show the next time.
        let attributes = self.0.fs.getattr(ctx, number.into(), None);
        let (handle, mut options) = self.0.fs.open(ctx, number.into(), kill_priv, flags)?;
        if let Ok((attr, _)) = attributes {
            options |= self.0.opened.options(number, flags, &attr, SystemTime::now());
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
        self.0.fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
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
        self.0.fs.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
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
        self.0.fs.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64) -> io::Result<()> {
        self.0.fs.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()> {
        self.0.fs.fsync(ctx, inode, datasync, handle)
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
        self.0.fs.fallocate(ctx, inode, handle, mode, offset, length)
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
        self.0.fs.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64> {
        self.0.fs.statfs(ctx, inode)
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
        self.0.fs.setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.0.fs.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply> {
        self.0.fs.listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()> {
        self.0.fs.removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: Context, inode: Self::Inode, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        self.0.fs.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.0.fs.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()> {
        self.0.fs.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle) -> io::Result<()> {
        self.0.fs.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()> {
        self.0.fs.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.0.fs.lseek(ctx, inode, handle, offset, whence)
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
        self.0.fs.copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()> {
        self.0.fs.syncfs(ctx, inode)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

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

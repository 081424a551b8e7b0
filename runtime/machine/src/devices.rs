//! The devices that every machine has.

use std::{fs::File, io, os::fd::OwnedFd, time::Duration};

use vz_jail::Role;
use vz_proto::GUEST_CID;
use vz_virtio::{
    blk::{self, Blk, BlkQueue},
    fs::{self, Fs, Threads},
    vsock::{self, Handle, Vsock},
};

use crate::{
    LaunchError,
    control::{BootConfig, Disk, Nic},
};

/// How long the guest believes names and attributes of shared files: a burst of a program that starts, or of a walk
/// over a tree, and no longer than people notice.
const FS_CACHE: Duration = Duration::from_millis(100);
/// Request queues: more do not help, since the guest gives each vCPU one.
const MOST_REQUEST_QUEUES: u32 = 4;
/// Descriptors that are ours and not the guest's: each connection has one, and may be on its way with another.
const OWN_FDS: u64 = 2 * (vsock::DIALS + 2 * vsock::GUEST_MADE) as u64 + fs::OWN_FDS + 128;
/// Fewer than this a guest may well want to have open at once.
const FEW_FDS: u64 = 1 << 13;

/// Backends, before a machine serves them.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) fs: Fs,
    pub(crate) vsock: Vsock,
}

/// What the share needs that the process's root does not have.
#[derive(Debug)]
pub(crate) struct ShareRoot {
    /// Where the share is.
    pub(crate) path: String,
    /// `/proc/self/fd`.
    pub(crate) proc_self_fd: File,
    /// Limit of open files of this process.
    pub(crate) nofile: u64,
}

/// What came with the configuration, sorted by what it is for.
#[derive(Debug)]
pub(crate) struct Files {
    /// Network cards with their taps' queues.
    pub(crate) nics: Vec<(Nic, Vec<OwnedFd>)>,
    /// Disks, each by its queues.
    pub(crate) disks: Vec<Vec<BlkQueue>>,
}

impl Files {
    /// Call it outside of the jail, in which block devices tell nothing of themselves.
    pub(crate) fn new(config: &BootConfig, files: Vec<OwnedFd>) -> Result<Self, LaunchError> {
        let (nics, disks, found) = (config.nics.len(), config.disks.len(), files.len());
        let wanted = config.nics.iter().map(|nic| usize::from(nic.queue_pairs)).sum::<usize>().saturating_add(disks);
        if found != wanted {
            return Err(LaunchError::Descriptors { nics, disks, wanted, found });
        }
        let mut files = files.into_iter();
        let nic = |nic: &Nic| (nic.clone(), files.by_ref().take(nic.queue_pairs.into()).collect());
        let nics = config.nics.iter().map(nic).collect();
        let queues = request_queues(config);
        let disks = config.disks.iter().zip(files).map(|(disk, file)| {
            let Disk { id, read_only } = disk.clone();
            Ok(Blk::new(blk::Config { file: file.into(), read_only, id, queues })?.split())
        });
        Ok(Self { nics, disks: disks.collect::<Result<_, LaunchError>>()? })
    }
}

pub(crate) fn request_queues(config: &BootConfig) -> u16 {
    u16::try_from(config.vcpus.min(MOST_REQUEST_QUEUES)).unwrap_or(1).max(1)
}

/// Starts a thread that waits for locks.
fn lock_thread(work: fs::Work) -> io::Result<()> {
    let refused = |e: vz_jail::Error| {
        // Nothing unconfined runs, and what it was to wait for goes unanswered: the device is of no use any more.
        panic!("confine lock thread: {}", vz_sys::error::chain(&e));
    };
    vz_jail::spawn(Role::Lock, "lock", work, refused).map(drop)
}

impl Devices {
    /// Makes them; call it inside of the jail.
    pub(crate) fn new(config: &BootConfig, share: ShareRoot) -> Result<(Self, Handle), LaunchError> {
        let fd_limit = share.nofile.saturating_sub(OWN_FDS).max(share.nofile / 2);
        if fd_limit < FEW_FDS {
            tracing::warn!(
                "guest can have some {} shared files open at once, and gets ENFILE beyond that: \
                 raise the limit of open files (LimitNOFILE) of containerd",
                fd_limit / 2
            );
        }
        let fs = Fs::new(fs::Config {
            root: share.path,
            tag: config.share_tag.clone(),
            request_queues: request_queues(config),
            proc_self_fd: Some(share.proc_self_fd),
            cache: FS_CACHE,
            fd_limit,
            lock_threads: Threads::new(lock_thread),
        })?;
        let (vsock, handle) = Vsock::new(GUEST_CID, config.guest_ports.iter().copied()).map_err(LaunchError::Vsock)?;
        Ok((Self { fs, vsock }, handle))
    }
}

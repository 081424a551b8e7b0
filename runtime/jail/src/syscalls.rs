//! Which system calls each role may make.
//!
//! Found by tracing whole runs of the integration tests, and read off what the libraries in use can call; each table
//! has what its thread's work needs, [`COMMON`] what every thread's run time does behind its back.

use libc::{
    self, SYS_accept4, SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_close,
    SYS_copy_file_range, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_eventfd2, SYS_exit,
    SYS_exit_group, SYS_fallocate, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_fcntl,
    SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr, SYS_flock, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs,
    SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getpid, SYS_getrandom,
    SYS_gettid, SYS_getxattr, SYS_ioctl, SYS_linkat, SYS_listxattr, SYS_lseek, SYS_madvise, SYS_mkdirat, SYS_mknodat,
    SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_name_to_handle_at, SYS_newfstatat, SYS_openat, SYS_openat2,
    SYS_pidfd_send_signal, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev,
    SYS_pwritev2, SYS_read, SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_removexattr, SYS_renameat,
    SYS_renameat2, SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sched_getaffinity, SYS_sched_yield, SYS_seccomp, SYS_sendmsg, SYS_sendto, SYS_set_robust_list,
    SYS_set_tid_address, SYS_setgroups, SYS_setresgid, SYS_setresuid, SYS_setxattr, SYS_shutdown, SYS_sigaltstack,
    SYS_socketpair, SYS_statx, SYS_symlinkat, SYS_syncfs, SYS_tgkill, SYS_timerfd_create, SYS_timerfd_settime,
    SYS_umask, SYS_unlinkat, SYS_unshare, SYS_utimensat, SYS_waitid, SYS_write, SYS_writev, c_int, c_long,
};

use crate::Role;

/// A system call that is allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Allow {
    /// With any arguments.
    Any(c_long),
    /// Where this argument's lower half is one of these.
    OneOf(c_long, u8, &'static [u32]),
    /// Where this argument, masked by the first, is the second.
    Masked(c_long, u8, u64, u64),
    /// Where this argument is the process's id.
    Ourselves(c_long, u8),
}

use Allow::{Any, Masked, OneOf, Ourselves};

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;
/// What a socket's type can have added to it.
const SOCK_TYPE: u64 = 0xf;

/// Memory, locks, time, logging, panics, and a thread's end. No memory becomes executable, and no thread sends signals
/// out of the process.
pub(crate) const COMMON: &[Allow] = &[
    Any(SYS_brk),
    Any(SYS_clock_gettime),
    Any(SYS_clock_nanosleep),
    Any(SYS_close),
    Any(SYS_exit),
    Any(SYS_exit_group),
    Any(SYS_fcntl),
    Any(SYS_fstat),
    Any(SYS_futex),
    Any(SYS_getpid),
    Any(SYS_getrandom),
    Any(SYS_gettid),
    Any(SYS_lseek),
    Any(SYS_madvise),
    Masked(SYS_mmap, 2, PROT_EXEC, 0),
    Masked(SYS_mprotect, 2, PROT_EXEC, 0),
    Any(SYS_mremap),
    Any(SYS_munmap),
    OneOf(SYS_prctl, 0, &[libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32]),
    Any(SYS_read),
    Any(SYS_readv),
    Any(SYS_restart_syscall),
    Any(SYS_rseq),
    Any(SYS_rt_sigaction),
    Any(SYS_rt_sigprocmask),
    Any(SYS_rt_sigreturn),
    Any(SYS_sched_getaffinity),
    Any(SYS_sched_yield),
    Any(SYS_set_robust_list),
    Any(SYS_sigaltstack),
    Ourselves(SYS_tgkill, 0),
    Any(SYS_write),
    Any(SYS_writev),
    // Waiting for descriptors.
    Any(SYS_epoll_create1),
    Any(SYS_epoll_ctl),
    Any(SYS_epoll_pwait),
    Any(SYS_ppoll),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_epoll_wait),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_poll),
];

/// The shim's channel, the console's file, QEMU's process.
const MAIN: &[Allow] = &[
    Any(SYS_eventfd2),
    Any(SYS_ftruncate),
    Any(SYS_pidfd_send_signal),
    Any(SYS_pread64),
    Any(SYS_pwrite64),
    Any(SYS_recvmsg),
    Any(SYS_sendmsg),
    Any(SYS_waitid),
];

const VCPU: &[Allow] = &[OneOf(SYS_ioctl, 1, KVM)];

/// Interrupting the guest, where a thread serves a device of the KVM machine: by the VM's descriptor, of which nothing
/// else may be asked.
const INTERRUPT: Allow = OneOf(SYS_ioctl, 1, &[write(KVMIO, 0x61, 8)]); // KVM_IRQ_LINE

/// Requests of a vCPU's thread: running it, and reading its registers for a report of what went wrong. Everything else
/// was set up before the thread entered its role.
const KVM: &[u32] = &[
    none(KVMIO, 0x80),      // KVM_RUN
    read(KVMIO, 0x81, 144), // KVM_GET_REGS
    read(KVMIO, 0x83, 312), // KVM_GET_SREGS
];

/// virtiofsd's pass-through file system. Paths are not looked at here: there is nothing but the share to name.
const FS: &[Allow] = &[
    INTERRUPT,
    Any(SYS_capget),
    Any(SYS_capset),
    // A thread for a request that waits for a lock, no process; and that thread's own filter and way to it.
    Masked(SYS_clone, 0, CLONE_THREAD, CLONE_THREAD),
    Any(SYS_seccomp),
    Any(SYS_copy_file_range),
    Any(SYS_dup),
    Any(SYS_fallocate),
    Any(SYS_fchdir),
    Any(SYS_fchmod),
    Any(SYS_fchmodat),
    Any(SYS_fchown),
    Any(SYS_fchownat),
    Any(SYS_fdatasync),
    Any(SYS_fgetxattr),
    Any(SYS_flistxattr),
    Any(SYS_flock),
    Any(SYS_fremovexattr),
    Any(SYS_fsetxattr),
    Any(SYS_fstatfs),
    Any(SYS_fsync),
    Any(SYS_ftruncate),
    Any(SYS_getdents64),
    Any(SYS_getegid),
    Any(SYS_geteuid),
    Any(SYS_getxattr),
    Any(SYS_linkat),
    Any(SYS_listxattr),
    Any(SYS_mkdirat),
    Any(SYS_mknodat),
    Any(SYS_name_to_handle_at),
    Any(SYS_newfstatat),
    Any(SYS_openat),
    Any(SYS_openat2),
    // libcap-ng looks at what a thread has before it changes that.
    OneOf(SYS_prctl, 0, &[libc::PR_CAPBSET_READ as u32, libc::PR_CAP_AMBIENT as u32, libc::PR_SET_NO_NEW_PRIVS as u32]),
    Any(SYS_pread64),
    Any(SYS_preadv),
    Any(SYS_preadv2),
    Any(SYS_pwrite64),
    Any(SYS_pwritev),
    Any(SYS_pwritev2),
    Any(SYS_readlinkat),
    Any(SYS_removexattr),
    Any(SYS_renameat),
    Any(SYS_renameat2),
    Any(SYS_setgroups),
    Any(SYS_setresgid),
    Any(SYS_setresuid),
    Any(SYS_setxattr),
    Any(SYS_statx),
    Any(SYS_symlinkat),
    Any(SYS_syncfs),
    Any(SYS_umask),
    Any(SYS_unlinkat),
    OneOf(SYS_unshare, 0, &[libc::CLONE_FS as u32]),
    Any(SYS_utimensat),
];

/// Locks on files that are open; those of POSIX are by fcntl. The end wakes the thread of the queue.
const LOCK: &[Allow] = &[Any(SYS_flock)];

/// Connections that are ends of socket pairs.
const VSOCK: &[Allow] = &[
    INTERRUPT,
    OneOf(SYS_ioctl, 1, &[libc::FIONBIO as u32, libc::FIONREAD as u32]),
    Any(SYS_recvfrom),
    Any(SYS_recvmsg),
    Any(SYS_sendmsg),
    Any(SYS_sendto),
    Any(SYS_shutdown),
    Masked(SYS_socketpair, 1, SOCK_TYPE, libc::SOCK_STREAM as u64),
];

/// A tap device's descriptor.
const NET: &[Allow] = &[INTERRUPT, OneOf(SYS_ioctl, 1, TUN)];

const TUN: &[u32] = &[
    write(TUNIO, 208, 4), // TUNSETOFFLOAD
    read(TUNIO, 210, 4),  // TUNGETIFF
    write(TUNIO, 216, 4), // TUNSETVNETHDRSZ
    write(TUNIO, 217, 4), // TUNSETQUEUE
];

/// A file or block device that is open.
const BLOCK: &[Allow] = &[
    INTERRUPT,
    Any(SYS_fallocate),
    Any(SYS_fdatasync),
    Any(SYS_fsync),
    Any(SYS_pread64),
    Any(SYS_preadv),
    Any(SYS_preadv2),
    Any(SYS_pwrite64),
    Any(SYS_pwritev),
    Any(SYS_pwritev2),
    OneOf(SYS_ioctl, 1, &[none(0x12, 119), none(0x12, 127)]), // BLKDISCARD, BLKZEROOUT
];

/// Guest memory that is given back, and bytes that are given out at a rate.
const DEVICE: &[Allow] = &[INTERRUPT, Any(SYS_fallocate), Any(SYS_timerfd_settime)];

/// QEMU's socket, and the guest memory, notifications and interrupts that come over it.
const PROTOCOL: &[Allow] = &[
    Any(SYS_accept4),
    Any(SYS_eventfd2),
    OneOf(SYS_ioctl, 1, &[libc::FIONBIO as u32]),
    Any(SYS_recvfrom),
    Any(SYS_recvmsg),
    Any(SYS_sendmsg),
    Any(SYS_sendto),
    Any(SYS_shutdown),
    Any(SYS_statx),
];

/// What threads do before they enter their role: setting up the machine, starting others, and confining themselves.
pub(crate) const START: &[Allow] = &[
    Any(SYS_capget),
    Any(SYS_capset),
    // Threads only: no process, no namespace.
    Masked(SYS_clone, 0, CLONE_THREAD, CLONE_THREAD),
    Any(SYS_eventfd2),
    // Whatever a machine needs to be set up: there is a descriptor for KVM only where it is the machine's.
    Masked(SYS_ioctl, 1, 0xff00, (KVMIO << 8) as u64),
    OneOf(SYS_ioctl, 1, TUN),
    OneOf(SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS as u32]),
    Any(SYS_seccomp),
    Any(SYS_set_tid_address),
    Any(SYS_timerfd_create),
];

/// Calls that fail with an error instead of ending the process: the C library makes them by itself and does without.
pub(crate) const REFUSED_AT_START: &[(c_long, c_int)] = &[
    // Its flags are in memory, where a filter cannot see them; the library then uses clone.
    (libc::SYS_clone3, libc::ENOSYS),
];

/// The same, for all roles but [`Role::Fs`]: malloc wants to know how the host overcommits memory.
const REFUSED: &[(c_long, c_int)] = &[(SYS_openat, libc::EACCES)];

impl Role {
    /// What it may do besides [`COMMON`].
    pub(crate) const fn allowed(self) -> &'static [Allow] {
        match self {
            Self::Main => MAIN,
            Self::Vcpu => VCPU,
            Self::Fs => FS,
            Self::Lock => LOCK,
            Self::Vsock => VSOCK,
            Self::Net => NET,
            Self::Block => BLOCK,
            Self::Device => DEVICE,
            Self::Protocol => PROTOCOL,
        }
    }

    /// What fails with an error.
    pub(crate) const fn refused(self) -> &'static [(c_long, c_int)] {
        match self {
            // It starts threads, and so tries what those that start the machine's try.
            Self::Fs => REFUSED_AT_START,
            _ => REFUSED,
        }
    }
}

/// The type of KVM's and of TUN's requests.
const KVMIO: u32 = 0xae;
const TUNIO: u32 = 0x54;

/// Requests by type, number and size of what they point to: include/uapi/asm-generic/ioctl.h.
const fn none(kind: u32, number: u32) -> u32 {
    kind << 8 | number
}

const fn write(kind: u32, number: u32, size: u32) -> u32 {
    1 << 30 | size << 16 | none(kind, number)
}

const fn read(kind: u32, number: u32, size: u32) -> u32 {
    2 << 30 | size << 16 | none(kind, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_that_the_kernel_has() {
        assert_eq!(none(KVMIO, 0x80), 0xae80);
        assert_eq!(read(KVMIO, 0x81, 144), 0x8090_ae81);
        assert_eq!(read(KVMIO, 0x83, 312), 0x8138_ae83);
        assert_eq!(write(TUNIO, 208, 4), 0x4004_54d0);
        assert_eq!(none(0x12, 119), 0x1277);
    }
}

//! QEMU's arguments. Pure.

use std::os::fd::{OwnedFd, RawFd};

use crate::Config;

/// Most random bytes that the guest gets in a period, and its length. A guest asks for 64 at a time.
const RANDOM_BYTES: u32 = 1 << 20;
const RANDOM_PERIOD_MS: u32 = 1000;

/// A network card that QEMU serves itself, on TAP devices' descriptors.
#[derive(Debug)]
pub struct Nic {
    /// The address that the guest finds.
    pub mac: [u8; 6],
    /// A descriptor for each queue pair, at least one.
    pub queues: Vec<OwnedFd>,
}

/// A device that our process serves over vhost-user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// virtio-fs.
    Fs {
        /// The name that the guest mounts.
        tag: String,
        /// Number of request queues.
        request_queues: u16,
        /// Size of each queue.
        queue_size: u16,
    },
    /// virtio-vsock; its context id is the device's to tell.
    Vsock,
    /// virtio-blk.
    Disk {
        /// Which one, from 0.
        number: usize,
        /// Number of queues.
        queues: u16,
    },
}

/// What every device of QEMU's own gets, see [`arguments`].
const NO_EVENT_IDX: &str = "event_idx=off";
/// Size of a disk's queues.
const DISK_QUEUE_SIZE: u16 = 256;

/// The arguments, without the program's name. Kernel, initramfs, the devices' sockets and the cards' queues are
/// inherited as the descriptors `first`, `first + 1`, and so on.
pub fn arguments(config: &Config<'_>, first: RawFd) -> Vec<String> {
    let kernel = first;
    let initramfs = first.saturating_add(1);
    let sockets = first.saturating_add(2);
    let Config { name, vcpus, memory_mib, append, count_instructions, devices, nics, .. } = config;

    let mut args = Vec::new();
    let mut add = |option: &str, value: String| {
        args.push(format!("-{option}"));
        if !value.is_empty() {
            args.push(value);
        }
    };
    add("name", format!("vz,process={}", escape(name)));
    add("nodefaults", String::new());
    add("no-user-config", String::new());
    add("no-reboot", String::new());
    // Filters on system calls; it needs no other process, and no other user.
    add("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    add("display", "none".into());
    // Without ACPI the guest cannot power off, so it reboots and -no-reboot ends QEMU; with it, this machine hangs at
    // boot now and then. It does not boot without the timer (pit) and interrupt controller (pic) of a PC.
    add("machine", "microvm,x-option-roms=off,isa-serial=on,pit=on,pic=on,rtc=on,acpi=off,memory-backend=ram".into());
    // With one thread QEMU 7.2 leaves the guest's memory barriers out, so that suppressed notifications get lost: no
    // device has EVENT_IDX, see vz_vhost's adapter. What QEMU's own devices lose then comes with the next buffer.
    //
    // A thread for each vCPU would be faster where they are several, and crash their kernel now and then: a vCPU can
    // run a breakpoint that the kernel has just patched away (its jump labels), which no processor does. The buffer for
    // translated code is many times what a boot takes; the default is a gigabyte, which long runs fill with dead code.
    add("accel", "tcg,thread=single,tb-size=256".into());
    if *count_instructions {
        // The clock of a guest that waits does not follow the host's; nor does the calendar, and what is random is not.
        add("icount", "shift=0,sleep=off".into());
        add("rtc", "base=2000-01-01,clock=vm".into());
        add("seed", "1".into());
    }
    // Virtualization of its own is of no use to a guest here.
    add("cpu", "max,-svm".into());
    add("smp", format!("{vcpus}"));
    add("m", format!("{memory_mib}M"));
    // Our process maps the same memory.
    add("object", format!("memory-backend-memfd,id=ram,share=on,size={memory_mib}M"));
    add("kernel", descriptor(kernel));
    add("initrd", descriptor(initramfs));
    add("append", (*append).to_owned());
    add("chardev", "stdio,id=console,signal=off".into());
    add("serial", "chardev:console".into());
    add("global", "virtio-mmio.force-legacy=false".into());
    for ((device, _), fd) in devices.iter().zip(sockets..) {
        let id = match device {
            Device::Fs { .. } => "fs".to_owned(),
            Device::Vsock => "vsock".to_owned(),
            Device::Disk { number, .. } => format!("disk{number}"),
        };
        add("chardev", format!("socket,id={id},fd={fd}"));
        add(
            "device",
            match device {
                Device::Fs { tag, request_queues, queue_size } => format!(
                    "vhost-user-fs-device,chardev={id},tag={},num-request-queues={request_queues},queue-size={queue_size}",
                    escape(tag)
                ),
                Device::Vsock => format!("vhost-user-vsock-device,chardev={id}"),
                Device::Disk { queues, .. } => {
                    format!("vhost-user-blk,chardev={id},num-queues={queues},queue-size={DISK_QUEUE_SIZE}")
                }
            },
        );
    }
    let mut queues = sockets.saturating_add(RawFd::try_from(devices.len()).unwrap_or(RawFd::MAX))..;
    for (number, nic) in nics.iter().enumerate() {
        let fds: Vec<String> = queues.by_ref().take(nic.queues.len()).map(|fd| fd.to_string()).collect();
        // vhost-net would be another part of the host's kernel for the guest to attack.
        let several = fds.len() > 1;
        let named = if several { "fds" } else { "fd" };
        add("netdev", format!("tap,id=net{number},{named}={},vhost=off", fds.join(":")));
        let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let mq = if several { ",mq=on" } else { "" };
        add("device", format!("virtio-net-device,netdev=net{number},mac={}{mq},{NO_EVENT_IDX}", mac.join(":")));
    }
    if !*count_instructions {
        // Its answers come when the host has time for them.
        add("object", "rng-builtin,id=rng".into());
        // QEMU makes all that the guest asks for before it hands it over: 4 GiB at a time, were it not limited.
        add(
            "device",
            format!("virtio-rng-device,rng=rng,max-bytes={RANDOM_BYTES},period={RANDOM_PERIOD_MS},{NO_EVENT_IDX}"),
        );
    }
    // Memory that the guest frees goes back to the host.
    add("device", format!("virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on,{NO_EVENT_IDX}"));
    args
}

fn descriptor(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// A value inside of a comma-separated list.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixStream, path::Path};

    use super::*;

    fn nic(number: u8, queues: usize) -> Nic {
        let fd = || OwnedFd::from(File::open("/dev/null").unwrap());
        Nic { mac: [2, 0, 0, 0, 0, number], queues: std::iter::repeat_with(fd).take(queues).collect() }
    }

    #[test]
    fn everything_is_inherited_and_nothing_named() {
        let null = File::open("/dev/null").unwrap();
        let fs = Device::Fs { tag: "v,z".into(), request_queues: 2, queue_size: 1024 };
        let args = arguments(
            &Config {
                program: Path::new("/qemu"),
                root: Path::new("/run"),
                name: "default/a,b",
                vcpus: 2,
                memory_mib: 300,
                kernel: &null,
                initramfs: &null,
                append: "console=ttyS0 a,b",
                count_instructions: false,
                devices: vec![
                    (fs, UnixStream::pair().unwrap().0),
                    (Device::Vsock, UnixStream::pair().unwrap().0),
                    (Device::Disk { number: 0, queues: 2 }, UnixStream::pair().unwrap().0),
                ],
                nics: vec![nic(0, 1), nic(1, 2)],
            },
            3,
        );
        let value = |option: &str, which: usize| {
            let at = args.iter().enumerate().filter(|(_, a)| *a == option).nth(which).unwrap().0;
            args[at + 1].as_str()
        };
        assert_eq!(value("-kernel", 0), "/proc/self/fd/3");
        assert_eq!(value("-initrd", 0), "/proc/self/fd/4");
        assert_eq!(value("-append", 0), "console=ttyS0 a,b");
        assert_eq!(value("-name", 0), "vz,process=default/a,,b");
        assert_eq!((value("-smp", 0), value("-m", 0)), ("2", "300M"));
        assert!(value("-object", 0).contains("share=on,size=300M"));
        assert_eq!(value("-chardev", 1), "socket,id=fs,fd=5");
        assert_eq!(
            value("-device", 0),
            "vhost-user-fs-device,chardev=fs,tag=v,,z,num-request-queues=2,queue-size=1024"
        );
        assert_eq!(value("-chardev", 2), "socket,id=vsock,fd=6");
        assert_eq!(value("-device", 1), "vhost-user-vsock-device,chardev=vsock");
        assert_eq!(value("-device", 2), "vhost-user-blk,chardev=disk0,num-queues=2,queue-size=256");
        assert_eq!(value("-netdev", 0), "tap,id=net0,fd=8,vhost=off");
        assert_eq!(value("-device", 3), "virtio-net-device,netdev=net0,mac=02:00:00:00:00:00,event_idx=off");
        assert_eq!(value("-netdev", 1), "tap,id=net1,fds=9:10,vhost=off");
        assert_eq!(value("-device", 4), "virtio-net-device,netdev=net1,mac=02:00:00:00:00:01,mq=on,event_idx=off");
        for option in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(args.iter().any(|a| a == option), "{option}");
        }
        assert!(!args.iter().any(|a| a == "-icount"));
        // The guest decides how much it asks for.
        assert!(args.iter().any(|a| a.starts_with("virtio-rng-device") && a.contains("max-bytes=1048576,period=1000")));
    }

    #[test]
    fn counted_instructions_depend_on_nothing_of_the_hosts() {
        let null = File::open("/dev/null").unwrap();
        let args = |count_instructions| {
            let config = Config {
                program: Path::new("/qemu"),
                root: Path::new("/run"),
                name: "x",
                vcpus: 1,
                memory_mib: 256,
                kernel: &null,
                initramfs: &null,
                append: "quiet",
                count_instructions,
                devices: Vec::new(),
                nics: Vec::new(),
            };
            arguments(&config, 3).join(" ")
        };
        let counted = args(true);
        for wanted in ["-icount shift=0,sleep=off", "clock=vm", "-seed 1"] {
            assert!(counted.contains(wanted), "{counted}");
        }
        assert!(!counted.contains("virtio-rng") && args(false).contains("virtio-rng"));
    }
}

//! The loop of a vCPU: runs the guest, serves what it asks of the machine, ends with a cause.
//!
//! Threat: what the guest reads and writes, where and how wide. Every exit is either served here or ends the VM.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::libc;

use crate::{End, Error, bus::Bus, end::Processor, ports::Ports};

/// A vCPU that is ready to run.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) number: u8,
    pub(crate) fd: VcpuFd,
    pub(crate) bus: Arc<Bus>,
    pub(crate) ports: Arc<Ports>,
}

impl Vcpu {
    /// Runs until the VM ends because of this vCPU.
    pub(crate) fn run(mut self) -> End {
        loop {
            if let Some(end) = self.step() {
                return end;
            }
        }
    }

    fn step(&mut self) -> Option<End> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // A signal, or a vCPU that was woken while it waits to be started.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Err(e) => return Some(self.failed(e.errno())),
        };
        let what = match exit {
            VcpuExit::MmioRead(address, bytes) => {
                self.bus.read(address, bytes);
                return None;
            }
            VcpuExit::MmioWrite(address, bytes) => {
                self.bus.write(address, bytes);
                return None;
            }
            VcpuExit::IoIn(port, bytes) => {
                self.ports.read(port, bytes);
                return None;
            }
            VcpuExit::IoOut(port, bytes) => return self.ports.write(port, bytes),
            // The interrupt controllers are in the kernel, which waits for interrupts itself.
            VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => return None,
            VcpuExit::SystemEvent(kind, _) => return Some(self.system_event(kind)),
            VcpuExit::Shutdown => What::TripleFault,
            VcpuExit::InternalError => What::Internal,
            VcpuExit::FailEntry(reason, _) => What::Entry(reason),
            VcpuExit::MemoryFault { gpa, .. } => What::Memory(gpa),
            other => What::Unexpected(format!("{other:?}")),
        };
        Some(self.over(what))
    }

    fn over(&mut self, what: What) -> End {
        let at = self.processor();
        match what {
            What::TripleFault => End::TripleFault(at),
            What::Internal => {
                let (suberror, data) = self.internal_error();
                End::Internal { suberror, data, at }
            }
            What::Entry(reason) => End::Entry { reason, at },
            What::Memory(address) => End::Memory { address, at },
            What::Unexpected(exit) => End::Unexpected { exit, at },
        }
    }

    fn system_event(&self, kind: u32) -> End {
        match kind {
            kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => End::PowerOff,
            kvm_bindings::KVM_SYSTEM_EVENT_RESET => End::Reset,
            kind => End::Unexpected { exit: format!("system event {kind}"), at: self.processor() },
        }
    }

    fn failed(&mut self, errno: i32) -> End {
        End::Run { errno, at: self.processor() }
    }

    /// KVM's suberror, and what it says about it.
    fn internal_error(&mut self) -> (u32, Vec<u64>) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the kernel filled this member; all of its
        // fields are integers, for which every value is valid.
        #[allow(unsafe_code)]
        let error = unsafe { run.__bindgen_anon_1.internal };
        let count = usize::try_from(error.ndata).unwrap_or(0).min(error.data.len());
        (error.suberror, error.data.iter().take(count).copied().collect())
    }

    fn processor(&self) -> Processor {
        let regs = self.fd.get_regs().unwrap_or_default();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        Processor {
            vcpu: self.number,
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            cs: sregs.cs.selector,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
        }
    }
}

/// An exit that ends the VM, without its details.
#[derive(Debug)]
enum What {
    TripleFault,
    Internal,
    Entry(u64),
    Memory(u64),
    Unexpected(String),
}

impl Vcpu {
    /// Starts it on a thread of its own; `ended` is told how the VM ended, `refused` where the thread could not be
    /// confined.
    pub(crate) fn start(
        self,
        ended: impl FnOnce(End) + Send + 'static,
        refused: crate::OnFailure,
    ) -> Result<(), Error> {
        let name = format!("vcpu-{}", self.number);
        let named = name.clone();
        vz_jail::spawn(
            vz_jail::Role::Vcpu,
            &name,
            move || ended(self.run()),
            move |e| refused(format!("thread {named}: {}", crate::chain(&e))),
        )
        .map(drop)
        .map_err(|source| Error::Thread { name, source })
    }
}

//! The adapter: vhost-user's view of a device on one side, [`Backend`] on the other.
//!
//! Neither side's notifications are suppressed. Suppression needs a full memory barrier on both sides, between what one
//! side writes and what it reads then of the other's. Under QEMU's emulation with a single thread the guest has none:
//! `xchg` and `mfence` become plain code. An interrupt that the device leaves out is then lost now and then, and the
//! guest waits for ever. So VIRTIO_RING_F_EVENT_IDX is not offered, every buffer that is returned causes an interrupt,
//! and [`vz_virtio`] never sets VRING_USED_F_NO_NOTIFY without that feature.

use std::{
    cell::Cell,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT, bitmap::BitmapMmapRegion};
use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vz_jail::Role;
use vz_sys::sync::lock;
use vz_virtio::{Backend, Kicks, Kind, Memory, Queue, Worker};

use crate::{Failure, OnFailure, chain, words};

type AtomicMemory = GuestMemoryAtomic<Memory>;
type Vring = VringMutex<AtomicMemory>;

/// What QEMU's virtio-mmio offers the guest for every queue, whatever the device asks for.
const MMIO_QUEUE_SIZE: u16 = 1024;

/// A worker with what its thread knows about itself.
struct Thread {
    backend: Box<dyn Backend>,
    name: String,
    role: Role,
    entered: bool,
    /// A ring was unusable: the backend gets none until the guest resets the device.
    broken: bool,
    /// It told [`OnFailure`], which ends the machine; the backend is not called again.
    failed: bool,
}

pub(crate) struct Adapter {
    kind: Kind,
    queues: usize,
    queue_size: u16,
    features: u64,
    space: Vec<u8>,
    masks: Vec<u64>,
    threads: Vec<Mutex<Thread>>,
    memory: AtomicMemory,
    active: AtomicBool,
    on_failure: OnFailure,
}

impl Adapter {
    pub(crate) fn new(
        queues: usize,
        workers: Vec<Worker<Role>>,
        memory: AtomicMemory,
        on_failure: OnFailure,
    ) -> Option<Self> {
        let first = workers.first()?;
        let kind = first.backend.kind();
        let features = first.backend.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let queue_size =
            workers.iter().flat_map(|worker| worker.backend.queue_sizes()).copied().max()?.max(MMIO_QUEUE_SIZE);
        let space = first.backend.config().to_vec();
        let masks = workers.iter().map(|worker| worker.queues).collect();
        let threads = workers
            .into_iter()
            .map(|Worker { backend, thread, role, .. }| {
                Mutex::new(Thread { backend, name: thread, role, entered: false, broken: false, failed: false })
            })
            .collect();
        let active = AtomicBool::new(false);
        Some(Self { kind, queues, queue_size, features, space, masks, threads, memory, active, on_failure })
    }

    /// The epoll data of a backend's source: 0 to `queues` are the queues and the exit event.
    pub(crate) fn event_of(&self, token: u16) -> u16 {
        u16::try_from(self.queues).unwrap_or(u16::MAX).saturating_add(1).saturating_add(token)
    }

    /// Prepares the thread that this runs on.
    fn enter(thread: &mut Thread) -> Result<(), Failure> {
        // Only for people who look: no reason to fail.
        vz_sys::thread::set_name(&thread.name);
        let failed = |e: &dyn std::error::Error| Failure::Thread { thread: thread.name.clone(), message: chain(e) };
        vz_jail::enter(thread.role).map_err(|e| failed(&e))?;
        thread.backend.enter_thread().map_err(|e| failed(&e))
    }

    /// Confines the connection's thread, which the library starts, at its first message.
    fn enter_protocol(&self) {
        thread_local!(static ENTERED: Cell<bool> = const { Cell::new(false) });
        if ENTERED.replace(true) {
            return;
        }
        if let Err(e) = vz_jail::enter(Role::Protocol) {
            let thread = thread::current().name().unwrap_or("vhost").to_owned();
            (self.on_failure)(Failure::Thread { thread, message: chain(&e) });
        }
    }

    fn handle(&self, thread: &mut Thread, event: u16, vrings: &[Vring]) -> Result<(), Failure> {
        if !thread.entered {
            thread.entered = true;
            Self::enter(thread)?;
        }
        let broken = thread.broken;
        // Always in the same order, and only by this thread or for a moment by the one of the protocol.
        let mut guards: Vec<_> = vrings.iter().map(VringT::get_mut).collect();
        let mut queues: Vec<Option<&mut Queue>> = guards
            .iter_mut()
            .map(|guard| {
                let usable = !broken && guard.is_enabled() && guard.get_queue().ready();
                usable.then(|| guard.get_queue_mut())
            })
            .collect();
        let memory = self.memory.memory();
        let served = match event.checked_sub(self.event_of(0)) {
            Some(token) => thread.backend.source(token, &mut queues, &memory),
            None => thread.backend.queue(event, &mut queues, &memory),
        };
        let kicks = served.unwrap_or_else(|e| {
            thread.broken = true;
            tracing::warn!(thread = thread.name, "device stopped until the guest resets it: {}", chain(&e));
            Kicks::NONE
        });
        for (index, guard) in guards.iter_mut().enumerate() {
            if kicks.contains(index) {
                guard
                    .signal_used_queue()
                    .map_err(|e| Failure::Thread { thread: thread.name.clone(), message: format!("interrupt: {e}") })?;
            }
        }
        Ok(())
    }
}

impl VhostUserBackend for Adapter {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size.into()
    }

    fn features(&self) -> u64 {
        // A VMM asks for these before it says anything about the guest.
        self.enter_protocol();
        self.features
    }

    fn acked_features(&self, features: u64) {
        // The VMM says so each time it starts the device; the second time, the guest has reset it in between.
        let again = self.active.swap(true, Ordering::Relaxed);
        for thread in &self.threads {
            let mut thread = lock(thread);
            if again {
                thread.broken = false;
                thread.backend.reset();
            }
            thread.backend.activate(features);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        // QEMU has the configuration space of virtio-fs itself, and warns of a device that has one too.
        features.set(VhostUserProtocolFeatures::CONFIG, self.kind != Kind::Fs);
        features
    }

    // It is not offered.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let range = usize::try_from(offset).ok().zip(usize::try_from(size).ok());
        let end = |(start, size): (usize, usize)| Some((start, start.checked_add(size)?));
        let bytes = range.and_then(end).and_then(|(start, end)| self.space.get(start..end));
        // An empty answer is vhost-user's way of an error.
        bytes.map(<[u8]>::to_vec).unwrap_or_default()
    }

    // It is this very object that was replaced.
    fn update_memory(&self, _memory: AtomicMemory) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.masks.clone()
    }

    /// Always `Ok`: an error would end the thread without a word.
    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        let Some(thread) = self.threads.get(thread) else { return Ok(()) };
        let mut thread = lock(thread);
        if thread.failed {
            return Ok(());
        }
        let result = catch_unwind(AssertUnwindSafe(|| self.handle(&mut thread, event, vrings)));
        let failure = match result {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(panic) => Failure::Panic { thread: thread.name.clone(), message: words(panic.as_ref()).to_owned() },
        };
        thread.failed = true;
        (self.on_failure)(failure);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestAddress;
    use vz_virtio::{Error, Queues};

    use super::*;

    struct Device;

    impl Backend for Device {
        fn kind(&self) -> Kind {
            Kind::Vsock
        }

        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }

        fn config(&self) -> &[u8] {
            &[]
        }

        fn run(&mut self, _: Queues<'_, '_>, _: &Memory) -> Result<Kicks, Error> {
            Ok(Kicks::NONE)
        }
    }

    #[test]
    fn no_guest_may_suppress_notifications() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let workers = Worker::single(Device, "test", Role::Protocol);
        let adapter = Adapter::new(1, workers, GuestMemoryAtomic::new(memory), Arc::new(|_| ())).unwrap();
        // VIRTIO_RING_F_EVENT_IDX (virtio 1.2, 6).
        assert_eq!(adapter.features >> 29 & 1, 0);
        assert_eq!(adapter.features >> 28 & 1, 1, "indirect descriptors are");
    }
}

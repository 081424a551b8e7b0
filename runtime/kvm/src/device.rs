//! A virtio device on this machine: its registers on one side, a thread for each of its workers on the other.
//!
//! The guest's writes to the registers are handled by whichever vCPU made them; queues belong to the workers' threads,
//! which get them when the driver is ready and give them up when it resets the device. A notification wakes the thread
//! by an eventfd that KVM signals itself, an interrupt is a request to KVM: neither leaves the kernel for a vCPU.

use std::{
    fmt,
    io::{self, ErrorKind},
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, MutexGuard,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use kvm_ioctls::VmFd;
use virtio_queue::QueueT;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};
use vz_jail::Role;
use vz_sys::sync::lock;
use vz_virtio::{Backend, Kicks, Kind, Memory, Queue, Worker};

use crate::{Error, OnFailure, chain, register, register_page::RegisterPage};

/// Epoll data: a worker's commands, then its queues, then its backend's sources.
const COMMAND: u64 = 0;
const QUEUE: u64 = 1;
const SOURCE: u64 = 1 << 32;
/// Commands that wait for a worker. A guest that writes faster than its device takes it waits, and nothing grows.
const COMMANDS: usize = 16;
/// Events that are taken at once.
const EVENTS: usize = 16;

/// The guest's interrupt line of a device.
///
/// That buffers were used, once true, stays true until the device is reset: a driver looks at its rings at each
/// interrupt whatever else it is for, and its acknowledgement need not come here. KVM takes that one without waking us,
/// see [`Interrupt::USED`].
#[derive(Debug)]
pub(crate) struct Interrupt {
    status: Mutex<u32>,
    page: RegisterPage,
    line: Box<dyn InterruptLine>,
}

/// What the guest's interrupt controller has of a device.
pub(crate) trait InterruptLine: fmt::Debug + Send + Sync {
    /// An edge. Edges of one line must not overlap: the second would be none.
    fn pulse(&self) -> io::Result<()>;
}

/// A pin of KVM's interrupt controllers.
///
/// The thread that has something to say interrupts the guest itself, by two requests. An eventfd for KVM (an irqfd)
/// takes a kernel worker for that, to be woken and switched to each time: only an interrupt that is a message (MSI),
/// which virtio-mmio does not have, is delivered where the eventfd is written.
#[derive(Debug)]
pub(crate) struct Pin {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) gsi: u32,
}

impl InterruptLine for Pin {
    fn pulse(&self) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, true)?;
        Ok(self.vm.set_irq_line(self.gsi, false)?)
    }
}

impl Interrupt {
    /// A buffer was used. An acknowledgement of just this is for nobody.
    pub(crate) const USED: u32 = 1;
    /// The configuration space changed, or the device needs a reset.
    pub(crate) const CONFIG: u32 = 2;

    fn new(page: RegisterPage, line: Box<dyn InterruptLine>) -> Self {
        Self { status: Mutex::new(0), page, line }
    }

    fn change(&self, change: impl FnOnce(u32) -> u32) -> MutexGuard<'_, u32> {
        let mut status = lock(&self.status);
        let changed = change(*status);
        if changed != *status {
            *status = changed;
            self.page.set(register::INTERRUPT_STATUS, changed);
        }
        status
    }

    fn raise(&self, why: u32) -> Result<(), Error> {
        // Held until the line is down again.
        let _status = self.change(|status| status | why);
        self.line.pulse().map_err(Error::system("interrupt the guest"))
    }

    /// The driver has seen these reasons.
    pub(crate) fn acknowledge(&self, seen: u32) {
        drop(self.change(|status| status & !(seen & Self::CONFIG)));
    }

    /// The device is as new.
    fn reset(&self) {
        drop(self.change(|_| 0));
    }
}

/// An interrupt line that ends nowhere.
#[cfg(any(test, feature = "fuzzing"))]
#[derive(Debug)]
pub(crate) struct Unheard;

#[cfg(any(test, feature = "fuzzing"))]
impl InterruptLine for Unheard {
    fn pulse(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The device's status register: how far the driver is, and whether the device has given up.
#[derive(Debug)]
struct Status {
    shown: Mutex<Shown>,
    page: RegisterPage,
}

#[derive(Debug, Clone, Copy, Default)]
struct Shown {
    driver: u32,
    /// A ring was unusable: the device needs a reset.
    broken: bool,
}

impl Status {
    fn change(&self, change: impl FnOnce(&mut Shown)) {
        let mut shown = lock(&self.shown);
        change(&mut shown);
        let needs_reset = if shown.broken { register::status::NEEDS_RESET } else { 0 };
        self.page.set(register::STATUS, shown.driver | needs_reset);
    }

    fn is_broken(&self) -> bool {
        lock(&self.shown).broken
    }
}

/// A device's configuration space, as the driver sees it.
#[derive(Debug)]
struct Space {
    shown: Mutex<(Vec<u8>, u32)>,
    page: RegisterPage,
}

impl Space {
    fn new(bytes: &[u8], page: RegisterPage) -> Self {
        page.set_config(bytes);
        Self { shown: Mutex::new((bytes.to_vec(), 0)), page }
    }

    /// Takes over the backend's. The generation changes with it, by which the driver knows that it read across a
    /// change.
    fn refresh(&self, now: &[u8]) {
        let mut shown = lock(&self.shown);
        let (bytes, generation) = &mut *shown;
        if bytes.as_slice() != now {
            now.clone_into(bytes);
            *generation = generation.wrapping_add(1);
            self.page.set_config(now);
            self.page.set(register::CONFIG_GENERATION, *generation);
        }
    }

    fn len(&self) -> usize {
        lock(&self.shown).0.len()
    }
}

/// What a worker is told.
#[derive(Debug)]
enum Command {
    /// The driver is ready and accepted these features. The queues are the worker's, by its own index.
    Activate { features: u64, queues: Vec<Option<Queue>> },
    /// The driver resets the device; answered when no queue is touched any more.
    Reset(SyncSender<()>),
    /// The driver wrote to the configuration space.
    Config { offset: u64, bytes: Vec<u8> },
}

/// The vCPUs' way to a worker.
#[derive(Debug)]
struct Line {
    commands: SyncSender<Command>,
    wake: Arc<EventFd>,
    /// The device's queues that the worker serves, in its order.
    queues: Vec<usize>,
}

impl Line {
    fn send(&self, command: Command) {
        // A worker is only gone where the machine is ending.
        if self.commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// A device, as its registers see it.
#[derive(Debug)]
pub(crate) struct Device {
    /// Its virtio id.
    pub(crate) kind: Kind,
    /// The features of its type.
    pub(crate) features: u64,
    /// Largest sizes of its queues.
    pub(crate) queue_sizes: Vec<u16>,
    space: Arc<Space>,
    /// Its interrupt.
    pub(crate) interrupt: Arc<Interrupt>,
    status: Arc<Status>,
    /// What the guest reads of it.
    pub(crate) page: RegisterPage,
    /// Signalled by KVM for each of its queues.
    pub(crate) notifications: Vec<EventFd>,
    lines: Vec<Line>,
}

impl Device {
    /// Makes the device and what its threads will run; the guest reads its registers in `page`, and is interrupted by
    /// `line`.
    pub(crate) fn new(
        workers: Vec<Worker<Role>>,
        memory: &Memory,
        page: RegisterPage,
        line: Box<dyn InterruptLine>,
    ) -> Result<(Self, Vec<Serving>), Error> {
        let first = workers.first().ok_or(Error::NoWorkers)?;
        let kind = first.backend.kind();
        let features = first.backend.features();
        let space = Arc::new(Space::new(first.backend.config(), page.clone()));
        let interrupt = Arc::new(Interrupt::new(page.clone(), line));
        let status = Arc::new(Status { shown: Mutex::default(), page: page.clone() });
        let mut sizes: Vec<(usize, u16)> = Vec::new();
        let mut lines = Vec::new();
        let mut servings = Vec::new();
        for worker in workers {
            let queues: Vec<usize> = (0..u64::BITS)
                .filter(|bit| worker.queues >> bit & 1 == 1)
                .filter_map(|bit| bit.try_into().ok())
                .collect();
            sizes.extend(queues.iter().copied().zip(worker.backend.queue_sizes().iter().copied()));
            let (commands, received) = sync_channel(COMMANDS);
            let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("make eventfd"))?;
            let wake = Arc::new(wake);
            lines.push(Line { commands, wake: Arc::clone(&wake), queues: queues.clone() });
            servings.push(Serving {
                name: worker.thread,
                role: worker.role,
                backend: worker.backend,
                memory: memory.clone(),
                indices: queues,
                notifications: Vec::new(),
                commands: received,
                wake,
                interrupt: Arc::clone(&interrupt),
                space: Arc::clone(&space),
                status: Arc::clone(&status),
                queues: Vec::new(),
            });
        }
        sizes.sort_unstable();
        // Each queue has one worker, and there is no gap.
        if sizes.iter().enumerate().any(|(wanted, (found, _))| wanted != *found) {
            return Err(Error::Queues(kind));
        }
        let notifications: Vec<EventFd> = sizes
            .iter()
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK))
            .collect::<Result<_, _>>()
            .map_err(Error::system("make eventfd"))?;
        for serving in &mut servings {
            for index in &serving.indices {
                if let Some(notification) = notifications.get(*index) {
                    serving.notifications.push(notification.try_clone().map_err(Error::system("duplicate eventfd"))?);
                }
            }
        }
        let queue_sizes = sizes.into_iter().map(|(_, size)| size).collect();
        Ok((Self { kind, features, queue_sizes, space, interrupt, status, page, notifications, lines }, servings))
    }

    /// Hands the queues, by index, to the workers.
    pub(crate) fn activate(&self, features: u64, queues: Vec<Option<Queue>>) {
        let mut queues = queues;
        for line in &self.lines {
            let own = line.queues.iter().map(|index| queues.get_mut(*index).and_then(Option::take)).collect();
            line.send(Command::Activate { features, queues: own });
        }
    }

    /// Takes the queues back; no buffer of the guest is touched afterwards.
    pub(crate) fn reset(&self) {
        let (done, answers) = sync_channel(self.lines.len());
        for line in &self.lines {
            line.send(Command::Reset(done.clone()));
        }
        drop(done);
        // Ends when each has answered, or is gone.
        while answers.recv().is_ok() {}
        self.status.change(|shown| shown.broken = false);
        self.interrupt.reset();
    }

    /// Shows how far the driver is, beside whether the device waits for a reset.
    pub(crate) fn set_status(&self, driver: u32) {
        self.status.change(|shown| shown.driver = driver);
    }

    /// Writes to the configuration space; what is beyond its end is dropped.
    pub(crate) fn write_config(&self, offset: u64, bytes: &[u8]) {
        let inside = usize::try_from(offset).ok().and_then(|offset| self.space.len().checked_sub(offset)).unwrap_or(0);
        let bytes = bytes.get(..bytes.len().min(inside)).unwrap_or_default();
        if let Some(line) = self.lines.first().filter(|_| !bytes.is_empty()) {
            line.send(Command::Config { offset, bytes: bytes.to_vec() });
        }
    }
}

/// A worker on its thread.
pub(crate) struct Serving {
    name: String,
    role: Role,
    backend: Box<dyn Backend>,
    memory: Memory,
    /// The device's indices of its queues.
    indices: Vec<usize>,
    notifications: Vec<EventFd>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    interrupt: Arc<Interrupt>,
    space: Arc<Space>,
    status: Arc<Status>,
    /// By its own index; none before the driver is ready.
    queues: Vec<Option<Queue>>,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("name", &self.name).field("indices", &self.indices).finish_non_exhaustive()
    }
}

/// What a backend is called for.
#[derive(Debug, Clone, Copy)]
enum Call {
    Queue(u16),
    Source(u16),
}

impl Serving {
    /// Starts the thread.
    pub(crate) fn start(self, on_failure: &OnFailure) -> Result<(), Error> {
        let name = self.name.clone();
        let thread = name.clone();
        let (on_failure, refused) = (Arc::clone(on_failure), Arc::clone(on_failure));
        let refused_name = name.clone();
        vz_jail::spawn(
            self.role,
            &name,
            move || {
                if let Err(e) = self.run() {
                    on_failure(format!("device thread {thread}: {}", chain(&e)));
                }
            },
            move |e| refused(format!("device thread {refused_name}: {}", chain(&e))),
        )
        .map(drop)
        .map_err(|source| Error::Thread { name, source })
    }

    /// The thread: serves until the process ends.
    pub(crate) fn run(mut self) -> Result<(), Error> {
        self.backend.enter_thread().map_err(Error::Backend)?;
        let epoll = Epoll::new().map_err(Error::system("make epoll"))?;
        let watch = |fd: RawFd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd, event).map_err(Error::system("watch descriptor"))
        };
        watch(self.wake.as_raw_fd(), COMMAND)?;
        for (notification, data) in self.notifications.iter().zip(QUEUE..) {
            watch(notification.as_raw_fd(), data)?;
        }
        for source in self.backend.sources() {
            watch(source.fd, SOURCE | u64::from(source.token))?;
        }
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(source) => return Err(Error::System { operation: "wait for events", source }),
            };
            for event in events.iter().take(count) {
                match event.data() {
                    COMMAND => self.commands()?,
                    data if data & SOURCE != 0 => {
                        self.call(Call::Source(u16::try_from(data & 0xffff).unwrap_or(u16::MAX)))?;
                    }
                    data => {
                        let index = data.saturating_sub(QUEUE);
                        if let Some(notification) = usize::try_from(index).ok().and_then(|i| self.notifications.get(i))
                        {
                            let _ = notification.read();
                            self.call(Call::Queue(u16::try_from(index).unwrap_or(u16::MAX)))?;
                        }
                    }
                }
            }
        }
    }

    fn commands(&mut self) -> Result<(), Error> {
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Activate { features, queues } => {
                    self.queues = queues;
                    self.backend.activate(features);
                    // The driver may have made buffers available before it said that it is ready.
                    for index in 0..self.queues.len() {
                        self.call(Call::Queue(u16::try_from(index).unwrap_or(u16::MAX)))?;
                    }
                }
                Command::Reset(done) => {
                    self.queues.clear();
                    self.backend.reset();
                    let _ = done.send(());
                }
                Command::Config { offset, bytes } => {
                    self.backend.write_config(offset, &bytes);
                    self.space.refresh(self.backend.config());
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, what: Call) -> Result<(), Error> {
        if self.queues.is_empty() || self.status.is_broken() {
            if let Call::Source(token) = what {
                // So that it does not go on calling.
                let _ = self.backend.source(token, &mut [], &self.memory);
            }
            return Ok(());
        }
        let mut lent: Vec<Option<&mut Queue>> = self.queues.iter_mut().map(Option::as_mut).collect();
        let served = match what {
            Call::Queue(index) => self.backend.queue(index, &mut lent, &self.memory),
            Call::Source(token) => self.backend.source(token, &mut lent, &self.memory),
        };
        let kicks = match served {
            Ok(kicks) => kicks,
            Err(e) => {
                tracing::warn!(thread = self.name, "device stopped until the guest resets it: {}", chain(&e));
                self.status.change(|shown| shown.broken = true);
                self.interrupt.raise(Interrupt::CONFIG)?;
                Kicks::NONE
            }
        };
        let mut why = 0;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            // Where the guest's wish cannot be read, it is interrupted once too often.
            if kicks.contains(index)
                && queue.as_mut().is_some_and(|queue| queue.needs_notification(&self.memory).unwrap_or(true))
            {
                why |= Interrupt::USED;
            }
        }
        if kicks.config_changed() {
            self.space.refresh(self.backend.config());
            why |= Interrupt::CONFIG;
        }
        if why != 0 {
            self.interrupt.raise(why)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, AtomicU32, Ordering},
        thread,
    };

    use super::*;
    use crate::register_page::RegisterPages;

    /// Counts edges, and whether one began before another was over.
    #[derive(Debug, Default)]
    struct Edges {
        up: AtomicBool,
        count: AtomicU32,
        overlapped: AtomicBool,
    }

    impl InterruptLine for Arc<Edges> {
        fn pulse(&self) -> io::Result<()> {
            if self.up.swap(true, Ordering::SeqCst) {
                self.overlapped.store(true, Ordering::SeqCst);
            }
            thread::yield_now();
            self.count.fetch_add(1, Ordering::SeqCst);
            self.up.store(false, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn every_reason_is_an_edge_of_its_own() {
        let edges = Arc::new(Edges::default());
        let page = RegisterPages::reserve(1).unwrap().of(0);
        let interrupt = Interrupt::new(page, Box::new(Arc::clone(&edges)));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| interrupt.raise(Interrupt::USED).unwrap()));
            }
        });
        assert_eq!(edges.count.load(Ordering::SeqCst), 4000);
        assert!(!edges.overlapped.load(Ordering::SeqCst));
    }
}

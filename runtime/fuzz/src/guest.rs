//! A hostile guest's driver: rings that it writes as it likes, and what it may expect of a device all the same.

use std::ops::Range;

use arbitrary::{Arbitrary, Unstructured};
use virtio_queue::QueueT;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vz_virtio::{Backend, Memory};

use crate::{
    program::{Chain, Shape, Step, Wrong},
    ring::{Descriptor, INDIRECT, NEXT, RING, Ring, SIZE, WRITE},
};

/// Guest memory: two regions with a hole in between.
pub(crate) const LOW: Range<u64> = 0..0x4_0000;
pub(crate) const HIGH: Range<u64> = 0x5_0000..0x6_0000;
/// Rings from 0 on, indirect tables behind, then what a device reads, then what it writes.
const TABLES: u64 = 0x2000;
const TABLE: u64 = 0x100;
const DATA: u64 = 0x4000;
const ROOM: u64 = 0x1_8000;
/// Most steps of a program.
const STEPS: usize = 100;

/// A device under test.
pub(crate) trait Device: Sized {
    /// What the guest says to it, in the form of a chain's readable bytes.
    type Data: for<'a> Arbitrary<'a>;
    /// What happens on the host meanwhile.
    type Host: for<'a> Arbitrary<'a>;
    /// Whether it may write to guest memory that no buffer names.
    const WRITES_ELSEWHERE: bool = false;

    /// The device and what is around it. An error says why it cannot be had here.
    fn new() -> Result<Self, String>;
    /// Its backends, and the queues that each has. There are not more than 8 queues.
    fn workers(&mut self) -> &mut [Worker];
    /// What is said before anything else.
    fn greeting() -> Option<Self::Data> {
        None
    }
    /// How a good driver says it.
    fn ask(data: Self::Data) -> Ask;
    fn host(&mut self, action: Self::Host);
    /// Panics where the host is not as it must be.
    fn check(&mut self) {}
}

/// A chain of a good driver.
#[derive(Debug, Default)]
pub(crate) struct Ask {
    pub(crate) queue: usize,
    /// What the device reads.
    pub(crate) bytes: Vec<u8>,
    /// Bytes of the buffers that it writes; whole pages are aligned to pages.
    pub(crate) room: Vec<u32>,
}

/// One backend.
pub(crate) struct Worker {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) queues: usize,
}

impl Worker {
    pub(crate) fn new(backend: impl Backend + 'static) -> Self {
        let queues = backend.queue_sizes().len();
        Self { backend: Box::new(backend), queues }
    }
}

struct Guest<D: Device> {
    device: D,
    memory: Memory,
    /// What the guest itself wrote, to tell it from what the device did.
    shadow: Vec<u8>,
    /// Where the device may write.
    writable: Vec<Range<u64>>,
    rings: Vec<Ring>,
    next_data: u64,
    next_room: u64,
    next_table: u64,
    /// The guest told the device to write where the guest's own tables are, or the like: it gets what it asked for.
    tainted: bool,
}

/// Runs a program.
pub(crate) fn run<D: Device>(bytes: &[u8]) -> Result<(), String> {
    let mut u = Unstructured::new(bytes);
    let mut guest = Guest::<D>::new()?;
    let _ = guest.program(&mut u);
    guest.check();
    Ok(())
}

impl<D: Device> Guest<D> {
    fn new() -> Result<Self, String> {
        let mut device = D::new()?;
        let queues: usize = device.workers().iter().map(|worker| worker.queues).sum();
        let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap();
        let regions = [LOW, HIGH].map(|range| (GuestAddress(range.start), len(&range)));
        let rings: Vec<_> = (0..).take(queues).map(Ring::new).collect();
        assert!(u64::try_from(queues).unwrap() * RING <= TABLES);
        Ok(Self {
            device,
            memory: GuestMemoryMmap::from_ranges(&regions).unwrap(),
            shadow: vec![0; usize::try_from(HIGH.end).unwrap()],
            writable: Vec::new(),
            rings,
            next_data: DATA,
            next_room: ROOM,
            next_table: TABLES,
            tainted: false,
        })
    }

    fn program(&mut self, u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        self.activate(u64::arbitrary(u)?, bool::arbitrary(u)?);
        if let Some(data) = D::greeting() {
            self.ask(data);
        }
        for _ in 0..STEPS {
            if u.is_empty() {
                break;
            }
            self.step(Step::<D::Data, D::Host>::arbitrary(u)?);
        }
        for worker in 0..self.device.workers().len() {
            self.call(worker, None);
        }
        Ok(())
    }

    fn step(&mut self, step: Step<D::Data, D::Host>) {
        match step {
            Step::Ask(data) => self.ask(data),
            Step::Chain(chain) => self.chain(chain),
            Step::Notify(queue) => self.notify(self.ring(queue)),
            Step::Source(worker) => {
                let count = self.device.workers().len();
                self.call(usize::from(worker) % count, None);
            }
            Step::Host(action) => self.device.host(action),
            Step::Head(queue, head) => {
                let ring = self.ring(queue);
                self.rings[ring].mixed = true;
                self.publish(ring, head, 0);
            }
            Step::Index(queue, ahead) => {
                let ring = self.ring(queue);
                self.rings[ring].lies = true;
                self.rings[ring].available = self.rings[ring].available.wrapping_add(ahead);
                self.set_index(ring);
            }
            Step::Config(offset, bytes) => {
                for worker in self.device.workers() {
                    worker.backend.write_config(offset.into(), &bytes.0);
                    assert!(worker.backend.config().len() <= 256);
                }
            }
            Step::Reset(acked) => {
                for worker in self.device.workers() {
                    worker.backend.reset();
                }
                self.activate(acked, acked & 1 == 1);
            }
        }
    }

    fn activate(&mut self, acked: u64, event_idx: bool) {
        for index in 0..self.rings.len() {
            let base = self.rings[index].base();
            self.write(base, &[0; RING as usize]);
            self.rings[index].set_up(event_idx);
        }
        for worker in self.device.workers() {
            let features = worker.backend.features();
            worker.backend.activate(acked & features);
        }
    }

    fn ring(&self, number: u8) -> usize {
        usize::from(number) % self.rings.len()
    }

    /// Writes as the guest.
    fn write(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        let start = usize::try_from(address).unwrap();
        self.shadow[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// A place for so many bytes in a part of memory that is used over and over.
    fn place(next: &mut u64, part: Range<u64>, len: u64) -> u64 {
        if *next + len > part.end {
            *next = part.start;
        }
        let at = *next;
        // A gap, so that nothing passes by being contiguous.
        *next += len + 8;
        at
    }

    /// Does what a good driver does.
    fn ask(&mut self, data: D::Data) {
        let Ask { queue, bytes, room } = D::ask(data);
        let mut descriptors = self.readable(&bytes, &[]);
        descriptors.extend(room.iter().map(|len| self.writable((*len).into())));
        descriptors.truncate(usize::from(SIZE));
        if !descriptors.is_empty() {
            self.offer(queue, descriptors, Shape::Plain, None);
        }
        self.notify(queue);
    }

    /// Puts bytes into buffers of these lengths, of which the last takes the rest.
    fn readable(&mut self, bytes: &[u8], cuts: &[u8]) -> Vec<Descriptor> {
        let mut rest = bytes.get(..0x1_0000).unwrap_or(bytes);
        let mut readable = Vec::new();
        for cut in cuts.iter().map(|cut| usize::from(*cut)).chain([usize::MAX]) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(cut.min(rest.len()));
            let len = now.len();
            let address = Self::place(&mut self.next_data, DATA..ROOM, u64::try_from(len).unwrap());
            self.write(address, now);
            readable.push(Descriptor { address, len: u32::try_from(len).unwrap(), flags: 0, next: 0 });
            rest = later;
        }
        readable
    }

    fn writable(&mut self, len: u64) -> Descriptor {
        if len > 0 && len.is_multiple_of(4096) {
            self.next_room = self.next_room.next_multiple_of(4096);
        }
        let address = Self::place(&mut self.next_room, ROOM..LOW.end, len);
        Descriptor { address, len: u32::try_from(len).unwrap(), flags: WRITE, next: 0 }
    }

    fn chain(&mut self, chain: Chain<D::Data>) {
        let ring = self.ring(chain.queue);
        let bytes = chain.data.map(|data| D::ask(data).bytes).unwrap_or_default();
        let readable = self.readable(&bytes, &chain.cuts.0);
        let writable: Vec<_> = chain.room.0.iter().map(|room| self.writable(room.len())).collect();
        let mut descriptors =
            if chain.shape == Shape::Backwards { [writable, readable].concat() } else { [readable, writable].concat() };
        if descriptors.is_empty() {
            return;
        }
        descriptors.truncate(usize::from(SIZE));
        self.offer(ring, descriptors, chain.shape, chain.wrong);
        if chain.notify {
            self.notify(ring);
        }
    }

    fn offer(&mut self, ring: usize, mut descriptors: Vec<Descriptor>, shape: Shape, wrong: Option<Wrong>) {
        let count = u16::try_from(descriptors.len()).unwrap();
        let indirect = shape == Shape::Indirect;
        let head = self.rings[ring].next_descriptor;
        let slot = |i: u16| if indirect { i } else { (head + i) % SIZE };
        for (i, descriptor) in (0..).zip(&mut descriptors) {
            let last = i + 1 == count;
            descriptor.next = slot(if last { 0 } else { i + 1 });
            if !last || shape == Shape::Endless {
                descriptor.flags |= NEXT;
            }
        }
        let which = |which: u8| usize::from(which) % descriptors.len();
        match wrong {
            Some(Wrong::Address(i, place)) => {
                let i = which(i);
                descriptors[i].address = place.address();
            }
            Some(Wrong::Length(i, len)) => {
                let i = which(i);
                descriptors[i].len = len.u32();
            }
            Some(Wrong::Flags(i, flags)) => {
                let i = which(i);
                descriptors[i].flags = flags;
                // It may go on, or end.
                self.rings[ring].mixed = true;
                // Its buffer may be a table.
                self.tainted |= flags & INDIRECT != 0;
            }
            Some(Wrong::Next(i, next)) => {
                let i = which(i);
                descriptors[i].next = next;
                // Leads into what is left of other chains, or to where nothing was.
                self.rings[ring].mixed = true;
            }
            None => {}
        }
        let mut most = 0u64;
        for descriptor in descriptors.iter().filter(|descriptor| descriptor.flags & WRITE != 0) {
            let range = descriptor.address..descriptor.address.saturating_add(descriptor.len.into());
            self.tainted |= range.start < DATA && !range.is_empty();
            // What the device was told to write may be what it is told to read.
            most = most.saturating_add(descriptor.len.into());
            self.writable.push(range);
        }
        if shape == Shape::Endless {
            most = u64::MAX;
        }
        let encoded: Vec<[u8; 16]> = descriptors.iter().map(Descriptor::encode).collect();
        if indirect {
            let table = self.next_table;
            self.next_table += TABLE;
            if self.next_table >= DATA {
                self.next_table = TABLES;
                self.rings.iter_mut().filter(|ring| ring.outstanding() > 0).for_each(|ring| ring.mixed = true);
            }
            self.write(table, &encoded.concat());
            let len = u32::from(count) * 16;
            let entry = Descriptor { address: table, len, flags: INDIRECT, next: 0 }.encode();
            self.write(self.rings[ring].base() + 16 * u64::from(head), &entry);
            self.rings[ring].next_descriptor = (head + 1) % SIZE;
        } else {
            for (i, entry) in (0..).zip(&encoded) {
                self.write(self.rings[ring].base() + 16 * u64::from(slot(i)), entry);
            }
            self.rings[ring].next_descriptor = (head + count) % SIZE;
        }
        if self.rings[ring].outstanding() == 0 {
            self.rings[ring].written = 0;
        }
        self.rings[ring].written += if indirect { 1 } else { count };
        self.rings[ring].mixed |= self.rings[ring].written > SIZE;
        self.publish(ring, head, most);
    }

    fn publish(&mut self, ring: usize, head: u16, most: u64) {
        let Ring { available, .. } = self.rings[ring];
        self.write(self.rings[ring].avail() + 4 + 2 * u64::from(available % SIZE), &head.to_le_bytes());
        self.rings[ring].available = available.wrapping_add(1);
        let chains = self.rings[ring].published.entry(head).or_insert((0, 0));
        *chains = (chains.0 + 1, chains.1.max(most));
        self.set_index(ring);
    }

    fn set_index(&mut self, ring: usize) {
        let index = self.rings[ring].available;
        self.write(self.rings[ring].avail() + 2, &index.to_le_bytes());
    }

    /// The worker that has a queue, and the first of its queues.
    fn worker_of(&mut self, ring: usize) -> (usize, usize) {
        let mut first = 0;
        for (index, worker) in self.device.workers().iter().enumerate() {
            if ring < first + worker.queues {
                return (index, first);
            }
            first += worker.queues;
        }
        unreachable!("every queue is somebody's")
    }

    fn notify(&mut self, ring: usize) {
        let (worker, first) = self.worker_of(ring);
        self.call(worker, Some(ring - first));
    }

    /// Lets a backend work: for a queue, or for its source.
    fn call(&mut self, worker: usize, queue: Option<usize>) {
        let before: usize = self.device.workers()[..worker].iter().map(|worker| worker.queues).sum();
        let Self { device, rings, memory, .. } = self;
        let worker = &mut device.workers()[worker];
        let mine = before..before + worker.queues;
        let mut queues: Vec<_> =
            rings[mine.clone()].iter_mut().map(|ring| (!ring.broken).then_some(&mut ring.queue)).collect();
        let done = match queue {
            Some(index) => worker.backend.queue(u16::try_from(index).unwrap(), &mut queues, memory),
            None => worker.backend.source(0, &mut queues, memory),
        };
        let kicks = match done {
            Ok(kicks) => kicks,
            Err(_) => {
                // As a transport does.
                rings[mine].iter_mut().for_each(|ring| ring.broken = true);
                return;
            }
        };
        for (index, ring) in mine.enumerate() {
            if self.rings[ring].broken {
                continue;
            }
            let used = self.take_used(ring);
            assert!(used == 0 || kicks.contains(index), "used buffers of queue {index}, and told nobody");
            let Self { rings, memory, .. } = self;
            // A transport asks this each time.
            let _ = rings[ring].queue.needs_notification(memory);
        }
    }

    /// Looks at what came back.
    fn take_used(&mut self, ring: usize) -> usize {
        let ring = &mut self.rings[ring];
        let index: u16 = self.memory.read_obj(GuestAddress(ring.used_ring() + 2)).unwrap();
        let mut count = 0;
        while ring.used != index && !self.tainted && !ring.lies {
            let entry = ring.used_ring() + 4 + 8 * u64::from(ring.used % SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            let head = u16::try_from(head).expect("head of a chain");
            let (left, most) = ring.published.get_mut(&head).expect("a chain that was published");
            *left = left.checked_sub(1).expect("a chain that was not returned before");
            assert!(ring.mixed || u64::from(len) <= *most, "wrote {len} bytes to a chain of {most}");
            ring.used = ring.used.wrapping_add(1);
            count += 1;
        }
        ring.used = index;
        count
    }

    fn check(&mut self) {
        self.device.check();
        if self.tainted || D::WRITES_ELSEWHERE {
            return;
        }
        let mut allowed: Vec<_> = self.writable.clone();
        allowed.extend(self.rings.iter().map(Ring::device_part));
        let mut bytes = vec![0; self.shadow.len()];
        for range in [LOW, HIGH] {
            let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            self.memory.read_slice(&mut bytes[part], GuestAddress(range.start)).unwrap();
        }
        // A page at a time: most are as they were.
        for (page, (is, was)) in (0u64..).zip(bytes.chunks(4096).zip(self.shadow.chunks(4096))) {
            if is == was {
                continue;
            }
            for (i, (is, was)) in (0u64..).zip(is.iter().zip(was)) {
                let address = page * 4096 + i;
                assert!(
                    is == was || allowed.iter().any(|range| range.contains(&address)),
                    "the device wrote to {address:#x}, which nobody gave it"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::{QueueOwnedT, QueueT};
    use vz_virtio::{Error, Kicks, Kind, Queues};

    use super::*;
    use crate::{
        program::{Few, Room},
        values::Bytes,
    };

    /// A device that may do what none must.
    struct Rogue {
        /// Where it writes.
        to: Option<u64>,
        /// What it says that it wrote.
        len: u32,
        times: usize,
        kicks: bool,
    }

    impl Backend for Rogue {
        fn kind(&self) -> Kind {
            Kind::Rng
        }

        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }

        fn config(&self) -> &[u8] {
            &[]
        }

        fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
            let mut kicks = Kicks::NONE;
            let Some(Some(queue)) = queues.first_mut() else { return Ok(kicks) };
            while let Some(chain) = queue.iter(memory).unwrap().next() {
                if let Some(to) = self.to {
                    memory.write_slice(&[1], GuestAddress(to)).unwrap();
                }
                for _ in 0..self.times {
                    queue.add_used(memory, chain.head_index(), self.len).unwrap();
                }
                if self.kicks {
                    kicks.insert(0);
                }
            }
            Ok(kicks)
        }
    }

    struct Test([Worker; 1]);

    impl Device for Test {
        type Data = Bytes;
        type Host = ();

        fn new() -> Result<Self, String> {
            Ok(Self([Worker::new(Rogue { to: None, len: 64, times: 1, kicks: true })]))
        }

        fn workers(&mut self) -> &mut [Worker] {
            &mut self.0
        }

        fn ask(data: Bytes) -> Ask {
            Ask { bytes: data.0, ..Ask::default() }
        }

        fn host(&mut self, (): ()) {}
    }

    fn with(rogue: Rogue, shape: Shape) {
        let mut guest = Guest::<Test>::new().unwrap();
        guest.device = Test([Worker::new(rogue)]);
        guest.activate(0, false);
        for _ in 0..40 {
            guest.chain(Chain {
                queue: 0,
                data: Some(Bytes(vec![1, 2, 3])),
                cuts: Few(vec![1]),
                room: Few(vec![Room::Small(32), Room::Small(32)]),
                shape,
                wrong: None,
                notify: true,
            });
        }
        guest.check();
    }

    const HONEST: Rogue = Rogue { to: None, len: 64, times: 1, kicks: true };

    #[test]
    fn an_honest_device_passes() {
        with(HONEST, Shape::Plain);
        with(HONEST, Shape::Indirect);
        with(Rogue { to: Some(ROOM), ..HONEST }, Shape::Plain);
    }

    #[test]
    #[should_panic = "which nobody gave it"]
    fn writing_elsewhere_is_seen() {
        with(Rogue { to: Some(DATA + 1), ..HONEST }, Shape::Plain);
    }

    #[test]
    #[should_panic = "wrote 65 bytes to a chain of 64"]
    fn lying_about_the_length_is_seen() {
        with(Rogue { len: 65, ..HONEST }, Shape::Indirect);
    }

    #[test]
    #[should_panic = "a chain that was not returned before"]
    fn returning_twice_is_seen() {
        with(Rogue { times: 2, ..HONEST }, Shape::Plain);
    }

    #[test]
    #[should_panic = "told nobody"]
    fn telling_nobody_is_seen() {
        with(Rogue { kicks: false, ..HONEST }, Shape::Plain);
    }
}

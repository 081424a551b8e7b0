//! How a device is divided among threads.

use std::fmt;

use crate::Backend;

/// What one thread serves. What it may do meanwhile (`R`) is for whoever starts it to know.
pub struct Worker<R> {
    /// The device, or its part; it sees the queues below as 0, 1, and so on.
    pub backend: Box<dyn Backend>,
    /// The device's queues that it serves, as a bit set.
    pub queues: u64,
    /// Name of its thread, at most 15 bytes.
    pub thread: String,
    /// What its thread may do.
    pub role: R,
}

impl<R: Copy> Worker<R> {
    /// One thread for the whole of a device.
    pub fn single(backend: impl Backend + 'static, thread: &str, role: R) -> Vec<Self> {
        let count = backend.queue_sizes().len();
        let queues = (0..count).fold(0, |set, queue| set | 1u64 << queue);
        vec![Self { backend: Box::new(backend), queues, thread: thread.into(), role }]
    }

    /// A thread for each queue, by the backends' order.
    pub fn one_each<B: Backend + 'static>(backends: Vec<B>, name: &str, role: R) -> Vec<Self> {
        let worker = |(index, backend)| Self {
            backend: Box::new(backend),
            queues: 1u64 << index,
            thread: format!("{name}-{index}"),
            role,
        };
        backends.into_iter().enumerate().map(worker).collect()
    }
}

impl<R> fmt::Debug for Worker<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("queues", &self.queues).field("thread", &self.thread).finish_non_exhaustive()
    }
}

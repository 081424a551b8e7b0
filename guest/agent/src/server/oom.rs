//! When the kernel kills for want of memory.

use std::{collections::HashMap, os::fd::AsFd, sync::Mutex};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use vz_sys::sync;

use super::{cgroup::Cgroup, readiness};

/// Watches `memory.events` of every container. A watch ends with its cgroup.
#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    containers: Mutex<HashMap<WatchDescriptor, String>>,
}

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self { inotify, containers: Mutex::default() })
    }

    /// Watches a container.
    pub fn add(&self, container: &str, cgroup: &Cgroup) {
        match self.inotify.add_watch(&cgroup.file("memory.events"), AddWatchFlags::IN_MODIFY) {
            Ok(watch) => drop(self.lock().insert(watch, container.into())),
            // A container that has ended already may have none.
            Err(Errno::ENOENT) => {}
            Err(e) => tracing::warn!(container, "watch for out of memory: {e}"),
        }
    }

    /// Waits for changes and returns the containers that are concerned.
    pub async fn changed(&self) -> std::io::Result<Vec<String>> {
        let readiness = readiness::register(self.inotify.as_fd())?;
        loop {
            let mut ready = readiness.readable().await?;
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            let mut containers = self.lock();
            let mut changed = Vec::new();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    containers.remove(&event.wd);
                } else if let Some(container) = containers.get(&event.wd) {
                    changed.push(container.clone());
                }
            }
            changed.dedup();
            return Ok(changed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<WatchDescriptor, String>> {
        sync::lock(&self.containers)
    }
}

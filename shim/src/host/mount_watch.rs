//! Has a sandbox's volumes follow the host's mounts: one watch of the mount table for all of them.

use std::{
    fs::File,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use super::{error::Error, offload, share::Share};
use crate::complaint::Complaint;

/// Time between two looks at the mount table: bounds what a host costs that mounts all the time.
const PAUSE: Duration = Duration::from_millis(50);

/// Starts the watch, if a volume wants it and none runs, for as long as the share exists. The host's file systems may
/// take `deadline` for each look.
pub fn start(share: &Arc<Share>, deadline: Duration) {
    if !share.has_followers() || !share.claim_watch() {
        return;
    }
    let watched = File::open("/proc/self/mountinfo").and_then(crate::fd::watch_changes);
    match watched {
        Ok(table) => drop(tokio::spawn(follow(table, Arc::downgrade(share), deadline))),
        Err(error) => tracing::warn!(%error, "mounts that the host makes later do not appear in volumes"),
    }
}

async fn follow(table: AsyncFd<File>, share: Weak<Share>, deadline: Duration) {
    let mut complaint = Complaint::default();
    loop {
        let Some(share) = share.upgrade() else { return };
        let looked = offload::run::<_, Error>(deadline, move |doing| {
            doing.now("follow the host's mounts below volumes");
            Ok(share.follow()?)
        });
        if let Err(error) = looked.await
            && let Some(error) = complaint.about(&error)
        {
            tracing::warn!(error, "a mount of the host's does not appear in a volume");
        }
        sleep(PAUSE).await;
        match table.ready(Interest::PRIORITY).await {
            // Before the look, so that a change during it is another event.
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => return tracing::error!(%error, "watch the mount table"),
        }
    }
}

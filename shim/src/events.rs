//! Events to containerd: one strict queue, in order, kept over a restart of the daemon. A sandbox of the command line
//! `vz` has no containerd, and nobody to tell.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::{
    events::task::TaskOOM,
    protobuf::MessageDyn,
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
};
use tokio::sync::mpsc;
use ttrpc::context;

use vz_sys::sync::lock;

/// First pause before the daemon is dialled again; there is no event that tells of its return.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long one event may take.
const FORWARD_DEADLINE: Duration = Duration::from_secs(10);

/// Where events are put in.
#[derive(Debug, Clone)]
pub struct Publisher {
    /// None where there is nobody to tell.
    queue: Option<mpsc::UnboundedSender<Queued>>,
    namespace: String,
    lacking: Lacking,
}

/// Containers whose lack of memory is in the queue.
type Lacking = Arc<Mutex<HashSet<String>>>;

/// An event in the queue, and the container whose lack of memory it tells of.
#[derive(Debug)]
struct Queued(Envelope, Option<String>);

/// The other end; see [`Queue::run`].
#[derive(Debug)]
pub struct Queue {
    events: mpsc::UnboundedReceiver<Queued>,
    address: String,
    lacking: Lacking,
}

/// A publisher of events of `namespace` to the daemon that serves ttrpc at `address`; to nobody where that is empty.
///
/// The queue is bounded by what clients have asked for, not by a number: for each process the events of its making and
/// its deletion, which requests cause, and one exit ([`crate::container::said`] takes no second one); for each
/// container one event of its lack of memory, since further ones are dropped while one is in the queue
/// ([`Publisher::out_of_memory`]).
pub fn publisher(namespace: &str, address: &str) -> (Publisher, Queue) {
    let (queue, events) = mpsc::unbounded_channel();
    let namespace = namespace.to_owned();
    let queue = Some(queue).filter(|_| !address.is_empty());
    let lacking = Lacking::default();
    let publisher = Publisher { queue, namespace, lacking: lacking.clone() };
    (publisher, Queue { events, address: address.to_owned(), lacking })
}

impl Publisher {
    /// One whose events nobody hears.
    pub fn to_nobody() -> Self {
        Self { queue: None, namespace: String::new(), lacking: Lacking::default() }
    }

    /// Puts an event at the end of the queue.
    pub fn publish(&self, topic: &str, event: Box<dyn MessageDyn>) {
        self.put(topic, event, None);
    }

    /// A container lacks memory. False where that is in the queue already.
    pub fn out_of_memory(&self, container: &str) -> bool {
        let mut lacking = lock(&self.lacking);
        if !lacking.insert(container.to_owned()) {
            return false;
        }
        drop(lacking);
        let mut event = TaskOOM::new();
        event.set_container_id(container.to_owned());
        self.put("/tasks/oom", Box::new(event), Some(container.to_owned()));
        true
    }

    fn put(&self, topic: &str, event: Box<dyn MessageDyn>, lacking: Option<String>) {
        let Some(queue) = &self.queue else { return };
        let envelope = timestamp().and_then(|at| {
            let mut envelope = Envelope::new();
            envelope.set_topic(topic.to_owned());
            envelope.set_namespace(self.namespace.clone());
            envelope.set_timestamp(at);
            envelope.set_event(convert_to_any(event)?);
            Ok(envelope)
        });
        match envelope {
            // A closed queue means that the shim is about to exit.
            Ok(envelope) => drop(queue.send(Queued(envelope, lacking))),
            Err(error) => tracing::error!(%error, topic, "encode event"),
        }
    }
}

impl Queue {
    /// Forwards events until every [`Publisher`] is gone and the queue is empty.
    pub async fn run(mut self) {
        let mut client = None;
        while let Some(Queued(envelope, lacking)) = self.events.recv().await {
            let topic = envelope.topic.clone();
            let mut request = ForwardRequest::new();
            request.set_envelope(envelope);
            let mut pause = FIRST_PAUSE;
            loop {
                match self.forward(&mut client, &request).await {
                    Ok(()) => break,
                    // The daemon has it and does not want it; sending it again would not change that.
                    Err(ttrpc::Error::RpcStatus(status)) => {
                        tracing::error!(topic, message = status.message(), "event was refused");
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(topic, %error, "containerd is not there, the event waits");
                        client = None;
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
            if let Some(container) = lacking {
                lock(&self.lacking).remove(&container);
            }
        }
    }

    async fn forward(&self, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
        let events = match client {
            Some(events) => events,
            None => client.insert(EventsClient::new(Client::connect(&address(&self.address)).await?)),
        };
        let deadline = i64::try_from(FORWARD_DEADLINE.as_nanos()).unwrap_or(i64::MAX);
        events.forward(context::with_timeout(deadline), request).await.map(drop)
    }
}

fn address(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("unix://{address}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_is_in_the_queue_once() {
        let (publisher, mut queue) = publisher("ns", "/nowhere");
        assert!(publisher.out_of_memory("a"));
        assert!((0..10_000).all(|_| !publisher.out_of_memory("a")));
        assert!(publisher.out_of_memory("b"));
        let queued: Vec<_> = std::iter::from_fn(|| queue.events.try_recv().ok()).collect();
        assert_eq!(queued.iter().map(|Queued(_, of)| of.as_deref()).collect::<Vec<_>>(), [Some("a"), Some("b")]);
    }
}

//! Events to containerd: one strict queue, in order, kept over a restart of the daemon. A sandbox of the command line `vz` has
//! no containerd, and nobody to tell.

use std::time::Duration;

use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::{
    protobuf::MessageDyn,
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
};
use tokio::sync::mpsc;
use ttrpc::context;

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
    queue: Option<mpsc::UnboundedSender<Envelope>>,
    namespace: String,
}

/// The other end; see [`Queue::run`].
#[derive(Debug)]
pub struct Queue {
    events: mpsc::UnboundedReceiver<Envelope>,
    address: String,
}

/// A publisher of events of `namespace` to the daemon that serves ttrpc at `address`; to nobody where that is empty.
///
/// The queue grows with the tasks' own events only, which clients ask for: a guest cannot fill it, since it can end
/// each process once.
pub fn publisher(namespace: &str, address: &str) -> (Publisher, Queue) {
    let (queue, events) = mpsc::unbounded_channel();
    let namespace = namespace.to_owned();
    let queue = Some(queue).filter(|_| !address.is_empty());
    (Publisher { queue, namespace }, Queue { events, address: address.to_owned() })
}

impl Publisher {
    /// Puts an event at the end of the queue.
    pub fn publish(&self, topic: &str, event: Box<dyn MessageDyn>) {
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
            Ok(envelope) => drop(queue.send(envelope)),
            Err(error) => tracing::error!(%error, topic, "encode event"),
        }
    }
}

impl Queue {
    /// Forwards events until every [`Publisher`] is gone and the queue is empty.
    pub async fn run(mut self) {
        let mut client = None;
        while let Some(envelope) = self.events.recv().await {
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

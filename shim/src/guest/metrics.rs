//! A container's metrics as the guest reports them, reduced to what containerd's message defines.
//!
//! Threat: the guest's message may carry fields that nobody knows, which a protobuf library keeps and writes again, and
//! lists without end.

use containerd_shim_protos::{
    cgroups_v2::metrics::{IOStat, Metrics, PSIStats, RdmaStat},
    protobuf::{self, Message},
};

/// Longest message that is passed on; a guest with a dozen disks needs a tenth.
const MOST: usize = 64 << 10;

/// Why metrics are not passed on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They are no such message.
    #[error("decode the guest's metrics")]
    Decode(#[from] protobuf::Error),
    /// They are too long.
    #[error("the guest's metrics have {0} bytes, at most {MOST} are passed on")]
    TooLarge(usize),
}

/// Reads the guest's metrics and writes those of their fields that are known.
pub fn known(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    if bytes.len() > MOST {
        return Err(Error::TooLarge(bytes.len()));
    }
    let mut metrics = Metrics::parse_from_bytes(bytes)?;
    strip(&mut metrics);
    Ok(metrics.write_to_bytes()?)
}

fn strip(metrics: &mut Metrics) {
    forget(metrics);
    metrics.pids.as_mut().map(forget);
    if let Some(cpu) = metrics.cpu.as_mut() {
        forget(cpu);
        cpu.psi.as_mut().map(pressure);
    }
    if let Some(memory) = metrics.memory.as_mut() {
        forget(memory);
        memory.psi.as_mut().map(pressure);
    }
    if let Some(RdmaStat { current, limit, .. }) = metrics.rdma.as_mut() {
        current.iter_mut().chain(limit).for_each(forget);
    }
    metrics.rdma.as_mut().map(forget);
    if let Some(IOStat { usage, psi, .. }) = metrics.io.as_mut() {
        usage.iter_mut().for_each(forget);
        psi.as_mut().map(pressure);
    }
    metrics.io.as_mut().map(forget);
    metrics.hugetlb.iter_mut().for_each(forget);
    metrics.memory_events.as_mut().map(forget);
    metrics.network.iter_mut().for_each(forget);
}

fn pressure(stats: &mut PSIStats) {
    forget(stats);
    stats.some.as_mut().map(forget);
    stats.full.as_mut().map(forget);
}

fn forget(message: &mut impl Message) {
    message.mut_special_fields().mut_unknown_fields().clear();
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::{
        MessageDyn, MessageField,
        reflect::{RuntimeFieldType, RuntimeType},
    };

    use super::*;

    /// Sets every message field of a message, each with an unknown field 1000.
    fn fill(message: &mut dyn MessageDyn) {
        message.mut_unknown_fields_dyn().add_varint(1000, 1);
        for field in message.descriptor_dyn().fields() {
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(RuntimeType::Message(_)) => fill(field.mut_message(message)),
                RuntimeFieldType::Repeated(RuntimeType::Message(kind)) => {
                    let mut entry = kind.new_instance();
                    fill(&mut *entry);
                    field.mut_repeated(message).push(entry.into());
                }
                RuntimeFieldType::Singular(_) | RuntimeFieldType::Repeated(_) | RuntimeFieldType::Map(..) => {}
            }
        }
    }

    /// Tag of field 1000 as a varint, and the value 1.
    const UNKNOWN: [u8; 3] = [0xc0, 0x3e, 1];

    #[test]
    fn no_message_keeps_fields_that_are_not_known() {
        let mut metrics = Metrics::new();
        fill(&mut metrics);
        let sent = metrics.write_to_bytes().unwrap();
        assert!(sent.windows(3).filter(|part| *part == UNKNOWN).count() > 10);
        let passed = known(&sent).unwrap();
        assert_eq!(passed.windows(3).filter(|part| *part == UNKNOWN).count(), 0, "{passed:?}");
        assert!(Metrics::parse_from_bytes(&passed).unwrap().io.psi.some.is_some());
    }

    #[test]
    fn what_is_known_is_passed_on_and_what_is_too_long_is_not() {
        let mut metrics = Metrics::new();
        metrics.pids = MessageField::some(Default::default());
        metrics.pids.as_mut().unwrap().current = 7;
        let bytes = metrics.write_to_bytes().unwrap();
        assert_eq!(known(&bytes).unwrap(), bytes);
        assert!(matches!(known(&vec![0; MOST + 1]), Err(Error::TooLarge(_))));
        assert!(matches!(known(&[0xff; 100]), Err(Error::Decode(_))));
    }
}

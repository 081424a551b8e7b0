//! What the kernel's log holds, as records for the host. The format of `/dev/kmsg` is in the kernel's
//! Documentation/ABI/testing/dev-kmsg.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
};

use nix::{errno::Errno, fcntl::OFlag};
use vz_proto::LogRecord;

/// The kernel writes no longer record: a header, a line of 1 KiB whose bytes are escaped, and a device's name.
const RECORD: usize = 8192;

/// Every line that is there, the last record an empty one; with the failure that cut them short, if there was one.
pub fn records() -> (Vec<LogRecord>, Option<io::Error>) {
    let mut records = Vec::new();
    let failed = read(|bytes| records.extend(parse(&String::from_utf8_lossy(bytes)))).err();
    records.push(LogRecord { kernel: true, ..Default::default() });
    (records, failed)
}

fn read(mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut kmsg = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg")?;
    let mut bytes = [0; RECORD];
    loop {
        match kmsg.read(&mut bytes) {
            Ok(count) => each(bytes.get(..count).unwrap_or_default()),
            // That was the last one.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Overwritten while we read: the next read goes on with the oldest that there is.
            Err(e) if e.raw_os_error() == Some(Errno::EPIPE as i32) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// `priority,sequence,microseconds,flags[,...];line`, then lines with properties, which begin with a blank.
fn parse(record: &str) -> Option<LogRecord> {
    let (header, text) = record.split_once(';')?;
    let mut fields = header.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let time_us = fields.nth(1)?.parse().ok()?;
    // The lower three bits; the others say who wrote it.
    let level = match priority & 7 {
        0..=3 => "error",
        4 => "warn",
        5 | 6 => "info",
        _ => "debug",
    };
    let message = text.lines().next().filter(|line| !line.is_empty())?.to_owned();
    Some(LogRecord { level: level.into(), message, kernel: true, time_us, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_taken_apart() {
        let record = parse("6,339,5140900,-;NET: Registered\\x20family; 10\n SUBSYSTEM=net\n").unwrap();
        assert_eq!((record.level.as_str(), record.time_us), ("info", 5_140_900));
        assert_eq!(record.message, "NET: Registered\\x20family; 10");
        assert!(record.kernel && record.container_id.is_empty());
        // A program's line: the facility is above the level's bits.
        assert_eq!(parse("12,1,7,-,caller=T1;vz-agent: x\n").unwrap().level, "warn");
        for nonsense in ["", ";", "6,1,2", "x,1,2,-;a", "6,1,x,-;a", "6,1,2,-;", "6;a"] {
            assert_eq!(parse(nonsense), None, "{nonsense:?}");
        }
    }
}

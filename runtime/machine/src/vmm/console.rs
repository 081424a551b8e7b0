//! The guest's console: kept in a file of bounded size, the last lines quoted when the VM has ended.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use vz_state::CONSOLE;

/// Bytes that are kept for [`Console::tail`].
const TAIL: usize = 4096;
/// Least size of the file.
const LEAST: u64 = 4096;

/// Where console output goes.
///
/// The file is never larger than its limit: when it is full, its older half is dropped. So its name and descriptor stay
/// the same, which a process that can open nothing any more needs.
#[derive(Debug)]
pub(super) struct Console {
    file: Option<File>,
    size: u64,
    limit: u64,
    tail: VecDeque<u8>,
}

impl Console {
    /// Starts a new file `console.log` in `dir`.
    pub(super) fn create(dir: &Path, limit: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(dir.join(CONSOLE))?;
        Ok(Self { file: Some(file), size: 0, limit: limit.max(LEAST), tail: VecDeque::new() })
    }

    /// Adds output.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let surplus = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..surplus);
        if let Err(e) = self.keep(bytes) {
            // A full disk: the guest goes on, and so does the tail in memory.
            tracing::warn!("write console.log, which ends here: {e}");
            self.file = None;
        }
    }

    fn keep(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let half = self.limit / 2;
        while !bytes.is_empty() {
            if self.size >= self.limit {
                let mut newer = vec![0; usize::try_from(half).map_err(io::Error::other)?];
                file.read_exact_at(&mut newer, self.size - half)?;
                file.write_all_at(&newer, 0)?;
                file.set_len(half)?;
                self.size = half;
            }
            let room = usize::try_from(self.limit - self.size).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            file.write_all_at(now, self.size)?;
            self.size += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Whether there was any output.
    pub(super) fn is_empty(&self) -> bool {
        self.tail.is_empty()
    }

    /// The last lines.
    pub(super) fn tail(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().filter(|b| *b != b'\r').collect();
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_the_newest_output_and_no_more_than_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut console = Console::create(dir.path(), 10_000).unwrap();
        assert!(console.is_empty());
        let mut all = Vec::new();
        for i in 0..5000 {
            let line = format!("line {i}\r\n");
            console.write(line.as_bytes());
            all.extend_from_slice(line.as_bytes());
            assert!(std::fs::metadata(&path).unwrap().len() <= 10_000);
        }
        let kept = std::fs::read(&path).unwrap();
        assert!(kept.len() >= 5000);
        assert!(all.ends_with(&kept));
        assert!(console.tail().ends_with("line 4998\nline 4999"));
        assert!(console.tail().len() <= TAIL);
        console.write(&vec![b'x'; 100_000]);
        assert!((5000..=10_000).contains(&std::fs::metadata(&path).unwrap().len()));
    }
}

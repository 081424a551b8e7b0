//! The shim's own log: logfmt lines into the fifo `log` of the bundle, which containerd copies into its own log.
//! Without containerd, into a file that is kept small.

use std::{
    env,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Mutex,
};

use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Writes to the fifo where there is room and a reader; a line that does not fit is lost, never waited for.
struct Fifo {
    file: File,
    /// What each line begins with: whose it is.
    prefix: String,
}

impl Write for Fifo {
    /// One call is one line, and one write, so that the lines of several processes do not mix.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.file.write(&[self.prefix.as_bytes(), line].concat()) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe) => Err(e),
            _ => Ok(line.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Environment variable that names a file to log to instead of the bundle's fifo.
pub const LOG_FILE: &str = "VZ_LOG_FILE";
/// Bytes of that file; one that is full begins anew.
const MOST: u64 = 1 << 20;

/// Writes to a file that others look at and nobody takes away.
struct Bounded {
    file: File,
    prefix: String,
}

impl Write for Bounded {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.file.metadata()?.len() > MOST {
            self.file.set_len(0)?;
        }
        self.file.write_all(&[self.prefix.as_bytes(), line].concat())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging to `bundle`/log, where containerd has made that, from `level` on, as `sandbox`.
///
/// Returns the fifo or file, for a child process that writes lines of this form to its stderr.
pub fn init(bundle: &Path, level: &str, sandbox: &str) -> Option<File> {
    let prefix = format!("sandbox={sandbox} ");
    let (file, writer): (File, Box<dyn Write + Send>) = match env::var_os(LOG_FILE) {
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path).ok()?;
            (file.try_clone().ok()?, Box::new(Bounded { file, prefix }))
        }
        None => {
            let fifo = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("log"));
            // Where nobody reads there is nobody to tell.
            let file = fifo.ok()?;
            (file.try_clone().ok()?, Box::new(Fifo { file, prefix }))
        }
    };
    let layer = tracing_logfmt::builder().layer().with_writer(Mutex::new(writer));
    // A logger that is there already stays.
    drop(tracing_subscriber::registry().with(EnvFilter::new(level)).with(layer).try_init());
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd};

    use super::*;

    #[test]
    fn a_log_file_is_kept_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        let mut log = Bounded { file, prefix: "p ".into() };
        for _ in 0..3 * MOST / 4096 {
            log.write_all(&[b'x'; 4096]).unwrap();
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= MOST + 8192);
        log.write_all(b"last\n").unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("p last\n"));
    }

    #[test]
    fn a_line_has_its_sandbox_and_is_never_waited_for() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let mut fifo = Fifo { file: File::from(write), prefix: "sandbox=ns/c1 ".into() };
        assert_eq!(fifo.write(b"level=info\n").unwrap(), 11);
        let mut said = [0; 64];
        let len = File::from(OwnedFd::try_clone(&read).unwrap()).read(&mut said).unwrap();
        assert_eq!(&said[..len], b"sandbox=ns/c1 level=info\n");
        // Many times what a pipe holds.
        for _ in 0..100 {
            assert_eq!(fifo.write(&[b'x'; 4000]).unwrap(), 4000);
        }
        drop(read);
        assert_eq!(fifo.write(b"nobody reads").unwrap(), 12);
    }
}

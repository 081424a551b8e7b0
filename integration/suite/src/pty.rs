//! A program on a terminal of its own, as a person would have it.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::poll::try_until;

/// A program on a terminal; dropped, it is killed.
#[derive(Debug)]
pub struct Session {
    child: Child,
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
    deadline: Duration,
}

impl Session {
    /// Starts a program on a terminal of this size.
    #[track_caller]
    pub fn start(name: &str, args: &[&str], env: &[(String, String)], (rows, columns): (u16, u16)) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("make a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlock a terminal");
        let path = ptsname(&master, Vec::new()).expect("name a terminal").into_string().expect("a name is ASCII");
        let slave = OpenOptions::new().read(true).write(true).open(path).expect("open a terminal");
        resize(&master, rows, columns);
        let clone = || Stdio::from(slave.try_clone().expect("duplicate a descriptor"));
        // setsid makes it the program's controlling terminal: the program is told of a new size by a signal.
        let child = Command::new("setsid")
            .args(["--ctty", name])
            .args(args)
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(clone())
            .stdout(clone())
            .stderr(clone())
            .spawn()
            .unwrap_or_else(|e| panic!("run setsid {name}: {e}"));
        drop(slave);
        let master = File::from(master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, shown) = (master.try_clone().expect("duplicate a descriptor"), seen.clone());
        thread::spawn(move || {
            let mut part = [0; 4096];
            // EIO is a terminal's end of file.
            while let Ok(n @ 1..) = reader.read(&mut part) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&part[..n]);
            }
        });
        Self { child, master, seen, deadline: Duration::from_secs(60) }
    }

    /// Everything on the screen so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Types.
    #[track_caller]
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("write to a terminal");
    }

    /// Changes the terminal's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        resize(&self.master, rows, columns);
    }

    /// Waits until the screen shows `wanted`.
    #[track_caller]
    pub fn expect(&self, wanted: &str) {
        if try_until(self.deadline, || self.screen().contains(wanted).then_some(())).is_none() {
            panic!("the terminal never showed {wanted:?}: {:?}", self.screen());
        }
    }

    /// Waits for the program's end; its exit code, 128 and the signal where one ended it.
    #[track_caller]
    pub fn wait(mut self) -> (i32, String) {
        let status = try_until(self.deadline, || self.child.try_wait().expect("wait for a child"));
        let Some(status) = status else { panic!("the program on the terminal does not end: {:?}", self.screen()) };
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        // What it wrote last may still be on its way to the reader.
        let mut last = self.screen();
        try_until(Duration::from_millis(200), || {
            let now = self.screen();
            let same = now == last;
            last = now;
            (!same).then_some(())
        });
        (code, self.screen())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn resize(master: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master, size).expect("set a terminal's size");
}

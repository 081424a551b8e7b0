//! Measures a directory: `vz-io DIRECTORY [MIB]` prints one line for each kind of use, `name value unit`.
//!
//! The same program runs on the host and in a container that has the directory as a volume, so that what is between the
//! two is measured, and nothing else. Files are made anew below the directory, and removed where all went well.

use std::{
    env,
    error::Error,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

const MIB: usize = 1 << 20;
/// Accesses of each random test, of this size each.
const ACCESSES: u64 = 4000;
const BLOCK: usize = 4096;
/// The tree that is walked: directories, and files in each.
const DIRS: usize = 40;
const FILES: usize = 25;

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let (Some(dir), mib) = (args.next(), args.next()) else {
        eprintln!("usage: vz-io DIRECTORY [MIB]");
        return ExitCode::from(2);
    };
    let mib = mib.and_then(|mib| mib.parse().ok()).unwrap_or(64);
    let dir = Path::new(&dir).join(format!("vz-io.{}", std::process::id()));
    match measure(&dir, mib) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vz-io: {}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn measure(dir: &Path, mib: usize) -> Result<(), Box<dyn Error>> {
    fs::create_dir(dir)?;
    let path = dir.join("file");
    let chunk = vec![0x5a; MIB];
    let seconds = timed(|| {
        let mut file = File::create(&path)?;
        for _ in 0..mib {
            file.write_all(&chunk)?;
        }
        Ok(file.sync_all()?)
    })?;
    say("sequential-write", mib as f64 / seconds, "MiB/s");
    let mut chunk = chunk;
    let seconds = timed(|| {
        // An open drops what the guest has cached of a file that may have changed.
        let mut file = File::open(&path)?;
        while file.read(&mut chunk)? > 0 {}
        Ok(())
    })?;
    say("sequential-read", mib as f64 / seconds, "MiB/s");

    let blocks = (mib * MIB / BLOCK) as u64;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut block = vec![0xa5; BLOCK];
    let mut places = Places(88_172_645_463_325_252);
    let seconds = timed(|| {
        for _ in 0..ACCESSES {
            file.read_exact_at(&mut block, places.next(blocks) * BLOCK as u64)?;
        }
        Ok(())
    })?;
    say("random-read-4k", ACCESSES as f64 / seconds, "1/s");
    let seconds = timed(|| {
        for _ in 0..ACCESSES {
            file.write_all_at(&block, places.next(blocks) * BLOCK as u64)?;
        }
        Ok(file.sync_all()?)
    })?;
    say("random-write-4k", ACCESSES as f64 / seconds, "1/s");
    drop(file);

    let tree: Vec<PathBuf> =
        (0..DIRS).flat_map(|d| (0..FILES).map(move |f| (d, f))).map(|(d, f)| dir.join(format!("{d}/{f}"))).collect();
    let count = tree.len() as f64;
    let seconds = timed(|| {
        for d in 0..DIRS {
            fs::create_dir(dir.join(d.to_string()))?;
        }
        for path in &tree {
            fs::write(path, b"one line\n")?;
        }
        Ok(())
    })?;
    say("create-small-files", count / seconds, "1/s");
    // What `git status` does: list every directory, look at every file.
    let seconds = timed(|| {
        let mut seen = 0;
        for d in 0..DIRS {
            for entry in fs::read_dir(dir.join(d.to_string()))? {
                seen += usize::from(entry?.metadata()?.is_file());
            }
        }
        if seen == tree.len() { Ok(()) } else { Err(format!("{seen} files of {}", tree.len()).into()) }
    })?;
    say("walk-and-stat", count / seconds, "1/s");
    let seconds = timed(|| {
        for path in &tree {
            fs::remove_file(path)?;
        }
        Ok(())
    })?;
    say("remove-files", count / seconds, "1/s");
    // By name: listing a directory while it is emptied misses files on a tmpfs of Linux before 6.6.
    for d in 0..DIRS {
        fs::remove_dir(dir.join(d.to_string()))?;
    }
    fs::remove_file(&path)?;
    Ok(fs::remove_dir(dir)?)
}

fn timed(f: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let begun = Instant::now();
    f()?;
    Ok(begun.elapsed().as_secs_f64())
}

fn say(name: &str, value: f64, unit: &str) {
    println!("{name} {value:.1} {unit}");
}

/// Marsaglia's xorshift: the same places in every run.
struct Places(u64);

impl Places {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below.max(1)
    }
}

//! The frequency of the time-stamp counter, which the guest's clock runs by.
//!
//! Where the processor does not state it, it is measured against the host's clock. The first sample is kept until the
//! host reboots, so that only the first sandbox waits, and the longer ago it was, the more exact the result.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use vz_sys::tsc::{Sample, stated_khz};

/// Below [`vz_state::ROOT`], which a reboot empties. A namespace of containerd has no name with a dot in front.
const FIRST_SAMPLE: &str = ".tsc";
/// Samples are off by well under a microsecond: the least time apart for some ten parts in a million.
const APART: Duration = Duration::from_millis(20);
/// Far more than clocks drift apart: beyond it, the counter was reset or has another frequency now.
const PARTS_OFF: u32 = 1000;

/// kHz.
pub(super) fn khz() -> u32 {
    stated_khz().unwrap_or_else(|| {
        measured(&Path::new(vz_state::ROOT).join(FIRST_SAMPLE)).unwrap_or_else(|e| {
            // Without a clock nothing else here would work: a frequency of most processors, and a word about it.
            tracing::error!("read clocks: {e}; the guest's clock will be wrong");
            2_500_000
        })
    })
}

fn measured(path: &Path) -> io::Result<u32> {
    let now = Sample::take()?;
    if let Some(khz) = since_first(path, &now) {
        return Ok(khz);
    }
    std::thread::sleep(APART);
    let khz = now.khz_until(&Sample::take()?).ok_or_else(|| io::Error::other("counter goes backwards"))?;
    if let Err(e) = keep(path, &now, khz) {
        tracing::debug!("keep {}: {e}", path.display());
    }
    Ok(khz)
}

/// The frequency since the kept sample, where that was long enough ago and nothing happened to the counter.
fn since_first(path: &Path, now: &Sample) -> Option<u32> {
    let text = fs::read_to_string(path).ok()?;
    let mut fields = text.split_whitespace().map(str::parse::<u64>);
    let (count, nanos, then) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
    if now.nanos.checked_sub(nanos)? < u64::try_from(APART.as_nanos()).ok()? {
        return None;
    }
    let khz = Sample { count, nanos }.khz_until(now)?;
    let then = u32::try_from(then).ok()?;
    (khz.abs_diff(then) <= then / PARTS_OFF).then_some(khz)
}

fn keep(path: &Path, sample: &Sample, khz: u32) -> io::Result<()> {
    let Some(dir) = path.parent() else { return Ok(()) };
    fs::create_dir_all(dir)?;
    // Renamed into place, so that nobody reads half of it.
    let new = dir.join(format!(".tsc.{}.{}", std::process::id(), sample.count));
    let mut file = fs::File::create(&new)?;
    let written = writeln!(file, "{} {} {khz}", sample.count, sample.nanos).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sample_is_used_again_unless_it_makes_no_sense() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/tsc");
        let first = measured(&path).unwrap();
        std::thread::sleep(APART);
        let again = since_first(&path, &Sample::take().unwrap()).unwrap();
        assert!(first.abs_diff(again) < first / PARTS_OFF);
        for nonsense in ["", "1", "1 2 x", "1 2 3", "18446744073709551615 0 1000", "0 18446744073709551615 1000"] {
            fs::write(&path, nonsense).unwrap();
            assert_eq!(since_first(&path, &Sample::take().unwrap()), None, "{nonsense}");
        }
        assert!(first.abs_diff(measured(&path).unwrap()) < first / PARTS_OFF);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}

//! How much a guest may cause to be logged and published.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use vz_sys::sync::lock;

/// A bucket: `size` at once, `refill` a second after that.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    size: u64,
    refill: u64,
    level: u64,
    at: Instant,
}

impl Bucket {
    fn full(size: u64, refill: u64, now: Instant) -> Self {
        Self { size, refill, level: size, at: now }
    }

    /// Pours in what is due by `now`. What is less than a unit stays due.
    fn fill(&mut self, now: Instant) {
        let due = now.saturating_duration_since(self.at).as_micros().saturating_mul(self.refill.into()) / 1_000_000;
        let due = u64::try_from(due).unwrap_or(u64::MAX);
        self.at += self.lasts(due);
        self.level = self.level.saturating_add(due).min(self.size);
    }

    /// How long it takes to gain so much.
    fn lasts(&self, amount: u64) -> Duration {
        let micros = u128::from(amount).saturating_mul(1_000_000) / u128::from(self.refill);
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// How long it takes until there is so much; more than the bucket holds counts as a full one.
    fn missing(&self, amount: u64) -> Duration {
        self.lasts(amount.min(self.size).saturating_sub(self.level))
    }
}

/// What a guest may have logged: records and bytes, for a moment and for the day.
#[derive(Debug)]
pub struct Budget(Mutex<Buckets>);

#[derive(Debug)]
struct Buckets {
    records: Bucket,
    burst: Bucket,
    day: Bucket,
}

impl Budget {
    /// 1000 records at once, then 100 a second; 1 MiB at once, then 100 KiB a second, until 16 MiB are used up; from
    /// then on 256 MiB a day.
    pub fn of_a_guest() -> Self {
        const DAY: u64 = 24 * 60 * 60;
        let now = Instant::now();
        Self(Mutex::new(Buckets {
            records: Bucket::full(1000, 100, now),
            burst: Bucket::full(1 << 20, 100 << 10, now),
            day: Bucket::full(16 << 20, (256 << 20) / DAY, now),
        }))
    }

    /// Takes a record of so many bytes out of the budget, or says how long it has to wait until it is asked for again.
    pub fn take(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = lock(&self.0);
        let Buckets { records, burst, day } = &mut *buckets;
        let wanted = [(records, 1), (burst, bytes), (day, bytes)];
        let mut wait = Duration::ZERO;
        let filled = wanted.map(|(bucket, amount)| {
            bucket.fill(now);
            wait = wait.max(bucket.missing(amount));
            (bucket, amount)
        });
        if wait > Duration::ZERO {
            // The timer's own grain is a millisecond.
            return Err(wait.max(Duration::from_millis(1)));
        }
        for (bucket, amount) in filled {
            bucket.level = bucket.level.saturating_sub(amount);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest gets through in this time if it never stops, in records and bytes.
    fn flood(record: u64, time: Duration) -> (u64, u64) {
        let budget = Budget::of_a_guest();
        let begun = Instant::now();
        let (mut now, mut records) = (begun, 0);
        while now <= begun + time {
            match budget.take(record, now) {
                Ok(()) => records += 1,
                Err(wait) => now += wait,
            }
        }
        (records, records * record)
    }

    #[test]
    fn a_flood_is_held_to_its_rates() {
        let (records, _) = flood(10, Duration::from_secs(10));
        assert!((1990..=2010).contains(&records), "{records}");
        let (_, bytes) = flood(4000, Duration::from_secs(10));
        assert!((1_900_000..=2_200_000).contains(&bytes), "{bytes}");
        let (_, bytes) = flood(4000, Duration::from_secs(24 * 60 * 60));
        assert!((270 << 20..=273 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_record_that_is_larger_than_a_bucket_waits_for_a_full_one() {
        let budget = Budget::of_a_guest();
        let now = Instant::now();
        assert_eq!(budget.take(10 << 20, now), Ok(()));
        let wait = budget.take(10 << 20, now).unwrap_err();
        assert!(wait > Duration::from_secs(10));
    }
}

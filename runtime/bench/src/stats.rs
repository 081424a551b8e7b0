//! What many measurements of the same thing say.

use serde::Serialize;

/// Measurements, summed up. All in the unit of the measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many.
    pub count: usize,
    /// The least.
    pub min: f64,
    /// Half are no more than this, half no less: of two in the middle, what is between them.
    pub median: f64,
    /// The least one that nine of ten are no more than.
    pub p90: f64,
    /// The most.
    pub max: f64,
    /// From the least to the most.
    pub spread: f64,
}

impl Summary {
    /// Of these; none of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let count = sorted.len();
        let middle = count / 2;
        let median = match count % 2 {
            0 => sorted[middle - 1].midpoint(sorted[middle]),
            _ => sorted[middle],
        };
        // Nearest rank, in whole numbers: ceil(0.9 n).
        let p90 = sorted[(9 * count).div_ceil(10) - 1];
        Some(Self { count, min, median, p90, max, spread: max - min })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_all_there_is() {
        let summary = Summary { count: 1, min: 7.0, median: 7.0, p90: 7.0, max: 7.0, spread: 0.0 };
        assert_eq!(Summary::of(&[7.0]), Some(summary));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn order_does_not_matter() {
        let summary = Summary::of(&[9.0, 1.0, 5.0, 3.0]).unwrap();
        assert_eq!((summary.min, summary.median, summary.max, summary.spread), (1.0, 4.0, 9.0, 8.0));
        assert_eq!(Summary::of(&[2.0, 8.0, 4.0]).unwrap().median, 4.0);
    }

    #[test]
    fn nine_of_ten_are_no_more_than_p90() {
        let p90 = |count: u32| Summary::of(&(1..=count).map(f64::from).collect::<Vec<_>>()).unwrap().p90;
        assert_eq!((p90(2), p90(9), p90(10), p90(11), p90(20), p90(100)), (2.0, 9.0, 9.0, 10.0, 18.0, 90.0));
    }
}

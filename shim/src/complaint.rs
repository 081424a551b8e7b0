//! A complaint that is not repeated while its cause is the same.

use vz_sys::error::chain;

/// What was complained about last. Causes come in bursts, and one line for each is enough.
#[derive(Debug, Default)]
pub struct Complaint(String);

impl Complaint {
    /// The error as a line for the log, unless it was the last one too.
    pub fn about(&mut self, error: &dyn std::error::Error) -> Option<&str> {
        let text = chain(error);
        if text == self.0 {
            return None;
        }
        self.0 = text;
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn only_another_cause_is_said() {
        let mut complaint = Complaint::default();
        let [first, second] = ["no memory", "no space"].map(Error::other);
        assert_eq!(complaint.about(&first), Some("no memory"));
        assert_eq!(complaint.about(&Error::other("no memory")), None);
        assert_eq!(complaint.about(&second), Some("no space"));
        assert_eq!(complaint.about(&first), Some("no memory"));
    }
}

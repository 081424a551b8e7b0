//! The bundle in the program itself.

use std::io::{self, Write};

use vz_kernel::Part;

use crate::Source;

/// The bundle of the profile `container` that this program was built with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Embedded;

impl Source for Embedded {
    fn name(&self) -> String {
        "the bundle in this program".into()
    }

    fn version(&self) -> io::Result<Vec<u8>> {
        Ok(vz_kernel::VERSION.as_bytes().to_vec())
    }

    fn copy(&self, name: &str, to: &mut dyn Write) -> io::Result<()> {
        if name == "NOTICE" {
            return to.write_all(vz_kernel::NOTICE.as_bytes());
        }
        match Part::ALL.into_iter().find(|part| part.file() == Some(name)) {
            Some(part) => part.write_to(to).map(drop),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "this program has no such file in it")),
        }
    }

    fn belongs_to_program(&self) -> bool {
        true
    }
}

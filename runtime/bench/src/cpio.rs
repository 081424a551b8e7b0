//! A further archive for an initramfs: cpio's newc form. The kernel unpacks archives one after the other, each of which
//! begins at a multiple of four bytes.

use std::io;

/// Its parts begin at multiples of this.
pub const ALIGNMENT: usize = 4;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive in the making: directories before what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    members: u32,
}

impl Archive {
    /// Adds a directory.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.member(path, DIRECTORY | mode, 2, &[])
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.member(path, FILE | mode, 1, content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.member(path, LINK | 0o777, 1, target.as_bytes())
    }

    /// The whole of it.
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        self.member("TRAILER!!!", 0, 1, &[])?;
        Ok(self.bytes)
    }

    fn member(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let name = u32::try_from(path.len() + 1).map_err(|_| io::Error::from(io::ErrorKind::InvalidFilename))?;
        self.members += 1;
        // Inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum.
        let fields = [self.members, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        align(&mut self.bytes);
        self.bytes.extend_from_slice(content);
        align(&mut self.bytes);
        Ok(())
    }
}

/// Adds zeros, which the kernel passes over.
pub fn align(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_where_the_kernel_looks_for_them() {
        let mut archive = Archive::default();
        archive.directory("d", 0o755).unwrap();
        archive.file("d/f", 0o644, b"12345").unwrap();
        archive.link("d/l", "f").unwrap();
        let bytes = archive.finish().unwrap();
        let mut at = 0;
        let mut found = Vec::new();
        while at < bytes.len() {
            assert_eq!((&bytes[at..at + 6], at % ALIGNMENT), (&b"070701"[..], 0));
            let field = |index: usize| {
                let at = at + 6 + 8 * index;
                usize::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
            };
            let name = String::from_utf8(bytes[at + 110..at + 110 + field(11) - 1].to_vec()).unwrap();
            let content = (at + 110 + field(11)).next_multiple_of(ALIGNMENT);
            found.push((name, field(0), field(1), bytes[content..content + field(6)].to_vec()));
            at = (content + field(6)).next_multiple_of(ALIGNMENT);
        }
        let member =
            |name: &str, inode, mode, content: &str| (name.to_owned(), inode, mode, content.as_bytes().to_vec());
        let wanted = [
            member("d", 1, 0o040_755, ""),
            member("d/f", 2, 0o100_644, "12345"),
            member("d/l", 3, 0o120_777, "f"),
            member("TRAILER!!!", 4, 0, ""),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_file_that_no_archive_can_hold_is_refused() {
        assert_eq!(Archive::default().member(&"x".repeat(3), FILE, 1, &[]).map_err(|e| e.kind()), Ok(()));
        let mut bytes = vec![1];
        align(&mut bytes);
        assert_eq!(bytes, [1, 0, 0, 0]);
        align(&mut bytes);
        assert_eq!(bytes.len(), 4);
    }
}

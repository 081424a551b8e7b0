//! The bytes, which `mk/bundle/payload` makes.

use std::io::{self, Read, Write};

use zstd::stream::read::Decoder;

/// The uncompressed ELF kernel with its PVH note (`vmlinux`), compressed.
pub const KERNEL_BYTES: &[u8] = include_bytes!("../payload/kernel.zst");
/// The initramfs (`initramfs.img`), compressed with the agent as the dictionary.
pub const INITRAMFS_BYTES: &[u8] = include_bytes!("../payload/initramfs.zst");
/// The static guest agent, which is `/init` in the initramfs, compressed.
pub const AGENT_BYTES: &[u8] = include_bytes!("../payload/agent.zst");
/// The static youki program, compressed with the agent as the dictionary.
pub const YOUKI_BYTES: &[u8] = include_bytes!("../payload/youki.zst");
/// Debian's static BusyBox, compressed. It is not part of the bundle: it is for those who append a second archive to
/// the initramfs.
pub const BUSYBOX_BYTES: &[u8] = include_bytes!("../payload/busybox.zst");
/// The bill of materials (`sbom.cdx.json`), compressed.
pub const SBOM_BYTES: &[u8] = include_bytes!("../payload/sbom.zst");
/// The bundle's `version.json`, as it is.
pub const VERSION: &str = include_str!("../payload/version.json");
/// The bundle's `NOTICE`, as it is: licences, and the offer of source.
pub const NOTICE: &str = include_str!("../payload/NOTICE");
/// The same for BusyBox.
pub const NOTICE_BUSYBOX: &str = include_str!("../payload/NOTICE.busybox");

/// One compressed part of the bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// [`KERNEL_BYTES`].
    Kernel,
    /// [`INITRAMFS_BYTES`].
    Initramfs,
    /// [`AGENT_BYTES`].
    Agent,
    /// [`YOUKI_BYTES`].
    Youki,
    /// [`SBOM_BYTES`].
    Sbom,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Kernel, Self::Initramfs, Self::Agent, Self::Youki, Self::Sbom];

    /// Its name in a bundle's directory; none for what is not a file of a bundle.
    pub fn file(self) -> Option<&'static str> {
        match self {
            Self::Kernel => Some("vmlinux"),
            Self::Initramfs => Some("initramfs.img"),
            Self::Youki => Some("youki"),
            Self::Sbom => Some("sbom.cdx.json"),
            Self::Agent => None,
        }
    }

    /// Its compressed bytes.
    pub fn bytes(self) -> &'static [u8] {
        match self {
            Self::Kernel => KERNEL_BYTES,
            Self::Initramfs => INITRAMFS_BYTES,
            Self::Agent => AGENT_BYTES,
            Self::Youki => YOUKI_BYTES,
            Self::Sbom => SBOM_BYTES,
        }
    }

    /// Writes it to `to`, decompressed, and returns how many bytes these were. Memory is needed for a window, and for
    /// the agent where that is the dictionary: 6 MiB each.
    pub fn write_to(self, to: &mut dyn Write) -> io::Result<u64> {
        if matches!(self, Self::Initramfs | Self::Youki) {
            let agent = Self::Agent.decompress()?;
            copy(Decoder::with_ref_prefix(self.bytes(), &agent)?, to)
        } else {
            copy(Decoder::with_buffer(self.bytes())?, to)
        }
    }

    /// It, decompressed.
    pub fn decompress(self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes)?;
        Ok(bytes)
    }
}

/// BusyBox, decompressed. By itself, so that programs which only want the bundle are not linked with it.
pub fn busybox() -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    copy(Decoder::with_buffer(BUSYBOX_BYTES)?, &mut bytes)?;
    Ok(bytes)
}

fn copy(mut from: impl Read, mut to: &mut dyn Write) -> io::Result<u64> {
    io::copy(&mut from, &mut to)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_parts_are_what_version_json_says() {
        let version: Value = serde_json::from_str(VERSION).unwrap();
        assert_eq!((&version["profile"], &version["architecture"]), (&"container".into(), &"x86_64".into()));
        let artifacts = version["artifacts"].as_object().unwrap();
        let mut files: Vec<_> = Part::ALL.into_iter().filter_map(Part::file).chain(["NOTICE"]).collect();
        files.sort_unstable();
        let mut named: Vec<_> = artifacts.keys().map(String::as_str).collect();
        named.sort_unstable();
        assert_eq!(files, named);
        let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        for part in Part::ALL {
            let Some(file) = part.file() else { continue };
            let bytes = part.decompress().unwrap();
            assert_eq!(artifacts[file]["sha256"], digest(&bytes), "{file}");
            assert_eq!(artifacts[file]["size"], bytes.len(), "{file}");
        }
        assert_eq!(artifacts["NOTICE"]["sha256"], digest(NOTICE.as_bytes()));
    }

    #[test]
    fn the_agent_is_the_one_in_the_initramfs() {
        let (agent, initramfs) = (Part::Agent.decompress().unwrap(), Part::Initramfs.decompress().unwrap());
        let at = initramfs.windows(agent.len()).position(|window| window == agent);
        assert!(at.is_some());
        assert!(busybox().unwrap().starts_with(b"\x7fELF"));
        assert!(NOTICE_BUSYBOX.contains("GPL-2.0-only"));
    }
}

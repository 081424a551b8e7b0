//! Puts a kernel and what it needs to start into guest memory, by the 64-bit Linux boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use std::{
    fs::File,
    io::{Seek, SeekFrom},
};

use linux_loader::loader::{
    Elf, KernelLoader,
    bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};
use vz_virtio::Memory;

use crate::{Error, image::Image, join::join, layout, memory};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "HdrS", which says that there is a header.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version whose header names the ACPI root pointer.
const PROTOCOL_VERSION: u16 = 0x020e;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Loads everything; the address of the kernel's 64-bit entry.
pub(crate) fn load(memory: &Memory, kernel: &File, initramfs: &File, cmdline: &str) -> Result<GuestAddress, Error> {
    // Most of what a start costs on the host is this copying, so both are copied at once. Nobody runs yet: where the
    // initramfs is too large, what it overwrites of the kernel is an error afterwards.
    let (initramfs, (entry, kernel_end)) =
        join("initramfs", || load_initramfs(memory, initramfs), || load_kernel(memory, kernel))?;
    let initramfs = behind(initramfs, kernel_end, memory)?;
    load_cmdline(memory, cmdline)?;
    let zero_page = zero_page(memory, initramfs, cmdline.len())?;
    memory.write_obj(zero_page, GuestAddress(layout::ZERO_PAGE)).map_err(Error::place("boot parameters"))?;
    Ok(entry)
}

fn load_kernel(memory: &Memory, kernel: &File) -> Result<(GuestAddress, u64), Error> {
    let loaded = Elf::load(memory, None, &mut Image::new(kernel), Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(|e| Error::Kernel(e.to_string()))?;
    Ok((loaded.kernel_load, loaded.kernel_end))
}

/// As far up in low memory as it goes, where the kernel does not have to step around it; address and size.
fn load_initramfs(memory: &Memory, mut file: &File) -> Result<(u64, u64), Error> {
    let read = |source| Error::Initramfs { source };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    let low = low_memory(memory);
    let Some(address) = low.checked_sub(size).map(|address| address & !(memory::PAGE - 1)) else {
        return Err(Error::TooLittle { memory: low, needed: size });
    };
    let bytes = usize::try_from(size).map_err(|_| Error::TooLittle { memory: low, needed: size })?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, bytes).map_err(Error::place("initramfs"))?;
    Ok((address, size))
}

/// That the initramfs, given by its address and size, is behind the kernel's end.
fn behind((address, size): (u64, u64), kernel_end: u64, memory: &Memory) -> Result<(u64, u64), Error> {
    if address < kernel_end {
        return Err(Error::TooLittle { memory: low_memory(memory), needed: kernel_end.saturating_add(size) });
    }
    Ok((address, size))
}

/// Bytes of memory below the hole.
fn low_memory(memory: &Memory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

fn load_cmdline(memory: &Memory, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= layout::CMDLINE_SIZE || cmdline.contains('\0') {
        return Err(Error::Cmdline { len: cmdline.len(), most: layout::CMDLINE_SIZE.saturating_sub(1) });
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(layout::CMDLINE)).map_err(Error::place("command line"))
}

fn zero_page(memory: &Memory, initramfs: (u64, u64), cmdline: usize) -> Result<boot_params, Error> {
    // Everything is below 4 GiB, so the fields hold it; where it is not, the kernel is not started.
    let word = |value: u64| u32::try_from(value).map_err(|_| Error::Layout(value));
    let mut page = boot_params::default();
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.version = PROTOCOL_VERSION;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = word(layout::CMDLINE)?;
    page.hdr.cmdline_size = word(cmdline as u64)?;
    page.hdr.ramdisk_image = word(initramfs.0)?;
    page.hdr.ramdisk_size = word(initramfs.1)?;
    page.acpi_rsdp_addr = layout::ACPI;
    for (slot, entry) in page.e820_table.iter_mut().zip(e820(memory)) {
        *slot = entry;
        page.e820_entries = page.e820_entries.saturating_add(1);
    }
    Ok(page)
}

/// What is where, for the kernel.
fn e820(memory: &Memory) -> Vec<boot_e820_entry> {
    let range = |from: u64, to: u64, type_| boot_e820_entry { addr: from, size: to.saturating_sub(from), type_ };
    let mut entries = vec![
        range(0, layout::CONVENTIONAL_END, E820_RAM),
        range(layout::CONVENTIONAL_END, layout::HIGH_MEMORY, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        entries.push(range(start.max(layout::HIGH_MEMORY), end, E820_RAM));
    }
    entries
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_map_has_memory_and_hole() {
        let memory = memory::reserve(4 << 30).unwrap();
        let map: Vec<_> = e820(&memory).iter().map(|e| ({ e.addr }, { e.size }, { e.type_ })).collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0x6_0400, E820_RESERVED),
                (0x10_0000, 0xbff0_0000, E820_RAM),
                (0x1_0000_0000, 0x4000_0000, E820_RAM),
            ]
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = memory::reserve(16 << 20).unwrap();
        let error = load(&memory, &file(b"not an ELF file, by far"), &file(b""), "").unwrap_err();
        assert!(matches!(error, Error::Kernel(_)), "{error}");
    }

    #[test]
    fn an_initramfs_is_put_at_the_end_of_low_memory() {
        let memory = memory::reserve(16 << 20).unwrap();
        let (address, size) = load_initramfs(&memory, &file(&[7; 5000])).unwrap();
        assert_eq!(behind((address, size), 14 << 20, &memory).unwrap(), ((16 << 20) - 8192, 5000));
        let mut last = [0; 1];
        memory.read_slice(&mut last, GuestAddress(address + size - 1)).unwrap();
        assert_eq!(last, [7]);
        let error = behind((address, size), address + 1, &memory).unwrap_err();
        assert!(matches!(error, Error::TooLittle { .. }), "{error}");
        let error = load_initramfs(&memory, &file(&vec![7; (16 << 20) + 1])).unwrap_err();
        assert!(matches!(error, Error::TooLittle { .. }), "{error}");
    }

    #[test]
    fn a_command_line_has_a_largest_size() {
        let memory = memory::reserve(16 << 20).unwrap();
        load_cmdline(&memory, &"x".repeat(layout::CMDLINE_SIZE - 1)).unwrap();
        assert!(load_cmdline(&memory, &"x".repeat(layout::CMDLINE_SIZE)).is_err());
        assert!(load_cmdline(&memory, "a\0b").is_err());
    }
}

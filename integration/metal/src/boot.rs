//! The first instructions, on both machines, up to a stack and 64 bits with the first 4 GiB mapped to themselves.
//!
//! QEMU enters by the PVH note: 32 bits, no paging, `ebx` is the address of `hvm_start_info` ("x86/HVM direct boot ABI"
//! of Xen). The built-in machine enters at the ELF file's entry: 64 bits, `rsi` is the address of `boot_params` (Linux'
//! Documentation/arch/x86/boot.rst), whose page tables end before the devices.
//!
//! Interrupts stay off, and there is no table of handlers: an exception is a triple fault, which ends the VM.

// The first instructions are nobody's function.
#![allow(unsafe_code)]

use core::{arch::global_asm, slice};

/// Offset of the command line's address in `hvm_start_info`, where it has 64 bits, and in `boot_params`, where it has
/// 32.
const PVH_CMDLINE: u64 = 24;
const LINUX_CMDLINE: u64 = 0x228;
/// Longest command line that is read.
const CMDLINE: usize = 64 * 1024;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4                             # bytes of the name
    .long 8                             # bytes of the entry's address
    .long 18                            # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start32

    .section .text.start, "ax", @progbits
    .code32
    .globl start32
start32:
    cli
    cld
    movl %ebx, %edi
    movl %cr4, %eax
    orl $0x620, %eax                    # PAE; SSE, which compiled code takes for granted
    movl %eax, %cr4
    movl $metal_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $0x100, %eax                    # LME
    wrmsr
    movl %cr0, %eax
    andl $~0xc, %eax                    # no emulated FPU, nothing saved lazily
    orl $0x80000003, %eax               # PG, MP, PE
    movl %eax, %cr0
    lgdt metal_gdt_pointer
    ljmp $8, $2f
    .code64
2:  movl %edi, %edi
    movl $1, %esi
    jmp 3f

    .globl start64
start64:
    cli
    cld
    movq %rsi, %rdi
    movq %cr4, %rax
    orq $0x620, %rax
    movq %rax, %cr4
    movl $metal_pml4, %eax
    movq %rax, %cr3
    movq %cr0, %rax
    andq $~0xc, %rax
    orq $2, %rax
    movq %rax, %cr0
    lgdt metal_gdt_pointer
    xorl %esi, %esi

3:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $metal_stack_end, %esp
    xorl %ebp, %ebp
    call metal_main
4:  hlt
    jmp 4b

    .section .data.boot, "aw", @progbits
    .balign 4096
metal_pml4:
    .quad metal_pdpt + 3
    .fill 511, 8, 0
metal_pdpt:
    .quad metal_pd + 3, metal_pd + 0x1003, metal_pd + 0x2003, metal_pd + 0x3003
    .fill 508, 8, 0
metal_pd:                               # 2048 pages of 2 MiB: present, writable, large
    .set at, 0
    .rept 2048
    .quad at + 0x83
    .set at, at + 0x200000
    .endr
    .balign 8
metal_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
metal_gdt_pointer:
    .word 23
    .quad metal_gdt

    .section .bss.boot, "aw", @nobits
    .balign 16
    .fill 0x20000
metal_stack_end:
"#,
    options(att_syntax)
);

/// The command line, from what the machine handed over; `pvh` says by which protocol.
pub fn command_line(handed: u64, pvh: bool) -> &'static str {
    // SAFETY: both are the machine's own, in the first GiB, which is mapped; nothing writes to them any more.
    let bytes = unsafe {
        let at = if pvh {
            ((handed + PVH_CMDLINE) as *const u64).read_unaligned()
        } else {
            u64::from(((handed + LINUX_CMDLINE) as *const u32).read_unaligned())
        };
        let first = at as *const u8;
        let length = (0..CMDLINE).take_while(|n| first.add(*n).read() != 0).count();
        slice::from_raw_parts(first, length)
    };
    str::from_utf8(bytes).unwrap_or("")
}

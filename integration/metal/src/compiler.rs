//! What compiled code calls, and the C library has elsewhere. In assembly, as a loop in Rust would be compiled to a
//! call of itself.

// Nobody else has these names.
#![allow(unsafe_code)]

use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.compiler, "ax", @progbits
    .globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    movq %rdi, %rax
    subq %rsi, %rax
    cmpq %rdx, %rax                     # the target begins inside of the source: from the end
    jae memcpy
    movq %rdi, %rax
    movq %rdx, %rcx
    leaq -1(%rdi,%rdx), %rdi
    leaq -1(%rsi,%rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
memcmp:
bcmp:
    movq %rdx, %rcx
    xorl %eax, %eax                     # and the flags say "equal", for no bytes
    repe cmpsb
    je 1f
    movzbl -1(%rdi), %ecx
    movzbl -1(%rsi), %eax
    subl %ecx, %eax
1:  ret
"#,
    options(att_syntax)
);

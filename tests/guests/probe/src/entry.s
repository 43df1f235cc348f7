# From the PVH entry (32-bit protected mode, no paging, start information in ebx) to Rust in long mode.
# Identity mapping of the first 4 GiB by 2 MiB pages: memory below 3 GiB and the device windows.

    .section .note.Xen, "a", @note
    .align 4
    .long 4                     # size of the name
    .long 4                     # size of the descriptor
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .text.entry, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    movl $stack_top, %esp

    movl $page_tables, %edi     # level 4, entry 0
    movl $page_tables + 0x1000 + 3, (%edi)
    movl $page_tables + 0x1000, %edi
    movl $page_tables + 0x2000 + 3, %eax
    movl $4, %ecx
1:  movl %eax, (%edi)           # level 3: one entry per GiB
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b

    movl $page_tables + 0x2000, %edi
    movl $0x83, %eax            # present, writable, 2 MiB
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b

    movl $page_tables, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl  $0x620, %eax           # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl  $0x100, %eax           # EFER.LME
    wrmsr
    movl %cr0, %eax
    andl $~0x4, %eax            # no emulation of the FPU
    orl  $0x80000003, %eax      # PG, MP, PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

    .code64
long_mode:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movl %ebx, %edi             # the start information is the first argument
    movq $stack_top, %rsp
    xorl %ebp, %ebp
    call guest_main
3:  hlt
    jmp 3b

    .global timer_interrupt
timer_interrupt:
    pushq %rax
    incq TIMER_INTERRUPTS
    movl $0xfee000b0, %eax      # end of the interrupt, at the local APIC
    movl $0, (%rax)
    popq %rax
    .global spurious_interrupt
spurious_interrupt:
    iretq

    .section .rodata.gdt, "a"
    .align 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 64-bit code
    .quad 0x00cf93000000ffff    # data
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .section .bss.early, "aw", @nobits
    .align 4096
page_tables:
    .skip 0x6000
    .align 16
    .skip 0x10000
stack_top:

/* Preloaded, it makes a process believe that its processor lacks instruction sets which it has: `cpuid` faults, and the
 * handler executes it and clears bits of the answer. Everything else runs at the processor's own speed. It takes a
 * processor and a kernel that can let `cpuid` fault (flag cpuid_fault in /proc/cpuinfo); else the process ends with 77.
 *
 * PROCESSOR_KIND: avx512 (no VNNI and no AMX), avx2 (nor AVX-512), sse (nor AVX). Unset: nothing happens.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

enum { ARCH_SET_CPUID = 0x1012, NOT_POSSIBLE = 77 };
typedef enum { AVX512, AVX2, SSE } Kind;
typedef struct { uint32_t a, b, c, d; } Registers;

static Kind kind;

static long let_cpuid_run(unsigned long yes) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static void hide(uint32_t leaf, uint32_t subleaf, Registers *r) {
    if (leaf == 1 && kind == SSE)
        r->c &= ~(BIT(12) | BIT(28) | BIT(29)); /* FMA, AVX, F16C */
    if (leaf == 7 && subleaf == 0) {
        r->c &= ~BIT(11);                         /* AVX512_VNNI */
        r->d &= ~(BIT(22) | BIT(24) | BIT(25));   /* AMX */
        if (kind != AVX512) {
            r->b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
            r->c &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));
            r->d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));
        }
        if (kind == SSE)
            r->b &= ~BIT(5); /* AVX2 */
    }
    if (leaf == 7 && subleaf == 1) {
        r->a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));            /* AVX-VNNI, AVX512_BF16, AMX-FP16, AVX-IFMA */
        r->d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));   /* AVX-VNNI-INT8, AVX-NE-CONVERT, …, AVX10 */
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)reg[REG_RIP];
    uint32_t leaf = (uint32_t)reg[REG_RAX], subleaf = (uint32_t)reg[REG_RCX];
    Registers r;
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        signal(number, SIG_DFL); /* a fault of the program's own: it happens again, and ends the process */
        return;
    }
    let_cpuid_run(1);
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    let_cpuid_run(0);
    hide(leaf, subleaf, &r);
    reg[REG_RAX] = r.a, reg[REG_RBX] = r.b, reg[REG_RCX] = r.c, reg[REG_RDX] = r.d;
    reg[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    static const char *const names[] = {"avx512", "avx2", "sse"};
    const char *wanted = getenv("PROCESSOR_KIND");
    struct sigaction action;
    if (wanted == NULL)
        return;
    for (kind = AVX512; kind <= SSE && strcmp(wanted, names[kind]) != 0; kind++)
        ;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (kind > SSE || sigaction(SIGSEGV, &action, NULL) != 0 || let_cpuid_run(0) != 0)
        _exit(NOT_POSSIBLE);
}

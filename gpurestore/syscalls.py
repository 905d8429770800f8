"""Numbers of the system calls that plans are made of: x86-64 Linux (arch/x86/entry/syscalls/syscall_64.tbl)."""

from __future__ import annotations

from enum import IntEnum


class NR(IntEnum):
    """A system call by its kernel name, in upper case."""

    READ = 0
    WRITE = 1
    CLOSE = 3
    POLL = 7
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    BRK = 12
    RT_SIGACTION = 13
    RT_SIGPROCMASK = 14
    IOCTL = 16
    SCHED_YIELD = 24
    MREMAP = 25
    MSYNC = 26
    MINCORE = 27
    MADVISE = 28
    PAUSE = 34
    NANOSLEEP = 35
    GETITIMER = 36
    SETITIMER = 38
    GETPID = 39
    EXIT = 60
    WAIT4 = 61
    KILL = 62
    FCNTL = 72
    FCHDIR = 81
    UMASK = 95
    PTRACE = 101
    SETPGID = 109
    GETPPID = 110
    SETSID = 112
    SETGROUPS = 116
    SETRESUID = 117
    SETRESGID = 119
    SETFSUID = 122
    SETFSGID = 123
    CAPSET = 126
    RT_SIGTIMEDWAIT = 128
    RT_SIGQUEUEINFO = 129
    SIGALTSTACK = 131
    PERSONALITY = 135
    GETPRIORITY = 140
    SETPRIORITY = 141
    MLOCKALL = 151
    MODIFY_LDT = 154
    PRCTL = 157
    ARCH_PRCTL = 158
    CHROOT = 161
    GETTID = 186
    FUTEX = 202
    SCHED_SETAFFINITY = 203
    SCHED_GETAFFINITY = 204
    SET_TID_ADDRESS = 218
    RESTART_SYSCALL = 219
    TIMER_CREATE = 222
    TIMER_SETTIME = 223
    TIMER_GETTIME = 224
    TIMER_GETOVERRUN = 225
    TIMER_DELETE = 226
    CLOCK_NANOSLEEP = 230
    EXIT_GROUP = 231
    MBIND = 237
    SET_MEMPOLICY = 238
    GET_MEMPOLICY = 239
    IOPRIO_SET = 251
    IOPRIO_GET = 252
    OPENAT = 257
    SET_ROBUST_LIST = 273
    GET_ROBUST_LIST = 274
    TEE = 276
    DUP3 = 292
    RT_TGSIGQUEUEINFO = 297
    PRLIMIT64 = 302
    KCMP = 312
    SCHED_SETATTR = 314
    SCHED_GETATTR = 315
    USERFAULTFD = 323
    MEMBARRIER = 324
    MLOCK2 = 325
    RSEQ = 334
    CLONE3 = 435
    CLOSE_RANGE = 436
    PIDFD_GETFD = 438
    CACHESTAT = 451
    # No system call: the agent itself (cext/gr_agent.h).
    AGENT_USE_TILES = 0x10000
    AGENT_CLONE = 0x10001

#ifndef GR_AGENT_ENTRY_H
#define GR_AGENT_ENTRY_H

/* Offsets of the agent's entries in its blob, and the marker by which ONCE says that its batch is done. */
#define GR_ENTRY_SERVE 0
#define GR_ENTRY_ONCE 16
#define GR_ENTRY_SYSCALL 64 /* no entry: a system call instruction for the tracer, which never lets go behind it */
#define GR_DONE_NR 39 /* getpid: harmless when nobody traces */
#define GR_DONE_MARK 0x67727374

#endif

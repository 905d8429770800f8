/*
 * A stand-in for libcuda.so.1, built by the tests: the driver's checkpoint calls with their real state machine, and the
 * part of the driver that lives in a process that uses CUDA. No GPU: a "device" is a file in $FAKE_CUDA_DIR.
 *
 *   DIR/PID.state    "STATE TID UUID" of a process, published by its restore thread
 *   DIR/PID.request  what the restore thread is to do next; taken away when it is done
 *   DIR/PID.device   the device's memory; gone while the process is CHECKPOINTED
 *   DIR/PID.busy     as long as it is there, the process's work never comes to rest
 *   DIR/calls        one line for each call: name, pid, result, and how many of its threads ran and were stopped
 *   FAKE_CUDA_FAIL   "NAME:CODE[:PID]" lets a call fail; with CODE 999 the process ends up FAILED
 *   FAKE_CUDA_GPUS   UUIDs (hex) that are here; empty: all
 *
 * From CUDA 13.4 on (VERSION 13040) it has custom storage as NVIDIA documents it: the caller must have called cuInit and
 * hold the primary context of the process's GPU; it gets addresses that only copies understand, and streams; copies are
 * done when their stream is synchronized and not before, by the caller or, for the streams handed out, by the call that
 * completes the operation; in between the process is CHECKPOINTING or RESTORING. Functions of the plain interface are
 * found by cuGetProcAddress alone. A process that went to custom storage does not come back without.
 *
 * As in the real driver, the state and the device's content while it is checkpointed are in the process's own memory,
 * and only its restore thread can do anything: a stopped one leaves every caller waiting (here: an error instead).
 */
#ifndef FAKE_H
#define FAKE_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

#ifndef VERSION
#define VERSION 13000
#endif
#define API __attribute__((visibility("default")))
#if VERSION >= 12080
#define SINCE_570 API
#else
#define SINCE_570 __attribute__((visibility("hidden"), used))
#endif
#if VERSION >= 13040
#define SINCE_615 API
#else
#define SINCE_615 __attribute__((visibility("hidden"), used))
#endif

enum { RUNNING, LOCKED, CHECKPOINTED, FAILED, CHECKPOINTING, RESTORING };
enum { OK, INVALID_VALUE, NO_MEMORY, NOT_INITIALIZED, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { ILLEGAL_STATE = 401, NOT_READY = 600, UNKNOWN = 999 };
enum { CELLS = 512, PATIENCE_MS = 3000 };

typedef struct { unsigned char bytes[16]; } uuid_t16;
typedef struct { unsigned int timeout_ms, reserved0; uint64_t reserved1[7]; } lock_args;
typedef struct { uint64_t reserved[8]; } plain_args;
typedef struct { uuid_t16 old, new; } pair;
typedef struct { uint64_t address; size_t size; void *stream; } device_data;
typedef struct { void *handle; device_data *devices; unsigned int count; } storage_info;
typedef struct { storage_info **out; char reserved[56]; } checkpoint_args;
typedef struct { pair *pairs; unsigned int count, padding; storage_info **out; char reserved[40]; } restore_args;
_Static_assert(sizeof(lock_args) == 64 && sizeof(plain_args) == 64 && sizeof(restore_args) == 64, "argument blocks");

/* files.c: the folder is what all processes see of the driver */
const char *folder(void);
void name_of(char *out, size_t size, const char *dir, int pid, const char *what);
void pause_ms(long ms);
int read_text(const char *path, char *out, size_t size);
void write_text(const char *path, const char *text);

/* calls.c: what other processes ask of a process's restore thread */
struct target {
	int state, tid, custom;
	char uuid[33];
};
int look(int pid, struct target *out);
void note(const char *name, int pid, int code, const char *extra);
int ask(int pid, int tid, const char *request);
int must_fail(const char *name, int pid, int tid);
int step_to(const char *name, int pid, int from, const char *request, const char *extra);
int is_initialised(void);

/* storage.c: device memory that the caller moves */
int holds(const char *uuid);
int hand_out(int pid, const char *uuid, int restore, storage_info **out);
int checkpoint_custom(int pid, storage_info **out);

#endif

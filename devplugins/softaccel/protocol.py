"""Messages between client and server of the software accelerator (a stand-in for hardware), and the doorbell page.

The socket is AF_UNIX, SOCK_SEQPACKET. A client has one message out at a time and waits for its reply:

    message   1 to MAX_BATCH requests; all but the last must be commands for streams. One reply, for the last request.
    request   u32 op, u32 reserved, u64 seq, u64 args[12]                  112 bytes, little endian
    reply     i32 errno, u32 bytes of text, u64 seq, u64 values[6], text   64 bytes and a message for people

A reply with another ``seq`` than the one waited for is stale and dropped: after a restore the server may repeat one.
Bytes of copies never pass through the socket: the server, as a DMA engine would, reads and writes the client's memory
itself (process_vm_readv, process_vm_writev). So a copy is either queued, and carried by a checkpoint as the addresses
it names, which are the same after a restore; or done. There is no buffer in between that a dump could tear.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
REQUEST = struct.Struct("<IIQ12Q")
REPLY = struct.Struct("<iIQ6Q")
MAX_BATCH = 64
MAX_MESSAGE_BYTES = REQUEST.size * MAX_BATCH
MAX_REPLY_BYTES = 4096
ALL_STREAMS = (1 << 64) - 1
_DOUBLE = struct.Struct("<d")
_WORD = struct.Struct("<Q")


class Op(IntEnum):
    """What a client may ask for. Arguments in brackets, values of the reply behind the arrow."""

    HELLO = 1  # (version, device, inode of the client's socket) -> context, device; the doorbell page comes along
    READY = 2  # (word written to the page) -> nothing; EAGAIN and the page once more if the server does not see it
    INFO = 3  # () -> number of devices; memory and free memory of the context's
    ALLOC = 4  # (bytes) -> address
    FREE = 5  # (address)
    STREAM_CREATE = 6  # () -> stream
    STREAM_DESTROY = 7  # (stream), which must be idle
    EVENT_CREATE = 8  # () -> event
    EVENT_DESTROY = 9  # (event)
    EVENT_QUERY = 10  # (event) -> 1 if done
    WAIT = 11  # (stream or ALL_STREAMS): everything that was queued so far is done
    EVENT_WAIT = 12  # (event)
    # Commands: they go into the stream that is their first argument, and are answered at once with their number.
    COPY_IN = 32  # (stream, device address, host address, bytes)
    COPY_OUT = 33  # (stream, host address, device address, bytes)
    COPY = 34  # (stream, to, from, bytes), both on the device
    LAUNCH = 35  # (stream, kernel, type, up to nine parameters)
    EVENT_RECORD = 36  # (stream, event)
    EVENT_AWAIT = 37  # (stream, event): what follows in this stream waits for the event


COMMANDS = frozenset(op for op in Op if op >= Op.COPY_IN)


class Kernel(IntEnum):
    """What a device can compute. ``n`` counts elements; matrices lie row by row; doubles travel as their bits."""

    FILL = 1  # (out, n, value)
    ADD = 2  # (out, a, b, n)
    ADD_ROW = 3  # (out, a, row, rows, columns): the same row to every row of a
    SCALE = 4  # (out, a, n, factor)
    AXPY = 5  # (y, x, n, factor): y += factor * x
    RELU = 6  # (out, a, n)
    RELU_GRADIENT = 7  # (out, gradient, a, n): the gradient where a > 0, else 0
    REDUCE_ROWS = 8  # (out, a, rows, columns): the sum of all rows
    MATMUL = 9  # (out, a, b, m, n, k, flags, alpha, beta): out = alpha * a @ b + beta * out
    SOFTMAX_CROSS_ENTROPY = 10  # (loss, gradient, scores, labels, rows, columns): a loss a row; labels are int64
    BUSY = 11  # (nanoseconds): computes nothing for so long


TRANSPOSE_A = 1  # a is stored as k rows of m
TRANSPOSE_B = 2  # b is stored as n rows of k


class Type(IntEnum):
    """Element types."""

    FLOAT32 = 1
    FLOAT64 = 2


TYPE_BYTES = {Type.FLOAT32: 4, Type.FLOAT64: 8}


class Request(NamedTuple):
    """One request, decoded."""

    op: int
    seq: int
    args: tuple[int, ...]

    def pack(self) -> bytes:
        """As it travels."""
        padding = (0,) * (12 - len(self.args))
        return REQUEST.pack(self.op, 0, self.seq, *self.args, *padding)


class Reply(NamedTuple):
    """One reply, decoded. ``errno`` 0 means done."""

    errno: int
    seq: int
    values: tuple[int, ...] = ()
    text: str = ""

    def pack(self) -> bytes:
        """As it travels."""
        text = self.text.encode()[: MAX_REPLY_BYTES - REPLY.size]
        padding = (0,) * (6 - len(self.values))
        return REPLY.pack(self.errno, len(text), self.seq, *self.values, *padding) + text


def unpack_requests(data: bytes) -> list[Request]:
    """All requests of a message. Raises ValueError when it is none."""
    if not data or len(data) % REQUEST.size or len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes")
    return [Request(op, seq, tuple(args)) for op, _, seq, *args in REQUEST.iter_unpack(data)]


def unpack_reply(data: bytes) -> Reply:
    """Raises ValueError when it is none."""
    if len(data) < REPLY.size:
        raise ValueError(f"a reply of {len(data)} bytes")
    errno, size, seq, *values = REPLY.unpack_from(data)
    return Reply(errno, seq, tuple(values), data[REPLY.size : REPLY.size + size].decode(errors="replace"))


def double_bits(value: float) -> int:
    """A double as the u64 that it travels in."""
    return int(_WORD.unpack(_DOUBLE.pack(value))[0])


def bits_double(bits: int) -> float:
    """And back."""
    return float(_DOUBLE.unpack(_WORD.pack(bits))[0])


# ---- the doorbell page: u64 words, one page, mapped shared by client and server
#
#     0   magic          16   words written by the client (READY)        32   1 when the device is lost
#     8   context        24   doorbell: messages sent by the client      256 + 8 * stream   commands done in the stream

PAGE_BYTES = 4096
PAGE_MAGIC = 0x3143434154464F53  # "SOFTACC1"
AT_MAGIC, AT_CONTEXT, AT_READY, AT_DOORBELL, AT_LOST, AT_FENCES = 0, 8, 16, 24, 32, 256
MAX_STREAMS = (PAGE_BYTES - AT_FENCES) // 8

"""The demonstration's training job on the software accelerator, which is a stand-in for hardware, not a GPU.

The network of job.py, with everything that it learns in device memory: weights, momentum, and the weights of the last
steps, which are averaged at the end. Three streams work out the gradients of their shard of a batch; events order them.
A forked process prepares batches in shared memory, a thread keeps the books. The result depends on the arguments alone.

    python -m gpurestore.demo.device_job --out DIR [--steps N]        needs $SOFTACCEL_SOCKET
"""

from __future__ import annotations

import signal
from array import array
from pathlib import Path

import numpy as np

from gpurestore.demo.job import (
    BATCH_ROWS,
    LEARNING_RATE,
    MOMENTUM,
    NR_CLASSES,
    NR_HIDDEN,
    NR_PIXELS,
    NR_SHARDS,
    SEED,
    SHARD_ROWS,
    Array,
    Labels,
    Loader,
    Metrics,
    Slots,
    draw_rows,
    initial_weights,
    load_digits,
    read_message,
    run_job,
    save_weights,
    write_message,
)
from gpurestore.devplugins.softaccel.client import Context, Stream
from gpurestore.devplugins.softaccel.protocol import Kernel, Type

F64 = Type.FLOAT64
SIZES = (NR_PIXELS * NR_HIDDEN, NR_HIDDEN, NR_HIDDEN * NR_CLASSES, NR_CLASSES)
NR_WEIGHTS = sum(SIZES)
OFFSETS = tuple(8 * sum(SIZES[:index]) for index in range(len(SIZES)))
NR_KEPT = 512  # steps whose weights are kept: some 60 MB on the device
NR_NOISES = 700  # batches of noise that the loader draws ahead: some 100 MB on the host


class Shard:
    """A stream with what it needs to work out the gradients of its rows."""

    def __init__(self, context: Context, number: int) -> None:
        self.number = number
        self.stream: Stream = context.create_stream()
        self.done = context.create_event()
        self.pixels = context.alloc(SHARD_ROWS * NR_PIXELS * 8)
        self.labels = context.alloc(SHARD_ROWS * 8)
        self.hidden = context.alloc(SHARD_ROWS * NR_HIDDEN * 8)
        self.active = context.alloc(SHARD_ROWS * NR_HIDDEN * 8)
        self.back = context.alloc(SHARD_ROWS * NR_HIDDEN * 8)
        self.scores = context.alloc(SHARD_ROWS * NR_CLASSES * 8)
        self.errors = context.alloc(SHARD_ROWS * NR_CLASSES * 8)
        self.loss = context.alloc(SHARD_ROWS * 8)
        self.gradients = context.alloc(NR_WEIGHTS * 8)
        self.losses = array("d", bytes(SHARD_ROWS * 8))  # on the host

    def queue(self, weights: int, pixels: Array, labels: Labels) -> None:
        """Queue one batch's work; ``done`` is done when it is."""
        stream, rows = self.stream, slice(self.number * SHARD_ROWS, (self.number + 1) * SHARD_ROWS)
        w1, b1, w2, b2 = (weights + offset for offset in OFFSETS)
        g_w1, g_b1, g_w2, g_b2 = (self.gradients + offset for offset in OFFSETS)
        stream.copy_in(self.pixels.address, pixels[rows])
        stream.copy_in(self.labels.address, labels[rows])
        stream.matmul(F64, self.hidden, self.pixels, w1, (SHARD_ROWS, NR_HIDDEN, NR_PIXELS))
        stream.launch(Kernel.ADD_ROW, F64, self.hidden, self.hidden, b1, SHARD_ROWS, NR_HIDDEN)
        stream.launch(Kernel.RELU, F64, self.active, self.hidden, SHARD_ROWS * NR_HIDDEN)
        stream.matmul(F64, self.scores, self.active, w2, (SHARD_ROWS, NR_CLASSES, NR_HIDDEN))
        stream.launch(Kernel.ADD_ROW, F64, self.scores, self.scores, b2, SHARD_ROWS, NR_CLASSES)
        parameters = (self.loss, self.errors, self.scores, self.labels, SHARD_ROWS, NR_CLASSES)
        stream.launch(Kernel.SOFTMAX_CROSS_ENTROPY, F64, *parameters)
        stream.matmul(F64, self.back, self.errors, w2, (SHARD_ROWS, NR_HIDDEN, NR_CLASSES), transpose_b=True)
        stream.launch(Kernel.RELU_GRADIENT, F64, self.back, self.back, self.hidden, SHARD_ROWS * NR_HIDDEN)
        stream.matmul(F64, g_w1, self.pixels, self.back, (NR_PIXELS, NR_HIDDEN, SHARD_ROWS), transpose_a=True)
        stream.launch(Kernel.REDUCE_ROWS, F64, g_b1, self.back, SHARD_ROWS, NR_HIDDEN)
        stream.matmul(F64, g_w2, self.active, self.errors, (NR_HIDDEN, NR_CLASSES, SHARD_ROWS), transpose_a=True)
        stream.launch(Kernel.REDUCE_ROWS, F64, g_b2, self.errors, SHARD_ROWS, NR_CLASSES)
        stream.copy_out(self.losses, self.loss.address)
        stream.record(self.done)


class Trainer:
    """What lives on the device, and a step of training."""

    def __init__(self) -> None:
        self.context = Context()
        self.weights = self.context.upload(np.concatenate([weight.ravel() for weight in initial_weights()]))
        self.speed = self.context.alloc(NR_WEIGHTS * 8)
        self.kept = self.context.alloc(NR_KEPT * NR_WEIGHTS * 8)
        self.shards = [Shard(self.context, number) for number in range(NR_SHARDS)]

    def step(self, number: int, pixels: Array, labels: Labels) -> float:
        """One step; its loss."""
        stream = self.context.stream
        with self.context.batch():
            for shard in self.shards:
                shard.queue(self.weights.address, pixels, labels)
            stream.launch(Kernel.SCALE, F64, self.speed, self.speed, NR_WEIGHTS, MOMENTUM)
            for shard in self.shards:  # always in the same order: sums in another one are other sums
                stream.wait(shard.done)
                factor = -LEARNING_RATE / BATCH_ROWS
                stream.launch(Kernel.AXPY, F64, self.speed, shard.gradients, NR_WEIGHTS, factor)
            stream.launch(Kernel.AXPY, F64, self.weights, self.speed, NR_WEIGHTS, 1.0)
            stream.copy(self.kept + number % NR_KEPT * NR_WEIGHTS * 8, self.weights, NR_WEIGHTS * 8)
        self.context.synchronize()
        return sum(sum(shard.losses) for shard in self.shards) / BATCH_ROWS

    def result(self) -> bytes:
        """The weights, and the sum of those that were kept."""
        total = self.context.alloc(NR_WEIGHTS * 8)
        self.context.stream.launch(Kernel.REDUCE_ROWS, F64, total, self.kept, NR_KEPT, NR_WEIGHTS)
        return bytes(self.weights.read()) + bytes(total.read())


def serve_batches(slots: Slots, pixels: Array, labels: Labels, ask: int, answer: int) -> None:
    """The forked process: draws, shuffles and blurs pictures."""
    rng = np.random.default_rng(SEED)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    noises = rng.normal(0.0, 0.05, (NR_NOISES, BATCH_ROWS, NR_PIXELS))
    for number, rows in enumerate(draw_rows(rng, len(pixels))):
        slot = read_message(ask)
        if slot is None:
            return
        slots.pixels[slot][:] = pixels[rows] + noises[number % NR_NOISES]
        slots.labels[slot][:] = labels[rows]
        write_message(answer, slot)


def train(steps: int, out: Path) -> None:
    """The whole job."""
    loader = Loader(*load_digits(), serve=serve_batches)
    metrics = Metrics(out / "losses.txt")
    trainer = Trainer()
    for step in range(steps):
        slot = loader.next_slot()
        loss = trainer.step(step, loader.slots.pixels[slot], loader.slots.labels[slot])
        loader.give_back(slot)
        metrics.add(step, loss)
    metrics.close()
    loader.close()
    save_weights(out, trainer.result())
    trainer.context.close()


if __name__ == "__main__":
    run_job("train a small network on the software accelerator, not a GPU", train, 2000)

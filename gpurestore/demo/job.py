"""The training job of the demonstration: a small network learns to read scikit-learn's handwritten digits.

It is built as real jobs are - threads that compute gradients of their shard of a batch, a thread that keeps the books,
a forked process that prepares batches in shared memory and is talked to through pipes - and yet its result depends on
nothing but its arguments: sums are made in a fixed order, and who is faster never matters.

    python -m gpurestore.demo.job --out DIR [--steps N]

DIR/losses.txt grows by one line a step; DIR/weights.bin appears at the end.
"""

from __future__ import annotations

import argparse
import mmap
import os
import queue
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy loads; the threads here are our own

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.int64]
Weights: TypeAlias = list[Array]

NR_SHARDS = 3
SHARD_ROWS = 96
BATCH_ROWS = NR_SHARDS * SHARD_ROWS
NR_PIXELS = 64
NR_HIDDEN = 192
NR_CLASSES = 10
NR_SLOTS = 2  # batches that the loader prepares ahead
LEARNING_RATE = 0.05
MOMENTUM = 0.9
SEED = 20_240_601

_MESSAGE = struct.Struct("=I")
_PIXEL_BYTES = BATCH_ROWS * NR_PIXELS * 8
_SLOT_BYTES = _PIXEL_BYTES + BATCH_ROWS * 8


def load_digits() -> tuple[Array, Labels]:
    """The data set: 1797 pictures of 8 by 8 pixels, between 0 and 1, and what they show."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    return np.ascontiguousarray(pixels / 16.0, dtype=np.float64), np.ascontiguousarray(labels, dtype=np.int64)


class Slots:
    """Room for prepared batches, shared with the loader."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, NR_SLOTS * _SLOT_BYTES, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.pixels: list[Array] = []
        self.labels: list[Labels] = []
        for start in range(0, NR_SLOTS * _SLOT_BYTES, _SLOT_BYTES):
            pixels = np.frombuffer(memory, np.float64, BATCH_ROWS * NR_PIXELS, start)
            self.pixels.append(pixels.reshape(BATCH_ROWS, NR_PIXELS))
            self.labels.append(np.frombuffer(memory, np.int64, BATCH_ROWS, start + _PIXEL_BYTES))


# What the forked process does: (slots, pixels, labels, pipe with free slots, pipe for full ones).
Serve: TypeAlias = Callable[[Slots, Array, Labels, int, int], None]


class Loader:
    """The forked process that draws, shuffles and blurs pictures. Start it before any thread."""

    def __init__(self, pixels: Array, labels: Labels, serve: Serve | None = None) -> None:
        self.slots = Slots()
        ask_reader, self._ask = os.pipe()
        self._answer, answer_writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self._answer)
            serve = serve or _serve_batches
            _end_with(lambda: serve(self.slots, pixels, labels, ask_reader, answer_writer))
        os.close(ask_reader)
        os.close(answer_writer)
        for slot in range(NR_SLOTS):
            self.give_back(slot)

    def next_slot(self) -> int:
        """Wait for a batch; it stays valid until it is given back."""
        message = read_message(self._answer)
        if message is None:
            raise RuntimeError("the data loader has ended")
        return message

    def give_back(self, slot: int) -> None:
        """The slot's batch is used up: the loader may fill it again."""
        write_message(self._ask, slot)

    def close(self) -> None:
        """End the process and see that it ended well."""
        os.close(self._ask)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._answer)
        if status != 0:
            raise RuntimeError(f"the data loader ended with status {status}")


def _end_with(work: Callable[[], None]) -> None:
    """Run ``work`` and leave the process without the parent's clean-up."""
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _serve_batches(slots: Slots, pixels: Array, labels: Labels, ask: int, answer: int) -> None:
    rng = np.random.default_rng(SEED)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for rows in draw_rows(rng, len(pixels)):
        slot = read_message(ask)
        if slot is None:
            return
        slots.pixels[slot][:] = pixels[rows] + rng.normal(0.0, 0.05, (BATCH_ROWS, NR_PIXELS))
        slots.labels[slot][:] = labels[rows]
        write_message(answer, slot)


def draw_rows(rng: np.random.Generator, nr_rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of batch after batch, shuffled anew for each run through all of them."""
    while True:
        order = rng.permutation(nr_rows)
        for start in range(0, nr_rows - BATCH_ROWS + 1, BATCH_ROWS):
            yield order[start : start + BATCH_ROWS]


def write_message(fd: int, number: int) -> None:
    """Send the number of a slot."""
    os.write(fd, _MESSAGE.pack(number))


def read_message(fd: int) -> int | None:
    """The number of a slot, or None at the end."""
    raw = os.read(fd, _MESSAGE.size)  # messages are far below PIPE_BUF: never torn
    return int(_MESSAGE.unpack(raw)[0]) if raw else None


def initial_weights() -> Weights:
    """Two layers with their biases."""
    rng = np.random.default_rng(SEED + 1)
    return [
        rng.normal(0.0, 0.1, (NR_PIXELS, NR_HIDDEN)),
        np.zeros(NR_HIDDEN),
        rng.normal(0.0, 0.1, (NR_HIDDEN, NR_CLASSES)),
        np.zeros(NR_CLASSES),
    ]


def gradients(weights: Weights, pixels: Array, labels: Labels) -> tuple[float, Weights]:
    """Cross-entropy of the network on these rows, summed, and its derivatives."""
    w1, b1, w2, b2 = weights
    hidden = np.tanh(pixels @ w1 + b1)
    scores = hidden @ w2 + b2
    scores -= scores.max(axis=1, keepdims=True)
    chances = np.exp(scores)
    chances /= chances.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(chances[rows, labels]).sum()
    chances[rows, labels] -= 1.0
    back = (chances @ w2.T) * (1.0 - hidden**2)
    return float(loss), [pixels.T @ back, back.sum(axis=0), hidden.T @ chances, chances.sum(axis=0)]


@dataclass
class Shard:
    """What one gradient thread has worked out."""

    loss: float
    gradients: Weights


class ShardThreads:
    """Threads that each take the same rows of every batch."""

    def __init__(self) -> None:
        self._work: list[queue.SimpleQueue[tuple[Weights, Array, Labels] | None]] = []
        self._done: list[queue.SimpleQueue[Shard]] = []
        self._threads: list[threading.Thread] = []
        for number in range(NR_SHARDS):
            self._work.append(queue.SimpleQueue())
            self._done.append(queue.SimpleQueue())
            self._threads.append(threading.Thread(target=self._serve, args=(number,), name=f"shard {number}"))
            self._threads[-1].start()

    def _serve(self, number: int) -> None:
        while (work := self._work[number].get()) is not None:
            self._done[number].put(Shard(*gradients(*work)))

    def run(self, weights: Weights, pixels: Array, labels: Labels) -> list[Shard]:
        """Hand out the rows and collect the results, in the order of the shards."""
        for number, work in enumerate(self._work):
            rows = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
            work.put((weights, pixels[rows], labels[rows]))
        return [done.get() for done in self._done]

    def close(self) -> None:
        """End the threads."""
        for work in self._work:
            work.put(None)
        for thread in self._threads:
            thread.join()


class Metrics:
    """The thread that writes the loss curve, one line a step, appended at once."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._losses: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="metrics")
        self._thread.start()

    def _serve(self) -> None:
        while (entry := self._losses.get()) is not None:
            step, loss = entry
            os.write(self._fd, f"{step} {loss.hex()} {loss:.6f}\n".encode())

    def add(self, step: int, loss: float) -> None:
        """Note the loss of one step."""
        self._losses.put((step, loss))

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._losses.put(None)
        self._thread.join()
        os.close(self._fd)


def train(steps: int, out: Path) -> None:
    """The whole job."""
    loader = Loader(*load_digits())
    threads = ShardThreads()
    metrics = Metrics(out / "losses.txt")
    weights = initial_weights()
    speeds = [np.zeros_like(w) for w in weights]
    for step in range(steps):
        slot = loader.next_slot()
        shards = threads.run(weights, loader.slots.pixels[slot], loader.slots.labels[slot])
        loader.give_back(slot)
        for index, weight in enumerate(weights):
            total = np.sum([shard.gradients[index] for shard in shards], axis=0)
            speeds[index] = MOMENTUM * speeds[index] - LEARNING_RATE / BATCH_ROWS * total
            weight += speeds[index]
        metrics.add(step, sum(shard.loss for shard in shards) / BATCH_ROWS)
    metrics.close()
    threads.close()
    loader.close()
    save_weights(out, b"".join(weight.tobytes() for weight in weights))


def save_weights(out: Path, weights: bytes) -> None:
    """What the whole job is for: there whole, or not at all."""
    partial = out / "weights.partial"
    partial.write_bytes(weights)
    partial.rename(out / "weights.bin")


def run_job(description: str, work: Callable[[int, Path], None], steps: int) -> None:
    """The command line of a job whose ``work`` takes the number of steps (``steps`` if none is given) and a folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=steps, metavar="N")
    args = parser.parse_args()
    work(args.steps, args.out)


if __name__ == "__main__":
    run_job("train a small network on handwritten digits", train, 4000)

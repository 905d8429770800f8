"""What the software accelerator (a stand-in for hardware) computes, with numpy, in one thread: always the same bits."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpurestore.devplugins.softaccel.device import AcceleratorError
from gpurestore.devplugins.softaccel.protocol import (
    TRANSPOSE_A,
    TRANSPOSE_B,
    TYPE_BYTES,
    Kernel,
    Type,
    bits_double,
)

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # sums in another order are other sums
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    import numpy as np

try:
    import numpy as np
except ImportError:
    _have_numpy = False
else:
    _have_numpy = True

# Where ``size`` bytes at a device address lie: the buffer's memory and the offset in it. Raises AcceleratorError.
Resolve = Callable[[int, int], tuple[Any, int]]
Array = Any


class _Views:
    """Arrays over device memory, of one element type."""

    def __init__(self, resolve: Resolve, kind: Type) -> None:
        self._resolve = resolve
        self.kind = kind
        self.dtype = np.dtype(np.float32 if kind == Type.FLOAT32 else np.float64)

    def vector(self, address: int, n: int) -> Array:
        memory, offset = self._resolve(address, n * TYPE_BYTES[self.kind])
        return np.frombuffer(memory, self.dtype, n, offset)

    def matrix(self, address: int, rows: int, columns: int) -> Array:
        return self.vector(address, rows * columns).reshape(rows, columns)

    def labels(self, address: int, n: int) -> Array:
        memory, offset = self._resolve(address, n * 8)
        return np.frombuffer(memory, np.int64, n, offset)


def run(resolve: Resolve, kernel: int, kind: int, p: tuple[int, ...]) -> None:
    """Run one kernel. Raises AcceleratorError for one that there is not, and for addresses outside of a buffer."""
    if kernel == Kernel.BUSY:
        time.sleep(p[0] / 1e9)
        return
    if not _have_numpy:
        raise AcceleratorError(errno.ENOSYS, "kernels need numpy on the server's side: pip install 'gpurestore[demo]'")
    function = _KERNELS.get(kernel)
    if function is None or kind not in TYPE_BYTES:
        raise AcceleratorError(errno.EINVAL, f"there is no kernel {kernel} for type {kind}")
    try:
        with np.errstate(all="ignore"):
            function(_Views(resolve, Type(kind)), p)
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise AcceleratorError(errno.EINVAL, f"kernel {Kernel(kernel).name.lower()}: {error}") from error


def _fill(views: _Views, p: tuple[int, ...]) -> None:
    views.vector(p[0], p[1])[:] = bits_double(p[2])


def _add(views: _Views, p: tuple[int, ...]) -> None:
    np.add(views.vector(p[1], p[3]), views.vector(p[2], p[3]), out=views.vector(p[0], p[3]))


def _add_row(views: _Views, p: tuple[int, ...]) -> None:
    out, a = views.matrix(p[0], p[3], p[4]), views.matrix(p[1], p[3], p[4])
    np.add(a, views.vector(p[2], p[4]), out=out)


def _scale(views: _Views, p: tuple[int, ...]) -> None:
    np.multiply(views.vector(p[1], p[2]), views.dtype.type(bits_double(p[3])), out=views.vector(p[0], p[2]))


def _axpy(views: _Views, p: tuple[int, ...]) -> None:
    y = views.vector(p[0], p[2])
    y += views.dtype.type(bits_double(p[3])) * views.vector(p[1], p[2])


def _relu(views: _Views, p: tuple[int, ...]) -> None:
    np.maximum(views.vector(p[1], p[2]), 0, out=views.vector(p[0], p[2]))


def _relu_gradient(views: _Views, p: tuple[int, ...]) -> None:
    gradient, a = views.vector(p[1], p[3]), views.vector(p[2], p[3])
    np.multiply(gradient, a > 0, out=views.vector(p[0], p[3]))


def _reduce_rows(views: _Views, p: tuple[int, ...]) -> None:
    np.sum(views.matrix(p[1], p[2], p[3]), axis=0, out=views.vector(p[0], p[3]))


def _matmul(views: _Views, p: tuple[int, ...]) -> None:
    m, n, k, flags = p[3:7]
    alpha, beta = (views.dtype.type(bits_double(bits)) for bits in p[7:9])
    a = views.matrix(p[1], k, m).T if flags & TRANSPOSE_A else views.matrix(p[1], m, k)
    b = views.matrix(p[2], n, k).T if flags & TRANSPOSE_B else views.matrix(p[2], k, n)
    out = views.matrix(p[0], m, n)
    product = a @ b
    if alpha != 1:
        product *= alpha
    out[:] = product + beta * out if beta else product


def _softmax_cross_entropy(views: _Views, p: tuple[int, ...]) -> None:
    rows, columns = p[4], p[5]
    loss, gradient = views.vector(p[0], rows), views.matrix(p[1], rows, columns)
    scores, labels = views.matrix(p[2], rows, columns), views.labels(p[3], rows)
    if rows and not 0 <= labels.min() <= labels.max() < columns:
        raise ValueError(f"a label outside of 0 to {columns - 1}")
    chances = scores - scores.max(axis=1, keepdims=True)
    np.exp(chances, out=chances)
    chances /= chances.sum(axis=1, keepdims=True)
    index = np.arange(rows)
    loss[:] = -np.log(chances[index, labels])
    chances[index, labels] -= 1
    gradient[:] = chances


_KERNELS: dict[int, Callable[[_Views, tuple[int, ...]], None]] = {
    Kernel.FILL: _fill,
    Kernel.ADD: _add,
    Kernel.ADD_ROW: _add_row,
    Kernel.SCALE: _scale,
    Kernel.AXPY: _axpy,
    Kernel.RELU: _relu,
    Kernel.RELU_GRADIENT: _relu_gradient,
    Kernel.REDUCE_ROWS: _reduce_rows,
    Kernel.MATMUL: _matmul,
    Kernel.SOFTMAX_CROSS_ENTROPY: _softmax_cross_entropy,
}

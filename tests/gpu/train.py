"""A small training job on one GPU whose losses depend on nothing but its arguments: OUT, STEPS, torch or cupy, BALLAST.

OUT gets one line for each step, the loss in hexadecimal. Half-way it says so in OUT.half and waits for OUT.go, with its
weights, optimizer and random numbers on the device, and BALLAST MiB of random numbers that must not change.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def torch_losses() -> Iterator[float]:
    """An MLP with Adam: weights, moments, and the generator's state live on the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(1024, 16)
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = torch.randn(4096, 256, device=device)
    labels = torch.randint(0, 16, (4096,), device=device)
    while True:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        yield float(loss.item())


def cupy_losses() -> Iterator[float]:
    """A linear model by gradient descent."""
    import cupy

    random = cupy.random.RandomState(7)
    inputs = random.standard_normal((4096, 256), dtype=cupy.float32)
    wanted = inputs @ random.standard_normal((256, 1), dtype=cupy.float32)
    weights = cupy.zeros((256, 1), dtype=cupy.float32)
    while True:
        error = inputs @ weights - wanted
        weights -= 1e-4 * (inputs.T @ error)
        yield float((error * error).mean())


class Ballast:
    """Memory on the device that nobody may change."""

    def __init__(self, library: str, mib: int) -> None:
        if library == "torch":
            import torch

            self._data = torch.randint(0, 1 << 30, (mib << 17,), device="cuda", dtype=torch.int64)
        else:
            import cupy

            self._data = cupy.random.RandomState(9).randint(0, 1 << 30, size=mib << 17, dtype=cupy.int64)
        self._sums = self._sum()

    def _sum(self) -> tuple[int, int]:
        if not self._data.shape[0]:
            return (0, 0)
        return int(self._data.sum()), int((self._data[::2] - self._data[1::2]).sum())

    def check(self) -> None:
        """Raise if it has changed."""
        if self._sum() != self._sums:
            raise SystemExit("the ballast on the device has changed")


def main() -> None:
    """Train."""
    out, steps, library = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    losses = torch_losses() if library == "torch" else cupy_losses()
    lines = [next(losses).hex()]  # which seeds the generators
    ballast = Ballast(library, int(sys.argv[4]))
    for step in range(1, steps):
        lines.append(next(losses).hex())
        if step == steps // 2:
            Path(f"{out}.half").touch()
            while not Path(f"{out}.go").exists():
                time.sleep(0.05)
    ballast.check()
    partial = Path(f"{out}.part")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(out)


if __name__ == "__main__":
    main()

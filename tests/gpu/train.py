"""A small training job on one GPU whose losses depend on nothing but its arguments: OUT, STEPS, torch or cupy.

OUT gets one line for each step, the loss in hexadecimal. Half-way it says so in OUT.half and waits for OUT.go, with its
weights, optimizer and random numbers on the device.
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


def main() -> None:
    """Train."""
    out, steps, library = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    losses = torch_losses() if library == "torch" else cupy_losses()
    lines = []
    for step in range(steps):
        lines.append(next(losses).hex())
        if step == steps // 2:
            Path(f"{out}.half").touch()
            while not Path(f"{out}.go").exists():
                time.sleep(0.05)
    partial = Path(f"{out}.part")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(out)


if __name__ == "__main__":
    main()

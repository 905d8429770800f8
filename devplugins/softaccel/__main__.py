"""Start the server of the software accelerator: ``python -m gpurestore.devplugins.softaccel``."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys

from gpurestore.devplugins.softaccel import DEFAULT_SOCKET, SOCKET_VARIABLE, address
from gpurestore.devplugins.softaccel.device import Config
from gpurestore.devplugins.softaccel.server import Server, describe

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_PR_SET_PDEATHSIG = 1


def size(text: str) -> int:
    """Bytes, perhaps with K, M, G or T."""
    number = text.lower().removesuffix("b").removesuffix("i")
    unit = _UNITS.get(number[-1:], 1)
    return int(float(number[:-1] if unit > 1 else number) * unit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpurestore.devplugins.softaccel",
        description="Serve the software accelerator: a stand-in for hardware, not a GPU. Ends on SIGTERM or SIGINT.",
    )
    parser.add_argument(
        "--socket",
        metavar="ADDRESS",
        help=f"a path, or @NAME in the abstract namespace (default: ${SOCKET_VARIABLE}, else {DEFAULT_SOCKET})",
    )
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="number of devices (default: 1)")
    parser.add_argument("--memory", metavar="SIZE", type=size, default=1 << 30, help="of each device (default: 1G)")
    parser.add_argument(
        "--bandwidth",
        metavar="SIZE",
        type=size,
        default=0,
        help="bytes a second of each DMA engine (default: no limit)",
    )
    parser.add_argument("--latency", metavar="US", type=float, default=0.0, help="microseconds before a copy begins")
    parser.add_argument(
        "--fault", metavar="FAULT", action="append", default=[], help="lost=DEVICE, hang=AT, partial=AT"
    )
    parser.add_argument("--with-parent", action="store_true", help="end when the process ends that started this one")
    return parser


def main() -> None:
    """Serve."""
    args = _parser().parse_args()
    if args.with_parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    config = Config(args.memory, float(args.bandwidth), args.latency / 1e6)
    where = address(args.socket)
    try:
        server = Server(where, [config] * max(1, args.devices))
    except OSError as error:
        sys.exit(f"softaccel: cannot listen at {where}: {error.strerror}")
    for spec in args.fault:
        server.add_fault(spec)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(describe(server), flush=True)
    server.run()
    # Streams may still compute, and nobody wants their results any more.
    os._exit(0)


if __name__ == "__main__":
    main()

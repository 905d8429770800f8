"""The compiled C core. ``ffi`` and ``lib`` are cffi's; what they hold is declared in cext/gr_*.h."""

from typing import Any

ffi: Any
lib: Any

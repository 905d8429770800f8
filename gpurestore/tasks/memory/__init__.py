"""The content of memory: which pages a dump stores, how they get into a pages image, and how they come back.

A pages image belongs to one pagemap: that of a task (its private memory) or that of an object (shared anonymous memory,
a memfd), whose "addresses" are offsets. All bytes move in C, several threads at a time, with the GIL released.
"""

from gpurestore.tasks.memory.compressed import CompressedPages
from gpurestore.tasks.memory.filling import (
    DEFAULT_WAYS,
    PagePlan,
    Ways,
    Worker,
    fill_file,
    open_pages,
    plan_object,
    plan_pages,
    read_page_bytes,
)
from gpurestore.tasks.memory.hugepages import HugePages
from gpurestore.tasks.memory.pagesfile import AnyPagesFile
from gpurestore.tasks.memory.patching import Patch, Piece, pieces
from gpurestore.tasks.memory.runs import PageRuns, Progress, default_jobs
from gpurestore.tasks.memory.saving import (
    GUARD,
    HUGE,
    IOCTL,
    READ,
    STORED,
    PagesFile,
    dump,
    pages_file,
    save_object,
    scan,
    select,
    weigh,
)
from gpurestore.tasks.memory.sources import COLD_WORKERS, PagesSource, Reading, open_source

__all__ = [
    "COLD_WORKERS",
    "DEFAULT_WAYS",
    "GUARD",
    "HUGE",
    "IOCTL",
    "READ",
    "STORED",
    "AnyPagesFile",
    "CompressedPages",
    "HugePages",
    "PagePlan",
    "PageRuns",
    "PagesFile",
    "PagesSource",
    "Patch",
    "Piece",
    "Progress",
    "Reading",
    "Ways",
    "Worker",
    "default_jobs",
    "dump",
    "fill_file",
    "open_pages",
    "open_source",
    "pages_file",
    "pieces",
    "plan_object",
    "plan_pages",
    "read_page_bytes",
    "save_object",
    "scan",
    "select",
    "weigh",
]

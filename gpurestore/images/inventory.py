"""``inventory.img``: what a reader must know before it opens anything else."""

from __future__ import annotations

from collections.abc import Sequence

from gpurestore.errors import ImageError
from gpurestore.images import pb
from gpurestore.images.magic import IMAGE_VERSION, INHERITING_VERSION

# Where CRIU keeps an id of the run, which it only uses for locked networks: marks a folder that must have a manifest.
RUN_ID = "gpurestore"


def build_inventory(
    root_ids: pb.task_kobj_ids_entry,
    plugins: Sequence[str] = (),
    *,
    inheriting: bool = False,
    root_cg_set: int | None = None,
    dump_uptime: int | None = None,
) -> pb.inventory_entry:
    """The inventory of a dump made by this tool.

    ``root_ids`` are the ids of the tool itself: what a task shares with it (namespaces above all) is not recreated.
    ``plugins`` are the names of those that the images need; an empty list is written as such, since CRIU takes a
    missing one for "any". ``inheriting``: there is memory that tasks have from their parents. The network lock (0,
    iptables) is CRIU's default and of no effect without TCP sockets.
    """
    entry = pb.inventory_entry(
        img_version=INHERITING_VERSION if inheriting else IMAGE_VERSION,
        fdinfo_per_id=True,
        ns_per_id=True,
        lsmtype=pb.NO_LSM,
        network_lock_method=0,
        root_ids=root_ids,
        dump_criu_run_id=RUN_ID,
    )
    entry.plugins_entry.SetInParent()
    entry.plugins_entry.plugins.extend(plugins)
    if root_cg_set is not None:
        entry.root_cg_set = root_cg_set
    if dump_uptime is not None:
        entry.dump_uptime = dump_uptime
    return entry


def check_inventory(entry: pb.inventory_entry) -> None:
    """Raise ImageError for images of a version that we do not read."""
    if entry.img_version not in (IMAGE_VERSION, INHERITING_VERSION):
        age = "newer" if entry.img_version > IMAGE_VERSION else "older"
        raise ImageError(
            f"inventory.img: image version {entry.img_version} is {age} than {IMAGE_VERSION}, "
            "the one that this gpurestore reads"
        )
    if not entry.fdinfo_per_id:
        raise ImageError("inventory.img: descriptors are stored per task: images of a CRIU before 2013 are not read")
    if entry.HasField("root_cg_set") and entry.root_cg_set == 0:
        raise ImageError("inventory.img: damaged: root_cg_set is 0")

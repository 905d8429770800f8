"""When the tasks of a tree are born: most at once, heirs of memory when their parent's is in place.

An *heir* shares pages with its parent copy-on-write (:mod:`gpurestore.tasks.inherited`). What follows from its birth
follows then: its own children, and whatever its parent has to do after it, such as founding a session.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby

from gpurestore.tasks.pstree import Birth, Run, TreePlan

Step = Birth | Run
# One batch of births is quicker than many, but the first child waits for the last one's birth.
HEIRS_AT_ONCE = 8


@dataclass(slots=True)
class Births:
    """The steps of a :class:`TreePlan` by the moment at which they can be done; each list strictly in its order.

    ``first``: at once. ``later``: by heir, its birth, those of other heirs that can follow it, and what they make
    possible. ``last``: when everyone is born. ``with_heir``: at whose birth each task is born; tasks that are not in
    there are born at once. ``previous``: of an heir in ``later``, the one before it: births of one parent happen one
    after another.
    """

    first: list[Step] = field(default_factory=list)
    later: dict[int, list[Step]] = field(default_factory=dict)
    last: list[Step] = field(default_factory=list)
    with_heir: dict[int, int] = field(default_factory=dict)
    previous: dict[int, int] = field(default_factory=dict)


def schedule(plan: TreePlan, heirs: Collection[int]) -> Births:
    """Put every step where it belongs. A task does its own steps in their order, but heirs come as late as they can."""
    births = Births()
    own: dict[int, list[Step]] = {}
    waiting: list[int] = []
    for step in plan.tree:
        if isinstance(step, Birth) and step.parent is None:
            births.first.append(step)
            waiting.append(step.pid)
        else:
            own.setdefault(_actor(step), []).append(step)
    for pid in waiting:
        heir = births.with_heir.get(pid)
        previous: int | None = None
        room = 0
        for step in _heirs_last(own.get(pid, []), heirs):
            if isinstance(step, Birth):
                waiting.append(step.pid)
                if step.pid in heirs and not room:
                    heir, room = step.pid, HEIRS_AT_ONCE
                    if previous is not None:
                        births.previous[heir] = previous
                    previous = heir
                room -= step.pid in heirs
                if heir is not None:
                    births.with_heir[step.pid] = heir
            else:
                room = 0
            _list_of(births, heir).append(step)
    _add_last(births, plan)
    return births


def _actor(step: Step) -> int:
    return step.parent or 0 if isinstance(step, Birth) else step.pid


def _heirs_last(steps: list[Step], heirs: Collection[int]) -> list[Step]:
    """Births have any order among themselves, but none can be moved across what the parent does in between."""
    ordered: list[Step] = []
    for _, group in groupby(steps, key=lambda step: isinstance(step, Birth)):
        ordered += sorted(group, key=lambda step: isinstance(step, Birth) and step.pid in heirs)
    return ordered


def _list_of(births: Births, heir: int | None) -> list[Step]:
    return births.first if heir is None else births.later.setdefault(heir, [])


def _add_last(births: Births, plan: TreePlan) -> None:
    """Groups need everyone that joins them, zombies what they do before they die; children die first."""
    deaths = list(reversed(plan.zombies))
    if not births.later:
        births.first += [*plan.groups, *deaths]
    elif plan.groups:
        births.last += [*plan.groups, *deaths]
    else:
        for death in deaths:
            _list_of(births, births.with_heir.get(death.pid)).append(death)

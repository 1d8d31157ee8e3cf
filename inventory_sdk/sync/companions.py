"""Which later-functions share a transaction.

Functions that only talk to the ledger's database share one: what each costs alone (a connection, a commit, a wait for the disk and for
the lock of a hot row) is paid once. One that waits for something else would hold the others' locks meanwhile, so it has a
transaction to itself, and eight of those go on at once. Nobody declares it: each call tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from inventory_sdk.ledger.protocol import Task, TaskRun

MOST: Final = 32
"""Functions of one transaction. PostgreSQL keeps 64 savepoints of a transaction where all sessions look for them; beyond, every
session pays. A driver's cache of prepared statements (100 in SQLAlchemy's for asyncpg) holds the savepoints of 32 by name. And what
a commit costs is already divided by 32."""
LANES: Final = 4
"""Shared transactions at once."""
QUICK: Final = 0.03
"""Seconds that a function may spend outside the database and still share. Above, eight at once get further than one after another; far
below, a busy event loop looks like one."""
PROBE: Final = 0.25
"""Seconds in which the first call of a name has no other beside it: on a hot row they would only wait for each other."""
CUT_OFF: Final = 100
"""Quick calls that a name has to show after one of its functions was cut off."""


@dataclass(slots=True)
class Company:
    """Tasks for one transaction, each of another group. It takes ``Manners.most`` of them, those that no other worker has.

    ``stock``: the (merchant, sku) keys of their operations, empty for one alone. No other company has them at the same time, so that
    companies neither wait for each other's rows nor in a circle."""

    tasks: list[Task]
    stock: set[str] = field(default_factory=set)
    shared: bool = True


class Manners:
    """What is known of the functions, by name, and how large companies may be."""

    def __init__(self) -> None:
        self.most = MOST
        self.apart: set[int] = set()
        """Tasks that run alone from now on: their company was rolled back, or they were cut off."""
        self._owed: dict[str, int] = {}
        """Quick calls that a name still has to show."""
        self._first: dict[str, float] = {}
        """When the first call of a name began (monotonic seconds)."""
        self._never: set[str] = set()

    def alone(self, task: Task) -> bool:
        """Whether it gets a transaction to itself: also one that has failed before, whose company may have been why."""
        if self.most == 1 or task.attempts > 0 or task.number in self.apart or task.name in self._never:
            return True
        return self._owed.get(task.name, 1) > 0

    def begins(self, task: Task) -> bool:
        """Whether it may begin alone. While the first call of its name is on, the others wait a moment for what it tells."""
        now = time.monotonic()
        if task.name not in self._first:
            self._first[task.name] = now
            return True
        return task.name in self._owed or now >= self._first[task.name] + PROBE

    def ran(self, run: TaskRun) -> None:
        """A call has ended by itself. One that failed tells nothing: its statements may have been cut short."""
        if run.error is None:
            owed = self._owed.get(run.task.name, 1)
            self._owed[run.task.name] = max(owed, 1) if run.elsewhere > QUICK else max(owed - 1, 0)

    def cut_off(self, task: Task) -> None:
        """It kept its company waiting for too long."""
        self._owed[task.name] = CUT_OFF

    def spoilt(self, task: Task) -> None:
        """It can't be undone alone: never again in this process."""
        self._never.add(task.name)

    def went_well(self) -> None:
        """A company has committed: the next may be larger by one."""
        self.most = min(self.most + 1, MOST)

    def went_wrong(self) -> None:
        """A company was rolled back (a deadlock with another worker's): the next is half as large."""
        self.most = max(self.most // 2, 1)


def stock_of(task: Task) -> set[str]:
    """The (merchant, sku) keys of the task's operation."""
    return set(json.loads(task.receipt)["lines"][::2])


def companies(due: Sequence[Task], running: Collection[Company], free: int, manners: Manners) -> list[Company]:
    """At most ``free`` new ones from what is due, in its order, beside those that run.

    A task waits where its group, or (unless alone) its stock, is taken; and the stock of one that waits is not given to younger ones,
    or a task of several SKUs would wait for ever."""
    groups = {_group(task) for company in running for task in company.tasks}
    taken = {key for company in running for key in company.stock}
    lanes = LANES - sum(company.shared for company in running)
    found: list[Company] = []
    for task in due:
        if _group(task) in groups:
            continue
        if manners.alone(task):
            if len(found) < free and manners.begins(task):
                found.append(Company([task], shared=False))
                groups.add(_group(task))
            continue
        stock = stock_of(task)
        open_ones = [company for company in found if company.shared]
        near = [company for company in open_ones if not company.stock.isdisjoint(stock)]
        if not taken.isdisjoint(stock) or len(near) > 1:
            taken |= stock
            continue
        if near:
            company = near[0]
        elif len(open_ones) < lanes and len(found) < free:
            company = Company([])
            found.append(company)
        elif open_ones:
            company = min(open_ones, key=lambda each: len(each.tasks))
        else:
            continue
        company.tasks.append(task)
        company.stock |= stock
        groups.add(_group(task))
    for company in found:
        # Two workers take the rows in the same order, as far as it is theirs to say.
        company.tasks.sort(key=lambda task: (sorted(stock_of(task)), task.number))
    return found


def _group(task: Task) -> tuple[str, str]:
    return task.merchant, task.group

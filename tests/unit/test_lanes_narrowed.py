"""A lane that a governor narrows, and gives back: nobody who is in or in line is turned away, no slot is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from inventory_sdk.errors import LaneFull
from inventory_sdk.model import Lane
from tests.unit.test_lanes import PATIENT, Busy, lanes_of, turns


async def test_calls_that_are_in_stay_in_and_their_slots_are_not_given_to_others() -> None:
    lanes = lanes_of(core=Lane(max_concurrency=3, **PATIENT))
    busy = Busy(lanes)
    tasks = [busy.call(number) for number in range(6)]
    await turns()
    lanes.narrow("core", 1)
    assert lanes.usage()["core"].running == 3
    busy.end(0, 1)
    await turns()
    assert busy.order == [0, 1, 2]
    assert (lanes.usage()["core"].running, lanes.usage()["core"].waiting) == (1, 3)
    busy.end(2)
    await turns()
    assert busy.order == [0, 1, 2, 3]
    busy.end(3, 4, 5)
    await asyncio.gather(*tasks)
    assert lanes.usage()["core"].running == 0


async def test_slots_that_come_back_go_to_the_line_at_once() -> None:
    lanes = lanes_of(core=Lane(max_concurrency=3, **PATIENT))
    busy = Busy(lanes)
    lanes.narrow("core", 1)
    tasks = [busy.call(number) for number in range(5)]
    await turns()
    assert busy.order == [0]
    lanes.narrow("core", 99)  # never more than were declared
    await turns()
    assert busy.order == [0, 1, 2]
    assert lanes.load("core").declared == 3
    busy.end(*range(5))
    await asyncio.gather(*tasks)


async def test_a_lane_is_never_narrowed_to_nothing() -> None:
    lanes = lanes_of(core=Lane(max_concurrency=2, **PATIENT))
    lanes.narrow("core", 0)
    async with lanes.enter("core"):
        assert lanes.load("core").peak == 1
    assert lanes.load("core").ended == 1


async def test_a_narrowed_lane_refuses_newcomers_by_what_they_would_wait() -> None:
    lanes = lanes_of(core=Lane(max_concurrency=4, max_wait=0.5, timeout=60))
    gate = lanes.gate("core")
    gate.service = 0.4
    busy = Busy(lanes)
    lanes.narrow("core", 1)
    tasks = [busy.call(number) for number in range(2)]
    await turns()
    with pytest.raises(LaneFull, match=r"about 0\.8"):
        await lanes.enter("core").__aenter__()
    busy.end(0, 1)
    await asyncio.gather(*tasks)


async def test_what_a_narrowed_lane_lent_comes_back_to_nobody() -> None:
    lanes = lanes_of(core=Lane(max_concurrency=1, borrows_from=("batch",), **PATIENT), batch=Lane(max_concurrency=2, **PATIENT))
    busy = Busy(lanes)
    tasks = [busy.call(number) for number in range(5)]  # one slot of its own, two lent
    await turns()
    assert busy.order == [0, 1, 2]
    lanes.narrow("batch", 1)
    busy.end(1)
    await turns()
    assert busy.order == [0, 1, 2]
    busy.end(2)
    await turns()
    assert busy.order == [0, 1, 2, 3]
    lanes.narrow("batch", 2)
    await turns()
    assert busy.order == [0, 1, 2, 3, 4]
    busy.end(0, 3, 4)
    await asyncio.gather(*tasks)
    assert all(usage.running == usage.lent == usage.waiting == 0 for usage in lanes.usage().values())


async def test_however_it_is_narrowed_no_slot_is_lost() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201  # replays a failure
    dice = random.Random(seed)
    lanes = lanes_of(core=Lane(max_concurrency=3, borrows_from=("batch",), **PATIENT), batch=Lane(max_concurrency=3, **PATIENT))

    async def call(lane: str) -> None:
        async with lanes.enter(lane):
            await asyncio.sleep(0)

    async def caller() -> None:
        for _ in range(20):
            task = asyncio.create_task(call(dice.choice(("core", "batch"))))
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
            if dice.random() < 0.2:
                task.cancel()
            lanes.narrow(dice.choice(("core", "batch")), dice.randrange(5))
            await asyncio.wait({task})

    await asyncio.gather(*(caller() for _ in range(10)))
    for name in lanes:
        lanes.narrow(name, 3)
    await asyncio.gather(*(call(name) for name in ("core", "batch") * 20))
    assert all(usage.running == usage.lent == usage.waiting == 0 for usage in lanes.usage().values())

"""Cancellations that are not meant for the one who gets them."""

from __future__ import annotations

import asyncio

import pytest

from inventory_sdk.sync.queues.amqp_connection import own_cancellation_only


async def test_a_wait_that_the_client_cancelled_is_a_lost_connection() -> None:
    waiting = asyncio.get_running_loop().create_future()
    waiting.cancel()
    with pytest.raises(ConnectionError), own_cancellation_only():
        await waiting


async def test_who_was_cancelled_himself_is_cancelled() -> None:
    async def wait() -> None:
        with own_cancellation_only():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_time_out_stays_a_time_out() -> None:
    with pytest.raises(TimeoutError), own_cancellation_only():
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            with own_cancellation_only():
                await asyncio.Event().wait()

"""CPU seconds of a coroutine that runs among others: the thread's clock is read around each of its steps."""

from __future__ import annotations

import time
import types
from collections.abc import Coroutine, Generator
from typing import Any


class Meter:
    """``cpu_seconds`` so far. What tasks take that the coroutine starts is not in it."""

    __slots__ = ("cpu_seconds",)

    def __init__(self) -> None:
        self.cpu_seconds = 0.0


@types.coroutine
def metered(work: Coroutine[Any, Any, Any], meter: Meter) -> Generator[Any, Any, Any]:
    """``await metered(work(), meter)`` is ``await work()``."""
    thrown: BaseException | None = None
    sent: Any = None
    try:
        while True:
            began = time.thread_time()
            try:
                asked = work.send(sent) if thrown is None else work.throw(thrown)
            except StopIteration as ended:
                return ended.value
            finally:
                meter.cpu_seconds += time.thread_time() - began
            thrown = None
            try:
                sent = yield asked
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  # handed to the coroutine, which is what it was meant for
                thrown = error
    finally:
        work.close()

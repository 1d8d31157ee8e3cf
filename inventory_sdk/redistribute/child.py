"""A process that calculates: ``main`` is all it does. ``pool.py`` starts it and talks to it through pipes.

Messages are pickles behind their length. First comes what makes this process import what its parent does, then runs: the function's
module and name, and its arguments. Each is answered by (whether it returned, result or error, CPU seconds). When the parent is gone
the process ends, also in the middle of a run: its key is somebody else's then.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
import struct
import sys
import threading
import time
from collections.abc import Coroutine
from importlib import import_module
from multiprocessing.spawn import prepare
from pathlib import Path
from typing import Any, BinaryIO, Final

from inventory_sdk.redistribute.coalesced import here
from inventory_sdk.weave import site_of

HEAD: Final = struct.Struct("!Q")
GROUP: Final = Path("/proc/self/autogroup")
TRIES: Final = 10
BETWEEN: Final = 0.15
"""Seconds; Linux takes one change of a group in a tenth of a second, from all of a machine's users together."""


def frame(message: Any) -> bytes:
    """The message as it goes through a pipe."""
    body = pickle.dumps(message)
    return HEAD.pack(len(body)) + body


def find(module: str, name: str) -> Any:
    """The plain function: what its decorators do is done in the parent."""
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    site = site_of(found)
    return found if site is None else site.function


def listen(pipe: BinaryIO, messages: queue.SimpleQueue[Any]) -> None:
    """Hand on what comes. The end of the pipe is the end of the parent, so of this process."""
    while len(head := pipe.read(HEAD.size)) == HEAD.size:
        messages.put(pipe.read(HEAD.unpack(head)[0]))
    os._exit(0)


def answer(runner: asyncio.Runner, module: str, name: str, arguments: dict[str, Any]) -> bytes:
    """Run one function; what it raises is an answer too."""
    began = time.process_time()
    try:
        work: Coroutine[Any, Any, Any] = find(module, name)(**arguments)
        returned, result = True, runner.run(work)
    except Exception as error:  # noqa: BLE001  # the parent raises it
        returned, result = False, error
    spent = time.process_time() - began
    try:
        body = frame((returned, result, spent))
        pickle.loads(body[HEAD.size :])  # noqa: S301  # our own bytes: some errors can be pickled and not be read back
    except Exception as error:  # noqa: BLE001  # whatever a user's __reduce__ raises
        why = f"{type(result).__name__} can't be pickled ({error}): {result}"
        body = frame((False, TypeError(why), spent))
    return body


def make_way(niceness: int) -> None:
    """This process, the first of its session, is weaker than others by so much, from now on. ``nice`` alone is not enough where Linux
    shares its time out among sessions (autogroup): Redis has one of its own, and would have to share with us as with an equal."""
    weakness = os.nice(niceness)
    for _ in range(TRIES):
        try:
            GROUP.write_text(str(weakness), encoding="ascii")
        except BlockingIOError:
            time.sleep(BETWEEN)  # nothing else runs here yet: the parent waits for our first word
        except OSError:
            return  # it has no such thing
        else:
            return


def main(fd: int, niceness: int) -> None:
    """Until the parent closes the pipe. Answers go to ``fd``; what the functions print goes where the parent's does."""
    make_way(niceness)
    here.calculates = True
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(sys.stdin.buffer, messages), daemon=True).start()
    prepare(pickle.loads(messages.get()))  # noqa: S301  # from our parent
    with open(fd, "wb", buffering=0) as replies, asyncio.Runner() as runner:
        replies.write(frame("ready"))
        while True:
            module, name, arguments = pickle.loads(messages.get())  # noqa: S301  # from our parent
            replies.write(answer(runner, module, name, arguments))

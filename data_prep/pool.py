"""Work on many slides in processes; one bad slide stops no other, even if it crashes its reader."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from lemon_muse.data.files import disk_is_full
from lemon_muse.errors import RunError, UserError

T = TypeVar("T")
CRASH = "the library that reads it crashed; fetch it again or leave it out."


def in_processes(
    function: Callable[[str], T], items: Iterable[str], *, workers: int
) -> Iterator[tuple[str, T | None, str]]:
    """Yield (item, result, problem) in the order of completion; result is None where it failed.

    Args:
        function: top-level function of a module, called with an item.
        items: usually paths. A deque may be added to by the caller while it is worked on.
        workers: processes; 0 works in this one (a crash of a library then ends the job).

    Raises:
        RunError: an item raised one (a full disk), which is no fact about the item alone.
    """
    waiting = items if isinstance(items, deque) else deque(items)
    if workers <= 0:
        while waiting:
            item = waiting.popleft()
            yield item, *_tried(function, item)
        return
    while waiting:
        suspects: list[str] = []
        # Spawned, not forked: native libraries do not survive a fork with their threads.
        with _pool(workers) as pool:
            running: dict[Future[tuple[T | None, str]], str] = {}
            try:
                while (waiting or running) and not suspects:
                    while waiting and len(running) < workers + 1:
                        item = waiting.popleft()
                        try:
                            running[pool.submit(_tried, function, item)] = item
                        except BrokenProcessPool:
                            suspects.append(item)
                            break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        item = running.pop(future)
                        try:
                            found = future.result()
                        except BrokenProcessPool:
                            suspects.append(item)
                        else:
                            yield item, *found
                suspects += running.values()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for item in suspects:  # one of them crashed: each by itself shows which
            with _pool(1) as pool:
                try:
                    yield item, *pool.submit(_tried, function, item).result()
                except BrokenProcessPool:
                    yield item, None, CRASH


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_die_with,
        initargs=(os.getpid(),),
    )


def _die_with(parent: int) -> None:
    """End this process with the one that started it: `kill -9` must leave nothing behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tried(function: Callable[[str], T], item: str) -> tuple[T | None, str]:
    try:
        return function(item), ""
    except UserError as error:
        return None, str(error)
    except RunError:
        raise
    except Exception as error:  # a library's own error is a fact about this item, not about the job
        if isinstance(error, OSError) and disk_is_full(error):
            raise RunError(
                "the disk is full; make room and run the same words again (what is done is kept)."
            ) from None
        return None, f"{item}: {type(error).__name__}: {error}"

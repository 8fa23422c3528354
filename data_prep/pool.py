"""Work on many slides in processes; one bad slide stops no other, even if it crashes its reader."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from lemon_muse.errors import UserError

T = TypeVar("T")
CRASH = "the library that reads it crashed; fetch it again or leave it out."


def in_processes(
    function: Callable[[str], T], items: list[str], *, workers: int
) -> Iterator[tuple[str, T | None, str]]:
    """Yield (item, result, problem) in the order of completion; result is None where it failed.

    Args:
        function: top-level function of a module, called with an item.
        items: usually paths.
        workers: processes; 0 works in this one (a crash of a library then ends the job).
    """
    if workers <= 0:
        for item in items:
            yield item, *_tried(function, item)
        return
    waiting = list(reversed(items))
    while waiting:
        suspects: list[str] = []
        # Spawned, not forked: native libraries do not survive a fork with their threads.
        with _pool(min(workers, len(waiting))) as pool:
            running: dict[Future[tuple[T | None, str]], str] = {}
            while (waiting or running) and not suspects:
                while waiting and len(running) < 2 * workers:
                    item = waiting.pop()
                    try:
                        running[pool.submit(_tried, function, item)] = item
                    except BrokenProcessPool:
                        suspects.append(item)
                        break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    try:
                        yield item, *future.result()
                    except BrokenProcessPool:
                        suspects.append(item)
            suspects += running.values()
        for item in suspects:  # one of them crashed: each by itself shows which
            with _pool(1) as pool:
                try:
                    yield item, *pool.submit(_tried, function, item).result()
                except BrokenProcessPool:
                    yield item, None, CRASH


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _tried(function: Callable[[str], T], item: str) -> tuple[T | None, str]:
    try:
        return function(item), ""
    except UserError as error:
        return None, str(error)
    except Exception as error:  # a library's own error is a fact about this item, not about the job
        return None, f"{item}: {type(error).__name__}: {error}"

"""Work done in threads while the caller goes on: made ahead of it, or written behind it."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield the same items, none of them None, and let a thread make up to `depth` of them in advance.

    Errors of `items` are raised here. The thread ends, and `items` is closed, with this generator.
    """
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def in_parallel(
    function: Callable[[T], R], items: Generator[T, None, None], threads: int
) -> Generator[R, None, None]:
    """Yield function(item) for each item, in order, and let `threads` threads compute as many in advance.

    With 0 threads, each is computed when it is asked for. The items are taken in the caller's thread. Errors
    of `function` are raised here. The threads end, and `items` is closed, with this generator.
    """
    with closing(items):
        if threads == 0:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(threads)
        try:
            pending = deque(pool.submit(function, item) for item in islice(items, threads))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def behind(write: Callable[[np.ndarray], None]) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that calls `write` in a thread, so that its caller can prepare the next array meanwhile.

    One call is under way at a time. Its error is raised by the next call, or at the end of the `with` block.
    """
    with ThreadPoolExecutor(1) as thread:
        pending: list[Future[None]] = []

        def later(array: np.ndarray) -> None:
            for last in pending:
                last.result()
            pending[:] = [thread.submit(write, array)]

        yield later
        for last in pending:
            last.result()

"""A function of many arguments on several processes, its results in order."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_order(work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Result]:
    """Yield `work(*job)` for each job in turn, computed by up to this many processes."""
    if min(processes, len(jobs)) <= 1:
        yield from (work(*job) for job in jobs)
        return
    # A new interpreter each: a copy of this one would have the locks of torch's threads, and not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        yield from pool.map(work, *zip(*jobs))

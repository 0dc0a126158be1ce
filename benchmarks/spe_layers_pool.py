"""Runs of a study in parallel processes on one device, within a budget of seconds; used by two benchmarks."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def run_pool(
    train: Callable[..., dict[str, Any]],
    jobs: Sequence[Hashable],
    arguments: Sequence[Any],
    *,
    workers: int,
    budget: float,
    save: Callable[[dict[Any, dict[str, Any]], float], None],
) -> dict[Any, dict[str, Any]]:
    """Results of ``train(job, *arguments)`` for every job that fits into the budget.

    A job is not started when it could not end in time, judged by the longest so far; what runs over all the
    same is ended. ``save(results, seconds)`` is called every few seconds and at the end.

    Args:
        train: a function of a module; its results have ``seconds``.
    """
    start = time.time()
    waiting, found = list(jobs), dict[Any, dict[str, Any]]()
    running: dict[Future[dict[str, Any]], Hashable] = {}
    longest = saved = 0.0
    # Spawned, not forked: a driver that an import has started does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        while waiting or running:
            if start + budget - time.time() < longest:
                waiting = []
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[pool.submit(train, job, *arguments)] = job
            for future in [f for f in running if f.done()]:
                job = running.pop(future)
                try:
                    found[job] = future.result()
                except Exception as error:
                    print("failed", job, repr(error)[:300], flush=True)
                    continue
                longest = max(longest, found[job]["seconds"])
                if time.time() - saved > 5:
                    saved = time.time()
                    save(found, saved - start)
            if time.time() > start + budget + 5:
                for process in list(pool._processes.values()):
                    process.terminate()
                break
            time.sleep(0.05)
    save(found, time.time() - start)
    return found

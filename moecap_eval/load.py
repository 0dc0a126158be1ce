"""Open-loop load: requests are sent when they are due, whether or not earlier ones were answered.

A closed loop slows down with the system it measures and hides its stalls. Here a latency runs from the
*scheduled* arrival, so a request that had to wait to be sent at all counts its wait too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A generator that is late by more than this share of the objective measures itself.
_LATENESS_SHARE = 0.05


def poisson_arrivals(rate: float, count: int, *, seed: int = 0) -> NDArray[np.float64]:
    """Arrival times of a Poisson process: ``count`` times in seconds, ascending, ``rate`` per second."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    return np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, size=count))


def read_arrivals(path: str | Path) -> NDArray[np.float64]:
    """Arrival times of a recorded trace: one number a line, seconds, ascending; the first one becomes 0.

    Raises:
        ValueError: a line that is no number, times that go back, or no line.
    """
    try:
        times = np.array([float(line) for line in Path(path).read_text().splitlines() if line.strip()])
    except ValueError as error:
        raise ValueError(f"{path}: an arrival must be a number of seconds a line: {error}") from None
    if not times.size or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError(f"{path}: arrivals must be finite numbers in ascending order, at least one")
    return times - times[0]


@dataclass(frozen=True, eq=False)
class LoadReport:
    """What an open loop measured.

    Attributes:
        latency_s: float64 ``[requests]``, completion minus scheduled arrival; NaN for a request that was
            refused or failed.
        lateness_s: float64 ``[requests]``, how late the generator itself was in sending it.
        rejected: requests refused with a ``retry_after_s``.
        failed: requests that ended in any other exception.
        duration_s: from the start of the schedule to its last arrival or the last completion, whichever is
            later.
    """

    latency_s: NDArray[np.float64]
    lateness_s: NDArray[np.float64]
    rejected: int
    failed: int
    duration_s: float

    def percentile(self, q: float) -> float:
        """Latency in seconds that ``q`` percent of the answered requests stay within; NaN without any."""
        answered = self.latency_s[~np.isnan(self.latency_s)]
        return float(np.percentile(answered, q)) if answered.size else float("nan")

    def goodput(self, slo_s: float) -> float:
        """Requests per second answered within ``slo_s``."""
        return float(np.count_nonzero(self.latency_s <= slo_s) / self.duration_s) if self.duration_s else 0.0

    def valid(self, slo_s: float) -> bool:
        """Whether the generator kept up: its 99th percentile of lateness is within 5 % of ``slo_s``."""
        if not self.lateness_s.size:
            return True
        return bool(np.percentile(self.lateness_s, 99) <= _LATENESS_SHARE * slo_s)


def open_loop(
    submit: Callable[[Any], Future[Any]], requests: Sequence[Any], arrivals: Sequence[float] | NDArray[Any]
) -> LoadReport:
    """Send ``requests`` at their ``arrivals`` and wait for all answers.

    Args:
        submit: starts one request and returns its Future at once. An exception with an attribute
            ``retry_after_s``, raised here or in the Future, counts as rejected; any other as failed.
        requests: what to submit, in order.
        arrivals: seconds from the start for each request, ascending (``poisson_arrivals``, or a trace).

    Raises:
        ValueError: lengths differ, or arrivals are negative, unordered or not finite.
    """
    schedule = np.asarray(arrivals, dtype=np.float64)
    if schedule.shape != (len(requests),):
        raise ValueError(f"{len(requests)} requests need as many arrivals, got shape {schedule.shape}")
    if schedule.size and not (
        np.isfinite(schedule).all() and schedule[0] >= 0 and (np.diff(schedule) >= 0).all()
    ):
        raise ValueError("arrivals must be finite, not negative and ascending")
    outcome = _Outcome(len(requests))
    begin = time.perf_counter()
    for index, (request, due) in enumerate(zip(requests, schedule, strict=True)):
        remaining = begin + due - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)
        outcome.lateness_s[index] = max(0.0, time.perf_counter() - begin - due)
        try:
            future = submit(request)
        except Exception as error:
            outcome.finish(index, error)
        else:
            future.add_done_callback(partial(outcome.on_done, index))
    outcome.all_done.wait()
    completed = outcome.completed_s - begin
    succeeded = ~np.isnan(completed)
    last_completion = float(completed[succeeded].max()) if succeeded.any() else 0.0
    return LoadReport(
        latency_s=completed - schedule,
        lateness_s=outcome.lateness_s,
        rejected=outcome.rejected,
        failed=outcome.failed,
        duration_s=max(last_completion, float(schedule[-1]) if schedule.size else 0.0),
    )


class _Outcome:
    """Completion of each request; Futures finish on threads of their own."""

    def __init__(self, count: int) -> None:
        self.completed_s = np.full(count, np.nan)
        self.lateness_s = np.zeros(count)
        self.rejected = self.failed = 0
        self.all_done = threading.Event()
        self._remaining = count
        self._lock = threading.Lock()
        if count == 0:
            self.all_done.set()

    def on_done(self, index: int, future: Future[Any]) -> None:
        self.finish(index, future.exception())

    def finish(self, index: int, error: BaseException | None) -> None:
        now = time.perf_counter()
        with self._lock:
            if error is None:
                self.completed_s[index] = now
            elif hasattr(error, "retry_after_s"):
                self.rejected += 1
            else:
                self.failed += 1
            self._remaining -= 1
            if self._remaining == 0:
                self.all_done.set()

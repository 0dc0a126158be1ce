"""How many samples may be taken for each insert."""

from __future__ import annotations

import threading


class RateLimiter:
    """Keeps ``samples_per_insert * inserts - samples`` near its value at ``min_size`` inserts (Reverb's
    rule).

    With ``offset = samples_per_insert * min_size`` an insert may happen while
    ``(inserts + n) * samples_per_insert - samples <= offset + error_buffer`` or there are fewer than
    ``min_size`` inserts,
    a sample while the table has ``min_size`` inserts and
    ``inserts * samples_per_insert - (samples + n) >= offset - error_buffer``.

    Args:
        samples_per_insert: Trajectories selected for each one written.
        min_size: No selection before this many writes.
        error_buffer: Allowed deviation, in samples; at least ``samples_per_insert``.
        timeout: Seconds to wait before TimeoutError; None waits for ever.
    """

    def __init__(
        self, samples_per_insert: float, min_size: int, error_buffer: float, timeout: float | None = None
    ) -> None:
        if not samples_per_insert > 0 or min_size < 1:
            raise ValueError(
                f"samples_per_insert={samples_per_insert} must be > 0 and min_size={min_size} >= 1"
            )
        if error_buffer < samples_per_insert:
            raise ValueError(
                f"error_buffer={error_buffer} below samples_per_insert={samples_per_insert} blocks for ever"
            )
        self.samples_per_insert = samples_per_insert
        self.min_size = min_size
        self.error_buffer = error_buffer
        self.timeout = timeout
        self.inserts = 0
        self.samples = 0
        self._condition = threading.Condition()

    def can_insert(self, n: int = 1) -> bool:
        """Whether ``n`` writes may happen now."""
        if self.inserts + n <= self.min_size:
            return True
        difference = (self.inserts + n) * self.samples_per_insert - self.samples
        return difference <= self.samples_per_insert * self.min_size + self.error_buffer

    def can_sample(self, n: int = 1) -> bool:
        """Whether ``n`` selections may happen now."""
        if self.inserts < self.min_size:
            return False
        difference = self.inserts * self.samples_per_insert - (self.samples + n)
        return difference >= self.samples_per_insert * self.min_size - self.error_buffer

    def inserted(self, n: int = 1) -> None:
        """Count ``n`` writes."""
        with self._condition:
            self.inserts += n
            self._condition.notify_all()

    def sampled(self, n: int = 1) -> None:
        """Count ``n`` selections."""
        with self._condition:
            self.samples += n
            self._condition.notify_all()

    def wait_insert(self, n: int = 1) -> None:
        """Wait until ``n`` writes may happen; TimeoutError names the side that starves."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.can_insert(n), self.timeout):
                raise TimeoutError(f"writers starve: no sample in {self.timeout} s ({self.describe()})")

    def wait_sample(self, n: int = 1) -> None:
        """Wait until ``n`` selections may happen; TimeoutError names the side that starves."""
        with self._condition:
            if not self._condition.wait_for(lambda: self.can_sample(n), self.timeout):
                raise TimeoutError(f"the learner starves: no insert in {self.timeout} s ({self.describe()})")

    def describe(self) -> str:
        """The state, for messages."""
        return (
            f"{self.inserts} inserts, {self.samples} samples, samples_per_insert={self.samples_per_insert}, "
            f"min_size={self.min_size}, error_buffer={self.error_buffer}"
        )

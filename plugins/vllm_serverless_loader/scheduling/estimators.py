"""How long loading and migrating will take, learnt from what was measured; seconds and bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LINKS = ("remote", "disk", "host")
_WAY = {"device": (), "host": ("host",), "disk": ("disk", "host"), "remote": ("remote", "host")}


class LoadingTimeEstimator:
    """Start-up time of a server: queue + fixed part + bytes / bandwidth of the slowest link on the way.

    All partitions share the links ``remote`` and ``disk``; each GPU has a link ``host`` of its own.

    Args:
        bandwidth: bytes per second of the links ``"remote"``, ``"disk"`` and ``"host"``.
        fixed_s: part of every load that does not depend on its size.
        smoothing: weight of a new measurement, in (0, 1].

    Attributes:
        bandwidth: what is believed now.

    Raises:
        ValueError: a link is missing or not positive, or a bad constant.
    """

    def __init__(
        self, bandwidth: Mapping[str, float], *, fixed_s: float = 0.0, smoothing: float = 0.5
    ) -> None:
        for link in LINKS:
            if not bandwidth.get(link, 0.0) > 0.0:
                raise ValueError(f"bandwidth of {link!r} must be positive, got {bandwidth.get(link)!r}")
        if fixed_s < 0 or not 0 < smoothing <= 1:
            raise ValueError(f"fixed_s >= 0 and 0 < smoothing <= 1 needed, got {fixed_s} and {smoothing}")
        self.bandwidth = {link: float(bandwidth[link]) for link in LINKS}
        self.fixed_s = fixed_s
        self.smoothing = smoothing

    def estimate(self, partition_bytes: Sequence[int], tier: str, *, queue_s: float = 0.0) -> float:
        """Seconds until a model that lies in ``tier`` is on the GPUs; 0.0 for ``"device"``."""
        if tier == "device":
            return 0.0
        slowest = max(_bytes(partition_bytes, link) / self.bandwidth[link] for link in _way(tier))
        return queue_s + self.fixed_s + slowest

    def observe(self, partition_bytes: Sequence[int], tier: str, seconds: float) -> None:
        """Learn from a finished load, timed without its queue: the link with the largest term is updated."""
        way = _way(tier)
        if not way or seconds <= self.fixed_s:
            return
        link = max(way, key=lambda one: _bytes(partition_bytes, one) / self.bandwidth[one])
        moved = _bytes(partition_bytes, link)
        if moved:
            slowness = (seconds - self.fixed_s) / moved
            share = self.smoothing
            self.bandwidth[link] = 1.0 / ((1.0 - share) / self.bandwidth[link] + share * slowness)


class MigrationTimeEstimator:
    """Time to recompute a request's context at its destination: a line through recent observations.

    Args:
        seconds_per_token, fixed_s: what holds until something was observed.
        window: observations kept.
    """

    def __init__(self, seconds_per_token: float = 1e-4, fixed_s: float = 0.0, *, window: int = 64) -> None:
        if seconds_per_token < 0 or fixed_s < 0 or window < 1:
            raise ValueError("seconds_per_token and fixed_s must be >= 0, window at least 1")
        self._given = (seconds_per_token, fixed_s)
        self._seen: deque[tuple[int, float]] = deque(maxlen=window)
        self._line = self._given

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a finished migration of ``tokens`` context tokens."""
        self._seen.append((tokens, seconds))
        self._line = self._fit()

    def estimate(self, context_tokens: int) -> float:
        """Seconds to migrate a request of ``context_tokens`` tokens."""
        slope, fixed = self._line
        return slope * context_tokens + fixed

    def _fit(self) -> tuple[float, float]:
        """Least squares; slope and fixed part are not negative (the other one is fitted again then)."""
        count = len(self._seen)
        mean_x = sum(x for x, _ in self._seen) / count
        mean_y = sum(y for _, y in self._seen) / count
        spread = sum((x - mean_x) ** 2 for x, _ in self._seen)
        if spread == 0.0:
            fixed = self._given[1]
            return (
                (max(0.0, (mean_y - fixed) / mean_x), fixed) if mean_x else (self._given[0], max(0.0, mean_y))
            )
        slope = sum((x - mean_x) * (y - mean_y) for x, y in self._seen) / spread
        fixed = mean_y - slope * mean_x
        if slope < 0.0:
            return 0.0, max(0.0, mean_y)
        if fixed < 0.0:
            return sum(x * y for x, y in self._seen) / sum(x * x for x, _ in self._seen), 0.0
        return slope, fixed


@dataclass(frozen=True)
class CacheTransfer:
    """Copying a request's key-value cache from server to server.

    Attributes:
        bytes_per_token: of the cache, all layers.
        bandwidth: bytes per second between the servers.
        fixed_s: part of every transfer that does not depend on its size.
    """

    bytes_per_token: float
    bandwidth: float
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_token > 0 and self.bandwidth > 0 and self.fixed_s >= 0):
            raise ValueError(f"bytes_per_token and bandwidth must be positive, fixed_s >= 0; got {self}")

    def estimate(self, context_tokens: int) -> float:
        """Seconds to copy the cache of ``context_tokens`` tokens."""
        return self.fixed_s + context_tokens * self.bytes_per_token / self.bandwidth


class CheapestTransport(MigrationTimeEstimator):
    """Migration by tokens or by cache, whichever takes less time for the request at hand.

    Args:
        cache: what copying costs.
        seconds_per_token, fixed_s, window: of recomputing, as in :class:`MigrationTimeEstimator`, whose
            observations it learns from.
    """

    def __init__(
        self,
        cache: CacheTransfer,
        seconds_per_token: float = 1e-4,
        fixed_s: float = 0.0,
        *,
        window: int = 64,
    ) -> None:
        super().__init__(seconds_per_token, fixed_s, window=window)
        self.cache = cache

    def choose(self, context_tokens: int) -> Literal["tokens", "cache"]:
        """The way that takes less time; tokens if both take the same, for they need no room on the way."""
        recompute = super().estimate(context_tokens)
        return "cache" if self.cache.estimate(context_tokens) < recompute else "tokens"

    def estimate(self, context_tokens: int) -> float:
        """Seconds by the way that :meth:`choose` names."""
        return min(super().estimate(context_tokens), self.cache.estimate(context_tokens))


def estimated_output_tokens(elapsed_s: float, seconds_per_token: float) -> int:
    """Tokens that a request has generated after ``elapsed_s`` seconds of decoding."""
    return int(elapsed_s // seconds_per_token)


def _way(tier: str) -> tuple[str, ...]:
    if tier not in _WAY:
        raise ValueError(f"tier must be one of {', '.join(_WAY)}; got {tier!r}")
    return _WAY[tier]


def _bytes(partition_bytes: Sequence[int], link: str) -> int:
    return max(partition_bytes) if link == "host" else sum(partition_bytes)

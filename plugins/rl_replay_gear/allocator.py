"""Extents of rows: next-fit with coalescing, so that a trajectory takes what it is long and no more."""

from __future__ import annotations

from bisect import bisect_left


class ExtentAllocator:
    """Hands out contiguous extents of ``capacity`` rows.

    The free extents are kept sorted and merged with their neighbours. The search starts where the last one
    ended (next fit).

    Args:
        capacity: Number of rows.
        ring: For first-in-first-out eviction: while less than three of the longest extents are free, extents
            follow one another and start again at row 0, so that what is evicted next lies where room is
            needed next. At most about twice the longest extent stays unused; next fit alone leaves 5 to 6.
    """

    def __init__(self, capacity: int, *, ring: bool = False) -> None:
        self.capacity = capacity
        self.ring = ring
        self._longest = 0
        self.free_rows = capacity
        self._starts = [0]
        self._stops = [capacity]
        self._cursor = 0
        self._largest_bound = capacity  # no free extent is longer; tightened when a search fails

    def allocate(self, rows: int) -> int | None:
        """First row of a fresh extent of ``rows``, or None where there is none: evict and ask again."""
        self._longest = max(self._longest, rows)
        if self.ring and self.free_rows < 3 * self._longest:
            return self._allocate_in_ring(rows)
        if rows > self._largest_bound:
            return None
        starts, stops = self._starts, self._stops
        count = len(starts)
        begin = bisect_left(starts, self._cursor)
        if begin and stops[begin - 1] > self._cursor:
            begin -= 1
        longest = 0
        for step in range(count):
            i = begin + step
            if i >= count:
                i -= count
            length = stops[i] - starts[i]
            if length >= rows:
                return self._take(i, rows)
            longest = max(longest, length)
        self._largest_bound = longest
        return None

    def _allocate_in_ring(self, rows: int) -> int | None:
        starts, stops = self._starts, self._stops
        i = bisect_left(starts, self._cursor)
        if i and stops[i - 1] > self._cursor:  # what lay before the cursor has been freed
            i -= 1
        follows = i < len(starts) and starts[i] <= self._cursor
        if follows and stops[i] - starts[i] >= rows:
            return self._take(i, rows)
        at_end = self._cursor == self.capacity or (follows and stops[i] == self.capacity)
        if at_end and starts and starts[0] == 0 and stops[0] >= rows:
            return self._take(0, rows)
        return None

    def _take(self, i: int, rows: int) -> int:
        start = self._starts[i]
        if self._stops[i] - start == rows:
            del self._starts[i], self._stops[i]
        else:
            self._starts[i] = start + rows
        self._cursor = start + rows
        self.free_rows -= rows
        return start

    def free(self, start: int, rows: int) -> None:
        """Give an extent back."""
        stop = start + rows
        starts, stops = self._starts, self._stops
        i = bisect_left(starts, start)
        joins_left = i > 0 and stops[i - 1] == start
        joins_right = i < len(starts) and starts[i] == stop
        if joins_left and joins_right:
            start, stop = starts[i - 1], stops[i]
            stops[i - 1] = stop
            del starts[i], stops[i]
        elif joins_left:
            start = starts[i - 1]
            stops[i - 1] = stop
        elif joins_right:
            stop = stops[i]
            starts[i] = start
        else:
            starts.insert(i, start)
            stops.insert(i, stop)
        self.free_rows += rows
        self._largest_bound = max(self._largest_bound, stop - start)

    def state(self) -> dict[str, int]:
        """What a saved table needs beside the live extents."""
        return {"cursor": self._cursor, "longest": self._longest}

    @classmethod
    def restore(
        cls, capacity: int, live: list[tuple[int, int]], state: dict[str, int], *, ring: bool = False
    ) -> ExtentAllocator:
        """The allocator with the extents ``live`` of (start, rows) taken."""
        allocator = cls(capacity, ring=ring)
        starts, stops, position = [], [], 0
        for start, rows in sorted(live):
            if start > position:
                starts.append(position)
                stops.append(start)
            position = start + rows
        if position < capacity:
            starts.append(position)
            stops.append(capacity)
        allocator._starts, allocator._stops = starts, stops
        allocator._cursor, allocator._longest = state["cursor"], state["longest"]
        allocator.free_rows = sum(stops) - sum(starts)
        allocator._largest_bound = max((b - a for a, b in zip(starts, stops, strict=True)), default=0)
        return allocator

"""When each stage of a change ran."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """One stage: ``began`` and ``ended`` are ``time.perf_counter`` seconds."""

    name: str
    began: float
    ended: float


@dataclass
class Trace:
    """Spans in the order in which they ended; a span encloses those that ended while it ran."""

    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the body as a span, also where it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(name, began, time.perf_counter()))

    def seconds(self, within: str) -> dict[str, float]:
        """Sums by name of the spans inside the last span called ``within``; that one is left out."""
        outer = next(span for span in reversed(self.spans) if span.name == within)
        sums: dict[str, float] = {}
        for span in self.spans:
            if span is not outer and outer.began <= span.began and span.ended <= outer.ended:
                sums[span.name] = sums.get(span.name, 0.0) + span.ended - span.began
        return sums

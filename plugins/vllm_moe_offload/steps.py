"""What is known of a forward pass: its tokens, whose they are, and which requests ended before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

Rows = list[tuple[str, slice]]


@dataclass
class Step:
    """A forward pass over scheduled tokens; dummy and profiling passes have none.

    Attributes:
        num_tokens: rows that are tokens; later rows are padding.
        number: steps before it.
        requests: gives ``(request, tokens)`` in order of rows, once the batch is laid out; empty where that
            is not known for this model runner.
        traced: pools whose estimator knows of the step.
    """

    num_tokens: int
    number: int
    requests: Callable[[], list[tuple[str, int]]]
    traced: set[int] = field(default_factory=set)

    @cached_property
    def rows(self) -> Rows:
        """The rows of each request; to be read when the step's batch is laid out, before the next one is."""
        rows, start = [], 0
        for request, tokens in self.requests():
            rows.append((request, slice(start, start + tokens)))
            start += tokens
        return rows


@dataclass
class Ended:
    """Requests that ended, and those that lost their cache and will be computed anew from the first token."""

    finished: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)


@dataclass
class StepNote:
    """What the host knows of a launched step: requests that ended before it, rows of those in it."""

    number: int
    ended: Ended
    rows: Rows

"""The ``params`` section of a text workload, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecap_eval.config import unknown_key
from moecap_eval.load import poisson_arrivals, read_arrivals

_DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "tasks": None,
    "limit": None,
    "max_new_tokens": 32,
    "concurrency": 32,
    "threads": None,
    "arrivals": None,
}


@dataclass(frozen=True)
class Arrivals:
    """When requests are offered: a Poisson process of ``rate`` per second, or the times in ``trace_file``.

    Goodput counts the answers within ``slo_s`` seconds of their scheduled arrival.
    """

    rate: float | None = None
    trace_file: str | None = None
    slo_s: float | None = None

    @classmethod
    def from_mapping(cls, values: Any) -> Arrivals:
        """Check types and names."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"params.arrivals must map {', '.join(known)} to values, got {values!r}")
        for key, value in values.items():
            if key not in known:
                raise ValueError(unknown_key(f"params.arrivals.{key}", known))
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "trace_file" and not (is_number and value > 0):
                raise ValueError(f"params.arrivals.{key} must be a positive number, got {value!r}")
        if ("rate" in values) == ("trace_file" in values):
            raise ValueError("params.arrivals needs either rate (requests per second) or trace_file")
        return cls(**values)

    def times(self, count: int, seed: int) -> NDArray[np.float64]:
        """Seconds at which ``count`` requests are due; a trace is repeated where it is too short."""
        if self.rate is not None:
            return poisson_arrivals(self.rate, count, seed=seed)
        trace = read_arrivals(str(self.trace_file))
        period = trace[-1] + (trace[-1] / (len(trace) - 1) if len(trace) > 1 else 0.0)
        turns, places = np.divmod(np.arange(count), len(trace))
        return turns * period + trace[places]


@dataclass(frozen=True)
class TextParams:
    """The params of a text workload.

    Without ``arrivals`` all requests of a block are offered at once; ``concurrency`` bounds how many run at a
    time in either case. ``threads`` limits the threads of an engine on a CPU; small models are fastest, and
    steadiest, on one.
    """

    model: str
    tasks: str | tuple[str, ...]
    limit: int | None
    max_new_tokens: int
    concurrency: int
    threads: int | None = None
    arrivals: Arrivals | None = None

    @classmethod
    def from_mapping(cls, params: Mapping[str, Any]) -> TextParams:
        """Check types and names; ValueError says which key is wrong and what it may be."""
        for key in params:
            if key not in _DEFAULTS:
                raise ValueError(unknown_key(f"params.{key}", list(_DEFAULTS)))
        values = {**_DEFAULTS, **params}
        if not _is_name(values["model"]):
            raise ValueError(f"params.model is required: a path or a name, got {values['model']!r}")
        if isinstance(values["tasks"], list) and values["tasks"]:
            values["tasks"] = tuple(values["tasks"])
        if not all(map(_is_name, listed(values["tasks"]))):
            raise ValueError(
                "params.tasks is required: a file, a folder, lm_eval:<task> or a list of them, got "
                f"{values['tasks']!r}"
            )
        for key in ("limit", "max_new_tokens", "concurrency", "threads"):
            value = values[key]
            if key in ("limit", "threads") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"params.{key} must be a positive integer, got {value!r}")
        if values["arrivals"] is not None:
            values["arrivals"] = Arrivals.from_mapping(values["arrivals"])
        return cls(**values)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def listed(tasks: Any) -> tuple[Any, ...]:
    """One source of tasks or several, as a tuple."""
    return tasks if isinstance(tasks, tuple) else (tasks,)

"""Scores of generated answers."""

from __future__ import annotations

from collections.abc import Sequence


def until_stop(output: str, stop: Sequence[str] = ()) -> str:
    """The output before the first stop string, white space stripped."""
    ends = [position for text in stop if (position := output.find(text)) >= 0]
    return output[: min(ends, default=len(output))].strip()


def exact_match(output: str, target: str, stop: Sequence[str] = ()) -> float:
    """1.0 if the output up to the first stop string is the target, else 0.0."""
    return float(until_stop(output, stop) == target.strip())

"""A forward pass as an engine announces it, and the record that the harness makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moecap_eval.accounting import clip_to_window
from moecap_eval.engines.counters import PassCounts


class Announced(NamedTuple):
    """What is known of a pass before it runs, cheap to note and evaluated beside it.

    ``rows`` are unpadded, ``tokens`` the new ones by request, ``computed`` those that each request had before
    (others may be listed too), ``drafts`` the speculated ones among all.
    """

    rows: int
    tokens: dict[str, int]
    computed: list[tuple[str, int]]
    drafts: int = 0


@dataclass(frozen=True)
class PassShape:
    """The sizes of a pass as a ``StepRecord`` has them."""

    tokens: int
    requests: int
    sampled_tokens: int
    kv_tokens_read: int
    attended_positions: int
    windowed: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, announced: Announced, windows: Sequence[int]) -> PassShape:
        """Sizes of a causal pass, for layers without a window and for each length in ``windows``."""
        computed = dict(announced.computed)
        kv_tokens = pairs = 0
        clipped = dict.fromkeys(windows, (0, 0))
        for request, tokens in announced.tokens.items():
            past = computed[request]
            kv_tokens += past + tokens
            pairs += tokens * past + tokens * (tokens + 1) // 2
            for window, sums in clipped.items():
                read, seen = clip_to_window(past, tokens, window)
                clipped[window] = sums[0] + read, sums[1] + seen
        requests = len(announced.tokens)
        return cls(announced.rows, requests, requests + announced.drafts, kv_tokens, pairs, clipped)


def step_fields(shape: PassShape, counts: PassCounts, layer_ids: Sequence[int], top_k: int) -> dict[str, Any]:
    """Fields of the ``StepRecord`` of a pass; an engine adds what it alone knows."""
    touched = (counts.counts > 0).sum(axis=1)
    same = np.array_equal(touched, counts.loaded)
    return {
        "duration_s": counts.duration_s,
        "tokens": shape.tokens,
        "requests": shape.requests,
        "sampled_tokens": shape.sampled_tokens,
        "distinct_tokens": counts.distinct_tokens,
        "kv_tokens_read": shape.kv_tokens_read,
        "attended_positions": shape.attended_positions,
        "experts_touched": _by_layer(layer_ids, touched),
        "experts_loaded": None if same else _by_layer(layer_ids, counts.loaded),
        "invalid": counts.problem or _hole(shape, counts, layer_ids, top_k),
        "windowed": shape.windowed,
    }


def _by_layer(layer_ids: Sequence[int], values: np.ndarray) -> dict[int, int]:
    return {layer: int(value) for layer, value in zip(layer_ids, values, strict=True)}


def _hole(shape: PassShape, counts: PassCounts, layer_ids: Sequence[int], top_k: int) -> str | None:
    """Each layer must have seen ``top_k`` experts of every row, or the pass is not usable."""
    expected = shape.tokens * top_k
    for layer, total in zip(layer_ids, counts.counts.sum(axis=1), strict=True):
        if total != expected:
            return f"layer {layer}: routed {total} (token, expert) pairs, expected tokens*k = {expected}"
    return None

"""Bytes and floating point operations of a forward pass, and how much of the hardware they use.

Utilisations are ratios of sums over passes (MoE-CAP, arXiv 2412.07067, eq. 4-6): bytes (or operations) of
all passes, divided by the summed durations, divided by the peak. A mean of per-pass ratios would weigh a
short pass like a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from moecap_eval.model_spec import COMPONENTS, Breakdown, LayerSpec, ModelSpec
from moecap_eval.workload import StepRecord

__all__ = [
    "Breakdown",
    "Convention",
    "draft_bytes",
    "mbu",
    "mfu",
    "s_mbu",
    "s_mfu",
    "step_bytes",
    "step_flops",
]

Convention = Literal["exact", "paper", "loaded"]
_PAPER_COMPONENTS = frozenset({"attention", "dense_ffn", "routed_experts", "shared_experts"})


def step_bytes(spec: ModelSpec, step: StepRecord, *, convention: Convention = "exact") -> Breakdown:
    """Bytes that one pass has to read, each weight and each cached position once.

    Args:
        spec: the model.
        step: the pass.
        convention: ``"exact"`` counts every weight a row of this pass uses, experts with at least one
            unpadded token among them. ``"loaded"`` also counts experts that only padding rows use
            (``experts_loaded``): compare this one with a profiler. ``"paper"`` is eq. 4 of MoE-CAP to the
            letter: attention, experts and key/value cache, without embedding, norms, router and lm_head.

    A tied embedding is read as lm_head where the pass samples, and by rows otherwise.

    Returns:
        Bytes by component, ``kv_cache`` included, and ``draft`` where a draft model proposed tokens.
    """
    parts = {key: sum(layer.weight_bytes[key] for layer in spec.layers) for key in COMPONENTS}
    parts["norm"] += spec.final_norm_bytes
    parts["lm_head"] = spec.lm_head_bytes if step.sampled_tokens else 0
    rows_in_head = spec.tied and step.sampled_tokens > 0
    parts["embedding"] = 0 if rows_in_head else step.distinct_tokens * spec.embedding_row_bytes
    counts = step.experts_touched
    if convention == "loaded" and step.experts_loaded is not None:
        counts = step.experts_loaded
    parts["routed_experts"] = sum(
        _distinct(counts, layer) * layer.expert_bytes for layer in spec.layers if layer.num_experts
    )
    parts["kv_cache"] = sum(layer.kv_bytes * _kv_tokens(step, layer) for layer in spec.layers)
    if convention == "paper":
        parts = {
            key: value if key in _PAPER_COMPONENTS or key == "kv_cache" else 0 for key, value in parts.items()
        }
    elif step.draft_bytes:
        parts["draft"] = step.draft_bytes
    return Breakdown(parts)


def draft_bytes(draft: ModelSpec, step: StepRecord, drafts: int) -> int:
    """Bytes that a dense draft model reads to propose ``drafts`` tokens for each request of ``step``.

    By its schedule: one pass over the step's own rows, then one row per request for each further draft.

    Raises:
        ValueError: the draft model has MoE layers, whose routing is not recorded.
    """
    if draft.moe_layers:
        raise ValueError("the draft model has MoE layers, whose routing is not recorded")
    total = 0
    for index in range(drafts):
        rows = step.tokens if index == 0 else step.requests
        proposal = replace(
            step,
            tokens=rows,
            sampled_tokens=step.requests,
            distinct_tokens=min(rows, step.distinct_tokens),
            kv_tokens_read=step.kv_tokens_read + index * step.requests,
            experts_touched={},
            experts_loaded=None,
            draft_bytes=0,
        )
        total += step_bytes(draft, proposal).total
    return total


def step_flops(spec: ModelSpec, step: StepRecord) -> Breakdown:
    """Matrix-product operations of one pass; a multiply-add counts as two.

    Algorithmic, so independent of the kernel: causal attention counts the pairs it needs and not the
    square that an eager kernel computes, MLA is not absorbed, and the latent of a cached position is
    expanded once.

    Returns:
        Operations by component, ``attention_scores`` included (no embedding, no norm).
    """
    parts = {
        key: 2 * step.tokens * sum(layer.matmul[key] for layer in spec.layers)
        for key in COMPONENTS
        if key not in ("embedding", "norm")
    }
    parts["routed_experts"] = (
        2 * step.tokens * sum(layer.top_k * layer.expert_matmul for layer in spec.layers)
    )
    parts["lm_head"] = 2 * step.sampled_tokens * spec.vocab_size * spec.hidden_size
    parts["attention_scores"] = sum(layer.pair_flops * _pairs(step, layer) for layer in spec.layers)
    return Breakdown(parts)


def s_mbu(
    spec: ModelSpec,
    steps: Sequence[StepRecord],
    peak_bytes_per_s: float,
    *,
    convention: Convention = "exact",
) -> float:
    """Sparse model bandwidth utilisation (eq. 4 and 6), in [0, 1].

    Raises:
        ValueError: no passes, an invalid pass (its reason is repeated), or a value above 1.
    """
    return _utilisation(
        "S-MBU",
        "B/s",
        steps,
        peak_bytes_per_s,
        lambda step: step_bytes(spec, step, convention=convention).total,
    )


def mbu(spec: ModelSpec, steps: Sequence[StepRecord], peak_bytes_per_s: float) -> float:
    """Model bandwidth utilisation as if every expert were read in every pass; equals S-MBU for a dense model.

    It overstates sparse models, at times beyond 1; that is an error, as everywhere.
    """
    return _utilisation(
        "MBU",
        "B/s",
        steps,
        peak_bytes_per_s,
        lambda step: step_bytes(spec, _all_experts(spec, step)).total,
    )


def s_mfu(spec: ModelSpec, steps: Sequence[StepRecord], peak_flops_per_s: float) -> float:
    """Sparse model FLOPs utilisation (eq. 5), in [0, 1]; errors as ``s_mbu``.

    Rows of rejected drafts are no useful work: they are left out, with their share of the attended
    positions.
    """
    return _utilisation(
        "S-MFU", "FLOP/s", steps, peak_flops_per_s, lambda step: step_flops(spec, _accepted(step)).total
    )


def mfu(spec: ModelSpec, steps: Sequence[StepRecord], peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation as if every token passed through every expert (dense: S-MFU)."""
    every_expert = replace(
        spec, layers=tuple(replace(layer, top_k=layer.num_experts) for layer in spec.layers)
    )
    return _utilisation(
        "MFU",
        "FLOP/s",
        steps,
        peak_flops_per_s,
        lambda step: step_flops(every_expert, step).total,
    )


def _utilisation(
    name: str,
    unit: str,
    steps: Iterable[StepRecord],
    peak: float,
    amount: Callable[[StepRecord], int],
) -> float:
    if peak <= 0:
        raise ValueError(f"{name}: the peak must be positive, got {peak:g} {unit}")
    total, seconds = 0, 0.0
    for step in steps:
        if step.invalid is not None:
            raise ValueError(f"{name} is unknown: a pass is invalid: {step.invalid}")
        total += amount(step)
        seconds += step.duration_s
    if seconds <= 0:
        raise ValueError(f"{name} is unknown: no passes were recorded")
    value = total / seconds / peak
    if value > 1:
        cause = f"peak {peak:.1e} {unit} is too low or the model fits in the cache"
        if not name.startswith("S-"):
            cause += f", or {name} counts experts that no token used (see S-{name})"
        raise ValueError(f"{name} {value:.3f} > 1: {cause}")
    return value


def _accepted(step: StepRecord) -> StepRecord:
    """The pass without the rows of rejected drafts."""
    if step.accepted_tokens is None:
        return step
    rows = step.tokens - (step.sampled_tokens - step.accepted_tokens)
    share = rows / step.tokens
    return replace(
        step,
        tokens=rows,
        sampled_tokens=step.accepted_tokens,
        attended_positions=round(step.attended_positions * share),
        windowed={window: (read, round(pairs * share)) for window, (read, pairs) in step.windowed.items()},
    )


def _all_experts(spec: ModelSpec, step: StepRecord) -> StepRecord:
    return replace(step, experts_touched={layer.index: layer.num_experts for layer in spec.layers})


def _distinct(counts: object, layer: LayerSpec) -> int:
    count = counts.get(layer.index) if hasattr(counts, "get") else None
    if count is None:
        raise ValueError(f"the pass has no expert count for MoE layer {layer.index}")
    if not 0 <= count <= layer.num_experts:
        raise ValueError(f"layer {layer.index}: {count} distinct experts of {layer.num_experts}")
    return int(count)


def _kv_tokens(step: StepRecord, layer: LayerSpec) -> int:
    """Cached positions read in this layer."""
    if layer.window is None:
        return step.kv_tokens_read
    if layer.window in step.windowed:
        return step.windowed[layer.window][0]
    # Only the sum over requests is known: exact for one, else an upper bound.
    return min(step.kv_tokens_read, step.requests * (layer.window - 1) + step.tokens)


def _pairs(step: StepRecord, layer: LayerSpec) -> int:
    """(query, key) pairs in this layer."""
    if layer.window is None:
        return step.attended_positions
    if layer.window in step.windowed:
        return step.windowed[layer.window][1]
    if step.requests == 1:
        return clip_to_window(step.kv_tokens_read - step.tokens, step.tokens, layer.window)[1]
    return min(step.attended_positions, step.tokens * layer.window)


def clip_to_window(past: int, tokens: int, window: int) -> tuple[int, int]:
    """Cached positions read and (query, key) pairs of ``tokens`` new rows after ``past`` others.

    A query sees itself and the ``window - 1`` positions before it.
    """
    short = max(0, min(tokens, window - past))  # queries that see everything before them
    pairs = short * past + short * (short + 1) // 2 + (tokens - short) * window
    return min(past, window - 1) + tokens, pairs

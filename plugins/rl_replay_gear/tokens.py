"""Trajectories as tokens: discretised values, ragged tasks in one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Discretizer:
    """Maps real values to integers ``0 .. bins - 1`` by edges per dimension.

    ``edges``: float64 [D, bins - 1], increasing; bin ``b`` is ``edges[b-1] <= x < edges[b]``.
    """

    edges: Tensor
    centers: Tensor
    mu: float | None = None
    scale: float = 1.0

    @property
    def bins(self) -> int:
        """Number of tokens per dimension."""
        return self.edges.shape[1] + 1

    @classmethod
    def uniform(cls, low: Tensor, high: Tensor, bins: int) -> Discretizer:
        """Bins of equal width between ``low`` and ``high`` [D] (Trajectory Transformer, Janner et al.
        2021).
        """
        low, high = torch.as_tensor(low).double(), torch.as_tensor(high).double()
        if bool((high <= low).any()):
            raise ValueError("every high must exceed its low")
        steps = torch.arange(bins + 1, dtype=torch.float64) / bins
        borders = low[:, None] + (high - low)[:, None] * steps
        return cls(borders[:, 1:-1].contiguous(), (borders[:, 1:] + borders[:, :-1]) / 2)

    @classmethod
    def quantile(cls, samples: Tensor, bins: int) -> Discretizer:
        """Bins of equal mass of ``samples`` [N, D]; a bin's centre is the mean of its samples."""
        samples = torch.as_tensor(samples).double()
        levels = torch.arange(1, bins, dtype=torch.float64) / bins
        edges = torch.quantile(samples, levels, dim=0).T.contiguous()
        token = torch.searchsorted(edges, samples.T.contiguous(), right=True)
        total = torch.zeros(samples.shape[1], bins, dtype=torch.float64).scatter_add_(1, token, samples.T)
        count = torch.zeros_like(total).scatter_add_(1, token, torch.ones_like(samples.T))
        full = torch.cat([samples.amin(0)[:, None], edges, samples.amax(0)[:, None]], 1)
        middle = (full[:, 1:] + full[:, :-1]) / 2
        return cls(edges, torch.where(count > 0, total / count.clamp(min=1), middle))

    @classmethod
    def mu_law(cls, size: int, bins: int = 1024, *, mu: float = 100.0, scale: float = 256.0) -> Discretizer:
        """Gato's encoding (Reed et al. 2022): ``sgn(x) log(|x| mu + 1) / log(scale mu + 1)``, clipped,
        uniform bins.
        """
        one = torch.ones(size)
        plain = cls.uniform(-one, one, bins)
        return cls(plain.edges, plain.centers, mu, scale)

    def encode(self, values: Tensor) -> Tensor:
        """``[..., D]`` real -> ``[..., D]`` int64; values outside the range take the outermost bins."""
        if values.shape[-1] != len(self.edges):
            raise ValueError(
                f"expected {len(self.edges)} values in the last dimension, got {values.shape[-1]}"
            )
        x = values.double()
        if self.mu is not None:
            x = x.sign() * torch.log1p(x.abs() * self.mu) / torch.log1p(torch.tensor(self.scale * self.mu))
        edges = self.edges.to(x.device)
        flat = x.reshape(-1, len(edges)).T.contiguous()
        return torch.searchsorted(edges, flat, right=True).T.reshape(values.shape)

    def decode(self, tokens: Tensor) -> Tensor:
        """Centres of bins: int64 ``[..., D]`` -> float64 ``[..., D]``."""
        centers = self.centers.to(tokens.device)
        x = centers[torch.arange(len(centers), device=tokens.device), tokens]
        if self.mu is not None:
            x = x.sign() * torch.expm1(x.abs() * torch.log1p(torch.tensor(self.scale * self.mu))) / self.mu
        return x


@dataclass(frozen=True)
class TokenStream:
    """One column in a token sequence: its discretizer (None: already integers), first token id, and loss."""

    column: str
    discretizer: Discretizer | None
    offset: int = 0
    loss: bool = False


def tokenize(batch: Mapping[str, Tensor], mask: Tensor, streams: Sequence[TokenStream]) -> dict[str, Tensor]:
    """Interleave columns step by step into ragged token sequences.

    A step becomes the tokens of ``streams`` in order (all dimensions of one column side by side), as in the
    Trajectory Transformer and Gato. Padded steps vanish: sequences are packed end to end.

    Args:
        batch: Columns ``[B, L, D]`` or ``[B, L]``. mask: bool [B, L].
        streams: What to emit per step.

    Returns:
        ``tokens`` int64 [T], ``loss_mask`` bool [T], ``cu_seqlens`` int32 [B + 1] (starts of the sequences,
        the form variable-length attention takes), ``position`` int64 [T] (place in its sequence).
    """
    parts, losses = [], []
    for stream in streams:
        values = batch[stream.column]
        values = values.unsqueeze(-1) if values.dim() == 2 else values.flatten(2)
        tokens = values.long() if stream.discretizer is None else stream.discretizer.encode(values)
        parts.append(tokens + stream.offset)
        losses.append(torch.full((tokens.shape[-1],), stream.loss, device=tokens.device))
    steps = torch.cat(parts, -1)
    loss = torch.cat(losses)
    width = steps.shape[-1]
    lengths = mask.sum(1) * width
    starts = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    starts[1:] = lengths.cumsum(0)
    tokens = steps[mask].flatten()
    position = torch.arange(len(tokens), device=mask.device) - torch.repeat_interleave(starts[:-1], lengths)
    return {
        "tokens": tokens,
        "loss_mask": loss.repeat(len(tokens) // width),
        "cu_seqlens": starts.int(),
        "position": position,
    }


def merge_streams(parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Concatenate the token sequences of several tasks (different columns) into one batch."""
    ends = torch.tensor([0, *[int(part["cu_seqlens"][-1]) for part in parts]]).cumsum(0)
    starts = [part["cu_seqlens"][(1 if i else 0) :] + int(ends[i]) for i, part in enumerate(parts)]
    merged = {key: torch.cat([part[key] for part in parts]) for key in ("tokens", "loss_mask", "position")}
    return {**merged, "cu_seqlens": torch.cat(starts).int()}

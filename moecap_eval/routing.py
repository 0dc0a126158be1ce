"""Activation sheets: how many tokens each expert got in each pass, stored, and resampled to other batches.

MoE-CAP (arXiv 2412.07067, section 4) measures routing once and reuses it; resampling answers how many
experts a batch of another size would touch if its tokens were drawn from the recorded ones.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing counts of a run.

    Attributes:
        counts: int32 ``[passes, layers, experts]``, tokens of the pass that the expert got.
        tokens: int32 ``[passes]``, unpadded tokens of the pass.
        layer_ids: index in the model of each recorded layer.
        top_k: experts per token.
    """

    counts: NDArray[np.int32]
    tokens: NDArray[np.int32]
    layer_ids: tuple[int, ...]
    top_k: int

    def __post_init__(self) -> None:
        counts, tokens = np.asarray(self.counts, np.int32), np.asarray(self.tokens, np.int32)
        if counts.ndim != 3 or tokens.shape != counts.shape[:1] or len(self.layer_ids) != counts.shape[1]:
            raise ValueError(
                "a RoutingTrace needs counts [passes, layers, experts], tokens [passes] and a layer id per "
                f"layer; got {counts.shape}, {tokens.shape} and {len(self.layer_ids)} ids"
            )
        wrong = np.argwhere(counts.sum(axis=2) != (tokens * self.top_k)[:, None])
        if wrong.size:
            index, layer = (int(value) for value in wrong[0])
            raise ValueError(
                f"pass {index}, layer {self.layer_ids[layer]}: {int(counts[index, layer].sum())} routed "
                f"pairs, expected tokens*k = {int(tokens[index]) * self.top_k}"
            )
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "layer_ids", tuple(int(layer) for layer in self.layer_ids))

    def save(self, path: str | Path) -> None:
        """Write a compressed ``.npz`` file."""
        np.savez_compressed(
            path,
            counts=self.counts,
            tokens=self.tokens,
            layer_ids=np.asarray(self.layer_ids, np.int32),
            top_k=np.int32(self.top_k),
        )

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a file of ``save``; ValueError names a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as data:
                layer_ids = tuple(int(layer) for layer in data["layer_ids"])
                return cls(data["counts"], data["tokens"], layer_ids, int(data["top_k"]))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"{path} is not a saved RoutingTrace: {error}") from error

    def distinct(self) -> NDArray[np.int64]:
        """Distinct experts with at least one token, ``[passes, layers]``."""
        return (self.counts > 0).sum(axis=2)

    def resample(self, batch: int | Sequence[int], seed: int = 0) -> RoutingTrace:
        """Passes of ``batch`` tokens, drawn with replacement from the recorded ones.

        A token's ``top_k`` experts are distinct, and each layer draws on its own: co-activation across
        layers is not recorded. Where a pass held one token its experts are known together; otherwise they
        are drawn without replacement with the layer's overall shares, the experts' inclusion being then
        close to, not exactly, the recorded frequency.

        Args:
            batch: tokens of each new pass; an int gives as many passes as were recorded.
            seed: of the draws.
        """
        sizes = [batch] * len(self.tokens) if isinstance(batch, int) else list(batch)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"batch sizes must be at least 1, got {batch}")
        generator = np.random.default_rng(seed)
        single = self.counts[self.tokens == 1]
        counts = np.zeros((len(sizes), *self.counts.shape[1:]), np.int32)
        for layer in range(self.counts.shape[1]):
            draw = self._single_token_rows if len(single) else self._weighted_rows
            for index, size in enumerate(sizes):
                counts[index, layer] = draw(layer, size, generator)
        return RoutingTrace(counts, np.asarray(sizes, np.int32), self.layer_ids, self.top_k)

    def _single_token_rows(self, layer: int, size: int, generator: np.random.Generator) -> NDArray[np.int32]:
        rows = self.counts[self.tokens == 1, layer]
        total: NDArray[np.int32] = rows[generator.integers(len(rows), size=size)].sum(axis=0, dtype=np.int32)
        return total

    def _weighted_rows(self, layer: int, size: int, generator: np.random.Generator) -> NDArray[np.int32]:
        """Draws ``top_k`` of the experts per token without replacement (Gumbel top-k)."""
        shares = self.counts[:, layer].sum(axis=0, dtype=np.float64)
        with np.errstate(divide="ignore"):
            logits = np.log(shares / shares.sum())
        scores = logits + generator.gumbel(size=(size, len(shares)))
        chosen = np.argpartition(-scores, self.top_k - 1, axis=1)[:, : self.top_k]
        return np.bincount(chosen.ravel(), minlength=len(shares)).astype(np.int32)


def expected_distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Experts touched by ``tokens`` tokens that each pick ``top_k`` of ``num_experts`` uniformly.

    E * (1 - (1 - k/E)^T): an expert stays idle when every token passes it by.
    """
    if not 0 < top_k <= num_experts or tokens < 0:
        raise ValueError(
            f"need 0 < top_k <= num_experts and tokens >= 0, got {top_k}, {num_experts}, {tokens}"
        )
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens)

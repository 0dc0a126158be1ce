"""From what a request did so far, or from hidden states, to the experts that it will need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_moe_offload.eam import EAMCollection, row_shares

Shares = npt.NDArray[np.float64]


class EAMPredictor:
    """Mean of the collection's matrices, weighted by their nearness to the observed one.

    ``share = sum_i w_i * rownormalise(matrices[i])`` with ``w = softmax(-distances / temperature)``;
    temperature 0 takes the first nearest entry alone, as the paper does. Zero rows and an empty collection
    give uniform rows.

    Args:
        collection: finished requests.
        temperature: of the softmax, 0 or more.
    """

    def __init__(self, collection: EAMCollection, *, temperature: float = 0.05) -> None:
        if not temperature >= 0:
            raise ValueError(f"EAM predictor: temperature must be 0 or more, got {temperature}")
        self.collection, self.temperature = collection, temperature

    def predict(self, observed: npt.NDArray[np.int64]) -> Shares:
        """Predicted shares of a request, float64 ``[layers, experts]``; rows sum to 1.

        Args:
            observed: the request's matrix so far.
        """
        return self._mean(observed, len(self.collection))

    def prior(self, observed: npt.NDArray[np.int64]) -> Shares:
        """Counts to expect of a request before its own count, float64 ``[layers, experts]``.

        :meth:`predict` over the nearest 16 entries, times the mean row sum of the collection.

        Args:
            observed: the request's matrix so far.
        """
        return self.collection.mean_choices * self._mean(observed, 16)

    def expect(self, observed: npt.NDArray[np.int64]) -> Shares:
        """What a request will use next: ``rownormalise(prior(observed) + observed)``.

        A Dirichlet posterior whose prior is as strong as one stored request: a request comes to trust what it
        did itself, and one unlike all others is not misled for long.

        Args:
            observed: the request's matrix so far.
        """
        return row_shares(self.prior(observed) + observed)

    def _mean(self, observed: npt.NDArray[np.int64], count: int) -> Shares:
        """Weighted mean over the ``count`` nearest entries."""
        if not len(self.collection):
            shape = (self.collection.num_layers, self.collection.num_experts)
            return np.full(shape, 1 / shape[1])
        distances = self.collection.distances(observed)
        if self.temperature == 0:
            return self.collection.mean_shares(np.asarray([distances.argmin()]), np.ones(1))
        weights = np.exp((distances.min() - distances) / self.temperature)
        # Far entries weigh nothing: leaving them out changes the result by less than their weight.
        kept = np.flatnonzero(weights > weights.sum() * 1e-13)
        if count < len(kept):
            kept = kept[np.argpartition(-weights[kept], count)[:count]]
        return self.collection.mean_shares(kept, weights[kept] / weights[kept].sum())


class GatePredictor:
    """Names a layer's experts before its turn: its gate on the hidden states that an earlier layer routes.

    The stream of hidden states changes little from layer to layer, so that the gate mostly chooses what it
    will choose when its turn comes. Works on the device, without the host.

    Args:
        gate: hidden states ``[T, hidden]`` -> router logits ``[T, experts]``.
        count: experts named for each token.
        bias: ``[experts]``, added to the sigmoid of the logits where the router chooses by that sum.
    """

    def __init__(self, gate: Callable[[Tensor], Tensor], *, count: int, bias: Tensor | None = None) -> None:
        self._gate, self._count, self._bias = gate, count, bias

    def predict(self, hidden: Tensor) -> Tensor:
        """Expert ids ``[T, count]``, likeliest first, for ``hidden`` ``[T, hidden]``; int64."""
        scores = self._gate(hidden).float()
        if self._bias is not None:
            scores = torch.sigmoid(scores) + self._bias
        return torch.topk(scores, self._count, dim=-1).indices


def prefetch_priority(share: Shares, layer: int) -> Shares:
    """Priority ``p[l, e] = (share[l, e] + 1e-8) * (1 - (l - layer) / (L + 1))`` for ``l >= layer``, else 0.

    MoE-Infinity's decay: what is needed sooner comes first.

    Args:
        share: predicted shares or counts ``[layers, experts]``.
        layer: the layer that runs.
    """
    layers = np.arange(len(share))[:, None]
    priority = (share + 1e-8) * (1 - (layers - layer) / (len(share) + 1))
    return np.where(layers >= layer, priority, 0.0)

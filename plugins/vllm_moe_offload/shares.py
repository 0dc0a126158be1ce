"""Predicted shares of a step: what its requests are expected to activate, from what they did so far."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.eam import EAMCollection, EAMTracer
from vllm_moe_offload.predictor import EAMPredictor, Shares


class ShareEstimator:
    """Traces live requests and predicts for the step that runs.

    The share of a step is the mean of its requests' predictions, weighted by their tokens. A request that has
    run before is predicted once a step; one in its first pass again at every layer, as its rows appear.

    Args:
        collection: finished requests; each finished request joins it.
        temperature: of :class:`EAMPredictor`.
    """

    def __init__(self, collection: EAMCollection, *, temperature: float = 0.05) -> None:
        self.tracer = EAMTracer(collection.num_layers, collection.num_experts)
        self._predictor = EAMPredictor(collection, temperature=temperature)
        self._tokens: dict[str, int] = {}
        self._known: Shares | None = None  # of requests seen before the step; made when first asked for
        self._new: list[str] = []

    @property
    def collection(self) -> EAMCollection:
        """The finished requests."""
        return self._predictor.collection

    def start_step(self, tokens: Mapping[str, int]) -> None:
        """A step begins that computes so many tokens of each request."""
        self._tokens = dict(tokens)
        self._new = [request for request in tokens if request not in self.tracer.live]
        self._known = None

    def share(self) -> Shares | None:
        """Share ``[layers, experts]`` for the layer about to run; None while nothing has finished yet."""
        if not len(self.collection):
            return None
        if self._known is None:
            known = [request for request in self._tokens if request not in self._new]
            self._known = sum((self._weighted(request) for request in known), start=self._zeros())
        total = sum((self._weighted(request) for request in self._new), start=self._known)
        return total / max(sum(self._tokens.values()), 1)

    def observe(self, layer: int, chosen: Mapping[str, npt.NDArray[np.integer]]) -> None:
        """Experts that the router chose at ``layer`` for each request of the step."""
        for request, experts in chosen.items():
            self.tracer.record(request, layer, experts)

    def finish(self, request: str) -> npt.NDArray[np.int64]:
        """A request is done: its matrix joins the collection and is returned. KeyError if it is not live."""
        matrix = self.tracer.finish(request)
        self.collection.add(matrix)
        return matrix

    def discard(self, request: str) -> None:
        """A request was aborted or preempted."""
        self.tracer.discard(request)

    def _zeros(self) -> Shares:
        return np.zeros((self.tracer.num_layers, self.tracer.num_experts))

    def _weighted(self, request: str) -> Shares:
        live = request in self.tracer.live
        observed = self.tracer.matrix(request) if live else self._zeros().astype(np.int64)
        return self._tokens[request] * self._predictor.predict(observed)

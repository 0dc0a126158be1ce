"""Predicted shares of a step: what its requests are expected to activate, from what they did so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_moe_offload.eam import EAMCollection, EAMTracer, row_shares
from vllm_moe_offload.predictor import EAMPredictor, Shares


@dataclass
class _Belief:
    """What is expected of a request. Its parts are renewed as it grows, not at every step.

    Attributes:
        prior: expected counts from finished requests, when ``matched`` choices a layer had been seen.
        share: prior and own counts together, when ``counted`` choices a layer had been seen.
    """

    matched: int
    prior: Shares
    counted: int
    share: Shares


class ShareEstimator:
    """Traces live requests and predicts for the step that runs.

    The share of a step is the mean of its requests' predictions, weighted by their tokens. One in its first
    pass is predicted again at every layer, as its rows appear. One that has run before is matched with the
    finished requests each time it has doubled, until it is as long as they are on average; its own counts are
    added each time they have grown by a quarter.

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
        self._beliefs: dict[str, _Belief] = {}

    @property
    def collection(self) -> EAMCollection:
        """The finished requests."""
        return self._predictor.collection

    def start_step(self, tokens: Mapping[str, int]) -> None:
        """A step begins that computes so many tokens of each request."""
        self._tokens = dict(tokens)
        self._new = [request for request in tokens if request not in self.tracer]
        self._known = None

    def share(self) -> Shares | None:
        """Share ``[layers, experts]`` for the layer about to run; None while nothing has finished yet."""
        if not len(self.collection):
            return None
        if self._known is None:
            self._known = self._zeros()
            for request, count in self._tokens.items():
                if request not in self._new:
                    self._known += count * self._believed(request)
        total = self._known.copy()
        for request in self._new:
            total += self._tokens[request] * self._first_expected(request)
        return total / max(sum(self._tokens.values()), 1)

    def observe(self, layer: int, chosen: Mapping[str, npt.NDArray[np.integer]]) -> None:
        """Experts that the router chose at ``layer`` for each request of the step."""
        for request, experts in chosen.items():
            self.tracer.record(request, layer, experts)

    def observe_step(self, rows: Sequence[tuple[str, slice]], chosen: npt.NDArray[np.integer]) -> None:
        """Experts ``[tokens, layers, top_k]`` that the router chose in a step with these rows."""
        self.tracer.record_step(rows, chosen)

    def step_share(self, tokens: Mapping[str, int]) -> Shares | None:
        """Share for a coming step with so many tokens of each request; None if none of them has run."""
        known = [request for request in tokens if request in self.tracer]
        if not known:
            return None
        total = self._zeros()
        for request in known:
            believed = self._believed(request)
            total += believed if tokens[request] == 1 else tokens[request] * believed
        total /= max(sum(tokens.values()), 1)
        return total

    def finish(self, request: str) -> npt.NDArray[np.int64]:
        """A request is done: its matrix joins the collection and is returned. KeyError if it is not live."""
        matrix = self.tracer.finish(request)
        self._beliefs.pop(request, None)
        self.collection.add(matrix)
        return matrix

    def discard(self, request: str) -> None:
        """A request was aborted or preempted."""
        self.tracer.discard(request)
        self._beliefs.pop(request, None)

    def _zeros(self) -> Shares:
        return np.zeros((self.tracer.num_layers, self.tracer.num_experts))

    def _first_expected(self, request: str) -> Shares:
        live = request in self.tracer
        return self._predictor.expect(self.tracer.matrix(request) if live else self._zeros().astype(np.int64))

    def _believed(self, request: str) -> Shares:
        """The kept prediction for a live request, renewed where it is due."""
        seen = self.tracer.choices(request)
        belief = self._beliefs.get(request)
        if belief is None or 2 * belief.matched <= min(seen, 2 * self.collection.mean_choices):
            observed = self.tracer.matrix(request)
            prior = self._predictor.prior(observed)
            belief = _Belief(seen, prior, seen, row_shares(prior + observed))
            self._beliefs[request] = belief
        elif seen >= 1.25 * belief.counted:
            belief.counted = seen
            belief.share = row_shares(belief.prior + self.tracer.matrix(request))
        return belief.share

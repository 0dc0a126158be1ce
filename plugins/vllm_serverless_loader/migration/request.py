"""A request as its tokens: all that a migration has to carry."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

_UNSUPPORTED = (
    "structured_outputs",
    "guided_decoding",
    "prompt_logprobs",
    "logits_processors",
    "thinking_token_budget",
    "repetition_detection",
    "bad_words",
)
# What an engine may be able to go on with, if it is told which part of its prompt is output.
_OVER_THE_OUTPUT = {
    "presence_penalty": "counts the output, which would become part of the prompt",
    "frequency_penalty": "counts the output, which would become part of the prompt",
    "stop": "may begin in the output, which would become part of the prompt",
}


class Token(NamedTuple):
    """One generated token; ``finish_reason`` is set on the last one of a request."""

    id: int
    finish_reason: str | None = None


@dataclass(frozen=True)
class RequestState:
    """A request and what was generated so far.

    Attributes:
        request_id: unique among the live requests.
        prompt_token_ids: the prompt.
        output_token_ids: tokens that the client has.
        sampling: fields of vLLM's SamplingParams as the client gave them; ``max_tokens`` counts the whole
            answer.
        lora_name: adapter, if any.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora_name: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.prompt_token_ids + self.output_token_ids

    def continuation(self) -> dict[str, Any]:
        """Sampling fields for the rest of the answer: max_tokens and min_tokens less the output so far."""
        sampling = dict(self.sampling)
        done = len(self.output_token_ids)
        if sampling.get("max_tokens") is not None:
            sampling["max_tokens"] -= done
        if sampling.get("min_tokens"):
            sampling["min_tokens"] = max(0, sampling["min_tokens"] - done)
        return sampling

    def refusal(self, carries: Collection[str] = ()) -> str | None:
        """Why a replay of the tokens cannot carry this request; None if it can.

        Args:
            carries: of both engines, see :class:`Engine`.
        """
        for name in ("n", "best_of"):
            if (self.sampling.get(name) or 1) > 1:
                return f"{name}={self.sampling[name]} makes several answers"
        for name, reason in _OVER_THE_OUTPUT.items():
            if self.sampling.get(name) and name not in carries:
                return f"{name} {reason}, and the engines do not say that they carry it"
        for name in _UNSUPPORTED:
            if self.sampling.get(name):
                return f"{name} depends on state that tokens do not hold"
        return None

    def renamed(self, request_id: str) -> RequestState:
        """The same request under another id."""
        return dataclasses.replace(self, request_id=request_id)


class Engine(Protocol):
    """All that migration needs of an engine.

    An engine that goes on with ``presence_penalty``, ``frequency_penalty`` or ``stop`` from
    ``request.output_token_ids`` names them in an attribute ``carries``; without it such requests stay.
    """

    def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The tokens that follow ``request.token_ids``."""

    async def prefill(self, request: RequestState) -> int:
        """Compute and keep the key-value cache of ``request.token_ids``; returns the tokens computed."""

    async def abort(self, request_id: str) -> None:
        """Stop a request; unknown ids are ignored."""


class MigrationError(RuntimeError):
    """A migration that did not happen; all requests go on where they were.

    Attributes:
        request_id: the request that was refused or failed, if it was one.
        reason: why.
    """

    def __init__(self, request_id: str | None, reason: str) -> None:
        super().__init__(f"request {request_id}: {reason}" if request_id is not None else reason)
        self.request_id = request_id
        self.reason = reason


@dataclass(frozen=True)
class Round:
    """One round of a request's migration.

    Attributes:
        context_tokens: tokens sent to the destination.
        computed_tokens: of those, tokens whose keys and values it had to compute.
        gap_tokens: tokens that the source generated meanwhile.
        seconds: how long the prefill took.
    """

    context_tokens: int
    computed_tokens: int
    gap_tokens: int
    seconds: float


@dataclass(frozen=True)
class RequestMigration:
    """How one request moved.

    Attributes:
        outcome: ``"migrated"``, or ``"finished"`` if it ended, or its client left, before the hand-over.
        rounds: the rounds before the hand-over.
        pause_s: from the source's stop to the first token of the destination.
    """

    request_id: str
    outcome: str
    rounds: tuple[Round, ...]
    pause_s: float


@dataclass(frozen=True)
class MigrationReport:
    """A completed migration."""

    requests: tuple[RequestMigration, ...]
    seconds: float

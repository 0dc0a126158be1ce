"""What vLLM must know of the tokens from before a migration: they count for penalties, and stop strings begin
in them.

A continued request's earlier output is part of its prompt, where vLLM's output penalties and its search for
stop strings do not look.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.model_executor.layers.utils import apply_penalties
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_serverless_loader.migration.request import RequestState

PENALTIES = ("presence_penalty", "frequency_penalty")
PROCESSOR = f"{__name__}:OutputPenalties"
_EXTRA = "serverless_loader_penalties"


def continuation(request: RequestState) -> dict[str, Any]:
    """Sampling fields for a vLLM that gets ``request.token_ids`` as its prompt."""
    sampling = request.continuation()
    if not request.output_token_ids:
        return sampling
    sampling.pop("stop", None)  # see StopStrings
    if any(sampling.get(name) for name in PENALTIES):
        given = {
            "prompt_tokens": len(request.prompt_token_ids),
            "presence": float(sampling.pop("presence_penalty", None) or 0.0),
            "frequency": float(sampling.pop("frequency_penalty", None) or 0.0),
            # vLLM applies it before the other two, so all three must be applied in one place.
            "repetition": float(sampling.pop("repetition_penalty", None) or 1.0),
        }
        sampling["extra_args"] = {**(sampling.get("extra_args") or {}), _EXTRA: given}
    return sampling


class OutputPenalties(AdapterLogitsProcessor):
    """vLLM's penalties for requests whose prompt ends with output (see :func:`continuation`)."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse values that are not of :func:`continuation`, before they reach the engine.

        Raises:
            ValueError: the key is ours, the value is not.
        """
        given = (sampling_params.extra_args or {}).get(_EXTRA)
        if given is None:
            return
        kinds = {"prompt_tokens": int, "presence": float, "frequency": float, "repetition": float}
        is_ours = isinstance(given, dict) and given.keys() == kinds.keys()
        if not is_ours or any(type(given[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"extra_args[{_EXTRA!r}] is set by migrations alone, got {given!r}")

    def is_argmax_invariant(self) -> bool:
        """Penalties change which token is the most likely one."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """The penalties of a continued request; None for all others."""
        given = (params.extra_args or {}).get(_EXTRA)
        if given is None:
            return None

        def penalise(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
            seam, device = given["prompt_tokens"], logits.device
            output = [*prompt_ids[seam:], *output_ids]
            apply_penalties(
                logits.unsqueeze(0),
                torch.tensor([prompt_ids[:seam]], dtype=torch.int64, device=device),
                torch.tensor([output], dtype=torch.int64, device=device),
                torch.tensor([given["presence"]], device=device),
                torch.tensor([given["frequency"]], device=device),
                torch.tensor([given["repetition"]], device=device),
            )
            return logits

        return penalise


class StopStrings:
    """Finds stop strings in all of a continued request's output, as vLLM would have found them.

    Args:
        tokenizer: the engine's.
        request: what was generated so far holds no stop string.
    """

    def __init__(self, tokenizer: Any, request: RequestState) -> None:
        params = SamplingParams(**{**request.sampling, "detokenize": True})
        asked = SimpleNamespace(
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_embeds=None,
            sampling_params=params,
        )
        self._text = IncrementalDetokenizer.from_new_request(tokenizer, asked)
        for token in request.output_token_ids:
            self._text.update([token], False)

    def completed_by(self, token: int) -> bool:
        """Whether the next token completes a stop string."""
        return self._text.update([token], False) is not None

"""vLLM's AsyncLLM as an engine that requests can move to and from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_serverless_loader.migration.request import RequestState, Token
from vllm_serverless_loader.vllm_seam import PENALTIES, PROCESSOR, OutputPenalties, StopStrings, continuation


class VLLMEngine:
    """One running ``AsyncLLM``, which must have prefix caching on: prefilled tokens are kept there.

    Args:
        llm: vLLM's ``AsyncLLM``.

    Attributes:
        carries: see :class:`~vllm_serverless_loader.migration.request.Engine`. ``stop`` needs vLLM to have
            its tokenizer, the penalties need :data:`~vllm_serverless_loader.vllm_seam.PROCESSOR` among vLLM's
            ``logits_processors``, which :meth:`start` sees to.

    Raises:
        ValueError: prefix caching is off.
    """

    def __init__(self, llm: Any) -> None:
        if not llm.vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("VLLMEngine: migration keeps prefilled tokens in the prefix cache; turn it on")
        self.llm = llm
        model = llm.vllm_config.model_config
        has_processor = {PROCESSOR, OutputPenalties} & set(model.logits_processors or ())
        carries = set(PENALTIES if has_processor else ())
        if not model.skip_tokenizer_init:
            carries.add("stop")
        self.carries = frozenset(carries)

    @classmethod
    def start(cls, model: str, **arguments: Any) -> VLLMEngine:
        """Start vLLM in a process of its own.

        Args:
            model: directory or name.
            arguments: of ``vllm.AsyncEngineArgs``.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings: dict[str, Any] = {"enable_prefix_caching": True, **arguments}
        if not settings.get("speculative_config"):  # with which vLLM takes no processors
            settings.setdefault("logits_processors", [PROCESSOR])
        return cls(AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **settings)))

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The tokens that follow ``request.token_ids``."""
        stop = None
        if request.sampling.get("stop") and request.output_token_ids:
            stop = StopStrings(self.llm.get_tokenizer(), request)
        sampling = {"detokenize": bool(request.sampling.get("stop")), **continuation(request)}
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
        prompt = {"prompt_token_ids": list(request.token_ids)}
        async with aclosing(self.llm.generate(prompt, params, request.request_id)) as outputs:
            async for output in outputs:
                answer = output.outputs[0]
                if answer.finish_reason == "abort" or (output.finished and not answer.token_ids):
                    raise RuntimeError(f"vLLM ended request {request.request_id}: {answer.finish_reason}")
                for number, token in enumerate(answer.token_ids, 1):
                    if stop is not None and stop.completed_by(token):
                        yield Token(token, "stop")
                        return
                    is_last = output.finished and number == len(answer.token_ids)
                    yield Token(token, answer.finish_reason if is_last else None)

    async def prefill(self, request: RequestState) -> int:
        """Compute and keep the key-value cache of ``request.token_ids``; returns the tokens computed."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        cached = 0
        prompt = {"prompt_token_ids": list(request.token_ids)}
        async for output in self.llm.generate(prompt, params, request.request_id):
            cached = output.num_cached_tokens or 0
        return len(request.token_ids) - cached

    async def abort(self, request_id: str) -> None:
        """Stop a request; unknown ids are ignored."""
        await self.llm.abort(request_id)

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self.llm.shutdown()

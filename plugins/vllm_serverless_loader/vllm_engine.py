"""vLLM's AsyncLLM as an engine that requests can move to and from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_serverless_loader.migration.request import RequestState, Token


class VLLMEngine:
    """One running ``AsyncLLM``, which must have prefix caching on: prefilled tokens are kept there.

    Args:
        llm: vLLM's ``AsyncLLM``.

    Raises:
        ValueError: prefix caching is off.
    """

    def __init__(self, llm: Any) -> None:
        if not llm.vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("VLLMEngine: migration keeps prefilled tokens in the prefix cache; turn it on")
        self.llm = llm

    @classmethod
    def start(cls, model: str, **arguments: Any) -> VLLMEngine:
        """Start vLLM in a process of its own.

        Args:
            model: directory or name.
            arguments: of ``vllm.AsyncEngineArgs``.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = {"enable_prefix_caching": True, **arguments}
        return cls(AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **settings)))

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The tokens that follow ``request.token_ids``."""
        sampling = {"detokenize": False, **request.continuation()}
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
        prompt = {"prompt_token_ids": list(request.token_ids)}
        async for output in self.llm.generate(prompt, params, request.request_id):
            answer = output.outputs[0]
            if answer.finish_reason == "abort" or (output.finished and not answer.token_ids):
                raise RuntimeError(f"vLLM ended request {request.request_id}: {answer.finish_reason}")
            if not answer.token_ids:
                continue
            *first, last = answer.token_ids
            for token in first:
                yield Token(token)
            yield Token(last, answer.finish_reason if output.finished else None)

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

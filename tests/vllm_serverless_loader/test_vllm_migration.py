"""Migration between two real vLLM engines, each with a process of its own (SL-14 to SL-16)."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vllm_serverless_loader import MigrationError, RequestState, TokenRouter

pytestmark = pytest.mark.vllm

MODEL = str(Path("examples/tiny_moe/model").resolve())
BLOCK = 32
TOKENS = 120
PROMPTS = [tuple((7 * i + j * j) % 250 + 2 for j in range(40 + 30 * i)) for i in range(3)]


def start():
    from vllm_serverless_loader import VLLMEngine

    return VLLMEngine.start(
        MODEL,
        dtype="float32",
        load_format="serverless_llm",
        block_size=BLOCK,
        enforce_eager=True,
        max_model_len=256,
        disable_log_stats=True,
        seed=0,
    )


def requests(tag, **more):
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, **more}
    return [RequestState(f"{tag}{n}", prompt, sampling=sampling) for n, prompt in enumerate(PROMPTS)]


def serve(router, tag, **more):
    async def collect(state):
        return [token.id async for token in router.generate(state)]

    return [asyncio.ensure_future(collect(state)) for state in requests(tag, **more)]


async def after(router, tokens):
    while not router.requests() or min(len(one.output_token_ids) for one in router.requests()) < tokens:
        await asyncio.sleep(0.005)


def engine_processes():
    """Running children; Python's own resource tracker stays until this process ends."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            is_tracker = any("resource_tracker" in word for word in child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not is_tracker:
                found.add(child.pid)
    return found


async def check_sl26(source, destination, plain):
    """Penalties and stop strings across a seam give what plain vLLM gives without one."""
    from vllm import SamplingParams

    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    expected = await asyncio.gather(*serve(TokenRouter(source), "whole", **penalties))
    assert expected != plain  # the penalties matter
    router = TokenRouter(source)
    streams = serve(router, "penalised", **penalties)
    await after(router, 20)
    await router.migrate(destination)
    assert await asyncio.gather(*streams) == expected

    # Text that occurs once, from a token at 40 to one at least 20 later: a seam between them cuts it.
    tokenizer = source.llm.get_tokenizer()
    texts = [tokenizer.decode(plain[0][:count]) for count in range(TOKENS + 1)]
    stops = (texts[end][len(texts[40]) :] for end in range(60, TOKENS))
    stop = next(text for text in stops if texts[TOKENS].find(text) == len(texts[40]))
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "stop": [stop]}
    prompt = {"prompt_token_ids": list(PROMPTS[0])}
    async for output in source.llm.generate(prompt, SamplingParams(**sampling), "native"):
        whole = output.outputs[0]
    assert whole.finish_reason == "stop"
    ids = tuple(whole.token_ids)
    assert 60 <= len(ids) < TOKENS
    for seam in (0, 1, 41, len(ids) - 1):
        state = RequestState(f"stops{seam}", PROMPTS[0], ids[:seam], sampling)
        rest = [token async for token in destination.generate(state)]
        assert tuple(token.id for token in rest) == ids[seam:]
        assert [token.finish_reason for token in rest if token.finish_reason] == ["stop"]
    assert source.carries == {"stop", "presence_penalty", "frequency_penalty"}


def test_sl26_penalties_of_a_continuation():
    """The whole output counts, on whichever side of the seam it is; against the formula by hand."""
    import torch
    from vllm import SamplingParams

    from vllm_serverless_loader.vllm_seam import OutputPenalties, continuation

    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0}
    plain = RequestState("r", (1, 2), sampling={**penalties, "extra_args": {"mine": 1}})
    assert continuation(plain) == dict(plain.sampling)  # nothing was generated: vLLM does it itself
    sampling = continuation(RequestState("r", (1, 2), (3, 3), sampling=plain.sampling))
    params = SamplingParams(**sampling)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
    assert params.extra_args["mine"] == 1
    OutputPenalties.validate_params(params)

    processor = OutputPenalties.__new__(OutputPenalties)
    assert processor.new_req_logits_processor(SamplingParams()) is None
    logits = torch.tensor([1.0, 1.0, -1.0, 4.0, 1.0, -1.0])
    found = processor.new_req_logits_processor(params)([1, 2, 3, 3], [3, 4], logits.clone())
    # Seen: 1 and 2 in the prompt, 3 three times and 4 once in the output.
    expected = torch.tensor([1.0, 0.5, -2.0, 2.0 - 0.75 - 0.5, 0.5 - 0.25 - 0.5, -1.0])
    assert torch.equal(found, expected)

    for bad in (5, {}, {**sampling["extra_args"]["serverless_loader_penalties"], "prompt_tokens": "2"}):
        with pytest.raises(ValueError, match="set by migrations alone"):
            OutputPenalties.validate_params(SamplingParams(extra_args={"serverless_loader_penalties": bad}))


@pytest.mark.slow
def test_sl14_real_engines_move_streams_and_survive_failures():
    """One test, because two engines take long to start; the steps are in order of how much they break."""

    async def run():
        before = engine_processes()
        source = start()
        first = engine_processes() - before
        destination = start()
        second = engine_processes() - before - first
        assert first
        assert second
        try:
            router = TokenRouter(source)
            expected = await asyncio.gather(*serve(router, "plain"))
            assert all(len(ids) == TOKENS for ids in expected)

            streams = serve(router, "moves")
            await after(router, 20)
            report = await router.migrate(destination, max_gap_tokens=4, max_rounds=4)
            assert await asyncio.gather(*streams) == expected
            assert router.engine is destination
            assert [one.outcome for one in report.requests] == ["migrated"] * 3
            for one in report.requests:
                known = 0
                for step in one.rounds:
                    # SL-15; the first prefill may find blocks of an earlier request with the same prompt.
                    law = step.context_tokens - BLOCK * (min(known, step.context_tokens - 1) // BLOCK)
                    assert step.computed_tokens == law
                    known = step.context_tokens

            await check_sl26(source, destination, expected)

            leaving, *staying = serve(router, "leaves")
            await after(router, 5)
            moving = asyncio.ensure_future(router.migrate(source))
            await asyncio.sleep(0.01)
            leaving.cancel()
            await moving
            assert await asyncio.gather(*staying) == expected[1:]
            assert router.requests() == ()
            for _ in range(100):
                left = source.llm.output_processor.get_num_unfinished_requests()
                left += destination.llm.output_processor.get_num_unfinished_requests()
                if not left:
                    break
                await asyncio.sleep(0.02)
            assert left == 0

            streams = serve(router, "stays")
            await after(router, 20)
            for pid in second:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(MigrationError, match="the destination failed"):
                await router.migrate(destination)
            assert router.engine is source
            assert await asyncio.gather(*streams) == expected
        finally:
            source.shutdown()
            destination.shutdown()
        for _ in range(1200):
            if not engine_processes() - before:
                break
            await asyncio.sleep(0.05)
        assert engine_processes() <= before

    asyncio.run(run())

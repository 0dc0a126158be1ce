"""Migration by tokens between toy engines whose next token is a hash of all before it (SL-14 to SL-17)."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_serverless_loader import MigrationError, RequestState, SimulatedEngine, TokenRouter
from vllm_serverless_loader.migration.simulated_engine import next_token

PROMPT = tuple(range(40))


def request(name="r", tokens=60, prompt=PROMPT, **sampling):
    return RequestState(name, prompt, sampling={"max_tokens": tokens, **sampling})


def expected(prompt, tokens):
    everything = list(prompt)
    for _ in range(tokens):
        everything.append(next_token(everything))
    return everything[len(prompt) :]


async def collect(router, state):
    return [token.id async for token in router.generate(state)]


async def after(router, tokens):
    """Wait until every live request has at least ``tokens``."""
    while not router.requests() or min(len(one.output_token_ids) for one in router.requests()) < tokens:
        await asyncio.sleep(0.0005)


async def settled(*engines):
    """Nothing runs any more at these engines."""
    for _ in range(200):
        if not any(engine.running for engine in engines):
            return
        await asyncio.sleep(0.002)
    raise AssertionError([engine.running for engine in engines])


def test_sl14_streams_equal_the_unmigrated_run():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_s_per_token=0.0002)
        router = TokenRouter(source)
        prompts = [tuple(range(n, n + 20 + 7 * n)) for n in range(5)]
        streams = [
            asyncio.ensure_future(collect(router, request(f"r{n}", 80, prompt)))
            for n, prompt in enumerate(prompts)
        ]
        await after(router, 5)
        report = await router.migrate(destination, max_gap_tokens=3)
        assert router.engine is destination
        assert not source.running
        assert [one.outcome for one in report.requests] == ["migrated"] * 5
        assert all(len(one.output_token_ids) > 5 for one in router.requests())
        for prompt, stream in zip(prompts, streams, strict=True):
            assert await stream == expected(prompt, 80)
        await settled(source, destination)
        assert router.requests() == ()

    asyncio.run(run())


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    waits=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    gap=st.integers(0, 20),
    rounds=st.integers(1, 4),
    prefill=st.sampled_from([0.0, 0.0001, 0.001]),
)
def test_sl14_nothing_is_lost_or_doubled_whenever_it_moves(lengths, waits, gap, rounds, prefill):
    async def run():
        engines = [SimulatedEngine(step_s=0.0002, prefill_s_per_token=prefill) for _ in range(len(waits) + 1)]
        router = TokenRouter(engines[0])
        streams = [
            asyncio.ensure_future(collect(router, request(f"r{n}", tokens)))
            for n, tokens in enumerate(lengths)
        ]
        for wait, engine in zip(waits, engines[1:], strict=True):
            await asyncio.sleep(wait * 0.0002)
            await router.migrate(engine, max_gap_tokens=gap, max_rounds=rounds)
        for tokens, stream in zip(lengths, streams, strict=True):
            assert await stream == expected(PROMPT, tokens)
        await settled(*engines)

    asyncio.run(run())


def test_sl14_new_requests_start_at_the_destination_during_a_migration():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.02)
        router = TokenRouter(source)
        first = asyncio.ensure_future(collect(router, request("old", 150)))
        await after(router, 3)
        moving = asyncio.ensure_future(router.migrate(destination, max_gap_tokens=0, max_rounds=2))
        await asyncio.sleep(0.005)
        with pytest.raises(MigrationError, match="another migration is under way"):
            await router.migrate(source)
        second = asyncio.ensure_future(collect(router, request("new", 30)))
        await asyncio.sleep(0.005)
        assert any(name.startswith("new") for name in destination.running)
        report = await moving
        assert [one.request_id for one in report.requests] == ["old"]
        assert await first == expected(PROMPT, 150)
        assert await second == expected(PROMPT, 30)

    asyncio.run(run())


def test_sl15_recomputed_tokens_follow_the_law():
    async def run():
        block = 16
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_s_per_token=0.0005, block_size=block)
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 300, tuple(range(100)))))
        await after(router, 10)
        report = await router.migrate(destination, max_gap_tokens=0, max_rounds=4)
        rounds = report.requests[0].rounds
        before = 0
        for one in rounds:
            context = one.context_tokens
            assert one.computed_tokens == context - block * (min(before, context - 1) // block)
            before = context
        # Rounds end where gaps stop shrinking; each starts where the gap of the one before ended.
        for one, following in itertools.pairwise(rounds):
            assert following.context_tokens == one.context_tokens + one.gap_tokens
        assert len(rounds) >= 2
        assert rounds[1].computed_tokens < rounds[0].computed_tokens
        await stream

    asyncio.run(run())


@pytest.mark.parametrize("round_number", [0, 1, 2])
def test_sl16_destination_that_dies_in_each_round(round_number):
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_s_per_token=0.0004, block_size=4)
        router = TokenRouter(source)
        prompt = tuple(range(400))
        streams = [asyncio.ensure_future(collect(router, request(f"r{n}", 500, prompt))) for n in range(3)]
        await after(router, 3)
        original, calls = destination.prefill, []

        async def prefill(state):
            calls.append(state.request_id)
            if f"prefill{round_number}" in state.request_id:
                destination.kill(ConnectionError("the machine is gone"))
            return await original(state)

        destination.prefill = prefill
        with pytest.raises(
            MigrationError, match=r"request r\d: the destination failed: .*machine is gone"
        ) as caught:
            await router.migrate(destination, max_gap_tokens=0, max_rounds=5)
        assert caught.value.request_id in {"r0", "r1", "r2"}
        assert router.engine is source
        for stream in streams:
            assert await stream == expected(prompt, 500)
        await settled(source, destination)
        # A later migration to a healthy engine works.
        healthy = SimulatedEngine()
        stream = asyncio.ensure_future(collect(router, request("again", 80)))
        await after(router, 3)
        await router.migrate(healthy)
        assert await stream == expected(PROMPT, 80)

    asyncio.run(run())


@pytest.mark.parametrize("tokens_before", [0, 1])
def test_sl16_destination_that_dies_after_the_hand_over_of_some(tokens_before):
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine()
        router = TokenRouter(source)
        streams = [asyncio.ensure_future(collect(router, request(f"r{n}", 150))) for n in range(3)]
        await after(router, 3)
        original, original_prefill = destination.generate, destination.prefill

        async def generate(state):
            produced = 0
            async for token in original(state):
                if produced == tokens_before and state.request_id.startswith("r0"):
                    destination.kill(ConnectionError("gone after hand-over"))
                    raise destination.dead
                produced += 1
                yield token

        async def prefill(state):
            if state.request_id.startswith("r2"):
                await asyncio.sleep(0.1)  # so that the migration is still under way
            return await original_prefill(state)

        destination.generate, destination.prefill = generate, prefill
        with pytest.raises(MigrationError, match="gone after hand-over"):
            await router.migrate(destination)
        for stream in streams:
            assert await stream == expected(PROMPT, 150)
        await settled(source)

    asyncio.run(run())


def test_sl16_request_that_ends_during_a_round_never_starts_at_the_destination():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.2)
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 10)))
        await after(router, 2)
        started = []
        original = destination.generate
        destination.generate = lambda state: started.append(state) or original(state)
        report = await router.migrate(destination, max_gap_tokens=0)
        assert [one.outcome for one in report.requests] == ["finished"]
        assert await stream == expected(PROMPT, 10)
        assert started == []
        await settled(source, destination)

    asyncio.run(run())


def test_sl16_source_that_dies_is_resumed_from_the_routers_tokens():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.02)
        router = TokenRouter(source)
        streams = [asyncio.ensure_future(collect(router, request(f"r{n}", 100))) for n in range(2)]
        await after(router, 5)
        moving = asyncio.ensure_future(router.migrate(destination, max_gap_tokens=0))
        await asyncio.sleep(0.005)
        source.kill(ConnectionError("source gone"))
        await moving
        for stream in streams:
            assert await stream == expected(PROMPT, 100)
        await settled(destination)

    asyncio.run(run())


def test_sl16_source_and_destination_that_die_reach_the_client():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.02)
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 100)))
        await after(router, 5)
        moving = asyncio.ensure_future(router.migrate(destination, max_gap_tokens=0))
        await asyncio.sleep(0.005)
        source.kill(ConnectionError("source gone"))
        destination.kill(ConnectionError("destination gone"))
        with pytest.raises(MigrationError, match="destination gone"):
            await moving
        with pytest.raises(ConnectionError, match="source gone"):
            await stream
        assert router.requests() == ()

    asyncio.run(run())


def test_sl14_an_error_outside_of_a_migration_reaches_the_client():
    async def run():
        engine = SimulatedEngine()
        router = TokenRouter(engine)
        stream = asyncio.ensure_future(collect(router, request("r", 100)))
        await after(router, 5)
        engine.kill(ConnectionError("gone"))
        with pytest.raises(ConnectionError, match="gone"):
            await stream

    asyncio.run(run())


@pytest.mark.parametrize("when", ["before", "round", "after"])
def test_sl14_client_that_leaves_leaves_nothing_behind(when):
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.02)
        router = TokenRouter(source)
        leaving = asyncio.ensure_future(collect(router, request("leaves", 500)))
        staying = asyncio.ensure_future(collect(router, request("stays", 200)))
        await after(router, 3)
        if when == "before":
            leaving.cancel()
        moving = asyncio.ensure_future(router.migrate(destination, max_gap_tokens=0, max_rounds=3))
        await asyncio.sleep(0.01)
        if when == "round":
            leaving.cancel()
        report = await moving
        if when == "after":
            leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        outcomes = {one.request_id: one.outcome for one in report.requests}
        assert outcomes["stays"] == "migrated"
        assert outcomes.get("leaves") == {"before": None, "round": "finished", "after": "migrated"}[when]
        assert await staying == expected(PROMPT, 200)
        await settled(source, destination)
        assert router.requests() == ()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_sl14_migration_that_is_cancelled_leaves_requests_at_the_source():
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine(prefill_fixed_s=0.05)
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 100)))
        await after(router, 3)
        moving = asyncio.ensure_future(router.migrate(destination, max_gap_tokens=0))
        await asyncio.sleep(0.01)
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert router.engine is source
        assert await stream == expected(PROMPT, 100)
        await settled(source, destination)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"n": 2}, "n=2"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"stop": ["\n"]}, "stop"),
        ({"bad_words": ["x"]}, "bad_words"),
    ],
)
def test_sl17_what_tokens_cannot_carry_is_refused_before_anything_changes(sampling, reason):
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine()
        router = TokenRouter(source)
        streams = [
            asyncio.ensure_future(collect(router, request("plain", 60))),
            asyncio.ensure_future(collect(router, request("special", 60, **sampling))),
        ]
        await after(router, 3)
        with pytest.raises(MigrationError, match=f"request special: {reason}") as caught:
            await router.migrate(destination)
        assert caught.value.request_id == "special"
        assert router.engine is source
        assert destination.computed_tokens == 0
        for stream in streams:
            assert await stream == expected(PROMPT, 60)

    asyncio.run(run())


@pytest.mark.parametrize("sampling", [{"stop": ["x"]}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}])
def test_sl26_only_what_both_engines_carry_moves(sampling):
    async def run():
        source, destination = SimulatedEngine(), SimulatedEngine()
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 60, **sampling)))
        await after(router, 3)
        for one, other in ((source, destination), (destination, source)):
            # Rolling back needs the source to carry it as well.
            one.carries, other.carries = frozenset(sampling), frozenset()
            with pytest.raises(MigrationError, match=next(iter(sampling))):
                await router.migrate(destination)
        source.carries = destination.carries = frozenset(sampling)
        report = await router.migrate(destination)
        assert report.requests[0].outcome in {"migrated", "finished"}
        assert router.engine is destination
        assert await stream == expected(PROMPT, 60)

    asyncio.run(run())


def test_sl17_what_they_can_carry_is_continued():
    state = RequestState(
        "r", (1, 2), (3, 4, 5), sampling={"max_tokens": 10, "min_tokens": 2, "temperature": 0.5, "seed": 3}
    )
    assert state.refusal() is None
    assert state.token_ids == (1, 2, 3, 4, 5)
    assert state.continuation() == {"max_tokens": 7, "min_tokens": 0, "temperature": 0.5, "seed": 3}
    assert RequestState("r", (1,)).continuation() == {}


def test_sl14_pause_is_the_hand_over_alone():
    """With rounds the client waits for the last gap; with stop and replay for the whole context."""

    async def pause(rounds, gap):
        source = SimulatedEngine(step_s=0.004)
        destination = SimulatedEngine(step_s=0.004, prefill_s_per_token=0.0005)
        router = TokenRouter(source)
        stream = asyncio.ensure_future(collect(router, request("r", 120, tuple(range(400)))))
        await after(router, 3)
        report = await router.migrate(destination, max_gap_tokens=gap, max_rounds=rounds)
        await stream
        return report.requests[0]

    async def run():
        with_rounds = await pause(8, 4)
        assert len(with_rounds.rounds) > 1
        # Stop and replay would wait for the first round's prefill, here 400 tokens, and a step.
        assert with_rounds.pause_s < with_rounds.rounds[0].seconds / 3

    asyncio.run(run())

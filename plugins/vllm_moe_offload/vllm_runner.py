"""vLLM's workers and engine front ends: which tokens a step has, and calls from the user's process."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import torch

from vllm_moe_offload import vllm_layer
from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.direct import DirectCache
from vllm_moe_offload.runtime import ModelOffload
from vllm_moe_offload.steps import Step
from vllm_moe_offload.trace import RoutingTrace

logger = logging.getLogger("vllm.moe_offload")

_RPC = "moe_offload_call"
_OFFLOAD = "_moe_offload"
_INACTIVE = "moe_offload is not active in this engine; `vllm-moe-offload doctor` says why"


def install(vllm_config: Any) -> None:
    """Wrap methods of the engine's class of workers and give it an RPC method. Idempotent.

    Runs in the worker's process when the first offloaded layer is built, hence while ``load_model`` runs.

    Raises:
        ImportError: this vLLM's worker lacks one of the methods.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    if hasattr(worker, _RPC):
        return
    for name in ("determine_available_memory", "initialize_from_config", "execute_model", "shutdown"):
        if not hasattr(worker, name):
            raise ImportError(f"moe_offload: vLLM's {worker.__name__} has no {name}")
    plain, stop = worker.execute_model, worker.shutdown
    determine, initialize = worker.determine_available_memory, worker.initialize_from_config

    def determine_available_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        _take_over(self)
        return determine(self, *args, **kwargs)

    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _take_over(self)  # where vLLM had no need to determine its memory
        return initialize(self, *args, **kwargs)

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        offload = _offload_of_worker(self)
        if offload is None or not offload.caches:
            return plain(self, scheduler_output, *args, **kwargs)  # nothing to manage
        step = None
        if scheduler_output.total_num_scheduled_tokens > 0:
            step = _step_of(self.model_runner, scheduler_output, offload)
        offload.begin_step(
            step,
            [external_id(name) for name in scheduler_output.finished_req_ids],
            [external_id(name) for name in getattr(scheduler_output, "preempted_req_ids", None) or ()],
        )
        try:
            result = plain(self, scheduler_output, *args, **kwargs)
            offload.end_step()
            return result
        finally:
            offload.step = None

    def shutdown(self: Any) -> None:
        offload = _offload_of_worker(self)
        try:
            if offload is not None:
                offload.close()
        finally:
            stop(self)

    worker.shutdown = shutdown
    worker.determine_available_memory = determine_available_memory
    worker.initialize_from_config = initialize_from_config
    worker.execute_model = execute_model
    setattr(worker, _RPC, _call)


def _take_over(worker: Any) -> None:
    """Before the first forward pass: experts into slots. vLLM counts the slots as weights."""
    offload = _offload_of_worker(worker)
    if offload is None:
        return
    if "gate" in offload.config.prefetch:
        vllm_layer.find_gates(worker.get_model())
    if offload.device.type != "cuda":
        offload.take_over()
        return
    before = torch.cuda.memory_allocated(offload.device)
    offload.take_over()
    worker.model_runner.model_memory_usage += torch.cuda.memory_allocated(offload.device) - before


@lru_cache(maxsize=4096)
def external_id(internal: str) -> str:
    """The user's request id: vLLM appends a dash and eight random hex digits to it."""
    return re.sub(r"-[0-9a-f]{8}$", "", internal)


def _step_of(runner: Any, scheduler_output: Any, offload: ModelOffload) -> Step:
    number, offload.steps = offload.steps, offload.steps + 1
    scheduled = scheduler_output.num_scheduled_tokens

    # Read when the batch is in its final order: inside the forward pass, or after it was launched.
    def requests() -> list[tuple[str, int]]:
        batch = _batch_of(runner)
        if batch is None:
            return []
        return [(external_id(name), scheduled[name]) for name in batch.req_ids if name in scheduled]

    return Step(scheduler_output.total_num_scheduled_tokens, number, requests)


def _batch_of(runner: Any) -> Any:
    """The batch of the V1 runner, or that of a V2 runner whose forward pass was launched; else None."""
    batch = getattr(runner, "input_batch", None)
    return batch or getattr(getattr(runner, "execute_model_state", None), "input_batch", None)


def _offload_of_worker(worker: Any) -> ModelOffload | None:
    known = getattr(worker, _OFFLOAD, None)  # found once the model is loaded
    if known is not None:
        return known
    offload = vllm_layer.offload_of(worker.vllm_config)
    if offload is not None:
        setattr(worker, _OFFLOAD, offload)
    return offload


def _call(worker: Any, action: str) -> Any:
    """Runs in a worker: ``action`` is a method of ModelOffload, or "caches" (in-process engines only)."""
    offload = _offload_of_worker(worker)
    if offload is None:
        raise RuntimeError(_INACTIVE)
    if action == "caches":
        return offload.caches
    return getattr(offload, action)()


def _ask(llm: Any, action: str) -> list[Any]:
    try:
        return llm.collective_rpc(_RPC, args=(action,))
    except (AttributeError, NotImplementedError) as error:
        raise RuntimeError(_INACTIVE) from error


def stats(llm: Any) -> list[dict[str, Any]]:
    """Counters of each rank of a :class:`vllm.LLM`, with the sizes of its pools.

    Returns:
        One dict a rank: the counters of :class:`vllm_moe_offload.counters.CacheStats`, ``num_slots``,
        ``num_layers``, ``num_experts``, ``expert_nbytes``, ``policy``, ``prefetch``.

    Raises:
        RuntimeError: the plugin is not active in this engine.
    """
    return _ask(llm, "stats")


def request_eams(llm: Any) -> dict[str, Any]:
    """Expert activation matrices, int64 ``[layers, experts]``, of the last 1024 finished requests of rank 0.

    vLLM tells its workers of a finished request with the next step, so the last ones may be missing.
    """
    return _ask(llm, "request_eams")[0]


def collect_trace(llm: Any) -> RoutingTrace:
    """The routing that rank 0 recorded since the last call.

    Raises:
        RuntimeError: ``record_trace`` is not set, or the plugin is not active.
    """
    return _ask(llm, "collect_trace")[0]


def get_cache(llm: Any) -> ExpertCache | DirectCache:
    """The slots of an engine that runs in this process.

    Raises:
        RuntimeError: the engine runs in another process, the plugin is not active, all experts have a slot,
            or the model has layers of several shapes, hence several pools.
    """
    if hasattr(llm.llm_engine.engine_core, "resources") or not hasattr(
        llm.llm_engine.engine_core, "engine_core"
    ):
        raise RuntimeError(
            "moe_offload: the engine runs in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0 "
            "before vllm is imported to reach its cache"
        )
    (caches,) = _ask(llm, "caches")
    if not caches:
        raise RuntimeError("moe_offload: all experts have a slot, so there is no cache")
    if len(caches) != 1:
        raise RuntimeError(f"moe_offload: the model has {len(caches)} pools of slots, not one")
    return caches[0]

"""vLLM's workers and engine front ends: which tokens a step has, and calls from the user's process."""

from __future__ import annotations

import logging
import re
from typing import Any

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.runtime import ModelOffload, Step
from vllm_moe_offload.trace import RoutingTrace

logger = logging.getLogger("vllm.moe_offload")

_RPC = "moe_offload_call"
_INACTIVE = "moe_offload is not active in this engine; `vllm-moe-offload doctor` says why"


def install() -> None:
    """Wrap two methods of vLLM's worker and give it an RPC method. Idempotent.

    Runs in the worker's process when the first offloaded layer is built.

    Raises:
        ImportError: this vLLM's worker lacks one of the methods.
    """
    from vllm.v1.worker.gpu_worker import Worker  # the CPU worker extends it

    if hasattr(Worker, _RPC):
        return
    for name in ("execute_model", "initialize_from_config"):
        if not hasattr(Worker, name):
            raise ImportError(f"moe_offload: this vLLM has no vllm.v1.worker.gpu_worker.Worker.{name}")
    plain, initialize = Worker.execute_model, Worker.initialize_from_config

    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        # At the latest here, so that a pool too small fails the start and not the first request. Where vLLM
        # profiles memory before, that pass has taken over already and the pool was counted.
        offload = _offload_of_worker(self)
        if offload is not None:
            offload.take_over()
        return initialize(self, *args, **kwargs)

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        offload = _offload_of_worker(self)
        if offload is None:
            return plain(self, scheduler_output, *args, **kwargs)
        offload.forget(
            [external_id(name) for name in scheduler_output.finished_req_ids],
            [external_id(name) for name in getattr(scheduler_output, "preempted_req_ids", None) or ()],
        )
        if scheduler_output.total_num_scheduled_tokens == 0:
            return plain(self, scheduler_output, *args, **kwargs)
        offload.step = _step_of(self.model_runner, scheduler_output, offload)
        try:
            return plain(self, scheduler_output, *args, **kwargs)
        finally:
            offload.step = None

    Worker.initialize_from_config = initialize_from_config
    Worker.execute_model = execute_model
    setattr(Worker, _RPC, _call)


def external_id(internal: str) -> str:
    """The user's request id: vLLM appends a dash and eight random hex digits to it."""
    return re.sub(r"-[0-9a-f]{8}$", "", internal)


def _step_of(runner: Any, scheduler_output: Any, offload: ModelOffload) -> Step:
    number, offload.steps = offload.steps, offload.steps + 1
    batch = getattr(runner, "input_batch", None)
    requests = None
    if batch is not None and hasattr(batch, "req_ids"):
        scheduled = scheduler_output.num_scheduled_tokens

        # Read inside the forward pass: only then is the batch in its final order.
        def requests() -> list[tuple[str, int]]:
            return [(external_id(name), scheduled[name]) for name in batch.req_ids if name in scheduled]

    elif offload.config.policy == "eam" and number == 0:
        logger.info(
            "moe_offload: %s does not say which rows belong to which request; the eam policy evicts by age",
            type(runner).__name__,
        )
    return Step(scheduler_output.total_num_scheduled_tokens, number, requests)


def _offload_of_worker(worker: Any) -> ModelOffload | None:
    from vllm_moe_offload.vllm_layer import offload_of

    return offload_of(worker.vllm_config)


def _call(worker: Any, action: str) -> Any:
    """Runs in a worker: ``action`` is a method of ModelOffload, or "caches" (in-process engines only)."""
    offload = _offload_of_worker(worker)
    if offload is None:
        raise RuntimeError(_INACTIVE)
    if action == "caches":
        offload.take_over()
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


def get_cache(llm: Any) -> ExpertCache:
    """The slots of an engine that runs in this process.

    Raises:
        RuntimeError: the engine runs in another process, the plugin is not active, or the model has layers of
            several shapes, hence several pools.
    """
    if hasattr(llm.llm_engine.engine_core, "resources") or not hasattr(
        llm.llm_engine.engine_core, "engine_core"
    ):
        raise RuntimeError(
            "moe_offload: the engine runs in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0 "
            "before vllm is imported to reach its cache"
        )
    (caches,) = _ask(llm, "caches")
    if len(caches) != 1:
        raise RuntimeError(f"moe_offload: the model has {len(caches)} pools of slots, not one")
    return caches[0]

"""vLLM workers that record each forward pass: duration, rows, cached positions and experts touched.

vLLM stays unmodified: the engine is told the class by its ``worker_cls`` argument, and each MoE layer's
router by its own ``set_capture_fn``. The two classes, ``ProfilingCPUWorker`` and ``ProfilingGPUWorker``, are
made on first use, because importing the CPU worker fails on a CUDA build.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moecap_eval.engines.counters import PassCounters
from moecap_eval.engines.passes import Announced, PassShape, step_fields

CPU_WORKER = f"{__name__}.ProfilingCPUWorker"
GPU_WORKER = f"{__name__}.ProfilingGPUWorker"
_BASES = {
    "ProfilingCPUWorker": ("vllm.v1.worker.cpu_worker", "CPUWorker"),
    "ProfilingGPUWorker": ("vllm.v1.worker.gpu_worker", "Worker"),
}


def __getattr__(name: str) -> type:
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = _BASES[name]
    worker = getattr(importlib.import_module(module), base)
    made = type(name, (_ProfilingMixin, worker), {"__module__": __name__, "__doc__": _ProfilingMixin.__doc__})
    globals()[name] = made
    return made


def announced(scheduled: Any) -> Announced:
    """What vLLM's scheduler says about a pass; the lists are copied, as the engine may change its own."""
    cached = scheduled.scheduled_cached_reqs
    computed = list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed += [(new.req_id, new.num_computed_tokens) for new in scheduled.scheduled_new_reqs]
    drafts = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
    return Announced(
        scheduled.total_num_scheduled_tokens, dict(scheduled.num_scheduled_tokens), computed, drafts
    )


class _ProfilingMixin:
    """A vLLM worker that records its passes; read them by ``collective_rpc("moecap_drain")``."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)  # type: ignore[misc]
        self._moecap = _Recorder(self)

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._moecap.paused or scheduler_output.total_num_scheduled_tokens == 0:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        self._moecap.begin(announced(scheduler_output))
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        if output is not None:  # else vLLM samples in a second call, which belongs to this pass
            self._moecap.end(output)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self._moecap.end(output)
        return output

    def execute_dummy_batch(self) -> None:
        self._moecap.flush()  # it may replay graphs that record
        super().execute_dummy_batch()  # type: ignore[misc]

    def moecap_configure(
        self, moved_bytes: str | None, record_routing: bool, windows: Sequence[int] = ()
    ) -> list[int]:
        """Set what to record; returns the layer ids whose routers are observed."""
        return self._moecap.configure(moved_bytes, record_routing, windows)

    def moecap_pause(self, paused: bool) -> None:
        """Record no pass until called with False."""
        self._moecap.pause(paused)

    def moecap_drain(self) -> list[dict[str, Any]]:
        """Fields of the ``StepRecord`` of each pass since the last call, in order."""
        return self._moecap.drain()

    def moecap_drain_routing(self) -> dict[str, Any]:
        """Routing of the passes since the last call: ``counts`` are the bytes of int32 ``shape``.

        Bytes, because vLLM's messages between processes do not carry nested arrays.
        """
        counts, tokens = self._moecap.drain_routing()
        stacked = np.stack(counts) if counts else np.zeros((0, 0, 0), np.int32)
        return {"counts": stacked.tobytes(), "shape": list(stacked.shape), "tokens": tokens}

    def moecap_device_bytes(self) -> int | None:
        """Device memory this worker holds, None on a CPU."""
        device = self.device  # type: ignore[attr-defined]
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def moecap_kv_cache_bytes(self) -> int:
        """Bytes of this worker's key/value cache; layers may share one allocation."""
        caches = tree_leaves(self.model_runner.kv_caches)  # type: ignore[attr-defined]
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}
        return sum(storage.nbytes() for storage in storages.values())


@dataclass(slots=True)
class _Pass:
    """What the host knows of a pass, kept beside what the device counts of it."""

    announced: Announced
    moved: dict[str, int] = field(default_factory=dict)
    accepted: int | None = None


class _Recorder:
    """The passes of one worker: pairs what the scheduler announced with what the device counted."""

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self.paused = False
        self.windows: tuple[int, ...] = ()
        config = worker.vllm_config
        self._speculates = config.speculative_config is not None
        if config.parallel_config.use_ubatching:
            raise RuntimeError(
                "passes cut into micro-batches on two streams cannot be profiled: turn enable_dbo off"
            )
        self._layers = _moe_layers(self._runner.get_model())
        self._layer_ids = [layer.layer_id for layer in self._layers]
        self._top_k = self._layers[0].router.top_k if self._layers else 0
        self._counters = PassCounters(
            num_layers=len(self._layers),
            num_experts=_num_logical_experts(self._layers[0]) if self._layers else 0,
            top_k=self._top_k,
            input_ids=_input_ids(self._runner),
            device=worker.device,
        )
        self._bound: list[Callable[[Tensor], None]] = []
        self._bind()
        self._moved_bytes: Callable[[], dict[str, int]] | None = None
        self._record_routing = False
        self._current: _Pass | None = None
        self._steps: list[dict[str, Any]] = []
        self._routing: tuple[list[np.ndarray], list[int]] = ([], [])
        self._checked = False

    def _bind(self) -> None:
        for slot, layer in enumerate(self._layers):
            capture, previous = self._counters.capture(slot), layer.router.capture_fn
            bound = capture if previous is None else _both(capture, previous)
            layer.router.set_capture_fn(bound)
            self._bound.append(bound)

    def configure(self, moved_bytes: str | None, record_routing: bool, windows: Sequence[int]) -> list[int]:
        self.windows = tuple(windows)
        self._moved_bytes = _load_function(moved_bytes) if moved_bytes else None
        self._record_routing = record_routing
        return list(self._layer_ids)

    def begin(self, announced: Announced) -> None:
        if not self._checked:
            self._check_still_bound()
        self._current = _Pass(announced)
        self._counters.begin(announced.rows, self._current)

    def flush(self) -> None:
        """Count what was recorded so far: graphs that run outside of passes write where it lies."""
        self._counters.flush()

    def pause(self, paused: bool) -> None:
        self.flush()
        self.paused = paused

    def _check_still_bound(self) -> None:
        for layer, bound in zip(self._layers, self._bound, strict=True):
            if layer.router.capture_fn is not bound:
                raise RuntimeError(
                    f"the routing capture of layer {layer.layer_id} was replaced after the model was loaded; "
                    "turn enable_return_routed_experts off while profiling"
                )
        self._checked = True

    def end(self, output: Any) -> None:
        if self._current is None:
            return
        self._counters.end()
        if self._moved_bytes:
            self._current.moved = dict(self._moved_bytes())
        if self._speculates:
            self._current.accepted = _accepted_tokens(output)
        self._current = None

    def drain(self) -> list[dict[str, Any]]:
        self._collect()
        steps, self._steps = self._steps, []
        return steps

    def drain_routing(self) -> tuple[list[np.ndarray], list[int]]:
        self._collect()
        routing, self._routing = self._routing, ([], [])
        return routing

    def _collect(self) -> None:
        for counts in self._counters.drain():
            noted: _Pass = counts.note
            shape = PassShape.of(noted.announced, self.windows)
            fields = step_fields(shape, counts, self._layer_ids, self._top_k)
            self._steps.append({**fields, "moved_bytes": noted.moved, "accepted_tokens": noted.accepted})
            if self._record_routing:
                self._routing[0].append(counts.counts)
                self._routing[1].append(shape.tokens)


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def call(topk_ids: Tensor) -> None:
        second(topk_ids)
        first(topk_ids)

    return call


def _moe_layers(model: torch.nn.Module) -> list[Any]:
    """The MoE layers of ``model`` in order; RuntimeError where one hides its routing."""
    import vllm
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    layers = [module for module in model.modules() if isinstance(module, MoERunner)]
    hidden = [layer for layer in layers if layer.is_monolithic or not hasattr(layer.router, "set_capture_fn")]
    if hidden:
        kernel = type(hidden[0].routed_experts.quant_method).__name__
        raise RuntimeError(
            f"model has {len(layers)} MoE layers but {len(hidden)} routers could not be observed "
            f"(vLLM {vllm.__version__}, kernel {kernel}); set moe_backend: triton"
        )
    return sorted(layers, key=lambda layer: layer.layer_id)


def _num_logical_experts(layer: Any) -> int:
    config = layer.moe_config
    return int(getattr(config, "num_logical_experts", None) or config.num_experts)


def _input_ids(runner: Any) -> Tensor:
    """The buffer in which each pass finds its token ids, in both of vLLM's model runners."""
    buffer = getattr(getattr(runner, "input_ids", None), "gpu", None)
    if buffer is None:
        buffer = getattr(getattr(runner, "input_buffers", None), "input_ids", None)
    if buffer is None:
        raise RuntimeError(
            f"{type(runner).__name__} has neither input_ids.gpu nor input_buffers.input_ids: "
            "this vLLM keeps its token ids elsewhere"
        )
    return buffer


def _accepted_tokens(output: Any) -> int | None:
    """Sampled tokens that stand; None where vLLM brings them to the host later (asynchronous scheduling)."""
    ids = getattr(output, "sampled_token_ids", None)
    # A request whose prompt is not finished samples one token, which is dropped.
    return sum(max(1, len(of_request)) for of_request in ids) if ids else None


def _load_function(name: str) -> Callable[[], dict[str, int]]:
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"moved_bytes must be 'package.module:function', got {name!r}")
    function: Callable[[], dict[str, int]] = getattr(importlib.import_module(module), attribute)
    return function

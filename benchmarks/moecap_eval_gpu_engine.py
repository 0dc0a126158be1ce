"""The engine of moecap_eval_gpu.py: a worker that holds graphs with recording and without."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.moecap_eval_gpu_model import random_weights

MODULE = "benchmarks.moecap_eval_gpu_engine"
MAX_SEQS, MAX_ROWS, REPLAYS = 32, 512, 16


def __getattr__(name: str) -> type:
    """The worker class, made where vLLM is imported: in the engine's process."""
    if name != "SwitchingWorker":
        raise AttributeError(name)
    base = importlib.import_module("moecap_eval.engines.vllm_worker").ProfilingGPUWorker
    globals()[name] = type(name, (_Switching, base), {"__module__": __name__})
    return globals()[name]


class _Switching:
    """A recording worker that holds graphs captured with recording, without, and with an oracle."""

    def load_model(self, **options: Any) -> None:
        from vllm.model_executor.model_loader import dummy_loader

        dummy_loader.initialize_dummy_weights = random_weights
        self._oracle: list[dict[str, list[int]]] | None = None
        super().load_model(**options)  # type: ignore[misc]

    def bench_capture(self) -> dict[str, int]:
        """Capture the other sets; returns graphs by set."""
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        layers = [module for module in model.modules() if isinstance(module, MoERunner)]
        self._routers = [layer.router for layer in sorted(layers, key=lambda layer: layer.layer_id)]
        self._wrappers = list(CUDAGraphWrapper._all_instances)
        shape = (len(layers), MAX_ROWS, self._routers[0].top_k)
        self._copies = torch.full(shape, -1, dtype=torch.int32, device=self.device)  # type: ignore[attr-defined]
        recording = [router.capture_fn for router in self._routers]
        self._sets = {"on": ([wrapper.concrete_cudagraph_entries for wrapper in self._wrappers], recording)}
        self._sets["off"] = self._capture([None] * len(recording))
        both = [self._with_copy(slot, function) for slot, function in enumerate(recording)]
        self._sets["oracle"] = self._capture(both)
        self.bench_switch("on")
        return {name: sum(map(len, graphs)) for name, (graphs, _) in self._sets.items()}

    def _with_copy(self, slot: int, recording: Callable) -> Callable:
        def call(topk_ids: torch.Tensor) -> None:
            self._copies[slot, : len(topk_ids)].copy_(topk_ids)
            recording(topk_ids)

        return call

    def _capture(self, functions: list) -> tuple[list[dict], list]:
        from vllm.config import set_current_vllm_config

        graphs: list[dict] = [{} for _ in self._wrappers]
        self._use(graphs, functions)
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            self.model_runner.capture_model()  # type: ignore[attr-defined]
        return graphs, functions

    def _use(self, graphs: list[dict], functions: list) -> None:
        for wrapper, entries in zip(self._wrappers, graphs, strict=True):
            wrapper.concrete_cudagraph_entries = entries
        for router, function in zip(self._routers, functions, strict=True):
            router.set_capture_fn(function)

    def bench_switch(self, name: str) -> None:
        self._use(*self._sets[name])
        self._oracle = [] if name == "oracle" else None
        self.moecap_pause(name == "off")  # type: ignore[attr-defined]

    def bench_oracle(self) -> list[dict[str, list[int]]]:
        return self._oracle or []

    def bench_replay(self, rows: int, turns: int) -> dict[str, list[float]]:
        """Seconds of a whole-pass graph replayed alone, with the ring in it, and with all of recording."""
        from vllm.config.compilation import CUDAGraphMode

        full = next(
            index
            for index, wrapper in enumerate(self._wrappers)
            if wrapper.runtime_mode == CUDAGraphMode.FULL
        )
        graphs = {
            name: next(
                entry.cudagraph
                for descriptor, entry in self._sets[name][0][full].items()
                if descriptor.num_tokens == rows
            )
            for name in ("off", "on")
        }
        counters = self._moecap._counters  # type: ignore[attr-defined]

        def recorded() -> None:
            counters.begin(rows)
            graphs["on"].replay()
            counters.end()

        arms = {"plain": graphs["off"].replay, "ring": graphs["on"].replay, "recorded": recorded}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for turn in range(turns + 1):
            for arm in [*arms][turn % 3 :] + [*arms][: turn % 3]:
                start.record()
                for _ in range(REPLAYS):
                    arms[arm]()
                stop.record()
                stop.synchronize()
                if turn:  # the first turn warms up
                    seconds[arm].append(start.elapsed_time(stop) / 1e3 / REPLAYS)
        counters.drain()
        return seconds

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._oracle is not None:
            self._rows = scheduler_output.total_num_scheduled_tokens
            self._copies.fill_(-1)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._oracle is not None and self._rows:
            torch.cuda.synchronize()
            ids = self._copies.cpu().numpy()
            found = {"touched": [], "loaded": [], "pairs": []}
            for layer in ids:
                found["touched"].append(np.unique(layer[: self._rows]).size)
                found["loaded"].append(np.unique(layer[layer >= 0]).size)
                found["pairs"].append(int((layer[: self._rows] >= 0).sum()))
            self._oracle.append(found)
        return output


ENGINE = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": MAX_SEQS,
    "max_num_batched_tokens": MAX_ROWS,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2 << 30,
    "disable_log_stats": False,
    "moe_backend": "triton",
}


def prompt(number: int, length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [(7919 * number + 131 * index + 17) % 150_000 for index in range(length)]}


def generate(llm: Any, prompts: list[dict], tokens: list[int]) -> list[Any]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in tokens
    ]
    return llm.generate(prompts, params, use_tqdm=False)


def time_per_token(llm: Any, batch: int, tokens: int) -> tuple[float, list[tuple[int, ...]]]:
    """Mean seconds per output token after the first, and the tokens."""
    outputs = generate(llm, [prompt(number, 64) for number in range(batch)], [tokens] * batch)
    spans = [output.metrics.last_token_ts - output.metrics.first_token_ts for output in outputs]
    return statistics.mean(spans) / (tokens - 1), [tuple(output.outputs[0].token_ids) for output in outputs]

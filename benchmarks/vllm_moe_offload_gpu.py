"""Step times on a GPU: plain vLLM, expert offload at several residencies, vLLM's own two offloaders.

    python benchmarks/vllm_moe_offload_gpu.py [--out DIR] [--layers 12] [--budget 240] [--arms plain,ours_25]
    python benchmarks/vllm_moe_offload_gpu.py --resume --arms uva,prefetch      adds arms to a result in DIR

Qwen3-30B shape (hidden 2048, 128 experts of 768, top-8, bf16; 9.4 MB an expert) or, with --shape, a larger
one in fewer layers, dummy weights, vLLM's default torch.compile and CUDA graphs in every arm. The router's
choices come from a trace that all arms replay on the device, topic-local (requests keep to a topic's experts)
or uniform (no structure at all), so that the tokens generated must be the same in all arms. The look ahead of
`ours_25_eam_gate` names the coming choices, right as often as a gate's does on tiny_moe. One engine after
the other in one process; `plain_again` is the control. The most important arms come first, each writes the
result file after every kind of routing, and an arm starts only while the budget has room for it. With
`ours_25_eam` one decode step is profiled kernel by kernel (timeline.png).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = "replayed"

import numpy as np
import torch

from benchmarks.common import RESULTS, Headline, hardware, write_result

NAME = "vllm_moe_offload_gpu"


@dataclass(frozen=True)
class Shape:
    """Sizes of an expert layer; all layers are Qwen3's otherwise."""

    hidden: int
    intermediate: int
    experts: int = 128
    top_k: int = 8

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert in bf16."""
        return 3 * self.hidden * self.intermediate * 2


SHAPES = {
    "qwen3_30b": Shape(2048, 768),
    "qwen3_235b": Shape(4096, 1536),
    "deepseek_v3": Shape(7168, 2048, experts=256),
}
SHAPE = SHAPES["qwen3_30b"]
BATCHES = (1, 8, 32)
TRACE_STEPS, TOPICS = 256, 8
WARM_STEPS, STEPS, SECONDS, PROMPT = 40, 40, 1.0, 2000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try the script out
OFF_DEVICE = 0.75
GATE_RECALL = 0.67  # results/vllm_moe_offload_lookahead.json, one layer ahead


def routing(kind: str, layers: int, seed: int = 0) -> np.ndarray:
    """Choices int32 ``[steps, layers, rows, top_k]``; a row is a request with a topic of its own."""
    rng = np.random.default_rng(seed)
    rows = max(BATCHES)
    shape = (TRACE_STEPS, layers, rows)
    noise = 0.15 if kind == "topic_local" else 1.0
    taste = rng.dirichlet(np.full(SHAPE.experts, 0.08), size=(TOPICS, layers))
    share = (1 - noise) * taste[rng.integers(TOPICS, size=rows)].swapaxes(0, 1) + noise / SHAPE.experts
    # Gumbel top-k draws without replacement by the shares [layers, rows, experts].
    score = np.log(share) + rng.gumbel(size=(*shape, SHAPE.experts))
    return np.argpartition(-score, SHAPE.top_k, axis=-1)[..., : SHAPE.top_k].astype(np.int32)


class Replayed:
    """A routing strategy of vLLM that takes its choices from a table on the device; fit for CUDA graphs.

    Every forward pass calls it once a layer, in order, so that the layer is a constant of the recorded graph;
    the step is counted on the device.
    """

    def __init__(self, layers: int) -> None:
        self._layers, self._calls = layers, 0
        self.table = torch.zeros(
            TRACE_STEPS, layers, max(BATCHES), SHAPE.top_k, dtype=torch.int32, device=DEVICE
        )
        self.guesses = self.table.clone()
        self.step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self._guessed = 0

    def load(self, ids: np.ndarray) -> None:
        """Replay these choices from now on."""
        rng = np.random.default_rng(1)
        self.table.copy_(torch.from_numpy(ids))
        wrong = rng.random(ids.shape) > GATE_RECALL
        self.guesses.copy_(
            torch.from_numpy(np.where(wrong, rng.integers(SHAPE.experts, size=ids.shape), ids))
        )

    def foretell(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of a gate's look ahead, which knows nothing of a replay: right as often as on tiny_moe."""
        layer = self._guessed % (self._layers - 1) + 1
        self._guessed += 1
        rows = self.guesses.index_select(0, self.step % TRACE_STEPS)[0, layer]
        tokens = hidden.shape[0]
        return rows.repeat(-(-tokens // len(rows)), 1)[:tokens].long()

    def route_tokens(self, hidden_states, router_logits, top_k, indices_type=None):
        """Weights and ids ``[tokens, top_k]`` of the step and layer whose turn it is."""
        layer = self._calls % self._layers
        self._calls += 1
        if layer == 0:
            self.step.add_(1)
        rows = self.table.index_select(0, self.step % TRACE_STEPS)[0, layer]
        tokens = hidden_states.shape[0]
        ids = rows.repeat(-(-tokens // len(rows)), 1)[:tokens].to(indices_type or torch.int32)
        return torch.full(ids.shape, 1 / top_k, dtype=torch.float32, device=ids.device), ids


def fast_dummy_weights(module, model_config, *args, **kwargs) -> None:
    """Random weights at memory speed (vLLM's own take minutes on the host for gigabytes of experts)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(1 << 20).uniform_(-0.05, 0.05, generator=generator)
    for parameter in module.state_dict().values():
        if parameter.is_floating_point() and parameter.numel():
            flat = parameter.data.view(-1)
            # Odd offsets, so that layers and experts differ.
            tile = noise.roll(parameter.numel() % 9973).to(parameter.dtype).to(parameter.device)
            whole = flat.numel() // tile.numel() * tile.numel()
            flat[:whole].view(-1, tile.numel()).copy_(tile.expand(whole // tile.numel(), -1))
            flat[whole:].copy_(tile[: flat.numel() - whole])


def write_config(folder: Path, layers: int) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": SHAPE.hidden,
        "moe_intermediate_size": SHAPE.intermediate,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": SHAPE.experts,
        "num_experts_per_tok": SHAPE.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def engine_arguments(arm: str, layers: int) -> dict[str, Any]:
    """What an arm passes to ``vllm.LLM`` beside what all share."""
    if arm.startswith("ours_"):
        _, share, *how = arm.split("_")
        options: dict[str, Any] = {"cache_fraction": int(share) / 100}
        options["policy"] = how[0] if how else "lru"
        wanted = {"prefetch": "eam", "gate": "gate"}
        options["prefetch"] = next((wanted[name] for name in how if name in wanted), "none")
        return {"additional_config": {"moe_offload": options}}
    if arm == "uva":
        experts = {"w13_weight", "w2_weight"}
        size = OFF_DEVICE * layers * SHAPE.experts * SHAPE.expert_nbytes / 2**30
        return {"cpu_offload_gb": size, "cpu_offload_params": experts, "offload_backend": "uva"}
    if arm == "prefetch":
        return {
            "offload_backend": "prefetch",
            "offload_group_size": 4,
            "offload_num_in_group": 3,
            "offload_prefetch_step": 1,
            "offload_params": {"w13_weight", "w2_weight"},
        }
    return {}


def run_steps(
    llm, batch: int, steps: int, seconds: float, counters: Callable[[], dict[str, int]] = dict
) -> dict[str, Any]:
    """Milliseconds of each decode step, at most so many and so long, the ids, and what counters grew by."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, detokenize=False)
    for row in range(batch):
        prompt = {"prompt_token_ids": [(row * 977 + 31 * position) % 31000 for position in range(4)]}
        llm.llm_engine.add_request(f"{time.monotonic_ns()}-{row}", prompt, params)
    times: list[float] = []
    ids: dict[str, list[int]] = {}

    def step() -> None:
        start = time.perf_counter()
        for output in llm.llm_engine.step():
            ids[output.request_id] = list(output.outputs[0].token_ids)
        times.append((time.perf_counter() - start) * 1e3)

    for _ in range(3):  # prefill, and what scheduling ahead delays
        step()
    times.clear()
    before, began = counters(), time.perf_counter()
    while len(times) < steps and (len(times) < 6 or time.perf_counter() - began < seconds):
        step()
    after = counters()
    llm.llm_engine.abort_request(list(ids))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    rows = sorted(ids, key=lambda name: int(name.split("-")[1]))
    return {
        "step_ms": times,
        "ids": [ids[name][:6] for name in rows],
        **{name: after[name] - before[name] for name in after},
    }


def measure(llm, strategy: Replayed, batch: int, offloaded: bool) -> dict[str, Any]:
    """Step times of one batch size after a warm-up, with the plugin's counters of these steps."""
    run_steps(llm, batch, WARM_STEPS, SECONDS)
    strategy.step.zero_()
    result = run_steps(llm, batch, STEPS, SECONDS, lambda: counters_of(llm, offloaded))
    if offloaded:
        add_rates(result)
    return result


def add_rates(result: dict[str, Any]) -> None:
    """Hit rate, and what crossed the link a step: misses and what a prediction brought in."""
    moved = result["misses"] + result["prefetched"]
    result["hit_rate"] = result["hits"] / result["accesses"] if result["accesses"] else 1.0
    result["missing_bytes_per_step"] = moved * SHAPE.expert_nbytes / len(result["step_ms"])


def counters_of(llm, offloaded: bool) -> dict[str, int]:
    """What the plugin counted so far."""
    import vllm_moe_offload

    names = ("accesses", "hits", "misses", "copies", "in_place", "prefetched", "prefetch_used")
    report = vllm_moe_offload.stats(llm)[0] if offloaded else {}
    return {name: report[name] for name in names if name in report}


def prefill(llm, strategy: Replayed, offloaded: bool) -> dict[str, Any]:
    """Milliseconds of one step over a long prompt, which needs nearly all experts of every layer."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    times, ids = [], []
    before: dict[str, int] = {}
    for turn in range(4):
        if turn == 1:
            before = counters_of(llm, offloaded)
        strategy.step.zero_()
        tokens = [(turn + 31 * position) % 31000 for position in range(PROMPT)]
        start = time.perf_counter()
        llm.llm_engine.add_request(f"prefill-{turn}", {"prompt_token_ids": tokens}, params)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                ids.append(list(output.outputs[0].token_ids))
        times.append((time.perf_counter() - start) * 1e3)
    after = counters_of(llm, offloaded)
    result = {"step_ms": times[1:], "ids": ids, **{name: after[name] - before[name] for name in after}}
    if offloaded:
        add_rates(result)
    return result


def timeline(llm, strategy: Replayed, batch: int, folder: Path) -> dict[str, Any]:
    """Kernels and copies of one decode step, from the CUDA profiler."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    for row in range(batch):
        llm.llm_engine.add_request(f"profile-{row}", {"prompt_token_ids": [row + 1] * 4}, params)
    for _ in range(30):
        llm.llm_engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(4):
            llm.llm_engine.step()
        torch.cuda.synchronize()
    llm.llm_engine.abort_request([f"profile-{row}" for row in range(batch)])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    events = sorted(
        (event.time_range.start, event.time_range.elapsed_us(), event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Buffer" not in event.name
    )
    # A step is what lies between two first layers' planning kernels.
    layers = len(llm.llm_engine.vllm_config.compilation_config.static_all_moe_layers) or 1
    plans = [index for index, event in enumerate(events) if "_plan_kernel" in event[2]]
    if len(plans) < 3 * layers:
        return {"error": f"{len(plans)} planning kernels seen"}
    step = events[plans[layers] : plans[2 * layers]]
    rows = [[round(at - step[0][0], 2), round(length, 2), kind_of(name)] for at, length, name in step]
    total = {}
    for _, length, kind in rows:
        total[kind] = total.get(kind, 0.0) + length
    span = step[-1][0] + step[-1][1] - step[0][0]
    result = {"batch": batch, "span_us": span, "busy_us": total, "idle_us": span - sum(total.values())}
    result["events_us"] = rows
    draw(rows, folder / f"{NAME}_timeline.png")
    return result


def kind_of(kernel: str) -> str:
    """What a kernel's name says it does."""
    kinds = {
        "_plan_kernel": "look-up",
        "_pull_kernel": "pull experts",
        "fused_moe_kernel": "experts",
        "Memcpy HtoD": "copy to device",
        "Memcpy DtoH": "copy to host",
        "attention": "attention",
        "gemm": "dense",
        "cutlass": "dense",
    }
    return next((kind for part, kind in kinds.items() if part in kernel), "other")


def draw(rows: list[list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({kind for _, _, kind in rows})
    figure, axes = plt.subplots(figsize=(12, 0.5 * len(kinds) + 1.5))
    for height, kind in enumerate(kinds):
        spans = [(at / 1e3, length / 1e3) for at, length, name in rows if name == kind]
        axes.broken_barh(spans, (height - 0.4, 0.8), color=f"C{height}")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("ms")
    axes.set_title("One decode step on the device")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def run_arm(
    arm: str,
    layers: int,
    folder: Path,
    out: Path,
    *,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Start the arm's engine and measure; ``save`` gets the figures before anything that could lose them."""
    from vllm import LLM

    offloaded = arm.startswith("ours_")
    strategy = Replayed(layers)
    register(strategy)
    if "gate" in arm:
        from vllm_moe_offload import GatePredictor

        GatePredictor.predict = lambda _, hidden: strategy.foretell(hidden)  # type: ignore[method-assign]
    start = time.perf_counter()
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=PROMPT + 500,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=PROMPT + 48,
        gpu_memory_utilization=0.75,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
        enforce_eager=DEVICE == "cpu",
        distributed_executor_backend="uni",
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        seed=0,
        **engine_arguments(arm, layers),
    )
    report: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    say(f"{arm}: started in {report['start_seconds']:.0f} s")
    try:
        report["cudagraph_mode"] = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
        report["device_memory_bytes"] = torch.cuda.memory_allocated() if DEVICE == "cuda" else None
        for kind in ("topic_local", "uniform"):
            strategy.load(routing(kind, layers))
            for batch in BATCHES:
                found = measure(llm, strategy, batch, offloaded)
                report[f"{kind}_{batch}"] = found
                hits = f", hit rate {found['hit_rate']:.3f}" if offloaded else ""
                say(f"{arm} {kind} {batch}: {statistics.median(found['step_ms']):.2f} ms{hits}")
            save(report)
        report["prefill"] = prefill(llm, strategy, offloaded)
        say(f"{arm} prefill: {statistics.median(report['prefill']['step_ms']):.1f} ms")
        save(report)
        if arm == "ours_25_eam":
            # The same engine with another policy: an engine takes most of a minute to start.
            strategy.load(routing("topic_local", layers))
            use_policy(llm, "lru")
            for batch in BATCHES:
                found = report[f"topic_local_lru_{batch}"] = measure(llm, strategy, batch, offloaded)
                median = statistics.median(found["step_ms"])
                say(f"{arm}, then lru {batch}: {median:.2f} ms, hit rate {found['hit_rate']:.3f}")
            use_policy(llm, "eam")
            save(report)
        if arm == "ours_25_eam" and DEVICE == "cuda":
            report["timeline"] = timeline(llm, strategy, 8, out)
        report["complete"] = True
        save(report)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def use_policy(llm, name: str) -> None:
    """Give the slots of a running engine another eviction policy, which begins without a history."""
    from vllm_moe_offload import get_cache, make_policy

    cache = get_cache(llm)
    cache.policy = make_policy(name, cache.store.num_layers, cache.store.num_experts)


def register(strategy: Replayed) -> None:
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulator

    RoutingSimulator.register_strategy("replayed", strategy)


def link() -> dict[str, float]:
    """Bandwidth of the link in this run, bytes/s: copies by the copy engine, reads in place by a kernel."""
    from tiered_memory import measure_bandwidth

    if DEVICE == "cpu":
        return {"host_to_device": 1e10}
    names = ("host_to_device", "pageable_to_device")
    return {name: measure_bandwidth(name, nbytes=512 << 20, seconds=0.3).bytes_per_s for name in names}


def compare(arms: dict[str, dict], bandwidth: float) -> None:
    """Add to each arm how it compares with plain vLLM: same tokens, time over it, and over the roofline."""
    plain = arms.get("plain", {})
    for arm in arms.values():
        for key, found in arm.items():
            reference = plain.get(key.replace("_lru", ""))
            if not isinstance(found, dict) or "step_ms" not in found or not reference:
                continue
            time_ms, base = (statistics.median(side["step_ms"]) for side in (found, reference))
            found["ids_equal_plain"] = found["ids"] == reference["ids"]
            found["times_plain"] = time_ms / base
            if "missing_bytes_per_step" in found:
                bound = base + found["missing_bytes_per_step"] / bandwidth * 1e3
                found["times_resident_plus_copies"] = time_ms / bound


def headline(result: dict[str, Any]) -> list[Headline]:
    rows = [Headline(f"link: {name}", rate / 1e9, "GB/s") for name, rate in result.get("link", {}).items()]
    for arm, report in result.get("arms", {}).items():
        for key, found in report.items():
            if not isinstance(found, dict) or "step_ms" not in found:
                continue
            times = found["step_ms"]
            note = f"ids equal plain: {found.get('ids_equal_plain')}"
            for name, text in (
                ("hit_rate", "hit rate"),
                ("times_plain", "x plain"),
                ("times_resident_plus_copies", "x (plain + missing bytes / link)"),
            ):
                if name in found:
                    note += f", {text} {found[name]:.3f}"
            kind, _, batch = key.rpartition("_")
            label = arm
            if kind.endswith("_lru"):
                kind, label = kind.removesuffix("_lru"), f"{arm}, then lru"
            what = f"{kind.replace('_', '-')} routing, batch {batch}: {label}"
            if key == "prefill":
                what = f"prefill of {PROMPT} tokens, uniform routing: {arm}"
            rows.append(
                Headline(what, statistics.median(times), "ms/step", min(times), max(times), note=note)
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_30b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--budget", type=float, default=240, help="seconds")
    parser.add_argument(
        "--arms",
        default="plain,ours_25_eam,uva,ours_100,prefetch,ours_25_eam_gate,ours_25_eam_prefetch,ours_50_eam,"
        "plain_again",
    )
    parser.add_argument(
        "--resume", action="store_true", help="add to the result in --out; skip what is there"
    )
    arguments = parser.parse_args()
    global SHAPE, NAME
    if arguments.shape != "qwen3_30b":
        SHAPE, NAME = SHAPES[arguments.shape], f"{NAME}_{arguments.shape}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", flush=True)

    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_dummy_weights = fast_dummy_weights
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "layers": arguments.layers,
        "link": link(),
        "arms": earlier_arms(arguments) if arguments.resume else {},
    }
    say(f"link {result['link']['host_to_device'] / 1e9:.1f} GB/s")
    failed = 0
    longest = 0.0

    def save(arm: str, report: dict[str, Any]) -> None:
        result["arms"][arm] = report
        compare(result["arms"], result["link"]["host_to_device"])
        write_result(
            NAME,
            question="What does a decode step cost with offloaded experts, here and in vLLM itself?",
            headline=headline(result),
            samples={},
            folder=arguments.out,
            **result,
        )

    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), arguments.layers)
        for arm in arguments.arms.split(","):
            if result["arms"].get(arm, {}).get("complete"):
                say(f"{arm}: there already")
                continue
            start = time.perf_counter()
            if start - began + longest > arguments.budget:
                say(f"{arm}: no time left")
                continue
            try:
                run_arm(arm, arguments.layers, Path(name), arguments.out, say=say, save=partial(save, arm))
            except Exception:
                error = traceback.format_exc()[-3000:]
                save(arm, {**result["arms"].get(arm, {}), "error": error})
                say(f"{arm} FAILED: {error[-1500:]}")
                failed = 1
            longest = max(longest, time.perf_counter() - start)
    return failed


def earlier_arms(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arms of the result file that is to be continued; none if there is no file."""
    path = arguments.out / f"{NAME}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    here = hardware()
    for what, ours, theirs in (
        ("layers", arguments.layers, found["layers"]),
        ("GPUs", here["gpus"], found["hardware"]["gpus"]),
    ):
        if ours != theirs:
            raise ValueError(f"{path} was made with {what} {theirs}, not {ours}; give another --out")
    return found["arms"]


if __name__ == "__main__":
    sys.exit(main())

"""What does recording cost under CUDA graphs, are its counts right, and do bytes equal the DRAM counters?

    python benchmarks/moecap_eval_gpu.py [--out DIR] [--layers 24] [--budget 220] [--parts ...]

One GPU with vLLM and, for the part `dram`, Nsight Compute. Model: the shape of Qwen3-30B-A3B with fewer
layers and random weights, under vLLM's default graphs. Parts:
  overhead  time per output token with and without recording, in one engine that holds both sets of graphs
  replay    the same by the device's clock alone: whole-pass graphs replayed without vLLM's host work
  oracle    counts of every pass against each layer's own copy, read after a full synchronisation
  bench     throughput of a recorded run against the timing loop of `vllm bench throughput`, not recorded
  energy    NVML's energy counter against its power readings, summed
  dram      bytes of a decode pass by the accounting against DRAM reads, in a child under Nsight Compute
The result file is rewritten after each part.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # compiles itself on first use

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import binom

from benchmarks.common import RESULTS, Headline, write_result
from benchmarks.moecap_eval_gpu_engine import ENGINE, MAX_SEQS, MODULE, generate, prompt, time_per_token
from benchmarks.moecap_eval_gpu_model import write_model
from moecap_eval import ModelSpec, s_mbu, step_bytes
from moecap_eval.engines import vllm as engine
from moecap_eval.workload import StepRecord

NAME = "moecap_eval_gpu"
BATCHES = (1, 8, 32)
TOKENS = {1: 48, 8: 32, 32: 32}  # of a run: many short runs tell more than few long ones
# How the parts that are still to do share the seconds that are left.
WEIGHTS = {"overhead": 6.0, "replay": 1.0, "oracle": 1.0, "bench": 2.0, "energy": 1.0, "dram": 8.0}
SPIN = "spin_kernel"


class Bench:
    """The engine and what the parts found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.begin_s = time.perf_counter()
        self.found: dict[str, Any] = {"layers": arguments.layers}
        self.headline: list[Headline] = []
        self.samples: dict[str, list[float]] = {}
        self.todo: list[str] = arguments.parts.split(",")
        self._llm: Any = None

    def left(self) -> float:
        """Seconds of the budget."""
        return self.arguments.budget - (time.perf_counter() - self.begin_s)

    def share(self, part: str) -> float:
        """Seconds for a part that begins now."""
        return self.left() * WEIGHTS[part] / sum(WEIGHTS[name] for name in self.todo)

    def deadline(self, part: str) -> float:
        """When a part that begins now has to end."""
        return time.perf_counter() + self.share(part)

    @property
    def llm(self) -> Any:
        """The engine with three sets of graphs, started on first use."""
        if self._llm is None:
            from vllm import LLM

            begin = time.perf_counter()
            model = write_model(self.folder / "model", self.arguments.layers)
            self._llm = LLM(model=model, worker_cls=f"{MODULE}.SwitchingWorker", **ENGINE)
            self._llm.collective_rpc("moecap_configure", args=(None, False))
            generate(self._llm, [prompt(0, 8)], [4])
            started = time.perf_counter()
            self.found["graphs"] = self._llm.collective_rpc("bench_capture")[0]
            self.found["start_s"], self.found["capture_s"] = started - begin, time.perf_counter() - started
            engine.drain_steps(self._llm)
        return self._llm

    def use(self, name: str) -> None:
        """Let the engine replay the graphs of one set."""
        self.llm.collective_rpc("bench_switch", args=(name,))

    def save(self) -> None:
        """Rewrite the result file."""
        write_result(
            NAME,
            question="What does recording cost under CUDA graphs, and are its counts and bytes right?",
            headline=self.headline,
            samples=self.samples,
            folder=self.arguments.out,
            **self.found,
        )


class Ratio(NamedTuple):
    """A median of paired ratios and its 95 % interval."""

    value: float
    low: float
    high: float


def median_ratio(base: list[float], arm: list[float]) -> Ratio:
    """Of arm over base, from at least six pairs; by the sign test, which stalls hardly move."""
    ratios = np.sort(np.divide(arm, base))
    rank = int(binom.ppf(0.025, len(ratios), 0.5))  # the bounds' place, counted from either end
    return Ratio(float(np.median(ratios)), float(ratios[rank - 1]), float(ratios[-rank]))


def overhead(bench: Bench) -> None:
    """Three arms in one engine, in turning order: not recorded, recorded, not recorded again."""
    from moecap_eval.hardware import measure_peaks

    llm = bench.llm
    deadline = bench.deadline("overhead")
    peaks = measure_peaks("cuda", 2.0)
    bench.found["measured_peaks"] = dataclasses.asdict(peaks)
    spec = engine.model_spec(llm)
    for position, batch in enumerate(BATCHES):
        share = (deadline - time.perf_counter()) / (len(BATCHES) - position)
        until = time.perf_counter() + share
        tokens = TOKENS[batch]
        arms = {"off": "off", "on": "on", "off again": "off"}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        steps: list[StepRecord] = []
        answers = set()
        for name in ("off", "on"):
            bench.use(name)
            time_per_token(llm, batch, tokens)
        engine.drain_steps(llm)
        while time.perf_counter() < until or len(seconds["off"]) < 6:
            turn = len(seconds["off"]) % len(arms)
            for arm in [*arms][turn:] + [*arms][:turn]:
                bench.use(arms[arm])
                value, ids = time_per_token(llm, batch, tokens)
                seconds[arm].append(value)
                answers.add(tuple(ids))
            steps += engine.drain_steps(llm)
        _overhead_rows(bench, batch, seconds, len(answers))
        _utilisation_rows(bench, spec, batch, steps, peaks.read_bytes_per_s)
        bench.save()


def _overhead_rows(bench: Bench, batch: int, seconds: dict[str, list[float]], answers: int) -> None:
    bench.samples |= {f"batch {batch}, seconds per token, {arm}": values for arm, values in seconds.items()}
    cost = median_ratio(seconds["off"], seconds["on"])
    control = median_ratio(seconds["off"], seconds["off again"])
    median = 1e3 * statistics.median(seconds["off"])
    bench.headline += [
        Headline(
            f"time per token, recorded over not, batch {batch}",
            cost.value,
            "x",
            cost.low,
            cost.high,
            target="<= 1.005, bound <= 1.01",
            note=f"{median:.3f} ms a token, {len(seconds['off'])} pairs, {answers} distinct answers",
        ),
        Headline(
            f"the same, not recorded against itself, batch {batch}",
            control.value,
            "x",
            control.low,
            control.high,
        ),
    ]
    print(bench.headline[-2], bench.headline[-1], sep="\n", flush=True)


def replay(bench: Bench) -> None:
    """The pass that a batch has just run, replayed without vLLM's host work between."""
    for batch in BATCHES:
        bench.use("on")
        time_per_token(bench.llm, batch, 16)
        engine.drain_steps(bench.llm)
        _replay_rows(bench, batch, bench.llm.collective_rpc("bench_replay", args=(batch, 25))[0])


def _replay_rows(bench: Bench, batch: int, seconds: dict[str, list[float]]) -> None:
    """The device's own time, whatever the host does meanwhile."""
    bench.samples |= {f"batch {batch}, replayed graph, {arm}": values for arm, values in seconds.items()}
    for arm, what in (("ring", "with the ring in its graph"), ("recorded", "recorded")):
        cost = median_ratio(seconds["plain"], seconds[arm])
        extra = statistics.median(seconds[arm]) - statistics.median(seconds["plain"])
        bench.headline.append(
            Headline(
                f"device time of a pass {what}, over not, batch {batch}",
                cost.value,
                "x",
                cost.low,
                cost.high,
                target="<= 1.005" if arm == "recorded" else "",
                note=f"{1e6 * extra:.1f} us more than {1e3 * statistics.median(seconds['plain']):.3f} ms",
            )
        )
        print(bench.headline[-1], flush=True)


def _utilisation_rows(
    bench: Bench, spec: ModelSpec, batch: int, steps: list[StepRecord], peak: float
) -> None:
    holes = [step.invalid for step in steps if step.invalid]
    decode = [step for step in steps if step.tokens == step.requests == batch and not step.invalid]
    bench.found[f"batch_{batch}"] = {
        "passes": len(steps),
        "invalid_passes": len(holes),
        "invalid": holes[:2],
        "decode_pass_s_median": statistics.median(step.duration_s for step in decode) if decode else None,
        "experts_touched_mean": statistics.mean(
            statistics.mean(step.experts_touched.values()) for step in decode
        )
        if decode
        else None,
    }
    note = f"{len(decode)} passes, measured peak {peak / 1e12:.2f} TB/s, {len(holes)} invalid passes"
    value = s_mbu(spec, decode, peak) if decode else None
    bench.headline.append(Headline(f"S-MBU of decode passes, batch {batch}", value, "of peak", note=note))


def oracle(bench: Bench) -> None:
    """Prompts and answers of many lengths, so that passes are padded, mixed, chunked, eager and replayed."""
    llm = bench.llm
    bench.use("oracle")
    engine.drain_steps(llm)
    lengths = [3, 40, 200, 700, 5, 61, 130, 9, 33, 77, 350, 12, 1, 90, 15, 28]
    tokens = [20 + 7 * (number % 9) for number in range(len(lengths))]
    prompts = [prompt(number, length) for number, length in enumerate(lengths)]
    with_oracle = [tuple(output.outputs[0].token_ids) for output in generate(llm, prompts, tokens)]
    expected, steps = llm.collective_rpc("bench_oracle")[0], engine.drain_steps(llm)
    equal = padded = 0
    for want, step in zip(expected, steps, strict=True):
        loaded = step.experts_loaded or step.experts_touched
        same = want["touched"] == list(step.experts_touched.values())
        same &= want["loaded"] == list(loaded.values())
        equal += same and set(want["pairs"]) == {8 * step.tokens} and step.invalid is None
        padded += step.experts_loaded is not None
    bench.use("off")
    plain = [tuple(output.outputs[0].token_ids) for output in generate(llm, prompts, tokens)]
    rows = sorted({step.tokens for step in steps})
    bench.found["oracle"] = {"rows_of_passes": rows, "passes_with_experts_of_padding": padded}
    bench.headline += [
        Headline(
            "passes whose expert counts equal the oracle's",
            equal,
            f"of {len(steps)}",
            target=str(len(steps)),
            note=f"{rows[0]} to {rows[-1]} rows, {padded} passes where padding loads more experts",
        ),
        Headline(
            "answers equal with and without recording",
            sum(map(tuple.__eq__, with_oracle, plain)),
            f"of {len(plain)}",
            target=str(len(plain)),
        ),
    ]


def vllm_bench(bench: Bench) -> None:
    """The same requests, with the sampling of `vllm bench`, in turn."""
    from vllm import SamplingParams
    from vllm.benchmarks import throughput
    from vllm.benchmarks.datasets import SampleRequest

    llm, length, tokens = bench.llm, 64, 24
    prompts = [prompt(number, length) for number in range(MAX_SEQS)]
    requests = [SampleRequest(text, length, tokens) for text in prompts]  # type: ignore[arg-type]
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def peer() -> float:
        bench.use("off")
        return throughput._run_vllm_requests(llm, requests, 1, True, False, False, False)[0]

    def recorded() -> float:
        bench.use("on")
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    arms = {"vllm bench": peer, "recorded": recorded}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    until = bench.deadline("bench")
    turn = 0
    while time.perf_counter() < until or len(seconds["recorded"]) < 6:
        for arm in list(arms) if turn % 2 else list(arms)[::-1]:
            value = arms[arm]()
            if turn:  # the first turn warms up
                seconds[arm].append(value)
        turn += 1
    engine.drain_steps(llm)
    bench.samples |= {f"throughput, seconds, {arm}": values for arm, values in seconds.items()}
    ratio = median_ratio(seconds["recorded"], seconds["vllm bench"])
    rate = len(prompts) * tokens / statistics.median(seconds["vllm bench"])
    bench.headline.append(
        Headline(
            "throughput, recorded over vllm bench",
            ratio.value,
            "x",
            ratio.low,
            ratio.high,
            target="interval within [0.98, 1.02]",
            note=f"{rate:.0f} tokens/s, {len(seconds['recorded'])} pairs",
        )
    )


def energy(bench: Bench) -> None:
    """Energy of decoding by the counter, and by the sum of power readings over the same time."""
    import pynvml

    from moecap_eval.hardware.energy import NvmlMeter

    llm, meter = bench.llm, NvmlMeter()
    first = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    device = pynvml.nvmlDeviceGetHandleByIndex(int(first))
    bench.use("off")
    found = []
    for _ in range(3):
        readings: list[tuple[float, float]] = []
        stop = threading.Event()

        def poll(readings: list = readings, stop: threading.Event = stop) -> None:
            while not stop.wait(0.01):
                readings.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(device) / 1e3))

        thread = threading.Thread(target=poll)
        thread.start()
        meter.begin()
        outputs = generate(llm, [prompt(number, 64) for number in range(32)], [400] * 32)
        joules = meter.end().joules
        stop.set()
        thread.join()
        times, watts = map(np.array, zip(*readings, strict=True))
        integral = float(trapezoid(watts, times))
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        found.append({"joules": joules, "power_integral_j": integral, "tokens": count})
    ratios = [entry["joules"] / entry["power_integral_j"] for entry in found]
    per_token = [entry["joules"] / entry["tokens"] for entry in found]
    bench.found["energy"] = found
    bench.headline += [
        Headline(
            "energy per token, batch 32 (nvml)",
            statistics.median(per_token),
            "J",
            min(per_token),
            max(per_token),
        ),
        Headline(
            "energy counter over integral of power readings",
            statistics.median(ratios),
            "x",
            min(ratios),
            max(ratios),
        ),
    ]


def dram(bench: Bench) -> None:
    """A child runs one decode pass per batch size under Nsight Compute, one counter pass a kernel."""
    if bench._llm is not None:
        engine.close(bench._llm)
        bench._llm = None
    ncu = shutil.which("ncu") or next(iter(sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"))), None)
    if ncu is None:
        raise RuntimeError("Nsight Compute (ncu) is not on this machine")
    log, steps_file = bench.folder / "ncu.csv", bench.folder / "steps.json"
    options = "--target-processes all --profile-from-start off --cache-control none --clock-control none"
    output = "--csv --page raw --print-units base --metrics dram__bytes_read.sum,dram__bytes_write.sum"
    command = [ncu, *options.split(), *output.split(), "--log-file", str(log)]
    child = [
        sys.executable,
        __file__,
        "--child",
        str(steps_file),
        "--layers",
        str(bench.arguments.ncu_layers),
    ]
    limit = max(30.0, bench.share("dram"))
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, *child], capture_output=True, text=True, timeout=limit, check=False, cwd=Path.cwd()
    )
    if done.returncode:
        tail = (log.read_text()[-600:] if log.exists() else "") + done.stderr[-1200:] + done.stdout[-400:]
        raise RuntimeError(f"ncu ended with {done.returncode}: {tail}")
    text = log.read_text()
    bench.found["ncu_log"] = text[:1200]  # kept where it cannot be read
    segments = read_segments(text)
    found = []
    for entry, kernels in zip(json.loads(steps_file.read_text()), segments, strict=True):
        read, written = sum(row[1] for row in kernels), sum(row[2] for row in kernels)
        experts = sum(row[1] for row in kernels if "fused_moe" in row[0])
        names: dict[str, float] = {}
        for name, read_bytes, _ in kernels:
            names[name[:60]] = names.get(name[:60], 0.0) + read_bytes
        largest = dict(sorted(names.items(), key=lambda item: -item[1])[:12])
        found.append({**entry, "dram_read": read, "dram_written": written, "by_kernel": largest})
        for what, predicted, measured in (
            ("bytes of a decode pass", entry["bytes"]["total"], read),
            ("of them expert weights", entry["bytes"]["routed_experts"], experts),
            ("by eq. 4 of the paper", entry["bytes_paper"], read),
        ):
            bench.headline.append(
                Headline(
                    f"{what} over DRAM reads, batch {entry['batch']}",
                    predicted / measured if measured else None,
                    "x",
                    target="1" if what.startswith("bytes") else "",
                    note=f"{predicted / 1e6:.1f} MB against {measured / 1e6:.1f} MB",
                )
            )
    bench.found["dram"] = {"layers": bench.arguments.ncu_layers, "seconds": time.perf_counter() - begin}
    bench.found["dram"]["passes"] = found
    del bench.found["ncu_log"]


def read_segments(text: str) -> list[list[tuple[str, float, float]]]:
    """(kernel, bytes read, bytes written) of each profiled pass; a spin kernel starts a pass."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = csv.DictReader(lines)
    segments: list[list[tuple[str, float, float]]] = []
    for row in rows:
        if not row["ID"]:  # the row of units
            continue
        name = row["Kernel Name"]
        if SPIN in name:
            segments.append([])
            continue
        read, written = (float(row[f"dram__bytes_{what}.sum"].replace(",", "")) for what in ("read", "write"))
        segments[-1].append((name, read, written))
    return segments


def child(steps_file: Path, layers: int) -> None:
    """Decode passes between cudaProfilerStart and Stop, eagerly, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", layers)
        arguments = {**ENGINE, "enforce_eager": True, "async_scheduling": False}
        llm = LLM(model=model, worker_cls=f"{MODULE}.SwitchingWorker", **arguments)
    llm.collective_rpc("moecap_configure", args=(None, False))
    spec = engine.model_spec(llm)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
    entries = []
    for batch in BATCHES:
        for number in range(batch):
            llm.llm_engine.add_request(f"{batch}-{number}", prompt(number, 128), params)
        tokens = 0
        while tokens != batch:  # until every request decodes
            llm.llm_engine.step()
            last = engine.drain_steps(llm)
            tokens = last[-1].tokens if last and last[-1].requests == batch else 0
        for _ in range(3):
            llm.llm_engine.step()
        engine.drain_steps(llm)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1000)
        llm.llm_engine.step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        (step,) = engine.drain_steps(llm)
        exact = step_bytes(spec, step)
        entries.append(
            {
                "batch": batch,
                "invalid": step.invalid,
                "experts_touched": list(step.experts_touched.values()),
                "bytes": {**exact, "total": exact.total},
                "bytes_paper": step_bytes(spec, step, convention="paper").total,
            }
        )
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    steps_file.write_text(json.dumps(entries))


PARTS = {
    "overhead": overhead,
    "replay": replay,
    "oracle": oracle,
    "bench": vllm_bench,
    "energy": energy,
    "dram": dram,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ncu-layers", type=int, default=8)
    parser.add_argument("--budget", type=float, default=220.0, help="seconds in all")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.layers)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for name in list(bench.todo):
            begin = time.perf_counter()
            try:
                PARTS[name](bench)
            except Exception as error:
                failed = 1
                bench.found[f"{name}_failed"] = f"{type(error).__name__}: {error}"[-1500:]
                traceback.print_exc()
            bench.todo.remove(name)
            bench.found[f"{name}_seconds"] = time.perf_counter() - begin
            bench.save()
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
        if bench._llm is not None:
            engine.close(bench._llm)
    return failed


if __name__ == "__main__":
    sys.exit(main())

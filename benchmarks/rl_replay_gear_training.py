"""Does a Decision Transformer wait for its data, and is its loss curve that of a naive loop?

    python benchmarks/rl_replay_gear_training.py [--steps 200] [--budget 60] [--out DIR]

(not installed: PYTHONPATH=plugins:. before it). Needs torch and transformers; runs on the GPU where there is
one. A synthetic chain of 17 features and 6 actions fills a table; the Hugging Face model trains on windows of
20 from a TrajectoryLoader and, from the same initial weights, on the same windows cut by a loop over a Python
list. Times every step: waiting for the batch (until it is on the device) and computing. Reading the loss
after every step leaves the GPU without queued work, so that all host time of a batch counts as waiting; a
second measure reads the loss every ten steps and compares with steps on one batch that stays on the device.
Where DeepSpeed can be imported the same model also trains under ``deepspeed.initialize``. Writes
rl_replay_gear_training_gpu.json (or _cpu.json) after every stage.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, Headline, interleaved, write_result
from rl_replay_gear import (
    ColumnSpec,
    ReturnsToGo,
    TableSpec,
    TrajectoryLoader,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.integrations.transformers import decision_transformer_inputs

STATE, ACTION, CONTEXT, MAX_STEPS, SCALE = 17, 6, 20, 1000, 100.0
BLOCK = 10  # steps between two readings of the loss
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def filled(trajectories: int) -> TrajectoryTable:
    """Trajectories of a linear system whose actions are a fixed function of the state."""
    columns = (
        ColumnSpec("observations", (STATE,)),
        ColumnSpec("actions", (ACTION,), fill=-10.0),
        ColumnSpec("rewards"),
    )
    spec = TableSpec(columns, trajectories * MAX_STEPS, trajectories, (ReturnsToGo(),))
    table = TrajectoryTable(spec)
    random = np.random.default_rng(0)
    gain = random.normal(size=(STATE, ACTION)) / STATE**0.5
    for _ in range(trajectories):
        n = int(random.integers(MAX_STEPS // 2, MAX_STEPS + 1))
        states = random.normal(size=(n, STATE)).cumsum(0) / np.sqrt(np.arange(1, n + 1))[:, None]
        columns_of = {"observations": states, "actions": np.tanh(states @ gain), "rewards": states[:, 0]}
        table.write({name: torch.from_numpy(value).float() for name, value in columns_of.items()})
    return table


def model_of(hidden: int, layers: int) -> Any:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=STATE, act_dim=ACTION, hidden_size=hidden, n_layer=layers, n_head=4, max_ep_len=MAX_STEPS,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return DecisionTransformerModel(config).to(DEVICE)


def loss_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of the actions that are not padding."""
    # Indexing with the mask would make the host wait for the GPU to count them.
    real = inputs["attention_mask"][..., None]
    squares = (model(**inputs).action_preds - inputs["actions"]).square() * real
    return squares.sum() / (real.sum() * ACTION)


def train(
    step: Callable[[Mapping[str, Tensor]], Tensor], batches: Callable[[], Mapping[str, Tensor]], steps: int
) -> dict[str, list[float]]:
    """Loss and seconds of each step: until ``batches`` returns, until the batch is on the device, in all."""
    found: dict[str, list[float]] = {"loss": [], "host": [], "waiting": [], "step": []}
    for _ in range(steps):
        begin = time.perf_counter()
        inputs = batches()
        returned = time.perf_counter()
        if DEVICE.type == "cuda":  # batches collected ahead, on another stream, are not waited for
            torch.cuda.current_stream().synchronize()
        waited = time.perf_counter()
        loss = step(inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found["loss"].append(loss.item())
        found["host"].append(returned - begin)
        found["waiting"].append(waited - begin)
        found["step"].append(time.perf_counter() - begin)
    return found


def plain_step(model: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(inputs: Mapping[str, Tensor]) -> Tensor:
        loss = loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def naive(table: TrajectoryTable, loader: TrajectoryLoader) -> Callable[[], Mapping[str, Tensor]]:
    """The windows that ``loader`` selects, cut by a loop over a Python dict on the CPU."""
    episodes = {handle: table.read(handle) for handle in table.handles().tolist()}

    def batch() -> Mapping[str, Tensor]:
        chosen = next(loader)
        size = len(chosen.handles)
        out = {
            "states": torch.zeros(size, CONTEXT, STATE),
            "actions": torch.full((size, CONTEXT, ACTION), -10.0),
            "rewards": torch.zeros(size, CONTEXT, 1),
            "returns_to_go": torch.zeros(size, CONTEXT, 1),
            "timesteps": torch.zeros(size, CONTEXT, dtype=torch.int64),
            "attention_mask": torch.zeros(size, CONTEXT, dtype=torch.int64),
        }
        for i, (handle, first) in enumerate(
            zip(chosen.handles.tolist(), chosen.anchors.tolist(), strict=True)
        ):
            episode = episodes[handle]
            stop = min(first + CONTEXT, len(episode["rewards"]))
            at = slice(CONTEXT - (stop - first), CONTEXT)
            out["states"][i, at] = episode["observations"][first:stop]
            out["actions"][i, at] = episode["actions"][first:stop]
            out["rewards"][i, at, 0] = episode["rewards"][first:stop]
            out["returns_to_go"][i, at, 0] = episode["returns_to_go"][first:stop] / SCALE
            out["timesteps"][i, at] = torch.arange(first, stop)
            out["attention_mask"][i, at] = 1
        return {name: value.to(DEVICE) for name, value in out.items()}

    return batch


def deepspeed_step(model: Any, batch_size: int) -> Callable[[Mapping[str, Tensor]], Tensor] | str:
    """A step of a DeepSpeed engine, or why there is none."""
    os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "29577")):  # fmt: skip
        os.environ.setdefault(name, value)
    # DeepSpeed clips gradients to norm 1 unless it is told not to.
    config = {"train_micro_batch_size_per_gpu": batch_size, "gradient_clipping": 0.0}
    try:
        import deepspeed

        if DEVICE.type == "cpu":  # a C++ build of minutes, of which one process makes no use
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:600]

    def step(inputs: Mapping[str, Tensor]) -> Tensor:
        loss = loss_of(engine, inputs)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200 if DEVICE.type == "cuda" else 40)
    parser.add_argument("--batch-size", type=int, default=256 if DEVICE.type == "cuda" else 64)
    parser.add_argument("--hidden", type=int, default=256 if DEVICE.type == "cuda" else 128)
    parser.add_argument("--layers", type=int, default=6 if DEVICE.type == "cuda" else 3)
    parser.add_argument("--trajectories", type=int, default=300)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; no stage starts later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    table = filled(options.trajectories)
    samples: dict[str, list[float]] = {}
    headline: list[Headline] = []
    notes: dict[str, Any] = {}
    in_next: list[float] = []  # seconds of each next() since they were last recorded

    def loader(**more: Any) -> TrajectoryLoader:
        return TrajectoryLoader(
            table, Uniform(over="steps"), Window(CONTEXT, 0, "head"), options.batch_size, seed=3, **more
        )

    def replayed(**more: Any) -> Callable[[], Mapping[str, Tensor]]:
        batches = loader(device=DEVICE, **more)

        def batch() -> Mapping[str, Tensor]:
            begin = time.perf_counter()
            chosen = next(batches)
            in_next.append(time.perf_counter() - begin)
            return decision_transformer_inputs(chosen, return_scale=SCALE)

        return batch

    def share(found: Mapping[str, list[float]]) -> list[float]:
        return sorted(w / s for w, s in zip(found["waiting"][3:], found["step"][3:], strict=True))

    def record(name: str, found: dict[str, list[float]], target: str = "") -> None:
        nonlocal samples
        samples |= {f"{name}: {key}": values for key, values in found.items()}
        shares = share(found)
        note = f"{1e3 * median(found['waiting'][3:]):.2f} of {1e3 * median(found['step'][3:]):.2f} ms a step"
        note += f", {1e3 * median(found['host'][3:]):.2f} ms of host time"
        if in_next:
            samples[f"{name}: next()"] = in_next[:]
            note += f" with {1e3 * median(in_next[3:]):.2f} ms of next()"
            in_next.clear()
        note += "; loss read after every step"
        low, high = (float(np.quantile(shares, q)) for q in (0.05, 0.95))
        headline.append(Headline(f"{name}: share of a step waiting for data", median(shares), "", low, high,
                                 target, note))  # fmt: skip
        print(headline[-1], flush=True)

    def stage_plain() -> None:
        for prefetch in (2, 0):
            found = train(
                plain_step(model_of(options.hidden, options.layers)), replayed(prefetch=prefetch),
                options.steps,
            )  # fmt: skip
            record(f"replay, prefetch {prefetch}", found, "<= 0.03" if prefetch == 2 else "")

    def stage_queued() -> None:
        step = plain_step(model_of(options.hidden, options.layers))
        sources = {f"prefetch {n}": replayed(prefetch=n) for n in (2, 0)}
        resident = sources["prefetch 2"]()
        sources["no loading"] = lambda: resident

        def block(batches: Callable[[], Mapping[str, Tensor]]) -> Callable[[], Any]:
            def run() -> float:
                return [step(batches()) for _ in range(BLOCK)][-1].item()

            return run

        arms = {name: block(batches) for name, batches in sources.items()}
        seconds = interleaved(arms, repeats=max(3, options.steps // BLOCK), warm_up=1)
        for name in ("prefetch 2", "prefetch 0"):
            pairs = zip(seconds[name], seconds["no loading"], strict=True)
            shares = sorted(1 - alone / loaded for loaded, alone in pairs)
            low, high = (float(np.quantile(shares, q)) for q in (0.05, 0.95))
            times = [1e3 * median(seconds[arm]) / BLOCK for arm in (name, "no loading")]
            headline.append(
                Headline(f"replay, {name}: share of a step that loading adds", median(shares), "", low, high,
                         "<= 0.03" if name == "prefetch 2" else "",
                         f"{times[0]:.2f} against {times[1]:.2f} ms a step; loss read every {BLOCK} steps")
            )  # fmt: skip
            print(headline[-1], flush=True)
        in_next.clear()
        samples.update({f"blocks of {BLOCK} steps: {name}": values for name, values in seconds.items()})

    def stage_naive() -> None:
        few = min(options.steps, 40)
        found = train(plain_step(model_of(options.hidden, options.layers)), naive(table, loader()), few)
        record("naive loop", found)
        other = samples["replay, prefetch 2: loss"][:few]
        difference = max(abs(a - b) / abs(b) for a, b in zip(other, found["loss"], strict=True))
        headline.append(
            Headline("loss: largest relative difference from the naive loop", difference, "",
                     target="0 on a CPU", note=f"{few} steps")
        )  # fmt: skip
        print(headline[-1], flush=True)

    def stage_deepspeed() -> None:
        model = model_of(options.hidden, options.layers)
        step = deepspeed_step(model, options.batch_size)
        if isinstance(step, str):
            notes["deepspeed"] = f"not run: {step}"
            print(notes["deepspeed"], flush=True)
            return
        few = min(options.steps, 40)
        try:
            found = train(step, replayed(), few)
        except Exception as error:
            notes["deepspeed"] = f"failed: {type(error).__name__}: {error}"[:600]
            print(notes["deepspeed"], flush=True)
            return
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        record("DeepSpeed, prefetch 2", found, "<= 0.03")
        other = samples["replay, prefetch 2: loss"][:few]
        difference = max(abs(a - b) / abs(b) for a, b in zip(other, found["loss"], strict=True))
        headline.append(
            Headline("loss: largest relative difference of DeepSpeed from plain torch", difference, "",
                     target="0 on a CPU", note=f"{few} steps, gradient_clipping 0")
        )  # fmt: skip
        print(headline[-1], flush=True)

    for stage in (stage_plain, stage_queued, stage_naive, stage_deepspeed):
        if time.monotonic() > end:
            notes["cut"] = f"{stage.__name__} and what follows: out of budget"
            break
        stage()
        write_result(
            f"rl_replay_gear_training_{'gpu' if DEVICE.type == 'cuda' else 'cpu'}",
            question="Does a Decision Transformer wait for its data, and is its loss curve a naive loop's?",
            headline=headline,
            samples=samples,
            folder=options.out,
            device=DEVICE.type,
            notes=notes,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Hit rate of every eviction policy against residency, with Belady's bound, by replay; what deciding costs.

    python benchmarks/vllm_moe_offload_policy.py --jobs 8
    python benchmarks/vllm_moe_offload_policy.py --quick            a minute on two cores
    python benchmarks/vllm_moe_offload_policy.py --only cost        on quiet cores

Traces, each with several seeds, all policies on the same ones:
  tiny_moe      routing of the trained model of examples/tiny_moe on its six held-out tasks, requests in turn
  tiny_moe x8   the same, eight requests at a time in one batch
  topic_local   8 latent topics, Dirichlet 0.08, 15 % noise: the paper's premise, one request after the other
  uniform       no structure
  cyclic        every step the next experts in turn

Besides: ``known topic`` keeps the experts that the topic of the running request uses most, which no policy
can know: a bound for prediction on topic_local, where Belady's knows the noise too. One pool for all layers
against the same slots in equal quotas. Temperature and size of the EAM collection on tiny_moe.
Cost: microseconds a layer of all that the host does in a step of the pool that the device manages (trace,
predict, learn, choose victims), 61 layers x 256 experts, a quarter in slots, 32 requests and 1000 EAMs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import RESULTS, Headline, write_result
from vllm_moe_offload import EAMCollection, EAMPredictor, RoutingTrace, replay
from vllm_moe_offload.policy import make_policy
from vllm_moe_offload.shares import ShareEstimator
from vllm_moe_offload.victims import Plan, VictimPlanner

LAYERS, EXPERTS, TOP_K, REQUESTS, TOKENS, TOPICS, NOISE = 8, 64, 6, 60, 16, 8, 0.15
POLICIES = ("lru", "lfu", "least_stale", "eam", "eam_reference", "belady")
RESIDENCIES = (0.06, 0.125, 0.25, 0.5)
KINDS = ("tiny_moe", "tiny_moe x8", "topic_local", "uniform", "cyclic")
PICTURE = RESULTS.parents[1] / "docs" / "images" / "vllm_moe_offload_hit_rate.png"
KNOWN, QUOTA = "known topic", "eam, quota a layer"


@cache
def topics_of(seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Shares of each topic's experts ``[topics, layers, experts]``, and the topic of each token."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.full(EXPERTS, 0.08), size=(TOPICS, LAYERS))
    return (1 - NOISE) * taste + NOISE / EXPERTS, rng.integers(TOPICS, size=REQUESTS).repeat(TOKENS)


@cache
def trace_of(kind: str, seed: int) -> RoutingTrace:
    """A trace by name; those of tiny_moe need its model, and transformers."""
    if kind.startswith("tiny_moe"):
        return tiny_moe_trace(seed, at_once=8 if kind.endswith("x8") else 1)
    share, topics = topics_of(seed)
    tokens = len(topics)
    if kind == "cyclic":
        base = np.arange(tokens)[:, None, None] * TOP_K + np.arange(TOP_K)
        ids = np.broadcast_to(base % EXPERTS, (tokens, LAYERS, TOP_K))
    else:
        wanted = share[topics] if kind == "topic_local" else np.full((tokens, LAYERS, EXPERTS), 1 / EXPERTS)
        # Gumbel top-k draws without replacement by the shares.
        noise = np.random.default_rng(1000 + seed).gumbel(size=wanted.shape)
        ids = np.argsort(-(np.log(wanted) + noise), axis=2)[:, :, :TOP_K]
    return RoutingTrace(ids, np.arange(REQUESTS).repeat(TOKENS), np.arange(tokens), EXPERTS)


def tiny_moe_trace(seed: int, *, at_once: int) -> RoutingTrace:
    """Ten held-out items of each task, shuffled, token by token, ``at_once`` requests in a step."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.tiny_moe.evaluate import HERE
    from examples.tiny_moe.tasks import read_items
    from examples.tiny_moe.tokenizer import encode_pair

    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    rng = np.random.default_rng(seed)
    by_task: dict[str, list[Any]] = {}
    for item in read_items(HERE / "tasks"):
        by_task.setdefault(item.id.split("/")[0], []).append(item)
    picked = [items[i] for items in by_task.values() for i in rng.permutation(len(items))[:10]]
    chosen = []
    with torch.no_grad():
        for index in rng.permutation(len(picked)):
            ids, _ = encode_pair(picked[index].prompt, picked[index].target)
            output = model(input_ids=torch.tensor([ids[:-1]]), output_router_logits=True, use_cache=False)
            logits = torch.stack([x.view(len(ids) - 1, -1) for x in output.router_logits], dim=1)
            chosen.append(logits.float().topk(model.config.num_experts_per_tok).indices.numpy())
    rows: list[tuple[int, int, npt.NDArray[np.integer]]] = []  # step, request, experts
    step = 0
    for start in range(0, len(chosen), at_once):
        group = range(start, min(start + at_once, len(chosen)))
        for tokens in zip_longest(*(chosen[request] for request in group)):
            rows += [(step, r, ids) for r, ids in zip(group, tokens, strict=True) if ids is not None]
            step += 1
    steps, requests, experts = zip(*rows, strict=True)
    return RoutingTrace(np.stack(experts), np.asarray(requests), np.asarray(steps), model.config.num_experts)


def known_topic_hit_rate(seed: int, num_slots: int) -> float:
    """Keep what the running topic uses most, then what all topics do, knowing the true shares."""
    share, topics = topics_of(seed)
    # A new request comes every TOKENS steps with an unknown topic.
    value = share[topics] + share.mean(axis=0) / TOKENS
    trace = trace_of("topic_local", seed)
    resident = np.zeros(LAYERS * EXPERTS, dtype=bool)
    hits = accesses = 0
    for step, layers in enumerate(trace.expert_ids):
        for layer, experts in enumerate(layers):
            keys = layer * EXPERTS + experts
            hits += int(resident[keys].sum())
            accesses += len(keys)
            resident[keys] = True
            others = np.setdiff1d(np.flatnonzero(resident), keys)
            surplus = int(resident.sum()) - num_slots
            if surplus > 0:
                resident[others[np.argsort(value[step].reshape(-1)[others])[:surplus]]] = False
    return hits / accesses


def quota_hit_rate(trace: RoutingTrace, num_slots: int) -> float:
    """Every layer with its own equal share of the slots, under ``eam``."""
    quota = num_slots // trace.num_layers
    results = [
        replay(
            RoutingTrace(trace.expert_ids[:, [layer]], trace.request, trace.step, trace.num_experts),
            num_slots=quota,
            policy="eam",
        )
        for layer in range(trace.num_layers)
    ]
    return sum(result.hits for result in results) / sum(result.accesses for result in results)


@dataclass(frozen=True)
class Case:
    """One replay: a trace of a kind, a share of slots, a policy."""

    kind: str
    seed: int
    residency: float
    policy: str

    def hit_rate(self) -> float:
        """Replay it."""
        trace = trace_of(self.kind, self.seed)
        slots = max(round(self.residency * trace.num_layers * trace.num_experts), trace.top_k)
        if self.policy == KNOWN:
            return known_topic_hit_rate(self.seed, slots)
        if self.policy == QUOTA:
            return quota_hit_rate(trace, slots)
        return replay(trace, num_slots=slots, policy=self.policy).hit_rate


def hit_rates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each trace, residency and policy, with the hit rate of each seed."""
    groups = [
        (kind, residency, policy)
        for kind in arguments.kinds
        for residency in arguments.residency
        for policy in (*POLICIES, QUOTA, *([KNOWN] if kind == "topic_local" else []))
        # A quota must hold the experts of one token.
        if policy != QUOTA or residency >= trace_of(kind, 0).top_k / trace_of(kind, 0).num_experts
    ]
    cases = [Case(kind, seed, share, policy) for kind, share, policy in groups for seed in arguments.seeds]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rates = list(pool.map(Case.hit_rate, cases))
    rows = []
    for index, (kind, residency, policy) in enumerate(groups):
        some = rates[index * len(arguments.seeds) : (index + 1) * len(arguments.seeds)]
        rows.append(
            {
                "trace": kind,
                "residency": residency,
                "policy": policy,
                "hit_rate": statistics.mean(some),
                "hit_rate_samples": some,
            }
        )
        print(f"{kind} {residency} {policy}: {rows[-1]['hit_rate']:.3f}", flush=True)
    return rows


def prediction_recall(temperature: float, capacity: int) -> float:
    """Share of a request's choices among the predicted top 2k experts of a layer, after its first third.

    On tiny_moe; the requests before it are the collection.
    """
    trace = trace_of("tiny_moe", 0)
    collection = EAMCollection(trace.num_layers, trace.num_experts, capacity)
    predictor = EAMPredictor(collection, temperature=temperature)
    found = wanted = 0
    for request in range(int(trace.request.max()) + 1):
        ids = trace.expert_ids[trace.request == request]
        counts = np.zeros((len(ids), trace.num_layers, trace.num_experts), dtype=np.int64)
        np.put_along_axis(counts, ids, 1, axis=2)
        if request >= capacity or request >= 10:
            share = predictor.predict(counts[: len(ids) // 3].sum(axis=0))
            top = np.argsort(-share, axis=1)[:, : 2 * trace.top_k]
            later = counts[len(ids) // 3 :].sum(axis=0)
            found += int(np.take_along_axis(later, top, axis=1).sum())
            wanted += int(later.sum())
        collection.add(counts.sum(axis=0))
    return found / wanted


def decision_cost(policy: str, steps: int) -> list[float]:
    """Microseconds a layer for all that the host does in a step under ``policy``, one value a step."""
    layers, experts, top_k, requests, stored, length = 61, 256, 8, 32, 1000, 192
    rng = np.random.default_rng(0)
    taste = rng.dirichlet(np.full(experts, 0.08), size=(requests, layers))

    def draw(topic: int, tokens: int) -> npt.NDArray[np.intp]:
        noise = rng.gumbel(size=(tokens, layers, experts))
        return np.argpartition(-(np.log(taste[topic] + 1e-4) + noise), top_k, axis=2)[:, :, :top_k]

    collection = EAMCollection(layers, experts, stored)
    for entry in range(stored):
        counts = np.zeros((layers, experts), dtype=np.int64)
        np.put_along_axis(counts, draw(entry % requests, 1)[0], length, axis=1)
        collection.add(counts)
    estimator = ShareEstimator(collection)
    slots = layers * experts // 4
    planner = VictimPlanner(make_policy(policy, layers, experts), num_slots=slots, own_slots=slots)
    planner.rows = np.full(layers * experts, slots)
    planner.rows[rng.permutation(layers * experts)[:slots]] = np.arange(slots)
    plan = planner.first_plan()
    # Requests of 192 tokens at all stages of their life; one ends and one starts every sixth step.
    ages = [round(length * slot / requests) for slot in range(requests)]
    for slot, age in enumerate(ages):
        estimator.observe_step([(str(slot), slice(0, age + 1))], draw(slot, age + 1))
    rows = [(str(slot), slice(slot, slot + 1)) for slot in range(requests)]
    costs = []
    for step in range(steps):
        chosen = np.concatenate([draw(slot, 1) for slot in range(requests)])
        serve(planner, plan, chosen)
        ended = [slot for slot in range(requests) if ages[slot] + 1 >= length]
        start = time.perf_counter()
        for slot in ended:
            estimator.finish(str(slot))
        estimator.observe_step(rows, chosen)
        share = estimator.step_share({request: 1 for request, _ in rows}) if policy == "eam" else None
        planner.learn(chosen, share)
        plan = planner.plan(share)
        costs.append((time.perf_counter() - start) / layers * 1e6)
        ages = [0 if slot in ended else age + 1 for slot, age in enumerate(ages)]
        if step == 0:
            costs.clear()  # the first step predicts all requests at once
    return costs


def serve(planner: VictimPlanner, plan: Plan, chosen: npt.NDArray[np.integer]) -> None:
    """What the device does with a plan in a step, and its report."""
    layers, experts = planner.policy.num_layers, planner.policy.num_experts
    used = np.zeros(layers * experts, dtype=bool)
    used[chosen + np.arange(0, layers * experts, experts)[:, None]] = True
    absent = np.flatnonzero(used & (planner.rows >= planner.num_slots))
    planner.accesses, planner.misses = int(used.sum()), len(absent)
    taken = plan.slots[: plan.queued][: int(plan.admitted[absent].sum())]
    key_of = np.zeros(planner.num_slots, dtype=np.int64)
    held = np.flatnonzero(planner.rows < planner.num_slots)
    key_of[planner.rows[held]] = held
    planner.rows[key_of[taken]] = planner.num_slots
    planner.rows[absent[plan.admitted[absent] != 0][: len(taken)]] = taken


def draw_picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a trace: hit rate over residency, a line a policy."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.6), sharey=True, squeeze=False)
    style: dict[str, dict[str, Any]] = {"belady": {"color": "black", "linestyle": "--"}}
    style[KNOWN] = {"color": "grey", "linestyle": ":"}
    style["eam"] = {"linewidth": 2.4}
    for axis, kind in zip(axes[0], kinds, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != QUOTA):
            points = [row for row in rows if row["trace"] == kind and row["policy"] == policy]
            axis.plot(
                [100 * row["residency"] for row in points],
                [row["hit_rate"] for row in points],
                marker="o",
                markersize=3,
                label=policy,
                **style.get(policy, {}),
            )
        axis.set(title=kind, xlabel="experts resident, %", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("hit rate")
    labels = {}
    for axis in axes[0]:
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels, ncols=len(labels), loc="lower center", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def headline(rows: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """The goals first, then the hit rate of each policy; intervals span the seeds."""
    by = {(row["trace"], row["residency"], row["policy"]): row["hit_rate_samples"] for row in rows}

    def ratio(kind: str, residency: float, over: str, under: str, target: str) -> list[Headline]:
        pairs = by.get((kind, residency, over)), by.get((kind, residency, under))
        if pairs[0] is None or pairs[1] is None or min(pairs[1]) == 0:
            return []
        values = [a / b for a, b in zip(*pairs, strict=True)]
        what = f"{kind}, {residency:.1%} resident: {over} / {under}"
        return [Headline(what, statistics.mean(values), "x", min(values), max(values), target)]

    found = []
    for kind in dict.fromkeys(row["trace"] for row in rows):
        for residency in dict.fromkeys(row["residency"] for row in rows):
            goal = ">= 0.98" if kind in {"uniform", "cyclic"} else ""
            found += ratio(
                kind,
                residency,
                "eam",
                "lru",
                ">= 1.15" if (kind, residency) == ("topic_local", 0.25) else goal,
            )
            found += ratio(kind, residency, "eam", "belady", ">= 0.85" if kind == "topic_local" else "")
            found += ratio(kind, residency, "eam", QUOTA, "")
        found += ratio(kind, 0.25, KNOWN, "lru", "")
    return found + [
        Headline(
            f"{row['trace']}, {row['residency']:.1%} resident: {row['policy']}",
            row["hit_rate"],
            "hit rate",
            min(row["hit_rate_samples"]),
            max(row["hit_rate_samples"]),
        )
        for row in rows
    ]


def measure_cost(out: Path, steps: int) -> None:
    """Write what a decision costs, lru and eam."""
    costs = {policy: decision_cost(policy, steps) for policy in ("lru", "eam")}
    rows = [
        Headline(
            f"{policy}: host time a layer in a step, 61 layers x 256 experts, 32 requests, 1000 EAMs",
            statistics.mean(values),
            "us",
            float(np.quantile(values, 0.05)),
            float(np.quantile(values, 0.95)),
            "<= 50",
            "mean over steps; 5 % and 95 % of steps",
        )
        for policy, values in costs.items()
    ]
    for row in rows:
        print(f"{row.what}: {row.value:.1f} us ({row.low:.1f} to {row.high:.1f})", flush=True)
    write_result(
        "vllm_moe_offload_policy_cost",
        question="How long does the host take to decide, a layer and step?",
        headline=rows,
        samples=costs,
        folder=out,
        sample_unit="us",
    )


def measure_hits(arguments: argparse.Namespace) -> None:
    """Write hit rates, recall of the predictor, and the picture."""
    rows = hit_rates(arguments)
    recall = {}
    if "tiny_moe" in arguments.kinds:
        recall = {
            f"temperature {t}, 1000 kept": prediction_recall(t, 1000) for t in (0, 0.02, 0.05, 0.1, 0.3)
        }
        recall |= {f"temperature 0.05, {n} kept": prediction_recall(0.05, n) for n in (5, 20, 50)}
    write_result(
        "vllm_moe_offload_policy",
        question="What share of expert requests does each eviction policy serve from its slots?",
        headline=headline(rows),
        samples={
            f"{row['trace']} {row['residency']} {row['policy']}": row["hit_rate_samples"] for row in rows
        },
        folder=arguments.out,
        sample_unit="hit rate of one trace",
        shape={"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "requests": REQUESTS, "tokens": TOKENS},
        rows=rows,
        tiny_moe_prediction_recall=recall,
    )
    picture = PICTURE if arguments.out == RESULTS else arguments.out / PICTURE.name
    draw_picture(rows, picture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--residency", type=float, nargs="+", default=list(RESIDENCIES))
    parser.add_argument("--jobs", type=int, default=2, help="processes that replay")
    parser.add_argument("--only", choices=["hits", "cost"], help="half of it")
    parser.add_argument("--quick", action="store_true", help="one seed, two residencies, few steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.residency = arguments.seeds[:1], [0.125, 0.25]
    stages: dict[str, Callable[[], None]] = {
        "hits": lambda: measure_hits(arguments),
        "cost": lambda: measure_cost(arguments.out, 20 if arguments.quick else 400),
    }
    for name, stage in stages.items():
        if arguments.only in {None, name}:
            stage()
    return 0


if __name__ == "__main__":
    sys.exit(main())

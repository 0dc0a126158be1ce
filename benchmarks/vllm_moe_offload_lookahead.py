"""How many of a layer's experts a look ahead through its gate finds, beside the EAM predictor.

    python benchmarks/vllm_moe_offload_lookahead.py [--out DIR] [--items 5]

The trained model of examples/tiny_moe (6 layers x 32 experts, top-4) on its held-out tasks, token by token,
the requests in turn. Predictors of the experts of a layer for one token, each naming k or 2k of them:
  gate, n ahead    the layer's gate on the hidden states that the layer n before it routes
  EAM              matrices of the requests before and of this request up to the token before it
  last token       what the request's token before it used, the rest by the request's counts
Recall: share of the token's real choices among those named. Deterministic, up to the order of sums.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import RESULTS, Headline, write_result
from vllm_moe_offload import EAMCollection, EAMPredictor, GatePredictor

DISTANCES = (1, 2, 3)
Choices = npt.NDArray[np.integer]


@dataclass
class Request:
    """One request, token by token.

    Attributes:
        task: its task.
        chosen: ``[tokens, layers, top_k]``.
        guesses: distance -> ids ``[tokens, layers, 2 * top_k]``, likeliest first; -1 for layers without one.
    """

    task: str
    chosen: Choices
    guesses: dict[int, Choices]


def requests(items_a_task: int, seed: int = 0) -> tuple[list[Request], int]:
    """Held-out items of every task in random order, and the number of experts."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.tiny_moe.evaluate import HERE
    from examples.tiny_moe.tasks import read_items
    from examples.tiny_moe.tokenizer import encode_pair

    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    top_k = model.config.num_experts_per_tok
    gates = [layer.mlp.gate for layer in model.model.layers]
    predictors = [
        GatePredictor(lambda x, weight=gate.weight: x @ weight.T, count=2 * top_k) for gate in gates
    ]
    hidden: list[Any] = []
    for gate in gates:
        gate.register_forward_pre_hook(
            lambda _, inputs: hidden.append(inputs[0].view(-1, inputs[0].shape[-1]))
        )
    by_task: dict[str, list[Any]] = {}
    for item in read_items(HERE / "tasks"):
        by_task.setdefault(item.id.split("/")[0], []).append(item)
    rng = np.random.default_rng(seed)
    picked = [
        (task, items[i])
        for task, items in by_task.items()
        for i in rng.permutation(len(items))[:items_a_task]
    ]
    found = []
    for index in rng.permutation(len(picked)):
        task, item = picked[index]
        ids, _ = encode_pair(item.prompt, item.target)
        hidden.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
            own = [predictor.predict(x).numpy() for predictor, x in zip(predictors, hidden, strict=True)]
            guesses = {}
            for distance in DISTANCES:
                guess = np.full((len(ids) - 1, len(gates), 2 * top_k), -1)
                for layer in range(distance, len(gates)):
                    guess[:, layer] = predictors[layer].predict(hidden[layer - distance]).numpy()
                guesses[distance] = guess
        found.append(Request(task, np.stack(own, axis=1)[:, :, :top_k], guesses))
    return found, model.config.num_experts


def history_guesses(found: list[Request], experts: int) -> Iterator[tuple[Choices, Choices]]:
    """Of each request what EAM and the last token name, ``[tokens, layers, 2 * top_k]``; first token: -1."""
    _, layers, top_k = found[0].chosen.shape
    collection = EAMCollection(layers, experts)
    predictor = EAMPredictor(collection)
    for request in found:
        counts = np.zeros((layers, experts), dtype=np.int64)
        eam = np.full((len(request.chosen), layers, 2 * top_k), -1)
        last = eam.copy()
        for token, chosen in enumerate(request.chosen):
            if token:
                eam[token] = np.argsort(-predictor.expect(counts), axis=1, kind="stable")[:, : 2 * top_k]
                recent = counts.astype(float)
                np.put_along_axis(recent, request.chosen[token - 1], np.inf, axis=1)
                last[token] = np.argsort(-recent, axis=1, kind="stable")[:, : 2 * top_k]
            np.put_along_axis(counts, chosen, np.take_along_axis(counts, chosen, 1) + 1, axis=1)
        yield eam, last
        collection.add(counts)


def recall(chosen: Choices, guess: Choices, count: int) -> tuple[int, int]:
    """Choices found among the first ``count`` guesses, and choices, where there is a guess."""
    known = guess[..., 0] >= 0
    hit = (chosen[known][:, :, None] == guess[known][:, None, :count]).any(axis=2)
    return int(hit.sum()), hit.size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--items", type=int, default=5, help="items of each task")
    arguments = parser.parse_args()
    rows = measure(arguments.items)
    headline = [
        Headline(
            f"{row['predictor']}: recall among {row['named']}",
            row["recall"],
            "share",
            min(row["by_task"].values()),
            max(row["by_task"].values()),
            note="interval: tasks",
        )
        for row in rows
    ]
    for line in headline:
        print(f"{line.what}: {line.value:.3f} ({line.low:.3f} to {line.high:.3f})", flush=True)
    write_result(
        "vllm_moe_offload_lookahead",
        question="Which share of a layer's experts does its gate name one to three layers ahead?",
        headline=headline,
        samples={},
        folder=arguments.out,
        items_a_task=arguments.items,
        rows=rows,
    )
    return 0


def measure(items_a_task: int) -> list[dict[str, Any]]:
    """Recall of every predictor, over all tokens and by task."""
    found, experts = requests(items_a_task)
    top_k = found[0].chosen.shape[2]
    named: dict[str, list[Choices]] = {
        f"gate, {distance} ahead": [request.guesses[distance] for request in found] for distance in DISTANCES
    }
    named["EAM"], named["last token"] = map(list, zip(*history_guesses(found, experts), strict=True))
    rows = []
    for predictor, guesses in named.items():
        for times in (1, 2):
            counts: dict[str, list[tuple[int, int]]] = {}
            for request, guess in zip(found, guesses, strict=True):
                counts.setdefault(request.task, []).append(recall(request.chosen, guess, times * top_k))
            by_task = {
                task: sum(h for h, _ in some) / sum(n for _, n in some) for task, some in counts.items()
            }
            pairs = [pair for some in counts.values() for pair in some]
            rows.append(
                {
                    "predictor": predictor,
                    "named": "k" if times == 1 else "2k",
                    "recall": sum(h for h, _ in pairs) / sum(n for _, n in pairs),
                    "mean_of_tasks": statistics.mean(by_task.values()),
                    "by_task": by_task,
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())

"""Measure the model: exact match by greedy generation, and how much its routing depends on the task.

Example: ``python -m examples.tiny_moe.evaluate --engine vllm``
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from examples.tiny_moe.tasks import TaskItem, read_items
from examples.tiny_moe.tokenizer import PAD_ID, encode_pair

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 12


def _batches(items: Sequence[TaskItem], size: int) -> Iterator[Sequence[TaskItem]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def forward_items(
    model: Any, items: Sequence[TaskItem], batch_size: int = 256
) -> tuple[list[bool], torch.Tensor]:
    """Run the model over prompts and targets; return who is answered exactly, and each item's EAM.

    An item counts as correct when the most likely token is right at every position of the answer and at its
    end, which holds exactly when greedy generation gives the target. The expert activation matrices (EAMs)
    have shape (items, layers, experts), int64: how often tokens of ``<bos> prompt target`` chose the expert.
    """
    device = next(model.parameters()).device
    top_k = model.config.num_experts_per_tok
    correct: list[bool] = []
    matrices = []
    for batch in _batches(items, batch_size):
        pairs = [encode_pair(item.prompt, item.target) for item in batch]
        width = max(len(ids) for ids, _ in pairs)
        ids_BT = torch.tensor([ids + [PAD_ID] * (width - len(ids)) for ids, _ in pairs], device=device)
        output = model(input_ids=ids_BT[:, :-1], output_router_logits=True, use_cache=False)
        predicted = output.logits.argmax(-1).tolist()
        correct += [
            row[start - 1 : len(ids) - 1] == ids[start:]
            for row, (ids, start) in zip(predicted, pairs, strict=True)
        ]
        logits_BLTE = torch.stack([x.view(len(batch), width - 1, -1) for x in output.router_logits], dim=1)
        chosen = logits_BLTE.float().softmax(-1).topk(top_k).indices
        used = torch.zeros_like(logits_BLTE, dtype=torch.int64).scatter_(3, chosen, 1)
        lengths = torch.tensor([len(ids) - 1 for ids, _ in pairs], device=device)
        real_BT = torch.arange(width - 1, device=device) < lengths.unsqueeze(1)
        matrices.append((used * real_BT[:, None, :, None]).sum(2).cpu())
    return correct, torch.cat(matrices)


def eam_distances(matrices: torch.Tensor) -> torch.Tensor:
    """Return the (N, N) distances 1 - mean over layers of the cosine, for (N, layers, experts) counts."""
    unit = torch.nn.functional.normalize(matrices.double(), dim=-1)
    return 1 - torch.einsum("nle,mle->nm", unit, unit) / matrices.shape[1]


def routing_report(items: Sequence[TaskItem], matrices: torch.Tensor) -> dict[str, Any]:
    """Return mean EAM distances within and between tasks, for single requests and for halves of a task.

    ``requests_*`` averages over pairs of items; ``halves_within`` compares the summed EAMs of a task's even
    and odd items, ``halves_between`` those of halves of different tasks. ``tasks`` holds, by task pair, the
    mean distance of single requests.
    """
    names = [item.id.split("/")[0] for item in items]
    tasks = list(dict.fromkeys(names))
    label = torch.tensor([tasks.index(name) for name in names])
    distance = eam_distances(matrices)
    same = label.unsqueeze(0) == label.unsqueeze(1)
    other = ~torch.eye(len(items), dtype=torch.bool)
    halves = torch.stack([matrices[label == t][h::2].sum(0) for t in range(len(tasks)) for h in (0, 1)])
    half_distance = eam_distances(halves)
    half_label = torch.arange(len(halves)) // 2
    half_same = half_label.unsqueeze(0) == half_label.unsqueeze(1)
    half_other = ~torch.eye(len(halves), dtype=torch.bool)
    pairs = {
        f"{a}-{b}": float(distance[(label == i).unsqueeze(1) & (label == j).unsqueeze(0) & other].mean())
        for i, a in enumerate(tasks)
        for j, b in enumerate(tasks)
        if i <= j
    }
    return {
        "requests_within": float(distance[same & other].mean()),
        "requests_between": float(distance[~same].mean()),
        "halves_within": float(half_distance[half_same & half_other].mean()),
        "halves_between": float(half_distance[~half_same].mean()),
        "tasks": pairs,
    }


@torch.no_grad()
def generate_transformers(
    model: Any, tokenizer: Any, items: Sequence[TaskItem], batch_size: int = 200
) -> list[str]:
    """Return the greedy answers of a transformers model, special tokens removed."""
    answers: list[str] = []
    for batch in _batches(items, batch_size):
        inputs = tokenizer([item.prompt for item in batch], return_tensors="pt", padding=True)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def generate_vllm(llm: Any, items: Sequence[TaskItem]) -> list[str]:
    """Return the greedy answers of a ``vllm.LLM``."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    outputs = llm.generate([item.prompt for item in items], settings, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def accuracy_report(items: Sequence[TaskItem], correct: Sequence[bool]) -> dict[str, Any]:
    """Return per task the exact matches, their share with its 95 % Wilson interval, and the mean share."""
    by_task: dict[str, list[bool]] = {}
    for item, hit in zip(items, correct, strict=True):
        by_task.setdefault(item.id.split("/")[0], []).append(hit)
    tasks = {}
    for task, hits in by_task.items():
        interval = binomtest(sum(hits), len(hits)).proportion_ci(0.95, method="wilson")
        tasks[task] = {
            "correct": sum(hits),
            "items": len(hits),
            "exact_match": sum(hits) / len(hits),
            "low": interval.low,
            "high": interval.high,
        }
    return {"mean": sum(t["exact_match"] for t in tasks.values()) / len(tasks), "tasks": tasks}


def score(items: Sequence[TaskItem], answers: Sequence[str]) -> list[bool]:
    """Return for each item whether the answer, white space stripped, is the target."""
    return [answer.strip() == item.target for item, answer in zip(items, answers, strict=True)]


def evaluate_folder(folder: Path, items: Sequence[TaskItem], device: str = "cpu") -> dict[str, Any]:
    """Load the saved bfloat16 model with transformers; return its accuracy and routing reports."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    answers = generate_transformers(model, AutoTokenizer.from_pretrained(folder), items)
    _, matrices = forward_items(model, items)
    return {
        "accuracy": accuracy_report(items, score(items, answers)),
        "routing": routing_report(items, matrices),
    }


def open_vllm(folder: Path) -> Any:
    """Open the model in vLLM, sized for these short texts."""
    from vllm import LLM

    return LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=64,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )


def environment(device: str | None) -> dict[str, str]:
    """Return versions and hardware; ``device`` is transformers' device, or None for vLLM."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device is None:
        import vllm

        found["vllm"] = vllm.__version__
    else:
        import transformers

        found["transformers"] = transformers.__version__
    gpu = torch.cuda.is_available() and device != "cpu"
    return found | {"hardware": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the accuracy table and, where measured, the routing distances."""
    table = Table(title="Held-out exact match, greedy generation", caption="95 % Wilson intervals")
    for column in ("task", "correct", "items", "exact match", "interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in report["accuracy"]["tasks"].items():
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(
            task,
            str(row["correct"]),
            str(row["items"]),
            f"{row['exact_match']:.3f}",
            interval,
        )
    table.add_row("mean", "", "", f"{report['accuracy']['mean']:.3f}", "")
    console.print(table)
    if "routing" in report:
        routing = report["routing"]
        for kind in ("requests", "halves"):
            within, between = routing[f"{kind}_within"], routing[f"{kind}_between"]
            console.print(
                f"EAM distance of {kind}: within a task {within:.4f}, between tasks {between:.4f}, "
                f"ratio {between / within:.2f}"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a saved model on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=HERE / "model", help="model folder (default: %(default)s)"
    )
    parser.add_argument("--tasks", type=Path, default=HERE / "tasks", help="items (default: %(default)s)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--device", default="cpu", help="for transformers (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the report, with versions, to this file")
    options = parser.parse_args(arguments)
    items = read_items(options.tasks)
    if options.engine == "vllm":
        answers = generate_vllm(open_vllm(options.model), items)
        report = {"accuracy": accuracy_report(items, score(items, answers))}
    else:
        report = evaluate_folder(options.model, items, options.device)
    print_report(report, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        given = sys.argv[1:] if arguments is None else arguments
        head = {"command": shlex.join(["python", "-m", "examples.tiny_moe.evaluate", *given])}
        head |= environment(options.device if options.engine == "transformers" else None)
        options.json.write_text(json.dumps(head | report, indent=2) + "\n")


if __name__ == "__main__":
    main()

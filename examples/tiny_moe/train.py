"""Train the small mixture-of-experts model from random weights and write model, log and held-out items.

Example: ``python -m examples.tiny_moe.train --out /tmp/tiny_moe`` (about a minute on a GPU, hours on a CPU).

The learning rate is constant until the validation mean reaches ``--decay-at`` (or most of the time is used),
then falls to zero over ``--decay-steps``; training stops there, or before as soon as the mean reaches
``--target``. So validation items alone, never a test item, decide which weights are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader, Dataset

from examples.tiny_moe.evaluate import (
    accuracy_report,
    environment,
    evaluate_folder,
    forward_items,
    print_report,
    routing_report,
)
from examples.tiny_moe.model import balance_loss, new_model
from examples.tiny_moe.tasks import held_out_items, training_pairs, write_items
from examples.tiny_moe.tokenizer import PAD_ID, encode_pair, save_tokenizer

IGNORED = -100
LOG_EVERY = 20  # steps; reading a loss waits for the device


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and shows every default."""


class TrainingBatches(Dataset):
    """Item ``i`` is the whole batch of step ``i``: token ids and labels (batch, time), int64.

    Labels are the next tokens where those belong to the answer or end it, ``IGNORED`` elsewhere.
    """

    def __init__(self, seed: int, steps: int, batch_size: int) -> None:
        self.seed, self.steps, self.batch_size = seed, steps, batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [encode_pair(p, t) for p, t in training_pairs(self.seed, step, self.batch_size)]
        width = max(len(ids) for ids, _ in pairs)
        ids_BT = torch.full((len(pairs), width), PAD_ID)
        labels_BT = torch.full((len(pairs), width), IGNORED)
        for row, (ids, start) in enumerate(pairs):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            labels_BT[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
        return ids_BT[:, :-1], labels_BT[:, :-1]


class LearningRate:
    """Linear warm-up, constant, then linear to zero from the step at which ``start_decay`` was called."""

    def __init__(self, peak: float, warm_up_steps: int, decay_steps: int) -> None:
        self.peak, self.warm_up_steps, self.decay_steps = peak, warm_up_steps, decay_steps
        self.decay_start: int | None = None

    def start_decay(self, step: int) -> None:
        """Begin the decay at ``step`` unless it has begun."""
        if self.decay_start is None:
            self.decay_start = step

    def at(self, step: int) -> float:
        """Return the learning rate of ``step``; 0 or less once the decay is over."""
        if self.decay_start is not None:
            return self.peak * (1 - (step - self.decay_start) / self.decay_steps)
        return self.peak * min(1.0, (step + 1) / self.warm_up_steps)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("moecap_out/tiny_moe"), help="gets model/, tasks/, training_log.json"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--seed", type=int, default=7, help="of weights, batches and items")
    add("--steps", type=int, default=20_000, help="train at most this many steps")
    add("--max-seconds", type=float, default=14_400, help="begin the decay at 80%% of this time")
    add("--batch-size", type=int, default=1024, help="sequences a step")
    add("--learning-rate", type=float, default=3e-3, help="its peak")
    add("--decay-at", type=float, default=0.85, help="validation mean that begins the decay")
    add("--decay-steps", type=int, default=200, help="length of the decay")
    add("--target", type=float, default=0.94, help="validation mean that ends training")
    add("--validate-every", type=int, default=50, help="steps between validations")
    add("--items", type=int, default=200, help="held-out items a task")
    add("--workers", type=int, default=6, help="processes that make batches")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "decay_steps", "validate_every", "items"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def train(options: argparse.Namespace, console: Console) -> tuple[Any, dict[str, Any]]:
    """Train until the schedule ends; return the float32 model and the log of losses and validations."""
    cuda = options.device.startswith("cuda")
    batches = DataLoader(
        TrainingBatches(options.seed, options.steps, options.batch_size),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=cuda,
    )
    model = new_model(options.seed, options.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=cuda
    )
    schedule = LearningRate(options.learning_rate, 100, options.decay_steps)
    validation = held_out_items("validation", options.items, options.seed)
    log: dict[str, Any] = {"training_steps": 0, "training_seconds": 0.0, "steps": [], "validation": []}
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=options.steps)
        for done, (ids, labels) in enumerate(batches, start=1):
            rate = schedule.at(done - 1)
            if rate <= 0:
                break
            optimizer.param_groups[0]["lr"] = rate
            on_device = [x.to(options.device, non_blocking=True) for x in (ids, labels)]
            losses = train_step(model, optimizer, *on_device)
            log["training_steps"], log["training_seconds"] = done, round(time.monotonic() - began, 1)
            progress.update(bar, completed=done)
            if done % LOG_EVERY == 0:
                loss, balance = (round(float(x), 4) for x in losses)
                log["steps"].append({"step": done, "loss": loss, "balance": balance, "learning_rate": rate})
                progress.update(bar, description=f"loss {loss:.3f}")
            if log["training_seconds"] > 0.8 * options.max_seconds:
                schedule.start_decay(done)
            if done % options.validate_every and done != options.steps:
                continue
            entry = {"step": done, "seconds": log["training_seconds"]} | validate(model, validation)
            log["validation"].append(entry)
            progress.console.print(validation_line(entry))
            if entry["mean"] >= options.target:
                break
            if entry["mean"] >= options.decay_at:
                schedule.start_decay(done)
    return model, log


def validation_line(entry: dict[str, Any]) -> str:
    """Return one line for people: accuracy by task, EAM distance within and between tasks."""
    accuracies = ", ".join(f"{task} {value:.2f}" for task, value in entry["tasks"].items())
    return (
        f"step {entry['step']}, {entry['seconds']:.0f} s: validation {entry['mean']:.3f} ({accuracies}); "
        f"EAM distance {entry['requests_within']:.2f} within, {entry['requests_between']:.2f} between tasks"
    )


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, ids_BT: torch.Tensor, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one optimiser step; return the mean answer loss (nats a token) and the balance loss, detached."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids_BT.is_cuda):
        output = model(input_ids=ids_BT, output_router_logits=True, use_cache=False)
    answer_loss = torch.nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED
    )
    config = model.config
    balance = balance_loss(output.router_logits, config.num_experts_per_tok, ids_BT.flatten() != PAD_ID)
    optimizer.zero_grad(set_to_none=True)
    (answer_loss + config.router_aux_loss_coef * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return answer_loss.detach(), balance.detach()


def validate(model: Any, items: Sequence[Any]) -> dict[str, Any]:
    """Return the validation mean, each task's exact match, and the mean EAM distances of requests."""
    model.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda):
        correct, matrices = forward_items(model, items)
    model.train()
    accuracy, routing = accuracy_report(items, correct), routing_report(items, matrices)
    return {
        "mean": accuracy["mean"],
        "tasks": {task: row["exact_match"] for task, row in accuracy["tasks"].items()},
        "requests_within": routing["requests_within"],
        "requests_between": routing["requests_between"],
    }


def save_model(model: Any, folder: Path) -> None:
    """Write config, bfloat16 safetensors and tokenizer, in the layout of published Qwen3-MoE checkpoints."""
    model = model.to(torch.bfloat16)
    model.set_experts_implementation("eager")
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, reload and evaluate on the command line."""
    options = parse_options(arguments)
    console = Console()
    items = held_out_items("test", options.items, options.seed)
    write_items(items, options.out / "tasks")
    model, log = train(options, console)
    save_model(model, options.out / "model")
    given = sys.argv[1:] if arguments is None else arguments
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    head = {"command": shlex.join(["python", "-m", "examples.tiny_moe.train", *given])}
    log = head | environment(options.device) | {"options": settings} | log
    log_file = options.out / "training_log.json"
    log_file.write_text(json.dumps(log, indent=1) + "\n")
    report = evaluate_folder(options.out / "model", items, options.device)
    log_file.write_text(json.dumps(log | {"test": report}, indent=1) + "\n")
    print_report(report, console)
    console.print(
        f"trained {log['training_steps']} steps in {log['training_seconds']} s on {log['hardware']}; "
        f"held-out mean exact match {report['accuracy']['mean']:.3f}; wrote {options.out}"
    )


if __name__ == "__main__":
    main()

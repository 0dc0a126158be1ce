"""Tasks as JSONL files, and the one way to turn any ``tasks:`` setting into items."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecap_eval.tasks.scoring import exact_match
from moecap_eval.workload import Item

LM_EVAL_PREFIX = "lm_eval:"


@dataclass(frozen=True)
class Question:
    """What a text workload asks. ``score`` maps the generated text to scores, the first one being the main.

    ``max_new_tokens`` is the task's own limit, None where the workload decides.
    """

    task: str
    prompt: str
    target: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    scorer: Callable[[str], dict[str, float]] | None = None

    def score(self, output: str) -> dict[str, float]:
        """Scores of ``output`` by metric name."""
        if self.scorer is not None:
            return self.scorer(output)
        return {"exact_match": exact_match(output, self.target, self.stop)}


@dataclass(frozen=True)
class Choice:
    """A question answered by the likeliest continuation: scored on the running engine, never timed.

    ``pairs`` are (context, continuation) texts; ``score`` maps their log-likelihoods, each with whether the
    continuation is the greedy one, to scores by metric name, the first one being the main.
    """

    task: str
    prompt: str
    target: str
    pairs: tuple[tuple[str, str], ...]
    score: Callable[[Sequence[tuple[float, bool]]], dict[str, float]]


def load_items(
    tasks: str | Path | Sequence[str | Path], limit: int | None = None, seed: int = 0
) -> list[Item]:
    """Equally many items of each task, interleaved by task, so that any stretch holds all tasks.

    Args:
        tasks: a JSONL file (one task, named like the file), a folder of them, ``lm_eval:<task>``, or a list
            of these, which then share ``limit`` equally and are spread evenly over the result.
        limit: at most this many items in all.
        seed: of the choice within each task.

    Raises:
        FileNotFoundError: no such file, or a folder without ``*.jsonl``.
        ValueError: a bad line (file and line number), an id used twice, a limit below the number of tasks.
    """
    sources = [tasks] if isinstance(tasks, str | Path) else list(tasks)
    if not sources:
        raise ValueError("tasks: at least one is needed")
    share = None if limit is None else limit // len(sources)
    if share == 0:
        raise ValueError(f"limit {limit} is below the number of task sources ({len(sources)})")
    chosen = [_interleave(_by_task(source), share, seed) for source in sources]
    check_unique([item for items in chosen for item in items])
    placed = [
        ((index + 0.5) / len(items), source, item)
        for source, items in enumerate(chosen)
        for index, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def _by_task(source: str | Path) -> dict[str, list[Item]]:
    if str(source).startswith(LM_EVAL_PREFIX):
        from moecap_eval.tasks.lm_eval_bridge import task_items

        return task_items(str(source).removeprefix(LM_EVAL_PREFIX))
    return {path.stem: _read(path) for path in _files(Path(source))}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{path} holds no *.jsonl file")
        return files
    if not path.is_file():
        raise FileNotFoundError(
            f"tasks {str(path)!r} not found: give a JSONL file, a folder of them, or lm_eval:<task>"
        )
    return [path]


def _read(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        entry = _entry(line, f"{path}:{number}")
        if entry.get("split", "test") == "test":
            stop = entry.get("stop", ())
            question = Question(path.stem, entry["prompt"], entry["target"], tuple(stop))
            items.append(Item(entry["id"], question))
    return items


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with id, prompt and target")
    for key in ("id", "prompt", "target"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{where}: {key!r} must be a string, got {entry.get(key)!r}")
    stop = entry.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"{where}: 'stop' must be a list of non-empty strings, got {stop!r}")
    return entry


def check_unique(items: Sequence[Item]) -> None:
    """Raise ValueError where two items have one id."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"item id {item.id!r} occurs twice in the tasks")
        seen.add(item.id)


def _interleave(by_task: Mapping[str, Sequence[Item]], limit: int | None, seed: int) -> list[Item]:
    check_unique([item for items in by_task.values() for item in items])
    empty = [task for task, items in by_task.items() if not items]
    if empty:
        raise ValueError(f"task {empty[0]!r} has no item of split 'test'")
    per_task = min(len(items) for items in by_task.values())
    if limit is not None:
        if limit < len(by_task):
            raise ValueError(f"limit {limit} is below the number of tasks ({len(by_task)})")
        per_task = min(per_task, limit // len(by_task))
    chosen = [
        random.Random(f"{seed}/{task}").sample(list(items), per_task) for task, items in by_task.items()
    ]
    return [items[index] for index in range(per_task) for items in chosen]

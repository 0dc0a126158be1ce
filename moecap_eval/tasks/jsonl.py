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


def load_items(tasks: str | Path, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Equally many items of each task, interleaved by task, so that any stretch holds all tasks.

    Args:
        tasks: a JSONL file (one task, named like the file), a folder of them, or ``lm_eval:<task>``.
        limit: at most this many items in all.
        seed: of the choice within each task.

    Raises:
        FileNotFoundError: no such file, or a folder without ``*.jsonl``.
        ValueError: a bad line (file and line number), an id used twice, a limit below the number of tasks.
    """
    if str(tasks).startswith(LM_EVAL_PREFIX):
        from moecap_eval.tasks.lm_eval_bridge import generation_items

        by_task = generation_items(str(tasks).removeprefix(LM_EVAL_PREFIX))
    else:
        by_task = {path.stem: _read(path) for path in _files(Path(tasks))}
    return _interleave(by_task, limit, seed)


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


def _interleave(by_task: Mapping[str, Sequence[Item]], limit: int | None, seed: int) -> list[Item]:
    seen: set[str] = set()
    for items in by_task.values():
        for item in items:
            if item.id in seen:
                raise ValueError(f"item id {item.id!r} occurs twice in the tasks")
            seen.add(item.id)
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

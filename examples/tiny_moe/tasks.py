"""The six generated tasks: short text in, short text out, any number of items from a seed.

Every prompt belongs to exactly one split, decided by its SHA-256 alone, so anyone can check which prompts
the model may have been trained on. Targets have at most eleven characters, so an answer and its end-of-text
token fit in twelve tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class TaskItem:
    """One question: ``prompt`` ends with ``=``, ``target`` is the exact answer without end-of-text token."""

    id: str
    prompt: str
    target: str
    split: str


def split_of(prompt: str) -> str:
    """Return ``"test"`` if SHA-256(prompt) mod 10 is 0, ``"validation"`` if it is 1, else ``"train"``.

    The digest is read as one big-endian integer; the prompt is encoded in UTF-8 and has no special tokens.
    """
    remainder = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    return SPLITS[min(remainder, 2)]


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 5, 11)
    return f"rev {word}=", word[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(string.digits, k=rng.randint(6, 11))
    return f"sort {''.join(digits)}=", "".join(sorted(digits))


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(10, 9999), rng.randint(10, 9999)
    return f"add {left}+{right}=", str(left + right)


def _rotate(rng: random.Random) -> tuple[str, str]:
    shift, word = rng.randint(1, 13), _word(rng, 4, 8)
    alphabet = string.ascii_lowercase
    table = str.maketrans(alphabet, alphabet[shift:] + alphabet[:shift])
    return f"rot {shift} {word}=", word.translate(table)


def _lookup(rng: random.Random) -> tuple[str, str]:
    keys = rng.sample(string.ascii_lowercase, rng.randint(2, 7))
    values = rng.choices(string.digits, k=len(keys))
    wanted = rng.randrange(len(keys))
    pairs = " ".join(key + value for key, value in zip(keys, values, strict=True))
    return f"get {pairs}?{keys[wanted]}=", values[wanted]


def _maximum(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 99_999), rng.randint(0, 99_999)
    return f"max {left} {right}=", str(max(left, right))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "rev": _reverse,
    "sort": _sort,
    "add": _add,
    "rot": _rotate,
    "get": _lookup,
    "max": _maximum,
}
"""Task name (the prompt's first word) -> generator of one ``(prompt, target)``."""


def draw(task: str, split: str, rng: random.Random) -> tuple[str, str]:
    """Draw prompts of ``task`` until one belongs to ``split``; return it with its target.

    Raises ``ValueError`` for an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} does not exist; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    while True:
        prompt, target = TASKS[task](rng)
        if split_of(prompt) == split:
            return prompt, target


def held_out_items(split: str, per_task: int, seed: int) -> list[TaskItem]:
    """Return ``per_task`` different items of each task, grouped by task, all from ``split``."""
    items = []
    for task in TASKS:
        rng = random.Random(f"{seed}/{split}/{task}")
        drawn: dict[str, str] = {}
        while len(drawn) < per_task:
            prompt, target = draw(task, split, rng)
            drawn.setdefault(prompt, target)
        items += [TaskItem(f"{task}/{i:03d}", p, t, split) for i, (p, t) in enumerate(drawn.items())]
    return items


def training_pairs(seed: int, step: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield the ``count`` training pairs of one step, tasks drawn uniformly; none is held out."""
    rng = random.Random(f"{seed}/train/{step}")
    names = tuple(TASKS)
    for _ in range(count):
        yield draw(rng.choice(names), "train", rng)


def write_items(items: list[TaskItem], folder: Path) -> None:
    """Write one ``<task>.jsonl`` per task, one item a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps(asdict(item)) for item in items if item.id.startswith(task + "/")]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def read_items(folder: Path) -> list[TaskItem]:
    """Read every ``*.jsonl`` of ``folder``, files in alphabetical order."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.jsonl file; run python -m examples.tiny_moe.train")
    return [TaskItem(**json.loads(line)) for file in files for line in file.read_text().splitlines()]

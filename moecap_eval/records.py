"""Append-only records of a run, and how they are read back.

A run's folder holds ``records.jsonl`` (one JSON object a line, ``"v": 1`` and a ``kind``) and
``steps.jsonl`` (one StepRecord a line). Kinds:

- ``run``: the first line. Config and its digest, workload, work unit, axes, items a block.
- ``arm``: an arm was opened. ``startup_s``, ``memory_bytes``, ``facts``.
- ``sample``: one item of a block. ``values``, ``digest``, ``detail``.
- ``block``: written last of its block, in the same append as its samples; a block without it never happened.
- ``failure``: an arm died or raised. ``message``.
- ``end``: a run came to its end, with or without failures.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moecap_eval.workload import Axis, StepRecord

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
STEPS_FILE = "steps.jsonl"
ENVIRONMENT_FILE = "environment.json"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class BlockRecord:
    """One slot of one block: what an arm did and what it took.

    ``usd`` is None without a price, ``energy_j`` without a meter (``energy_source`` then says ``none``).
    ``reasons`` explains values that are None. ``started_s`` counts from the run's first start (Unix time
    differences), for the timeline only.
    """

    arm: str
    block: int
    slot: int
    wall_s: float
    work: float
    values: Mapping[str, float | None]
    energy_j: float | None
    energy_source: str
    usd: float | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    started_s: float = 0.0


@dataclass(frozen=True)
class SampleRecord:
    """One item's outcome in one arm."""

    arm: str
    block: int
    item: str
    values: Mapping[str, float | None]
    digest: str | None
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class ArmRecord:
    """An arm as it was opened last."""

    arm: str
    startup_s: float
    memory_bytes: Mapping[str, int]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Records:
    """Everything a comparison or a report needs, read once.

    ``blocks`` and ``samples`` are keyed by arm name (the A/A slot included) and sorted by block;
    ``steps`` by (arm, block). ``failures`` holds the last failure of each arm that still lacks blocks.
    """

    path: Path
    config: Mapping[str, Any]
    config_digest: str
    workload: str
    work_unit: str
    axes: tuple[Axis, ...]
    num_blocks: int
    items_per_block: int
    left_out: int
    slots: tuple[str, ...]
    environment: Mapping[str, Any]
    arms: Mapping[str, ArmRecord]
    blocks: Mapping[str, list[BlockRecord]]
    samples: Mapping[str, list[SampleRecord]]
    steps: Mapping[tuple[str, int], list[StepRecord]]
    failures: Mapping[str, str]
    ended: bool
    created_s: float

    @property
    def baseline(self) -> str:
        """The arm everything is compared with."""
        return str(self.config["compare"]["baseline"])

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms in the order of the config, the A/A slot left out."""
        return tuple(self.config["arms"])

    def done(self) -> set[tuple[str, int]]:
        """(arm, block) pairs that are recorded."""
        return {(arm, block.block) for arm, blocks in self.blocks.items() for block in blocks}


class RecordLog:
    """The writer of a run's folder; one process at a time, each append synced to disk.

    Opening cuts off a half-written last line, which only an interrupted append can leave (``repaired``), and
    refuses any other damage, so nothing already stored is lost.

    Raises:
        ValueError: the folder holds another config's records or damaged ones, or another run is using it.
        OSError: the folder cannot be created or written.
    """

    def __init__(self, out_dir: Path, header: Mapping[str, Any]) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        self._path = out_dir / RECORDS_FILE
        self._steps_path = out_dir / STEPS_FILE
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"{out_dir} is in use by another run; wait for it or choose another -o"
            ) from None
        try:
            if not check_config(out_dir, str(header["config_digest"])):
                self._start_anew(out_dir)
            torn = [_cut_torn_line(path) for path in (self._path, self._steps_path)]
            self.repaired = any(torn)
            self._file.seek(0, os.SEEK_END)
            if self._file.tell() == 0:
                self.append([{"kind": "run", **header}])
        except BaseException:
            self._file.close()
            raise

    def _start_anew(self, out_dir: Path) -> None:
        """Drop what an attempt left that never finished a block, such as one with a mistake in its config.

        Files of these names in a folder without records are somebody else's.
        """
        others = [out_dir / name for name in (STEPS_FILE, ENVIRONMENT_FILE, CONFIG_FILE, REPORT_FILE)]
        if self._path.stat().st_size == 0:
            foreign = next((path for path in others if path.exists()), None)
            if foreign is not None:
                self._path.unlink()
                raise ValueError(f"{foreign} exists and is not of a run; choose another -o")
        self._file.truncate(0)
        for path in others:
            path.unlink(missing_ok=True)

    def append(self, records: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write lines in one append: the steps first, so that a ``block`` line implies its steps."""
        step_lines = "".join(_line(step) for step in steps)
        if step_lines:
            with self._steps_path.open("ab") as file:
                _write_all(file.fileno(), step_lines.encode())
        lines = "".join(_line({"v": SCHEMA_VERSION, **record}) for record in records)
        _write_all(self._file.fileno(), lines.encode())

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()


def check_config(out_dir: Path, digest: str) -> bool:
    """Whether the folder's records are of this config; False for a folder without any block.

    Raises:
        ValueError: it holds blocks of another config.
    """
    path = out_dir / RECORDS_FILE
    if not path.exists() or path.stat().st_size == 0:
        return False
    lines = _read_lines(path, torn_end=True)
    stored = lines[0].get("config_digest") if lines else None
    if stored == digest:
        return True
    if any(line.get("kind") == "block" for line in lines):
        raise ValueError(
            f"{out_dir} holds records of another config (digest {str(stored)[:12]}...); choose another -o"
        )
    return False


def read_records(out_dir: str | Path) -> Records:
    """Read a run's folder.

    Samples and steps of a block without its ``block`` line are ignored.

    Args:
        out_dir: the folder, or its ``records.jsonl``.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: a line is damaged (named by its number), cut off, or of another schema version.
    """
    folder = Path(out_dir)
    if folder.is_file():
        folder = folder.parent
    path = folder / RECORDS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORDS_FILE}: not the folder of a run")
    lines = _read_lines(path)
    if not lines or lines[0].get("kind") != "run":
        raise ValueError(f"{path}: the first line is not a run header; the file is empty or truncated")
    header = lines[0]
    blocks: dict[tuple[str, int], BlockRecord] = {}
    samples: dict[tuple[str, int], list[SampleRecord]] = {}
    arms: dict[str, ArmRecord] = {}
    failures: dict[str, str] = {}
    pending: list[SampleRecord] = []
    for line in lines[1:]:
        kind, key = line.get("kind"), (str(line.get("arm")), int(line.get("block") or 0))
        if kind == "sample":
            pending.append(_build(SampleRecord, line))
            continue
        # A block's samples stand directly before it; others are of an append that was cut short.
        own, pending = pending, []
        if kind == "block":
            if key in blocks:
                raise ValueError(f"{path}: block {key[1]} of arm {key[0]!r} is recorded twice")
            blocks[key] = _build(BlockRecord, line)
            samples[key] = [sample for sample in own if (sample.arm, sample.block) == key]
        elif kind == "arm":
            arms[key[0]] = _build(ArmRecord, line)
        elif kind == "failure":
            failures[key[0]] = str(line["message"])
    slots = tuple(header["slots"])
    num_blocks = int(header["blocks"])
    by_arm = {arm: [blocks[arm, b] for b in range(num_blocks) if (arm, b) in blocks] for arm in slots}
    return Records(
        path=folder,
        config=header["config"],
        config_digest=str(header["config_digest"]),
        workload=str(header["workload"]),
        work_unit=str(header["work_unit"]),
        axes=tuple(Axis(**axis) for axis in header["axes"]),
        num_blocks=num_blocks,
        items_per_block=int(header["items_per_block"]),
        left_out=int(header["left_out"]),
        slots=slots,
        environment=_read_environment(folder),
        arms=arms,
        blocks=by_arm,
        samples={arm: [s for block in by_arm[arm] for s in samples[arm, block.block]] for arm in slots},
        steps=_read_steps(folder / STEPS_FILE, set(blocks)),
        failures={arm: text for arm, text in failures.items() if len(by_arm.get(arm, [])) < num_blocks},
        ended=any(line.get("kind") == "end" for line in lines),
        created_s=float(header["created_s"]),
    )


def check_item_ids(ids: Mapping[str, Sequence[str]]) -> None:
    """Every arm must have the same item ids in the same order.

    Raises:
        ValueError: naming the first two arms that differ, how many ids each has alone, and an example.
    """
    arms = list(ids)
    for other in arms[1:]:
        first, second = ids[arms[0]], ids[other]
        if list(first) == list(second):
            continue
        only_first, only_second = sorted(set(first) - set(second)), sorted(set(second) - set(first))
        if not only_first and not only_second:
            raise ValueError(f"item ids come in another order in {other!r} than in {arms[0]!r}")
        parts = [
            f"{len(only)} only in {arm!r}{f' (e.g. {only[0]!r})' if only else ''}"
            for arm, only in ((arms[0], only_first), (other, only_second))
        ]
        raise ValueError(f"item ids differ between arms: {', '.join(parts)}")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal: the identity of an output."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def step_from_json(data: Mapping[str, Any]) -> StepRecord:
    """A StepRecord from its JSON form, whose layer numbers are strings."""
    fields = {key: value for key, value in data.items() if key not in {"v", "arm", "block"}}
    for name in ("experts_touched", "experts_loaded"):
        if fields.get(name) is not None:
            fields[name] = {int(layer): int(count) for layer, count in fields[name].items()}
    windowed = fields.get("windowed") or {}
    fields["windowed"] = {int(window): tuple(counts) for window, counts in windowed.items()}
    return StepRecord(**fields)


def _read_steps(path: Path, recorded: set[tuple[str, int]]) -> dict[tuple[str, int], list[StepRecord]]:
    """Steps of recorded blocks; where a killed attempt left some, only the last attempt's count."""
    steps: dict[tuple[str, int], list[StepRecord]] = {}
    attempts: dict[tuple[str, int], str] = {}
    for line in _read_lines(path) if path.is_file() else []:
        key = (str(line["arm"]), int(line["block"]))
        if key not in recorded:
            continue
        attempt = str(line.pop("attempt", ""))
        if attempts.get(key) != attempt:
            attempts[key] = attempt
            steps[key] = []
        steps[key].append(step_from_json(line))
    return steps


def _read_environment(folder: Path) -> dict[str, Any]:
    path = folder / ENVIRONMENT_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _read_lines(path: Path, *, torn_end: bool = False) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    if lines.pop() and not torn_end:
        raise ValueError(
            f"{path}: line {len(lines) + 1} is cut off, the run was interrupted there; `moecap run` with the "
            "same config and folder resumes it"
        )
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(
            f"{path}: line {number} is damaged (not JSON); restore the file or start anew"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: line {number} is not a record")
    if record.get("v", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ValueError(f"{path}: line {number} has schema version {record['v']}, this is {SCHEMA_VERSION}")
    return record


def _build(cls: type[Any], line: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in line.items() if key in names})


def _cut_torn_line(path: Path) -> bool:
    """Drop what follows the last newline, if the lines before it are whole; whether there was something."""
    if not path.exists():
        return False
    content = path.read_bytes()
    _read_lines(path, torn_end=True)
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
    return complete < len(content)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)

"""Run a configuration: arms in processes of their own, interleaved in balanced blocks, all recorded."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moecap_eval.arm_process import ArmFailure, ArmProcess
from moecap_eval.axes import run_axes
from moecap_eval.config import AA_SUFFIX, RunConfig
from moecap_eval.environment import (
    collect_environment,
    measure_in_subprocess,
    profile_json,
    write_environment,
)
from moecap_eval.memory import check_memory
from moecap_eval.records import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RecordLog,
    check_config,
    check_item_ids,
    read_records,
)
from moecap_eval.registry import load_workload

if TYPE_CHECKING:
    from moecap_eval.hardware import HardwareProfile
    from moecap_eval.hardware.energy import EnergyMeter

PEAK_SECONDS = 2.0


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: recorded blocks by arm (A/A slot included) and the message of each failed arm."""

    out_dir: Path
    completed: dict[str, int]
    failed: dict[str, str]
    left_out: int


@dataclass(frozen=True)
class Progress:
    """One event for whoever shows progress: slots done and in all, the arm at work, what it does."""

    done: int
    total: int
    arm: str
    phase: str


ProgressCallback = Callable[[Progress], None]


def block_order(arms: Sequence[str], blocks: int, seed: int) -> list[tuple[str, ...]]:
    """The order of arms in each block: blocks 2i and 2i+1 are a seeded permutation and its reverse.

    So of each pair of arms, each comes first in exactly half of the blocks, and a drift that is linear over a
    pair of blocks cancels.

    Raises:
        ValueError: ``blocks`` is odd.
    """
    if blocks % 2:
        raise ValueError(f"compare.blocks must be even, got {blocks}")
    generator = random.Random(seed)
    order: list[tuple[str, ...]] = []
    for _ in range(blocks // 2):
        permutation = tuple(generator.sample(list(arms), len(arms)))
        order += [permutation, permutation[::-1]]
    return order


def run(
    config: RunConfig,
    out_dir: str | Path,
    *,
    arms: Sequence[str] | None = None,
    limit: int | None = None,
    progress: ProgressCallback | None = None,
) -> RunSummary:
    """Run what is still missing in ``out_dir`` and record it; a finished folder is left as it is.

    Args:
        config: from ``load_config`` or ``parse_config``.
        out_dir: made if needed; a folder with records of the same config is resumed.
        arms: only these arms, the baseline among them.
        limit: at most so many items (at least 2); blocks fall to an even number that fits.
        progress: called before and after each step.

    Returns:
        recorded blocks by arm, and failed arms with their messages.

    Raises:
        ValueError: config, workload, arm option or folder at fault; nothing stored has been touched.
        OSError: a folder cannot be read or written.
    """
    config = config.restricted(arms, limit)
    folder = Path(out_dir)
    workload = load_workload(config.workload)
    axes = run_axes(workload, config.compare.margins, config.workload_params)
    items = workload.items(config.workload_params, config.seed)[: config.limit]
    ids = [item.id for item in items]
    if len(set(ids)) != len(ids):
        raise ValueError(f"workload {config.workload}: item ids are not unique")
    blocks = config.compare.blocks
    if len(ids) < blocks:
        raise ValueError(f"{blocks} blocks need at least {blocks} items, got {len(ids)}")
    profile = _load_profile(config)
    check_config(folder, config.digest)
    shortage = None if profile.fast_tier == "hbm" else check_memory(config)
    if shortage:
        raise ValueError(shortage)
    header = {
        "config_digest": config.digest,
        "config": config.content,
        "workload": config.workload,
        "work_unit": workload.work_unit,
        "axes": [asdict(axis) for axis in axes],
        "slots": config.slots,
        "blocks": blocks,
        "items_per_block": len(ids) // blocks,
        "left_out": len(ids) % blocks,
        "created_s": round(time.time(), 3),
    }
    with RecordLog(folder, header) as log:
        _Run(config, folder, log, ids, profile, progress or (lambda event: None)).execute()
    records = read_records(folder)
    return RunSummary(
        out_dir=folder,
        completed={slot: len(done) for slot, done in records.blocks.items()},
        failed=dict(records.failures),
        left_out=records.left_out,
    )


def _load_profile(config: RunConfig) -> HardwareProfile:
    from moecap_eval.hardware import load_hardware

    return load_hardware(config.hardware.profile)


@dataclass
class _Run:
    """One process's share of a run: from what is recorded to what is missing."""

    config: RunConfig
    folder: Path
    log: RecordLog
    ids: list[str]
    profile: HardwareProfile
    progress: ProgressCallback
    processes: dict[str, ArmProcess] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    arm_ids: dict[str, list[str]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    done: int = 0
    total: int = 0
    created_s: float = 0.0
    attempt: str = field(default_factory=lambda: f"{time.time_ns():x}")
    environment: dict[str, Any] = field(default_factory=dict)

    def execute(self) -> None:
        if self.log.repaired:
            self._tell("", "the last record was cut short by an interruption; its block runs again")
        records = read_records(self.folder)
        recorded = records.done()
        order = block_order(self.config.slots, self.config.compare.blocks, self.config.seed)
        todo = [(block, slot, arm) for block, arms in enumerate(order) for slot, arm in enumerate(arms)]
        missing = [entry for entry in todo if (entry[2], entry[0]) not in recorded]
        self.total, self.done = len(todo), len(todo) - len(missing)
        if not missing:
            return
        self.created_s = records.created_s
        self.environment = dict(records.environment) or self._new_environment()
        self.meter = self._meter()
        with ExitStack() as stack:
            stack.callback(self._kill_all)
            if self.config.compare.keep_alive:
                self._open_all({_process_of(arm) for _, _, arm in missing})
            for position, (block, slot, arm) in enumerate(missing):
                self._run_slot(block, slot, arm)
                following = missing[position + 1][2] if position + 1 < len(missing) else None
                if not self.config.compare.keep_alive and following != arm:
                    self._close_unless(following)
            self._close_unless(None)
        self.log.append([{"kind": "end", "failed": sorted(self.failed)}])

    def _new_environment(self) -> dict[str, Any]:
        """Describe the machine, measure its peaks if asked to, and store both with the config."""
        environment = collect_environment()
        environment["hardware"] = profile_json(self.profile)
        environment["peaks_used"] = self.config.hardware.peaks
        environment["measured_peaks"] = None
        if self.config.hardware.peaks == "measured":
            self._tell("", "measuring the machine's peaks")
            try:
                environment["measured_peaks"] = measure_in_subprocess(self._device(), PEAK_SECONDS)
            except RuntimeError as error:
                raise ValueError(f"{error}; set hardware.peaks: spec to use the profile's") from None
        write_environment(self.folder / ENVIRONMENT_FILE, environment)
        text = yaml.safe_dump(dict(self.config.content), sort_keys=False, allow_unicode=True)
        (self.folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        return environment

    def _device(self) -> str:
        return "cuda" if self.profile.fast_tier == "hbm" else "cpu"

    def _meter(self) -> EnergyMeter:
        """The machine's meter; a stated power counts as one only where the config prices none itself."""
        from moecap_eval.hardware.energy import open_meter

        stated = self.profile.tdp_w if self.config.cost.watts == 0 else None
        return open_meter(None if stated is None else stated.value)

    def _open_all(self, names: set[str]) -> None:
        """Open arms in the order of the config; the first one's user error ends the run before any block."""
        for arm in self.config.arms:
            if arm.name in names:
                self._open(arm.name)

    def _open(self, name: str) -> None:
        """Start, open and warm up an arm; a failure is recorded and the arm is out of the run.

        Raises:
            ValueError: an option or a path of the arm is wrong, or its items differ from another arm's.
        """
        self._tell(name, "starting")
        arm = next(arm for arm in self.config.arms if arm.name == name)
        timeout_s = self.config.compare.timeout_s
        process = ArmProcess(name, self.folder / "logs" / f"{name}.txt")
        self.processes[name] = process
        try:
            opened = process.ask(
                {
                    "command": "open",
                    "workload": self.config.workload,
                    "arm": {"name": arm.name, "options": dict(arm.options)},
                    "params": self.config.workload_params,
                    "seed": self.config.seed,
                    "limit": self.config.limit,
                    "out_dir": str(self.folder.resolve()),
                    "profile": self.config.hardware.profile,
                    "peaks": self.environment["measured_peaks"],
                    "peaks_date": self.environment["date"],
                },
                timeout_s,
            )
            self.arm_ids[name] = list(opened["items"])
            check_item_ids({**self.arm_ids})
            self._tell(name, "warming up")
            size = len(self.ids) // self.config.compare.blocks
            times = self.config.compare.warm_up
            ready = process.ask({"command": "warm_up", "start": 0, "stop": size, "times": times}, timeout_s)
        except ArmFailure as failure:
            if failure.user_error:
                raise ValueError(f"arms.{name}: {failure}") from None
            self._fail(name, 0, failure)
            return
        self.memory[name] = ready["memory_bytes"]
        self.config.cost.usd(
            1.0, None, self.memory[name] or None
        )  # refuse "used" without use before any block
        self.log.append(
            [
                {
                    "kind": "arm",
                    "arm": name,
                    "startup_s": opened["startup_s"],
                    "memory_bytes": ready["memory_bytes"],
                    "facts": ready["facts"],
                }
            ]
        )

    def _run_slot(self, block: int, slot: int, arm: str) -> None:
        name = _process_of(arm)
        if name in self.failed:
            return
        if name not in self.processes:
            self._open(name)
            if name in self.failed:
                return
        self._tell(arm, f"block {block + 1} of {self.config.compare.blocks}")
        size = len(self.ids) // self.config.compare.blocks
        command = {"command": "run", "start": block * size, "stop": (block + 1) * size}
        started_s = time.time() - self.created_s
        process, timeout_s = self.processes[name], self.config.compare.timeout_s
        self.meter.begin()
        try:
            try:
                process.ask(command, timeout_s)
            finally:
                energy = self.meter.end()
            reply = process.ask({"command": "collect"}, timeout_s)
        except ArmFailure as failure:
            self._fail(name, block, failure)
            return
        usd = None
        if self.config.has_cost:
            usd = self.config.cost.usd(reply["wall_s"], energy.joules, self.memory[name] or None)
        samples = [{"kind": "sample", "arm": arm, "block": block, **sample} for sample in reply["samples"]]
        record = {
            "kind": "block",
            "arm": arm,
            "block": block,
            "slot": slot,
            "wall_s": reply["wall_s"],
            "work": reply["work"],
            "values": reply["values"],
            "energy_j": energy.joules,
            "energy_source": energy.source,
            "usd": usd,
            "reasons": reply["reasons"],
            "started_s": round(started_s, 3),
        }
        where = {"v": 1, "arm": arm, "block": block, "attempt": self.attempt}
        self.log.append([*samples, record], [{**where, **step} for step in reply["steps"]])
        self.done += 1
        self._tell(arm, f"block {block + 1} of {self.config.compare.blocks} done")

    def _fail(self, name: str, block: int, failure: ArmFailure) -> None:
        self.failed.add(name)
        self.processes.pop(name).kill()
        self.log.append([{"kind": "failure", "arm": name, "block": block, "message": str(failure)}])
        slots = [arm for arm in self.config.slots if _process_of(arm) == name]
        recorded = read_records(self.folder).done()
        lost = [
            (arm, b) for arm in slots for b in range(self.config.compare.blocks) if (arm, b) not in recorded
        ]
        self.total -= len(lost)
        self._tell(name, f"failed: {failure}")

    def _close_unless(self, following: str | None) -> None:
        """Close every arm but the one that works next."""
        keep = None if following is None else _process_of(following)
        for name in [name for name in self.processes if name != keep]:
            self.processes.pop(name).close()

    def _kill_all(self) -> None:
        for process in self.processes.values():
            process.kill()
        self.processes.clear()

    def _tell(self, arm: str, phase: str) -> None:
        self.progress(Progress(self.done, self.total, arm, phase))


def _process_of(arm: str) -> str:
    return arm.removesuffix(AA_SUFFIX)

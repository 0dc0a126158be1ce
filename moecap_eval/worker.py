"""An arm's process: ``python -m moecap_eval.worker COMMAND_FD REPLY_FD``.

Commands and replies are JSON lines over two private pipes, which nothing that the measured library prints
or starts can reach. When the runner dies, however it dies, its end of the command pipe closes and this
process ends together with everything it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moecap_eval.workload import ArmConfig, BlockResult, Item, RunContext, StepRecord, System

USER_ERRORS = (ValueError, OSError, ImportError)


def main(argv: Sequence[str]) -> int:
    """Serve commands until ``close`` or the end of the command pipe."""
    command_fd, reply_fd = int(argv[0]), int(argv[1])
    for descriptor in (command_fd, reply_fd):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(command_fd, commands), daemon=True, name="commands").start()
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        arm = _Arm()
        while True:
            command = commands.get()
            if command["command"] == "close":
                arm.close()
                _reply(replies, {"event": "closed"})
                return 0
            _reply(replies, _answer(arm, command))


def _listen(descriptor: int, commands: queue.Queue[dict[str, Any]]) -> None:
    """Queue commands; at the end of the pipe the runner is gone, so the whole process group goes too."""
    with os.fdopen(descriptor, "r", encoding="utf-8") as pipe:
        for line in pipe:
            commands.put(json.loads(line))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(0), signal.SIGKILL)


def _answer(arm: _Arm, command: Mapping[str, Any]) -> dict[str, Any]:
    """The command's result; any exception becomes an ``error`` event, its traceback goes to the log."""
    try:
        if command["command"] == "open":
            return arm.open(command)
        if command["command"] == "warm_up":
            return arm.warm_up(command)
        return arm.run(command) if command["command"] == "run" else arm.collect()
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        message = " ".join(str(error).split()) or "no message"
        user = isinstance(error, USER_ERRORS) and command["command"] == "open"
        text = message if user else f"{type(error).__name__}: {message}"
        return {"event": "error", "message": text, "user_error": user}


def _reply(pipe: TextIO, message: Mapping[str, Any]) -> None:
    pipe.write(json.dumps(message, ensure_ascii=False, allow_nan=False, default=_to_json) + "\n")
    pipe.flush()


class _Arm:
    """The opened system and its items."""

    def __init__(self) -> None:
        self._system: System | None = None
        self._items: Sequence[Item] = ()
        self._block: tuple[Sequence[Item], float, BlockResult] | None = None

    @property
    def system(self) -> System:
        if self._system is None:
            raise RuntimeError("no arm is open")
        return self._system

    def open(self, command: Mapping[str, Any]) -> dict[str, Any]:
        from moecap_eval.environment import context_hardware
        from moecap_eval.registry import load_workload

        workload = load_workload(command["workload"])
        params, seed = command["params"], command["seed"]
        self._items = workload.items(params, seed)[: command["limit"]]
        context = RunContext(
            seed=seed,
            out_dir=Path(command["out_dir"]),
            hardware=context_hardware(command["profile"], command["peaks"], command["peaks_date"]),
            params=params,
        )
        begin = time.perf_counter()
        self._system = workload.open(ArmConfig(**command["arm"]), context)
        startup_s = time.perf_counter() - begin
        return {"event": "opened", "startup_s": startup_s, "items": [item.id for item in self._items]}

    def warm_up(self, command: Mapping[str, Any]) -> dict[str, Any]:
        items = self._items[command["start"] : command["stop"]]
        for _ in range(command["times"]):
            self.system.warm_up(items)
        return {
            "event": "ready",
            "memory_bytes": {tier: int(size) for tier, size in self.system.memory_bytes().items()},
            "facts": self.system.describe(),
        }

    def run(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Work on a block; what it was is told by ``collect``, when the runner has read its energy meter."""
        items = self._items[command["start"] : command["stop"]]
        begin = self.system.clock()
        result = self.system.run(items)
        self._block = items, self.system.clock() - begin, result
        return {"event": "worked"}

    def collect(self) -> dict[str, Any]:
        if self._block is None:
            raise RuntimeError("no block has been run")
        (items, wall_s, result), self._block = self._block, None
        if result.finish is not None:
            result.finish(result)
        _check(result, items, wall_s)
        values, reasons = _finite(result.values, result.reasons)
        return {
            "event": "block",
            "wall_s": wall_s,
            "work": float(result.work),
            "values": values,
            "reasons": reasons,
            "samples": [
                {
                    "item": sample.item_id,
                    "values": _finite(sample.values, {})[0],
                    "digest": sample.digest,
                    "detail": sample.detail,
                }
                for sample in result.samples
            ],
            "steps": [_step_json(step) for step in result.steps],
        }

    def close(self) -> None:
        if self._system is not None:
            self._system.close()


def _check(result: BlockResult, items: Sequence[Item], wall_s: float) -> None:
    if not (math.isfinite(wall_s) and wall_s > 0):
        raise ValueError(f"the block took {wall_s} s on the system's clock; a positive time is needed")
    if not (math.isfinite(result.work) and result.work > 0):
        raise ValueError(f"the block's work is {result.work}; a positive amount is needed")
    known = {item.id for item in items}
    foreign = [sample.item_id for sample in result.samples if sample.item_id not in known]
    if foreign:
        raise ValueError(f"a sample names item {foreign[0]!r}, which is not in the block")
    if len({sample.item_id for sample in result.samples}) != len(result.samples):
        raise ValueError("an item has two samples in one block")


def _finite(
    values: Mapping[str, float | None], reasons: Mapping[str, str]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values with NaN and infinity replaced by None, and the reasons completed accordingly."""
    clean: dict[str, float | None] = {}
    why = {name: str(reason) for name, reason in reasons.items()}
    for name, value in values.items():
        number = None if value is None else float(value)
        if number is not None and not math.isfinite(number):
            why.setdefault(name, f"the system gave {number}")
            number = None
        clean[name] = number
    return clean, why


def _step_json(step: StepRecord) -> dict[str, Any]:
    return dataclasses.asdict(step)


def _to_json(value: Any) -> Any:
    """NumPy's and torch's values as numbers, mappings and sequences as such, anything else as its text."""
    count = value.numel() if hasattr(value, "numel") else getattr(value, "size", None)
    if count == 1 and hasattr(value, "item"):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence | set | frozenset) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A workload with known effects on a simulated clock: the harness's own test object.

An arm's options say by how much it differs from the plain system; everything else is noise of a known size,
seeded by arm and block, so that the true answer of every comparison is known beforehand.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from moecap_eval.config import unknown_key
from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload

ITEM_S = 0.010
WORK_PER_ITEM = 8.0


@dataclass(frozen=True)
class SyntheticOptions:
    """Effects of an arm.

    ``slowdown`` multiplies the time of every item, ``accuracy`` is the share of right answers, ``noise`` and
    ``latency_noise`` are the standard deviations of the log time of a block and of an item, ``memory_gib`` is
    the memory used, ``sleep_s`` really passes per block; ``fail_in_block`` (counted per process, from 0)
    raises, ``kill_in_block`` kills the process, ``hang_in_block`` never answers.
    """

    slowdown: float = 1.0
    accuracy: float = 0.8
    noise: float = 0.0
    latency_noise: float = 0.0
    memory_gib: float = 4.0
    startup_s: float = 0.0
    sleep_s: float = 0.0
    fail_in_block: int = -1
    kill_in_block: int = -1
    hang_in_block: int = -1


class SyntheticWorkload(Workload):
    """Questions with known answers; params: ``items`` (default 96), ``tasks`` (default 2)."""

    name: ClassVar[str] = "synthetic"
    work_unit: ClassVar[str] = "token"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("exact_match", "accuracy", "share of items", "higher", level="item", margin=0.05, headline=True),
        Axis("latency_s", "performance", "s", "lower", level="item", margin=0.05, headline=True),
        Axis("unknown", "performance", "1", "higher"),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """``<task>/<number>`` with a payload drawn from the seed."""
        known = {"items": 96, "tasks": 2}
        for key in params:
            if key not in known:
                raise ValueError(unknown_key(f"params.{key}", list(known)))
        count, tasks = (int(params.get(key, default)) for key, default in known.items())
        if count < 1 or tasks < 1:
            raise ValueError("params.items and params.tasks must be positive")
        return [Item(f"task{i % tasks}/{i // tasks}", _uniform(seed, "item", i)) for i in range(count)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """The simulated system with the arm's effects."""
        known = [field.name for field in fields(SyntheticOptions)]
        for key in arm.options:
            if key not in known:
                raise ValueError(unknown_key(f"arms.{arm.name}.{key}", known))
        options = SyntheticOptions(**arm.options)
        if not (options.slowdown > 0 and 0 <= options.accuracy <= 1):
            raise ValueError(f"arms.{arm.name}: slowdown must be positive and accuracy in [0, 1]")
        time.sleep(options.startup_s)
        print(f"synthetic arm {arm.name} opened", flush=True)
        return SyntheticSystem(arm.name, options, context.seed)


class SyntheticSystem(System):
    """Advances a clock of its own by what the work would take."""

    def __init__(self, name: str, options: SyntheticOptions, seed: int) -> None:
        self._name = name
        self._options = options
        self._seed = seed
        self._now_s = 0.0
        self._calls: dict[str, int] = {}
        self._block = -1

    def clock(self) -> float:
        """Simulated seconds."""
        return self._now_s

    def warm_up(self, items: Sequence[Item]) -> None:
        """Nothing to warm up."""

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Answer the items; time passes on the simulated clock."""
        options = self._options
        self._block += 1
        time.sleep(options.sleep_s)
        if self._block == options.fail_in_block:
            raise RuntimeError(f"told to fail in block {self._block}")
        if self._block == options.kill_in_block:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._block == options.hang_in_block:
            time.sleep(3600)
        # The second visit to a block (the A/A slot) must not repeat the first one's noise.
        visit = self._calls[items[0].id] = self._calls.get(items[0].id, 0) + 1
        generator = np.random.default_rng(
            np.frombuffer(_digest(self._seed, self._name, items[0].id, visit), dtype=np.uint32)
        )
        block_factor = math.exp(options.noise * generator.standard_normal())
        samples = []
        for item in items:
            factor = math.exp(options.latency_noise * generator.standard_normal())
            latency_s = ITEM_S * options.slowdown * block_factor * factor
            self._now_s += latency_s
            right = float(item.payload) < options.accuracy
            samples.append(
                Sample(
                    item.id,
                    {"exact_match": float(right), "latency_s": latency_s},
                    digest=hashlib.sha256(f"{item.id} {right}".encode()).hexdigest(),
                    detail={"prompt": item.id, "target": "right", "output": "right" if right else "wrong"},
                )
            )
        return BlockResult(
            work=WORK_PER_ITEM * len(items),
            values={"unknown": None},
            samples=samples,
            reasons={"unknown": "this axis is never measured"},
        )

    def memory_bytes(self) -> dict[str, int]:
        """The memory that the options state, as ``dram``."""
        return {"dram": int(self._options.memory_gib * 2**30)}

    def describe(self) -> dict[str, Any]:
        """The options."""
        return {"options": asdict(self._options)}


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()


def _uniform(*parts: object) -> float:
    return int.from_bytes(_digest(*parts)[:8], "little") / 2**64

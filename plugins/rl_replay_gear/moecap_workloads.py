"""The workload ``replay_gear.train``: batches of trajectory windows from one store or another.

Arms: ``{store: gear | torchrl | rows, tier: host | pinned | device}``. ``torchrl`` is TorchRL's memory-mapped
storage with its slice sampler, ``rows`` a plain row gather; both are on the host.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload
from rl_replay_gear.workload_stores import gear_store, row_store, torchrl_store

OPTIONS = {"store": "gear", "tier": "host"}
PARAMS = {
    "access": "dt_windows", "trajectories": 200, "steps": 200, "batch_size": 64, "batches": 8, "items": 8,
}  # fmt: skip
STORES, TIERS = ("gear", "torchrl", "rows"), ("host", "pinned", "device")
ACCESSES = ("dt_windows", "trajectories", "prioritized", "online", "sharded")
CONTEXT, FEATURES = 20, 17
SMALLEST_P = 1e-5


class TrainWorkload(Workload):
    """Each item is a run of batches; ``sampling_law`` is a chi-square test of the trajectories drawn.

    Params: ``access`` (dt_windows, trajectories, prioritized, online, sharded), ``trajectories`` and
    ``steps`` stored, ``batch_size``, ``batches`` an item, ``items``.
    """

    name: ClassVar[str] = "replay_gear.train"
    work_unit: ClassVar[str] = "transition delivered"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("sampling_law", "accuracy", "share passed", "higher", level="item", margin=0.01, headline=True),
        Axis("validation_loss", "accuracy", "mean square", "lower", level="item", margin=0.05),
        Axis("bytes_per_s", "performance", "B/s", "higher", level="item", headline=True),
        Axis("sample_p99_s", "performance", "s", "lower", headline=True),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """One seed a run of batches."""
        count = _known(params, PARAMS, "replay_gear.train")["items"]
        return [Item(f"run-{seed}-{i}", seed * 1000 + i) for i in range(count)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Fill the arm's store."""
        options = _known(arm.options, OPTIONS, f"arm {arm.name!r} of replay_gear.train")
        params = _known(context.params, PARAMS, "replay_gear.train")
        for name, value, known in [
            ("store", options["store"], STORES),
            ("tier", options["tier"], TIERS),
            ("access", params["access"], ACCESSES),
        ]:
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if options["store"] != "gear" and options["tier"] != "host":
            raise ValueError(f"store: {options['store']} has only tier: host")
        if options["store"] != "gear" and params["access"] in ("prioritized", "online", "sharded"):
            raise ValueError(f"access: {params['access']} needs store: gear")
        return _TrainSystem(options, params, context.seed)


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in given:
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown option {key!r} (options: {', '.join(defaults)}){hint}")
    return {**defaults, **given}


class _TrainSystem(System):
    def __init__(self, options: Mapping[str, Any], params: Mapping[str, Any], seed: int) -> None:
        self.options, self.params = options, params
        generator = torch.Generator().manual_seed(seed)
        count, steps = params["trajectories"], params["steps"]
        self.episodes = torch.randn(count, steps, FEATURES, generator=generator)
        self.episodes[..., -1] = torch.arange(count)[:, None]  # which trajectory a row is of
        length = steps if params["access"] == "trajectories" else min(CONTEXT, steps)
        arguments = (self.episodes, length, params["batch_size"])
        if options["store"] == "gear":
            self.store = gear_store(*arguments, access=params["access"], memory=options["tier"])
        else:
            self.store = (torchrl_store if options["store"] == "torchrl" else row_store)(*arguments)

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Deliver the batches of all items."""
        samples, waits = [], []
        for item in items:
            drawn, losses, delivered = [], [], 0
            begin = time.perf_counter()
            for number in range(self.params["batches"]):
                asked = time.perf_counter()
                windows, mask = self.store.fetch(item.payload * 1000 + number)
                waits.append(time.perf_counter() - asked)
                drawn.append(windows[:, -1, -1].cpu())  # the last position always holds a step
                delivered += int(mask.sum())
                losses.append(windows[..., :-1][mask].square().mean())
            seconds = time.perf_counter() - begin
            values: dict[str, float | None] = {
                "sampling_law": float(self._law(torch.cat(drawn))),
                "validation_loss": float(torch.stack(losses).mean()),
                "bytes_per_s": delivered * FEATURES * 4 / seconds,
            }
            samples.append(Sample(item.id, values, detail={"transitions": delivered}))
        work = float(sum(sample.detail["transitions"] for sample in samples))
        return BlockResult(work, {"sample_p99_s": float(np.quantile(waits, 0.99))}, samples)

    def memory_bytes(self) -> dict[str, int]:
        """Rows stored, by tier."""
        return {"hbm" if self.options["tier"] == "device" else "dram": self.store.nbytes}

    def describe(self) -> dict[str, Any]:
        """What was opened."""
        return {**self.options, **self.params}

    def close(self) -> None:
        """Remove temporary files."""
        self.store.close()

    def _law(self, which: Tensor) -> bool:
        """Chi-square of the trajectories drawn against the uniform law (all priorities are equal)."""
        counts = np.bincount(which.long().numpy(), minlength=len(self.episodes))
        return bool(stats.chisquare(counts).pvalue > SMALLEST_P)

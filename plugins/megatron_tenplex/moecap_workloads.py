"""The workload ``tenplex.reconfigure``: change the layout of a small job, live or by a checkpoint."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload

OPTIONS = {"method": "live", "from": "tp=2", "to": "pp=2"}
PARAMS = {"workers": 2, "hidden_size": 64, "layers": 4, "steps": 4, "changes": 4, "tolerance": 2e-6}
METHODS = ("live", "checkpoint")


class ReconfigureWorkload(Workload):
    """Each item is one change between two stretches of training.

    Arms: ``{method: live | checkpoint, from: LAYOUT, to: LAYOUT}``. ``loss_continuity`` is 1 where all losses
    after the change lie within ``tolerance`` of a run without it. Params: ``workers`` (processes),
    ``hidden_size`` and ``layers`` of the GPT, ``steps`` before and after, ``changes`` (number of items),
    ``tolerance``.
    """

    name: ClassVar[str] = "tenplex.reconfigure"
    work_unit: ClassVar[str] = "reconfiguration"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("loss_continuity", "accuracy", "0 or 1", "higher", level="item", margin=0.01, headline=True),
        Axis("stall_s", "performance", "s", "lower", level="item", headline=True),
        Axis("moved_over_minimum", "performance", "ratio", "lower", level="item"),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """One data seed a change."""
        count = _known(params, PARAMS, self.name)["changes"]
        return [Item(f"change-{seed}-{index}", seed * 1000 + index) for index in range(count)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Check the arm; workers start with each block."""
        from megatron_tenplex.layout import ParallelConfig

        options = _known(arm.options, OPTIONS, f"arm {arm.name!r} of {self.name}")
        params = _known(context.params, PARAMS, self.name)
        if options["method"] not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {options['method']!r}")
        for name in ("from", "to"):
            layout = ParallelConfig.parse(options[name]).resolve(params["workers"])
            if layout.world_size != params["workers"]:
                raise ValueError(f"{name}: {layout} does not use all {params['workers']} workers")
        return _ReconfigureSystem(options, params)


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Defaults overridden by what is given."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{where}: unknown option {unknown[0]!r}, known: {', '.join(defaults)}")
    return {**defaults, **given}


class _ReconfigureSystem(System):
    def __init__(self, options: dict[str, Any], params: dict[str, Any]) -> None:
        from megatron_tenplex.testing import install_cpu_compat

        self.options, self.params = options, params
        install_cpu_compat()
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Train, change and train again, once for every item, in a world of forked workers."""
        from megatron_tenplex.testing import run_world

        seeds = [item.payload for item in items]
        folder = Path(self._folder.name) / "checkpoint"
        limit = 120.0 + 60.0 * len(items)  # a first checkpoint starts processes that import Megatron
        by_worker = run_world(
            self.params["workers"], _changes, seeds, self.options, self.params, folder, timeout=limit
        )
        rows = next(rows for rows in by_worker if rows)
        samples = [Sample(item.id, row) for item, row in zip(items, rows, strict=True)]
        return BlockResult(work=float(len(items)), samples=samples)

    def close(self) -> None:
        """Remove the checkpoint."""
        self._folder.cleanup()


def _changes(store: Any, worker: int, workers: int, seeds: list[int], *setup: Any) -> list[dict[str, float]]:
    """What one worker measures: one row for each seed."""
    from megatron_tenplex.layout import GPTShape
    from megatron_tenplex.membership import World
    from megatron_tenplex.testing.gpt import GPTJob

    warnings.filterwarnings("ignore")
    options, params, folder = setup
    world = World(store, worker, workers)
    shape = GPTShape(params["layers"], params["hidden_size"], 4, 128)
    rows = []
    for seed in seeds:
        job = GPTJob(shape, num_samples=50 + seed % 50)
        steady, _, _ = _train(job, world, {**options, "method": "none"}, params["steps"], folder)
        losses, stall, moved = _train(job, world, options, params["steps"], folder)
        gap = max(abs(a - b) for a, b in zip(steady, losses, strict=True))
        row = {"loss_continuity": float(gap <= params["tolerance"]), "stall_s": stall}
        rows.append({**row, **({"moved_over_minimum": moved} if moved is not None else {})})
    return rows


def _train(
    job: Any, world: Any, options: dict[str, Any], steps: int, folder: Path
) -> tuple[list[float], float, float | None]:
    """Losses, seconds of the change, and bytes moved over the lower bound where any have to move."""
    from megatron_tenplex.layout import ParallelConfig
    from megatron_tenplex.planner import lower_bound
    from megatron_tenplex.reconfigure import Reconfigurator
    from megatron_tenplex.testing.checkpoint import load_checkpoint, save_checkpoint

    before, after = (ParallelConfig.parse(options[name]) for name in ("from", "to"))
    elastic = Reconfigurator(job, world=world)
    state = elastic.start(before, resume=False)
    assert state is not None  # every worker has a role: ``open`` checks it
    losses = [job.step(state, elastic.parallel)[0] for _ in range(steps)]
    ratio = None
    source = elastic.gather(elastic.describe())
    started = time.perf_counter()
    if options["method"] == "live":
        state = elastic.reconfigure(after)
    elif options["method"] == "checkpoint":
        save_checkpoint(state, folder)
        small = elastic.gather_small()
        state = elastic.start(after, resume=False)
        assert state is not None
        elastic.describe()  # makes Adam's state, without which describing for a load asserts
        load_checkpoint(state, folder)
        elastic.apply_small(small)
    world.agree(None, "changing the layout")
    assert state is not None
    seconds = time.perf_counter() - started
    if options["method"] == "live":
        moved = sum(world.all_gather_json(elastic.report.received_bytes if elastic.report else 0))
        least = lower_bound(source, elastic.target_layout(), placement=world.members)
        ratio = moved / least if least else None
    losses += [job.step(state, elastic.parallel)[0] for _ in range(steps)]
    return losses, seconds, ratio

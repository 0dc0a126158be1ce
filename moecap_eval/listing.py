"""What there is to choose from: workloads, tasks, hardware profiles, a config's arms."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from moecap_eval.registry import list_workloads, load_workload

BUILT_IN = (
    "moecap_eval.workloads.text_generation:TextGeneration",
    "moecap_eval.workloads.synthetic:SyntheticWorkload",
)


def workloads(config: Path | None = None) -> Iterator[str]:
    """Name, work unit and axes of every registered workload, then those that the harness itself has."""
    entries = {name: entry.value for name, entry in list_workloads().items()}
    if not entries:
        yield "no workload is registered: install a plugin of graft-plugins"
    for name, value in {**entries, **dict.fromkeys(BUILT_IN, "built in")}.items():
        try:
            workload = load_workload(name)
        except ValueError as error:
            yield f"{name}  (cannot be loaded: {error})"
            continue
        axes = ", ".join(axis.name for axis in workload.axes)
        yield f"{name}  work in {workload.work_unit}; axes: {axes}  [{value}]"


def arms(config: Path | None) -> Iterator[str]:
    """The arms of a config with their options, the baseline marked."""
    from moecap_eval.config import load_config

    if config is None:
        raise ValueError("moecap list arms needs a CONFIG")
    loaded = load_config(config)
    for arm in loaded.arms:
        mark = " (baseline)" if arm.name == loaded.compare.baseline else ""
        yield f"{arm.name}{mark}  {json.dumps(dict(arm.options))}"


def hardware(config: Path | None = None) -> Iterator[str]:
    """Every hardware profile with bandwidth and source of its fastest memory."""
    from moecap_eval.hardware import list_profiles, load_hardware

    for name in list_profiles():
        profile = load_hardware(name)
        tier = profile.tiers[profile.fast_tier]
        yield (
            f"{name}  {profile.fast_tier} {tier.bytes / 2**30:.1f} GiB at {tier.bytes_per_s / 1e9:g} GB/s "
            f"({tier.source}, {tier.date})"
        )


def tasks(config: Path | None) -> Iterator[str]:
    """The tasks of a config with their number of items, or the groups that lm_eval knows."""
    if config is None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ValueError(
                "without a CONFIG, tasks are lm_eval's: pip install graft-plugins[eval]"
            ) from None
        yield from (f"lm_eval:{name}" for name in sorted(TaskManager().all_groups))
        return
    from moecap_eval.config import load_config

    loaded = load_config(config)
    items = load_workload(loaded.workload).items(loaded.workload_params, loaded.seed)
    counts = Counter(item.id.partition("/")[0] for item in items[: loaded.limit])
    yield from (f"{name}  {count} items" for name, count in counts.items())


def export_task(task: str, folder: str) -> str:
    """Write an lm_eval generation task as JSONL files; returns a line that names them."""
    from moecap_eval.tasks.lm_eval_bridge import export_jsonl

    paths = export_jsonl(task.removeprefix("lm_eval:"), folder)
    return f"written: {', '.join(str(path) for path in paths)}"


LISTS: dict[str, Callable[[Path | None], Iterator[str]]] = {
    "workloads": workloads,
    "tasks": tasks,
    "hardware": hardware,
    "arms": arms,
}

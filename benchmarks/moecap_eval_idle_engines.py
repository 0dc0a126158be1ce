"""Do engines that wait for their turn slow down the one that works, as `compare.keep_alive` lets them?

    python benchmarks/moecap_eval_idle_engines.py [--out DIR] [--repeats 16] [--engines 3]

One engine on examples/tiny_moe answers the same block again and again, in turn beside idle engines in
processes of their own and with these stopped (SIGSTOP), which leaves their memory where it is. A third arm
repeats the second one as control.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import RESULTS, Headline, write_result
from moecap_eval import ArmConfig, RunContext, load_hardware, paired_ratio
from moecap_eval.arm_process import ArmProcess
from moecap_eval.workloads.text_generation import TextGeneration

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny_moe"
PARAMS = {
    "model": str(EXAMPLE / "model"),
    "tasks": str(EXAMPLE / "tasks"),
    "limit": 48,
    "max_new_tokens": 12,
    "concurrency": 4,
    "threads": 1,
}
SEED = 7
ARMS = {"stopped": signal.SIGSTOP, "idle": signal.SIGCONT, "stopped again": signal.SIGSTOP}


def open_idle(name: str, folder: Path) -> ArmProcess:
    """An engine that has answered once and waits, as an arm does between its blocks."""
    process = ArmProcess(name, folder / f"{name}.txt")
    process.ask(
        {
            "command": "open",
            "workload": "moecap_eval.workloads.text_generation:TextGeneration",
            "arm": {"name": name, "options": {}},
            "params": PARAMS,
            "seed": SEED,
            "limit": None,
            "out_dir": str(folder),
            "profile": "cpu-reference",
            "peaks": None,
            "peaks_date": "",
        },
        300.0,
    )
    process.ask({"command": "warm_up", "start": 0, "stop": 6, "times": 1}, 300.0)
    return process


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--engines", type=int, default=3)
    arguments = parser.parse_args()
    workload, context = TextGeneration(), RunContext(SEED, Path(), load_hardware("cpu-reference"), PARAMS)
    items = workload.items(PARAMS, SEED)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    used: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        idle = [open_idle(f"idle-{number}", Path(name)) for number in range(arguments.engines)]
        try:
            system = workload.open(ArmConfig("working"), context)
            for turn in range(arguments.repeats + 1):
                for arm in list(ARMS)[turn % 3 :] + list(ARMS)[: turn % 3]:
                    for process in idle:
                        os.killpg(process.pid, ARMS[arm])
                    before, begin = sum(processor_seconds(p.pid) for p in idle), time.perf_counter()
                    start = system.clock()
                    system.run(items)
                    block_s = system.clock() - start
                    share = sum(processor_seconds(p.pid) for p in idle) - before
                    if turn:  # the first turn warms up
                        seconds[arm].append(block_s)
                        used += [share / (time.perf_counter() - begin)] if arm == "idle" else []
        finally:
            for process in idle:
                os.killpg(process.pid, signal.SIGCONT)
                process.kill()
    cost = paired_ratio(seconds["stopped"], seconds["idle"])
    control = paired_ratio(seconds["stopped"], seconds["stopped again"])
    write_result(
        "moecap_eval_idle_engines",
        question="Do engines that wait for their turn slow down the one that works?",
        headline=[
            Headline(
                f"time of a block beside {arguments.engines} idle engines, over the same with them stopped",
                cost.value,
                "x",
                cost.low,
                cost.high,
                target="within 1 %",
                note=f"median block {statistics.median(seconds['stopped']):.2f} s",
            ),
            Headline("the same, stopped against itself", control.value, "x", control.low, control.high),
            Headline(
                "processor time that all idle engines use",
                statistics.mean(used),
                "cores",
                min(used),
                max(used),
            ),
        ],
        samples=seconds,
        folder=arguments.out,
    )
    print(cost, control, statistics.mean(used), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long does the quickstart take after installation, and what does it find?

    python benchmarks/moecap_eval_quickstart.py [--out DIR]

Runs ``moecap run examples/quickstart.yaml`` in a fresh folder, as a user would.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result
from moecap_eval import compare, read_records

CONFIG = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"
QUOTED = ("throughput", "expert_memory_bytes", "exact_match")
GOAL_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "quickstart"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "moecap_eval", "run", CONFIG, "-o", folder], check=True)
        seconds = time.perf_counter() - start
        records = read_records(folder)
        comparison = compare(records)
    headline = [Headline("wall time", seconds, "s", target=f"<= {GOAL_S}")]
    for arm, (same, total) in comparison.identical_outputs.items():
        what = f"{arm}: outputs identical to plain vLLM"
        headline.append(Headline(what, same, f"of {total}", target=str(total)))
    for row in comparison.rows:
        if row.axis in QUOTED and row.estimate is not None:
            low, high = row.estimate.low, row.estimate.high
            unit = "x of plain" if row.effect == "ratio" else "difference"
            note = f"verdict {row.verdict}"
            headline.append(
                Headline(f"{row.arm}: {row.axis}", row.estimate.value, unit, low, high, note=note)
            )
    control = comparison.aa_control["throughput"]
    headline.append(
        Headline("plain against itself: throughput", control.value, "x", control.low, control.high)
    )
    for arm in comparison.identical_outputs:
        steps = (step for (name, _), block in records.steps.items() if name == arm for step in block)
        moved = sum(sum(step.moved_bytes.values()) for step in steps)
        headline.append(Headline(f"{arm}: moved between tiers", moved / 2**20, "MiB"))
    write_result(
        "moecap_eval_quickstart",
        question="How long does the quickstart take after installation, and what does it find?",
        headline=headline,
        samples={arm: [block.wall_s for block in blocks] for arm, blocks in records.blocks.items()},
        folder=arguments.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

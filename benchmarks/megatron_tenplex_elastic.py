"""A job under torchrun elastic in which a host dies and two join: is its loss curve the uninterrupted one?

python benchmarks/megatron_tenplex_elastic.py [--reuse FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import groupby, pairwise
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tenplex_elastic.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reuse", type=Path, help="what the example's --demo has written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.reuse is None:
            subprocess.run([sys.executable, str(EXAMPLE), "--demo", folder], check=True)
        content = json.loads(((options.reuse or Path(folder)) / "elastic.json").read_text())
    elastic = content["elastic"]
    runs = [(name, list(rows)) for name, rows in groupby(elastic, key=lambda row: row["layout"])]
    segments = [
        {"layout": name, "first": rows[0]["iteration"], "last": rows[-1]["iteration"]} for name, rows in runs
    ]
    gaps = [after[0]["time"] - before[-1]["time"] for (_, before), (_, after) in pairwise(runs)]
    write_result(
        "megatron_tenplex_elastic",
        question="Does the loss curve of a job whose hosts die and join lie on the uninterrupted one?",
        headline=[
            Headline(
                f"largest loss difference over {len(elastic)} steps",
                content["largest_loss_difference"],
                "nats",
                target="2e-6",
                note=" -> ".join(f"{s['layout']} ({s['first']} to {s['last']})" for s in segments),
            ),
            Headline(
                "from the last step before to the first after a change of hosts",
                max(gaps),
                "s",
                min(gaps),
                max(gaps),
                note="torchrun's restart and Megatron's import included; two shared cores",
            ),
        ],
        samples={
            "elastic": [row["loss"] for row in elastic],
            "uninterrupted": [row["loss"] for row in content["uninterrupted"]],
        },
        segments=segments,
    )


if __name__ == "__main__":
    main()

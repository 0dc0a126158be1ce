"""Run CPU benchmarks and make RESULTS.md from every result file.

python -m benchmarks                        all that need no GPU, then RESULTS.md
python -m benchmarks --only 'spe_layers_*'  some of them
python -m benchmarks --page                 RESULTS.md alone, from the results that are there
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.common import RESULTS

HERE = Path(__file__).resolve().parent

PAGE = """\
# Results

Made by `python -m benchmarks --page` from `results/*.json`, where the raw samples are. Intervals are those
of the file; a target is quoted whether it was met or not.
{% for name, result in results %}
## {{ name }}

{{ result.question }}

`{{ result.command }}` · {{ result.date }} · {{ result | machine }}

| what | figure | interval | target | note |
|---|---:|---|---|---|
{% for row in result.headline -%}
| {{ row.what }} | {{ row | figure }} | {{ row | interval }} | {{ row.target }} | {{ row.note }} |
{% endfor -%}
{% endfor -%}
"""


def short(value: float) -> str:
    """Four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def figure(row: Mapping[str, Any]) -> str:
    """The value with its unit, or the word unknown."""
    return "unknown" if row["value"] is None else f"{short(row['value'])} {row['unit']}".strip()


def interval(row: Mapping[str, Any]) -> str:
    """``low to high``, or nothing where there is none."""
    low, high = row.get("low"), row.get("high")
    return "" if low is None or high is None else f"{short(low)} to {short(high)}"


def machine(result: Mapping[str, Any]) -> str:
    """Hardware and the versions that matter, in one line."""
    hardware, versions = result["hardware"], result["versions"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return ", ".join([where, *(f"{name} {number}" for name, number in versions.items())])


def page(folder: Path = RESULTS) -> str:
    """The text of RESULTS.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters.update(figure=figure, interval=interval, machine=machine)
    results = [(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return environment.from_string(PAGE).render(results=results)


def main() -> int:
    """Run what was asked for; the exit code says whether every benchmark ran."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to run (shell pattern)")
    parser.add_argument("--page", action="store_true", help="run nothing, only make RESULTS.md")
    options = parser.parse_args()
    # The other files here are parts that benchmarks share.
    scripts = (path for path in HERE.glob("*.py") if path.stem != "__main__")
    names = sorted(path.stem for path in scripts if '__name__ == "__main__"' in path.read_text())
    chosen = [n for n in names if fnmatch.fnmatch(n, options.only) and "gpu" not in n.split("_")]
    if not options.page and not chosen:
        parser.error(f"no benchmark matches {options.only!r} (there are: {', '.join(names)})")
    failed = []
    for name in [] if options.page else chosen:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode:
            failed.append(name)
    (HERE / "RESULTS.md").write_text(page())
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

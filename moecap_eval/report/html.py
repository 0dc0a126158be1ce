"""One offline HTML file from a run's records, the same byte for byte whenever it is made again."""

from __future__ import annotations

import base64
import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import jinja2

from moecap_eval.comparison import Comparison, compare
from moecap_eval.records import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RECORDS_FILE,
    REPORT_FILE,
    STEPS_FILE,
    Records,
    read_records,
)
from moecap_eval.report import axis_table, money, sections
from moecap_eval.report.narrative import recommend, tell

EMBED_UP_TO_BYTES = 8 * 2**20


def write_report(out_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run's folder.

    Args:
        out_dir: the folder, or its ``records.jsonl``.
        path: the file to write; default ``report.html`` in the folder.

    Returns:
        the file's path.

    Raises:
        FileNotFoundError, ValueError: as ``read_records`` and ``compare``; nothing has been written then.
        OSError: the file cannot be written.
    """
    records = read_records(out_dir)
    target = Path(path) if path is not None else records.path / REPORT_FILE
    text = render_report(records, compare(records))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder: create it, or choose another -o")
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def render_report(records: Records, comparison: Comparison) -> str:
    """The report's HTML: no external reference, no script, nothing that depends on when it is made."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moecap_eval.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(**_context(records, comparison))


def _context(records: Records, comparison: Comparison) -> dict[str, Any]:
    return {
        "name": records.config["name"],
        "workload": records.workload,
        "work_unit": records.work_unit,
        "facts": sections.facts(records, comparison),
        "comparison": comparison,
        "styles": sections.styles(records, comparison),
        "advice": recommend(comparison),
        "stories": [tell(comparison, arm) for arm in comparison.arms],
        "control": sections.control_sentence(comparison),
        "radar": sections.radar_figure(records, comparison),
        "forests": sections.forest_figures(records, comparison),
        "axis_blocks": axis_table.axis_blocks(records, comparison),
        "pareto": sections.pareto_figures(records, comparison),
        "accuracy": sections.accuracy_tasks(records, comparison),
        "utilisation": money.utilisation_tables(records, comparison),
        "cost": money.cost_sheet(records, comparison),
        "timeline": sections.timeline_figure(records, comparison),
        "blocks": sections.block_table(records),
        "environment": money.environment_rows(records),
        "peaks": money.peak_rows(records),
        "signature": sections.signature(records),
        "archive": records_archive(records.path),
    }


def records_archive(folder: Path) -> dict[str, str] | None:
    """The run's files as a base64 tar.gz for embedding, with fixed times and owners; None when too large."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in (CONFIG_FILE, ENVIRONMENT_FILE, RECORDS_FILE, STEPS_FILE):
            path = folder / name
            if not path.is_file():
                continue
            data = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = buffer.getvalue()
    if len(data) > EMBED_UP_TO_BYTES:
        return None
    return {"base64": base64.b64encode(data).decode(), "kib": f"{len(data) / 1024:.0f}"}

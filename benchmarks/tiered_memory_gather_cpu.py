"""The gather on a CPU: compiled loops against the torch twin; tables in huge pages against 4 KiB ones.

python benchmarks/tiered_memory_gather_cpu.py [--out DIR]

The twin makes passes over index tensors. One thread, wall time, both arms in turns. About 40 s, 2 GB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from tiered_memory.arena import PinnedArena  # noqa: E402
from tiered_memory.gather import gather_rows, gather_segments, row_code  # noqa: E402

TABLE_BYTES = 336 << 20
LARGE_TABLE = (2_449_029, 100)  # float32; the features of ogbn-products
BACKENDS = {"loops": "auto", "torch": "torch"}


def segments(count: int, length: int) -> dict[str, Callable[[], Any]]:
    """Random windows of consecutive 112-byte rows of one table."""
    table = torch.randint(0, 1 << 40, (TABLE_BYTES // 112, 14))
    first = torch.randint(0, table.shape[0] - length, (count,))
    full, zero = torch.full_like(first, length), torch.zeros_like(first)
    out = torch.empty(count, length, 14, dtype=torch.int64)
    return {
        name: lambda backend=backend: gather_segments(
            table, first, full, zero, length, out=out, backend=backend
        )
        for name, backend in BACKENDS.items()
    }


def rows(count: int, width: int) -> dict[str, Callable[[], Any]]:
    """Random rows of two tables by a table of codes, as a feature store reads them."""
    table = torch.randint(0, 1 << 40, (TABLE_BYTES // width, width // 8))
    other = table[: table.shape[0] // 2]
    code = row_code(torch.randint(0, 2, (other.shape[0],)), torch.arange(other.shape[0]))
    index = torch.randint(0, code.numel(), (count,))
    out = torch.empty(count, width // 8, dtype=torch.int64)
    return {
        name: lambda backend=backend: gather_rows([table, other], code, index, out=out, backend=backend)
        for name, backend in BACKENDS.items()
    }


def pages(count: int) -> dict[str, Callable[[], Any]]:
    """Random rows of a large table, in an arena's huge pages and in those of torch's allocator."""
    arena = PinnedArena(LARGE_TABLE[0] * LARGE_TABLE[1] * 4, pinned=False)
    tables = {"huge pages": arena.empty(LARGE_TABLE, torch.float32), "torch.empty": torch.empty(LARGE_TABLE)}
    indices = torch.randint(0, LARGE_TABLE[0], (16, count))
    out = torch.empty(count, LARGE_TABLE[1])
    turn = {name: iter(range(1 << 30)) for name in tables}
    for table in tables.values():
        table.fill_(1.0)

    def read(name: str) -> None:
        gather_rows(tables[name], indices[next(turn[name]) % 16], out=out)

    return {name: partial(read, name) for name in tables}


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {}
    for count, length in ((1, 1), (256, 20), (2048, 20), (64, 1000)):
        cases[f"{count} segments of {length} rows of 112 B"] = partial(segments, count, length)
    for width in (64, 400, 1024):
        for count in (256, 2000, 50_000):
            cases[f"{count} rows of {width} B of two tables"] = partial(rows, count, width)
    cases["50000 rows of 400 B of a table of 1 GB"] = partial(pages, 50_000)
    headline, samples = [], {}
    for what, make in cases.items():
        seconds = interleaved(make(), repeats=25, warm_up=2)
        ours, other = seconds
        samples |= {f"{what}: {name}": values for name, values in seconds.items()}
        ratio = sorted(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
        note = ", ".join(
            f"{name} {statistics.median(values) * 1e6:.0f} us" for name, values in seconds.items()
        )
        row = Headline(
            f"speed of {ours} / {other}, {what}", statistics.median(ratio), "x", ratio[2], ratio[-3], "", note
        )
        headline.append(row)
        print(f"{row.what:60s} {row.value:6.2f} x   {note}", flush=True)
    path = write_result(
        "tiered_memory_gather_cpu",
        question="How much faster is the gather on a CPU by compiled loops and from huge pages?",
        headline=headline,
        samples=samples,
        folder=options.out,
    )
    print(path)


if __name__ == "__main__":
    main()

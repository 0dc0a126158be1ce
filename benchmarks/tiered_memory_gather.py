"""How close does the gather come to the links it uses? Pinned memory and HBM, by row width.

python benchmarks/tiered_memory_gather.py [--out DIR] [--quick]

Needs a CUDA device (does nothing without one). Every arm of a row width takes turns in one run; the limits
(pinned copy, device copy) are arms too. About 100 s on an H100, of which half pins the host table.
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
from tiered_memory.gather import gather_rows, gather_segments, peer_access  # noqa: E402

WIDTHS = (64, 128, 256, 400, 512, 1024, 4096)
SWEPT = (64, 128, 400, 512, 4096)
TILES = ((128, 2), (256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8))


def one_program_a_row() -> Callable[..., None]:
    """The plain kernel that the gather is compared with: one program copies one row."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(source, index, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        at = tl.load(index + row)
        values = tl.load(source + at * WIDTH + lane, mask=lane < WIDTH)
        tl.store(out + row * WIDTH + lane, values, mask=lane < WIDTH)

    def run(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        width = source.shape[1]
        kernel[(index.numel(),)](source, index, out, WIDTH=width, BLOCK=triton.next_power_of_2(width))

    return run


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """Several calls in a row, so that launching overlaps with running."""

    def loop() -> None:
        for _ in range(times):
            run()

    return loop


class Measure:
    """Collects rates (bytes per second) of interleaved arms."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.samples: dict[str, list[float]] = {}
        self.rates: dict[str, float] = {}

    def __call__(self, label: str, nbytes: int, arms: dict[str, Callable[[], Any]], calls: int) -> None:
        """Run the arms ``calls`` times in each of the repeats; ``nbytes`` are moved by one call."""
        loops = {name: repeated(arm, calls) for name, arm in arms.items()}
        seconds = interleaved(loops, repeats=self.repeats, synchronize=torch.cuda.synchronize)
        for name, values in seconds.items():
            key = f"{label}: {name}"
            self.samples[key] = [value / calls for value in values]
            self.rates[key] = nbytes / statistics.median(self.samples[key])
            print(f"{key:60s} {self.rates[key] / 1e9:9.1f} GB/s", flush=True)


def random_rows(rows: int, count: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(rows)
    return torch.randint(0, rows, (count,), device="cuda", generator=generator)


def check(source: torch.Tensor, index: torch.Tensor) -> None:
    """The kernel's rows are the twin's."""
    some = index[:4096]
    expected = gather_rows(source.cpu() if source.is_cuda else source, some.cpu(), backend="torch")
    assert torch.equal(gather_rows(source, some).cpu(), expected)


def pinned(measure: Measure, arena: PinnedArena, batch: int) -> None:
    """Rows of a pinned host table against a copy of as many bytes and against gathering on the CPU first."""
    naive = one_program_a_row()
    flat = arena.buffer[: batch // 4 * 4]
    target = torch.empty(flat.numel(), dtype=torch.uint8, device="cuda")
    staging = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
    for width in WIDTHS:
        table = arena.buffer[: arena.nbytes // width * width].view(torch.int32).view(-1, width // 4)
        index = random_rows(table.shape[0], batch // width)
        host_index = index.cpu()
        out = target[: index.numel() * width].view(torch.int32).view(-1, width // 4)
        stage = staging[: index.numel() * width].view(torch.int32).view(-1, width // 4)
        check(table, index)

        def on_cpu(table=table, host_index=host_index, stage=stage, out=out) -> None:
            torch.index_select(table, 0, host_index, out=stage)
            out.copy_(stage, non_blocking=True)
            torch.cuda.synchronize()

        arms = {
            "gather": lambda table=table, index=index, out=out: gather_rows(table, index, out=out),
            "pinned copy": lambda out=out, stage=stage: out.copy_(stage, non_blocking=True),
            "one program a row": lambda table=table, index=index, out=out: naive(table, index, out),
        }
        measure(f"pinned {width} B", out.nbytes, arms, calls=4)
        measure(f"pinned {width} B", out.nbytes, {"CPU index_select + copy": on_cpu}, calls=1)


def segments(measure: Measure, arena: PinnedArena, batch: int) -> None:
    """Windows of consecutive 112-byte rows of a pinned table."""
    table = arena.buffer[: arena.nbytes // 112 * 112].view(torch.float32).view(-1, 28)
    for length in (20, 1000):
        windows = batch // (112 * length)
        first = random_rows(table.shape[0] - length, windows)
        count, shift = torch.full_like(first, length), torch.zeros_like(first)
        out = torch.empty(windows, length, 28, device="cuda")
        flat = torch.empty(out.numel(), pin_memory=True)
        arms = {
            "gather_segments": lambda f=first, c=count, s=shift, o=out, n=length: gather_segments(
                table, f, c, s, n, out=o
            ),
            "pinned copy": lambda o=out, f=flat: o.view(-1).copy_(f, non_blocking=True),
        }
        measure(f"pinned segments of {length} rows", out.nbytes, arms, calls=4)


def hbm(measure: Measure, table_bytes: int, batch: int) -> None:
    """Rows of a table in GPU memory against a device copy and index_select."""
    memory = torch.randint(0, 1 << 30, (table_bytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty(batch // 4, dtype=torch.int32, device="cuda")
    naive = one_program_a_row()
    for width in WIDTHS:
        table = memory[: memory.numel() // (width // 4) * (width // 4)].view(-1, width // 4)
        index = random_rows(table.shape[0], batch // width)
        out = target[: index.numel() * (width // 4)].view(-1, width // 4)
        linear = table[: out.shape[0]]
        check(table, index)
        arms = {
            "gather": lambda table=table, index=index, out=out: gather_rows(table, index, out=out),
            "device copy": lambda out=out, linear=linear: out.copy_(linear),
            "index_select": lambda t=table, i=index, o=out: torch.index_select(t, 0, i, out=o),
            "one program a row": lambda table=table, index=index, out=out: naive(table, index, out),
        }
        measure(f"HBM {width} B", out.nbytes, arms, calls=10)


def sweep(measure: Measure, arena: PinnedArena, table_bytes: int, batch: int) -> None:
    """Units a program moves, and its warps."""
    from tiered_memory import kernels
    from tiered_memory.gather import _unit_views

    device = torch.randint(0, 1 << 30, (table_bytes // 4,), dtype=torch.int32, device="cuda")
    host = arena.buffer.view(torch.int32)
    for place, memory, size in (("pinned", host, batch // 4), ("HBM", device, batch)):
        for width in SWEPT:
            table = memory[: memory.numel() // (width // 4) * (width // 4)].view(-1, width // 4)
            index = random_rows(table.shape[0], size // width)
            out = torch.empty(index.numel(), width // 4, dtype=torch.int32, device="cuda")
            (source, target), unit = _unit_views([table, out])
            arms = {
                f"{block} units, {warps} warps": partial(
                    kernels.gather_rows, [source], index, None, target,
                    skipped=[], unit_bytes=unit, block_units=block, num_warps=warps,
                )
                for block, warps in TILES
            }  # fmt: skip
            measure(f"sweep {place} {width} B", out.nbytes, arms, calls=4)


def peer(measure: Measure, table_bytes: int, batch: int) -> None:
    """Rows of another GPU's memory against a peer copy."""
    memory = torch.randint(0, 1 << 30, (table_bytes // 4,), dtype=torch.int32, device="cuda:1")
    for width in WIDTHS:
        table = memory[: memory.numel() // (width // 4) * (width // 4)].view(-1, width // 4)
        index = random_rows(table.shape[0], batch // width)
        out = torch.empty(index.numel(), width // 4, dtype=torch.int32, device="cuda:0")
        check(table, index)
        arms = {
            "gather": lambda table=table, index=index, out=out: gather_rows(table, index, out=out),
            "peer copy": lambda table=table, out=out: out.copy_(table[: out.shape[0]]),
        }
        measure(f"peer {width} B", out.nbytes, arms, calls=4)


def headline(measure: Measure) -> list[Headline]:
    """Ratios to the limits of the same run."""
    rows = []

    def ratio(what: str, label: str, limit: str, target: str, arm: str = "gather") -> None:
        key, of = f"{label}: {arm}", f"{label}: {limit}"
        if key not in measure.samples:
            return
        pairs = [b / a for a, b in zip(measure.samples[key], measure.samples[of], strict=True)]
        note = f"{measure.rates[key] / 1e9:.1f} of {measure.rates[of] / 1e9:.1f} GB/s"
        rows.append(Headline(what, statistics.median(pairs), "x", min(pairs), max(pairs), target, note))

    for width in WIDTHS:
        aim = ">= 0.85" if width >= 512 else ""
        ratio(
            f"gather from pinned memory / pinned copy, {width} B rows",
            f"pinned {width} B",
            "pinned copy",
            aim,
        )
    ratio(
        "gather from pinned memory / one program a row, 128 B rows",
        "pinned 128 B",
        "one program a row",
        ">= 2",
    )
    for width in WIDTHS:
        aim = ">= 0.7" if width >= 512 else ""
        ratio(f"gather in HBM / device copy, {width} B rows", f"HBM {width} B", "device copy", aim)
        ratio(f"gather in HBM / index_select, {width} B rows", f"HBM {width} B", "index_select", "")
    for length in (20, 1000):
        what, label = f"segments of {length} rows of 112 B / pinned copy", f"pinned segments of {length} rows"
        ratio(what, label, "pinned copy", ">= 0.85" if length == 1000 else "", arm="gather_segments")
    for width in WIDTHS:
        aim = ">= 0.9" if width >= 512 else ">= 0.7" if width == 128 else ""
        ratio(f"gather from a peer / peer copy, {width} B rows", f"peer {width} B", "peer copy", aim)
    return rows


def main() -> None:
    """Measure all links of this machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="small tables, few repeats")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tiered_memory_gather: needs a CUDA device; nothing measured")
        return
    scale = 16 if options.quick else 1
    measure = Measure(3 if options.quick else 7)
    arena = PinnedArena((4 << 30) // scale, pinned=True, threads=8)
    filler = torch.randint(0, 1 << 30, (arena.nbytes // 4,), dtype=torch.int32, device="cuda")
    arena.buffer.view(torch.int32).copy_(filler)
    del filler
    batch = (1 << 28) // scale
    pinned(measure, arena, batch)
    segments(measure, arena, batch)
    hbm(measure, (8 << 30) // scale, (1 << 30) // scale)
    sweep(measure, arena, (8 << 30) // scale, (1 << 30) // scale)
    if torch.cuda.device_count() > 1 and peer_access(0, 1):
        peer(measure, (4 << 30) // scale, (1 << 30) // scale)
    path = write_result(
        "tiered_memory_gather",
        question="How close does the row gather come to the links it uses, by row width?",
        headline=headline(measure),
        samples=measure.samples,
        folder=options.out,
        bytes_per_s=measure.rates,
    )
    print(path)


if __name__ == "__main__":
    main()

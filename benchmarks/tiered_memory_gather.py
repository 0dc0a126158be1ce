"""How close does the gather come to the links it uses? Pinned memory and HBM, by row width.

python benchmarks/tiered_memory_gather.py [--out DIR] [--quick] [--budget SECONDS] [--only STAGE ...]

Needs a CUDA device (does nothing without one). Every arm of a row width takes turns in one run; the limits
(pinned copy, device copy) are arms too. Stages that the budget leaves no time for are left out, and the
result file is written again after each. About 100 s on an H100.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from tiered_memory.arena import PinnedArena  # noqa: E402
from tiered_memory.gather import gather_rows, gather_segments, peer_access  # noqa: E402

WIDTHS = (128, 512, 4096, 1024, 256, 64)
# (units of a block, warps, most programs at once or 0)
DEVICE_SHAPES = (
    (256, 4, 0),
    (512, 4, 0),
    (512, 8, 0),
    (1024, 8, 0),
    (2048, 8, 0),
    (512, 4, 2112),
    (1024, 8, 1056),
)
HOST_SHAPES = ((512, 4, 0), (512, 4, 132), (512, 4, 264), (512, 4, 528), (256, 4, 528), (1024, 4, 264))


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

    def __init__(self, repeats: int, deadline: float = float("inf")) -> None:
        self.repeats = repeats
        self.deadline = deadline
        self.best: dict[str, list[int]] = {}
        self.samples: dict[str, list[float]] = {}
        self.rates: dict[str, float] = {}

    def __call__(
        self, label: str, nbytes: int, arms: dict[str, Callable[[], Any]], calls: int, repeats: int = 0
    ) -> None:
        """Run the arms ``calls`` times in each of the repeats; ``nbytes`` are moved by one call."""
        loops = {name: repeated(arm, calls) for name, arm in arms.items()}
        seconds = interleaved(loops, repeats=repeats or self.repeats, synchronize=torch.cuda.synchronize)
        for name, values in seconds.items():
            key = f"{label}: {name}"
            self.samples[key] = [value / calls for value in values]
            self.rates[key] = nbytes / statistics.median(self.samples[key])
            print(f"{key:60s} {self.rates[key] / 1e9:9.1f} GB/s", flush=True)

    def widths(self, every: tuple[int, ...] = WIDTHS) -> Iterator[int]:
        """Row widths, until the budget is used up."""
        return takewhile(lambda _: time.perf_counter() < self.deadline, every)


def random_rows(rows: int, count: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(rows)
    return torch.randint(0, rows, (count,), device="cuda", generator=generator)


def check(source: torch.Tensor, index: torch.Tensor) -> None:
    """The kernel's rows are the twin's."""
    some = index[:4096]
    expected = torch.index_select(source, 0, some.to(source.device))
    assert torch.equal(gather_rows(source, some).cpu(), expected.cpu())


def in_request_order(table: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """The gather without sorting requests first."""
    from tiered_memory import kernels
    from tiered_memory.gather import _unit_views

    (source, target), unit = _unit_views([table, out])
    return lambda: kernels.gather_rows([source], index, None, target, skipped=[], unit_bytes=unit)


def pinned(measure: Measure, memory: torch.Tensor, batch: int) -> None:
    """Rows of a pinned host table against a copy of as many bytes and against gathering on the CPU first."""
    naive = one_program_a_row()
    target = torch.empty(batch, dtype=torch.uint8, device="cuda")
    staging = torch.empty(batch, dtype=torch.uint8, pin_memory=True)
    for width in measure.widths():
        table = as_rows(memory, width)
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
            "in request order": in_request_order(table, index, out),
            "pinned copy": lambda out=out, stage=stage: out.copy_(stage, non_blocking=True),
        }
        if width in (128, 512):
            arms["one program a row"] = lambda t=table, i=index, o=out: naive(t, i, o)
        measure(f"pinned {width} B", out.nbytes, arms, calls=2)
        if width in (128, 512, 4096):
            measure(f"pinned {width} B", out.nbytes, {"CPU index_select + copy": on_cpu}, calls=1)


def pages(measure: Measure, arena: PinnedArena, batch: int) -> None:
    """Why random rows of a large pinned table are slow: table size, kind of page, order of requests."""
    width = 512
    out = torch.empty(batch // width, width // 4, dtype=torch.int32, device="cuda")
    half = arena.nbytes // 2
    kinds = {
        "arena": arena.buffer[:half],
        "torch pin_memory": torch.empty(half, dtype=torch.uint8, pin_memory=True),
    }
    huge = mmap.mmap(-1, half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    huge.madvise(mmap.MADV_HUGEPAGE)
    kinds["transparent huge pages"] = torch.frombuffer(huge, dtype=torch.uint8)
    kinds["transparent huge pages"].zero_()
    address = kinds["transparent huge pages"].data_ptr()
    registered = torch.cuda.cudart().cudaHostRegister(address, half, 0)
    if int(registered) != 0:
        del kinds["transparent huge pages"]
    for name, memory in kinds.items():
        for share in (8, 1):
            table = as_rows(memory[: half // share], width)
            index = random_rows(table.shape[0], out.shape[0])
            ordered = index.sort().values
            arms = {
                "random": in_request_order(table, index, out),
                "ascending": in_request_order(table, ordered, out),
            }
            measure(f"pages, {name}, table of {half // share >> 20} MiB", out.nbytes, arms, calls=2)
    if int(registered) == 0:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)


def as_rows(memory: torch.Tensor, width: int) -> torch.Tensor:
    """A uint8 buffer as rows of int32."""
    return memory[: memory.numel() // width * width].view(torch.int32).view(-1, width // 4)


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


def hbm(measure: Measure, memory: torch.Tensor, batch: int) -> None:
    """Rows of a table in GPU memory against a device copy and index_select."""
    target = torch.empty(batch // 4, dtype=torch.int32, device="cuda")
    naive = one_program_a_row()
    for width in measure.widths():
        table = as_rows(memory, width)
        index = random_rows(table.shape[0], batch // width)
        out = target[: index.numel() * (width // 4)].view(-1, width // 4)
        linear = table[: out.shape[0]]
        check(table, index)
        arms = {
            "gather": lambda table=table, index=index, out=out: gather_rows(table, index, out=out),
            "device copy": lambda out=out, linear=linear: out.copy_(linear),
            "index_select": lambda t=table, i=index, o=out: torch.index_select(t, 0, i, out=o),
        }
        if width in (128, 512):
            arms["one program a row"] = lambda t=table, i=index, o=out: naive(t, i, o)
        measure(f"HBM {width} B", out.nbytes, arms, calls=5)


def sweep(measure: Measure, memory: torch.Tensor, batch: int, place: str, widths: tuple[int, ...]) -> None:
    """Launch shapes; the best of each width is measured again beside the limits."""
    from tiered_memory import kernels
    from tiered_memory.gather import _unit_views

    for width in measure.widths(widths):
        table = as_rows(memory, width)
        index = random_rows(table.shape[0], batch // width)
        out = torch.empty(index.numel(), width // 4, dtype=torch.int32, device="cuda")
        (source, target), unit = _unit_views([table, out])
        order = index.argsort() if place == "pinned" else None

        arm = partial(
            kernels.gather_rows, [source], index, None, target, skipped=[], unit_bytes=unit, order=order
        )
        shapes = HOST_SHAPES if place == "pinned" else DEVICE_SHAPES
        label = f"sweep {place} {width} B"
        measure(
            label,
            out.nbytes,
            {str(shape): partial(arm, shape=kernels.LaunchShape(*shape)) for shape in shapes},
            calls=2,
            repeats=3,
        )
        best = max(shapes, key=lambda shape: measure.rates[f"{label}: {shape}"])
        print(f"best shape, {place}, {width} B: {best}", flush=True)
        measure.best[f"{place} {width} B"] = list(best)
        if place == "HBM":
            arms = {
                "best shape": partial(arm, shape=kernels.LaunchShape(*best)),
                "device copy": lambda out=out, table=table: out.copy_(table[: out.shape[0]]),
                "index_select": lambda t=table, i=index, o=out: torch.index_select(t, 0, i, out=o),
            }
            measure(f"best {place} {width} B", out.nbytes, arms, calls=5)


def small(measure: Measure, memory: torch.Tensor) -> None:
    """A request so small that only the call itself counts."""
    table = as_rows(memory, 512)
    index = random_rows(table.shape[0], 256)
    out = torch.empty(256, 128, dtype=torch.int32, device="cuda")
    arms = {
        "gather": lambda: gather_rows(table, index, out=out),
        "index_select": lambda: torch.index_select(table, 0, index, out=out),
    }
    measure("256 rows of 512 B in HBM", out.nbytes, arms, calls=100)


def peer(measure: Measure, table_bytes: int, batch: int) -> None:
    """Rows of another GPU's memory against a peer copy."""
    memory = torch.randint(0, 256, (table_bytes,), dtype=torch.uint8, device="cuda:1")
    for width in measure.widths():
        table = as_rows(memory, width)
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
            f"gather from pinned memory / the same in request order, {width} B rows",
            f"pinned {width} B",
            "in request order",
            "",
        )
    for width in (128, 512):
        what = f"gather from pinned memory / one program a row, {width} B rows"
        ratio(what, f"pinned {width} B", "one program a row", ">= 2" if width == 128 else "")
    for width in (128, 512, 4096):
        label = f"pinned {width} B"
        if f"{label}: CPU index_select + copy" in measure.rates:
            value = measure.rates[f"{label}: gather"] / measure.rates[f"{label}: CPU index_select + copy"]
            what = f"gather from pinned memory / index_select on the CPU and copy, {width} B rows"
            rows.append(Headline(what, value, "x", note="medians"))
    for width in WIDTHS:
        aim = ">= 0.7" if width >= 512 else ""
        ratio(f"gather in HBM / device copy, {width} B rows", f"HBM {width} B", "device copy", aim)
        ratio(f"gather in HBM / index_select, {width} B rows", f"HBM {width} B", "index_select", "")
    for kind, size in (("arena", 256), ("arena", 2048), ("transparent huge pages", 2048)):
        label = f"pages, {kind}, table of {size} MiB"
        what = f"pinned rows of 512 B in address order / at random, {kind}, table of {size} MiB"
        ratio(what, label, "random", "", arm="ascending")
    for width in (128, 512, 1024, 4096):
        label = f"best HBM {width} B"
        ratio(
            f"best swept shape in HBM / index_select, {width} B rows", label, "index_select", "", "best shape"
        )
    small_call = "256 rows of 512 B in HBM"
    ratio(f"a call of {small_call}: gather / index_select", small_call, "index_select", "")
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
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all stages")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run, e.g. peer pinned HBM")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tiered_memory_gather: needs a CUDA device; nothing measured")
        return
    began, scale = time.perf_counter(), 16 if options.quick else 1
    measure = Measure(3 if options.quick else 5, began + options.budget)
    arena = PinnedArena((4 << 30) // scale, pinned=True, threads=8)
    memory = torch.randint(0, 256, ((8 << 30) // scale,), dtype=torch.uint8, device="cuda")
    arena.buffer.copy_(memory[: arena.nbytes])
    batch, wide = (1 << 26) // scale, (1 << 30) // scale
    stages: dict[str, Callable[[], None]] = {
        "peer": lambda: peer(measure, (4 << 30) // scale, wide),
        "pinned": lambda: pinned(measure, arena.buffer, batch),
        "segments": lambda: segments(measure, arena, batch),
        "HBM": lambda: hbm(measure, memory, wide),
        "small": lambda: small(measure, memory),
        "pages": lambda: pages(measure, arena, batch),
        "sweep of device shapes": lambda: sweep(measure, memory, wide, "HBM", (128, 512, 1024, 4096)),
        "sweep of host shapes": lambda: sweep(measure, arena.buffer, batch, "pinned", (128, 512, 4096)),
    }
    if torch.cuda.device_count() < 2 or not peer_access(0, 1):
        del stages["peer"]
    left_out = []
    for name, stage in stages.items():
        if name not in (options.only or stages) or time.perf_counter() > measure.deadline:
            left_out.append(name)
            continue
        stage()
        path = write_result(
            "tiered_memory_gather",
            question="How close does the row gather come to the links it uses, by row width?",
            headline=headline(measure),
            samples=measure.samples,
            folder=options.out,
            bytes_per_s=measure.rates,
            best_shapes=measure.best,
        )
        print(f"-- {name}: {time.perf_counter() - began:.1f} s so far", flush=True)
    print(f"left out: {', '.join(left_out) or 'nothing'}; {path}")


if __name__ == "__main__":
    main()

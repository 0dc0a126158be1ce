"""Does DirectReader keep the disk busy, and does its probe of the page cache cost anything?

python benchmarks/tiered_memory_direct_io.py [--out FOLDER] [--folder DIR] [--gigabytes N] [--repeats N]

Reads of 16 MiB by 1 to 16 threads, cold (pages dropped before each sweep) and resident, against plain preadv
with and without O_DIRECT into the same page-aligned buffers of small pages in the same run. `shifted` reads
to addresses 64 bytes further, as tensors lie: cold, that goes by way of DirectReader's own buffers
in huge pages.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from tiered_memory import DirectReader  # noqa: E402

BLOCK = 16 << 20
THREADS = (1, 2, 4, 16)


def sweep(read: Callable[[int, int], None], size: int, workers: int) -> None:
    """``read(offset, worker)`` for each block of the file."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [range(worker * BLOCK, size, workers * BLOCK) for worker in range(workers)]
        for job in [pool.submit(lambda w=w: [read(at, w) for at in jobs[w]]) for w in range(workers)]:
            job.result()


def small_pages(nbytes: int) -> torch.Tensor:
    """Populated memory in pages of 4 KiB."""
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8).zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    size = int(options.gigabytes * 1e9) // BLOCK * BLOCK
    memory = [small_pages(BLOCK + mmap.PAGESIZE) for _ in range(max(THREADS))]
    views = [tensor[:BLOCK].numpy().data for tensor in memory]
    with tempfile.NamedTemporaryFile(dir=options.folder, prefix="direct-io-") as file:
        block = os.urandom(BLOCK)
        for _ in range(size // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        seconds: dict[str, list[float]] = {}
        with DirectReader(file.name) as reader:

            def plain(fd: int, offset: int, worker: int) -> None:
                assert os.preadv(fd, [views[worker]], offset) == BLOCK

            def ours(shift: int, offset: int, worker: int) -> None:
                reader.read_into(memory[worker][shift : shift + BLOCK], offset)

            arms: dict[str, Callable[[], None]] = {}
            for workers in THREADS:
                for kind in ("cold", "resident"):
                    fd = direct if kind == "cold" else file.fileno()
                    raw = functools.partial(plain, fd)
                    arms[f"{kind}, plain preadv, {workers} threads"] = functools.partial(
                        sweep, raw, size, workers
                    )
                    for shift, who in ((0, "DirectReader"), (64, "DirectReader shifted")):
                        arms[f"{kind}, {who}, {workers} threads"] = functools.partial(
                            sweep, functools.partial(ours, shift), size, workers
                        )
            for turn in range(options.repeats):
                for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
                    if name.startswith("cold"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        sweep(functools.partial(plain, file.fileno()), size, 1)
                    begin = time.perf_counter()
                    arms[name]()
                    seconds.setdefault(name, []).append(time.perf_counter() - begin)
        os.close(direct)
    headline = []
    for name, values in seconds.items():
        rates = [size / value / 1e9 for value in values]
        print(f"{name:42s} {statistics.median(rates):6.2f} GB/s", flush=True)
        headline.append(Headline(name, statistics.median(rates), "GB/s", min(rates), max(rates)))
    for kind in ("cold", "resident"):
        best = {
            who: min(statistics.median(seconds[f"{kind}, {who}, {n} threads"]) for n in THREADS)
            for who in ("plain preadv", "DirectReader", "DirectReader shifted")
        }
        for who in ("DirectReader", "DirectReader shifted"):
            share = best["plain preadv"] / best[who]
            what = f"{kind}: best of {who}, share of the best plain sweep"
            headline.append(Headline(what, share, "x", target=">= 0.95"))
            print(what, round(share, 3))
    write_result(
        "tiered_memory_direct_io",
        question="Does DirectReader keep the disk busy, and does its probe of the page cache cost anything?",
        headline=headline,
        samples=seconds,
        folder=options.out,
        parameters={"bytes": size, "block": BLOCK},
    )


if __name__ == "__main__":
    main()

"""How fast are tensors loaded into existing parameters on a CPU, cold and from the page cache?

python benchmarks/vllm_serverless_loader_load.py [--out FOLDER] [--folder DIR] [--gigabytes N] [--repeats N]

Cold: the file's pages are dropped from the page cache (fsync, POSIX_FADV_DONTNEED) before each load; the
limit is a sweep of raw O_DIRECT reads in the same run. Warm: the file is resident; the limit is a plain
preadv into the parameters. All arms fill the same preallocated parameters, in turns. Peers that are not
importable are left out.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from vllm_serverless_loader import HostCache, LoadOptions, open_checkpoint, write_partition  # noqa: E402

CHUNK = 16 << 20


def make(folder: Path, nbytes: int) -> dict[str, torch.Tensor]:
    """A model of 24 MiB matrices and small vectors in both formats; returns parameters to fill."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(max(1, nbytes // (24 << 20))):
        matrix = torch.randint(0, 2**15, (3072, 4096), generator=generator, dtype=torch.int16)
        tensors[f"layers.{number}.weight"] = matrix.view(torch.bfloat16)
        tensors[f"layers.{number}.norm"] = torch.randn(4096, generator=generator).bfloat16()
    (folder / "plain").mkdir()
    save_file(tensors, folder / "plain" / "model.safetensors")
    write_partition(folder / "stored", tensors)
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def drop(folder: Path) -> None:
    for path in (folder / "plain" / "model.safetensors", folder / "stored" / "partition-00000-of-00001.bin"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def raw(path: Path, workers: int, buffer: mmap.mmap, *, direct: bool) -> None:
    """All of a file with plain preadv: the limit."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    size, view = os.fstat(fd).st_size, memoryview(buffer)

    def read(worker: int) -> None:
        for offset in range(worker * CHUNK, size, workers * CHUNK):
            end = min(offset + CHUNK, size)
            done = offset
            while done < end:
                done += os.preadv(fd, [view[done:end]], done)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(read, range(workers)))
    os.close(fd)


def fill(into: Mapping[str, torch.Tensor], pairs: Any) -> None:
    for name, tensor in pairs:
        into[name].copy_(tensor)


def peers(folder: Path, into: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Other loaders that can be imported."""
    from safetensors import safe_open

    file = str(folder / "plain" / "model.safetensors")

    def safetensors() -> None:
        with safe_open(file, framework="pt") as opened:
            fill(into, ((name, opened.get_tensor(name)) for name in opened.keys()))  # noqa: SIM118

    arms: dict[str, Callable[[], None]] = {"safetensors (also what sharded_state reads)": safetensors}
    try:
        from runai_model_streamer import SafetensorsStreamer

        def streamer() -> None:
            with SafetensorsStreamer() as stream:
                stream.stream_file(file)
                fill(into, stream.get_tensors())

        arms["runai_streamer"] = streamer
    except ImportError as error:
        print("left out:", error)
    try:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        def fast() -> None:
            loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
            loader.add_filenames({0: [file]})
            buffer = loader.copy_files_to_device()
            fill(into, ((name, buffer.get_tensor(name)) for name in loader.get_keys()))
            buffer.close()
            loader.close()

        arms["fastsafetensors"] = fast
    except ImportError as error:
        print("left out:", error)
    return arms


def ours(path: Path, into: Mapping[str, torch.Tensor], **options: Any) -> None:
    with open_checkpoint(path) as checkpoint:
        checkpoint.load(into=into, options=LoadOptions(**options))


def checked(
    arms: Mapping[str, Callable[[], Any]], into: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, bool]:
    """Whether each arm that fills ``into`` leaves the right values there."""
    with open_checkpoint(folder / "stored") as checkpoint:
        reference = checkpoint.load().tensors
    found = {}
    for name, run in arms.items():
        if name.startswith("raw"):
            continue
        for tensor in into.values():
            tensor.zero_()
        run()
        same = (torch.equal(into[key].view(torch.int16), reference[key].view(torch.int16)) for key in into)
        found[name] = all(same)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    try:
        into = make(folder, int(options.gigabytes * 1e9))
        nbytes = sum(tensor.nbytes for tensor in into.values())
        plain, stored = folder / "plain", folder / "stored"
        data = stored / "partition-00000-of-00001.bin"
        buffer = mmap.mmap(-1, data.stat().st_size)
        arms: dict[str, Callable[[], Any]] = peers(folder, into)
        arms["ours, own format"] = functools.partial(ours, stored, into)
        arms["ours, own format, not verified"] = functools.partial(ours, stored, into, verify=False)
        arms["ours, safetensors"] = functools.partial(ours, plain, into)
        identical = checked(arms, into, folder)
        print(identical, flush=True)

        cold = {
            f"raw O_DIRECT, {n} threads": functools.partial(raw, data, n, buffer, direct=True)
            for n in (1, 2, 4)
        }
        cold |= arms
        seconds: dict[str, list[float]] = {name: [] for name in cold}
        for turn in range(options.repeats):
            for name in list(cold) if turn % 2 == 0 else list(cold)[::-1]:
                drop(folder)
                begin = time.perf_counter()
                cold[name]()
                seconds[name].append(time.perf_counter() - begin)
        report("cold", seconds, nbytes, headline, samples)
        best = min(statistics.median(seconds[name]) for name in seconds if name.startswith("raw"))
        for name in ("ours, own format", "ours, safetensors"):
            ratios = [best / value for value in seconds[name]]
            headline.append(ratio(f"cold, {name}, share of the best raw sweep", ratios, ">= 0.95"))
        for name in arms:
            if not name.startswith("ours"):
                pairs = zip(seconds[name], seconds["ours, own format"], strict=True)
                headline.append(ratio(f"cold, ours over {name}", [a / b for a, b in pairs], ">= 1"))

        warm = {
            f"raw preadv, {n} threads": functools.partial(raw, data, n, buffer, direct=False) for n in (1, 2)
        }
        warm |= arms
        cache = HostCache(data.stat().st_size + (64 << 20))
        with open_checkpoint(stored) as checkpoint:
            model = cache.load(checkpoint)
        warm["ours, host cache into parameters"] = lambda: model.load(into=into)
        warm["ours, host cache as views"] = model.load
        seconds = interleaved(warm, repeats=options.repeats)
        report("warm", seconds, nbytes, headline, samples)
        views = seconds["ours, host cache as views"]
        headline.append(
            Headline("pool hit: views", statistics.median(views), "s", min(views), max(views), "<= 0.010")
        )
        for name in arms:
            if not name.startswith("ours"):
                pairs = zip(seconds[name], seconds["ours, own format, not verified"], strict=True)
                target = ">= 0.95" if name.startswith("safetensors") else "> 1"
                headline.append(
                    ratio(f"warm, ours not verified over {name}", [a / b for a, b in pairs], target)
                )
        model.release()
        cache.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_result(
        "vllm_serverless_loader_load",
        question="How fast are tensors loaded into existing CPU parameters, cold and resident?",
        headline=headline,
        samples=samples,
        folder=options.out,
        parameters={"bytes": nbytes, "file_system": file_system(options.folder)},
        identical=identical,
    )


def report(
    kind: str,
    seconds: Mapping[str, list[float]],
    nbytes: int,
    headline: list[Headline],
    samples: dict[str, list[float]],
) -> None:
    for name, values in seconds.items():
        samples[f"{kind}: {name}"] = values
        rates = [nbytes / value / 1e9 for value in values]
        print(f"{kind:5s} {name:50s} {statistics.median(rates):8.2f} GB/s", flush=True)
        if "views" not in name:
            median = statistics.median(rates)
            headline.append(Headline(f"{kind}, {name}", median, "GB/s", min(rates), max(rates)))


def ratio(what: str, values: list[float], target: str) -> Headline:
    return Headline(what, statistics.median(values), "x", min(values), max(values), target)


def file_system(folder: str) -> str:
    """Type of the file system that holds ``folder``."""
    device = os.stat(folder).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1]
    return "unknown"


if __name__ == "__main__":
    main()

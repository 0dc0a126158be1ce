"""How fast are tensors loaded into existing parameters on a CPU, cold and from the page cache?

python benchmarks/vllm_serverless_loader_load.py [--out FOLDER] [--folder DIR] [--gigabytes N] [--repeats N]
    [--budget SECONDS]

Cold: the file's pages are dropped from the page cache (fsync, POSIX_FADV_DONTNEED) before each load; the
limit is the best sweep of raw O_DIRECT reads of the same run, into small and into huge pages. Warm: the file
is resident; the limit is a plain preadv into memory. All arms fill the same preallocated parameters, in
turns, and are compared bit for bit before. Peers are called as their documentation does; one that is not
importable or fails is named in the result under ``peers``.
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
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from vllm_serverless_loader import HostCache, LoadOptions, open_checkpoint, write_partition  # noqa: E402

CHUNK = 16 << 20
SAFETENSORS = "safetensors"  # sharded_state reads its files in the same way
OURS = "ours, own format"
UNVERIFIED = "ours, own format, not verified"
PLAIN = "ours, safetensors"
Arms = dict[str, Callable[[], Any]]


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


def memory(nbytes: int, *, huge: bool) -> mmap.mmap:
    """Populated memory in huge pages, or in small ones."""
    nbytes = -(-nbytes // (2 << 20)) * (2 << 20)
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    torch.frombuffer(buffer, dtype=torch.uint8).zero_()
    return buffer


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


def with_safetensors(file: str, into: Mapping[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        fill(into, ((name, opened.get_tensor(name)) for name in opened.keys()))  # noqa: SIM118


def with_runai_streamer(file: str, into: Mapping[str, torch.Tensor]) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as stream:
        stream.stream_file(file)
        fill(into, stream.get_tensors())


def with_fastsafetensors(file: str, into: Mapping[str, torch.Tensor]) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    # Without a GPU there is no GPUDirect Storage; everything else is the library's default.
    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [file]})
    buffer = loader.copy_files_to_device()
    fill(into, ((name, buffer.get_tensor(name)) for name in loader.get_keys()))
    buffer.close()
    loader.close()


PEERS = {
    SAFETENSORS: ("safetensors", with_safetensors),
    "runai_streamer": ("runai-model-streamer", with_runai_streamer),
    "fastsafetensors": ("fastsafetensors", with_fastsafetensors),
}


def ours(path: Path, into: Mapping[str, torch.Tensor], **options: Any) -> None:
    with open_checkpoint(path) as checkpoint:
        checkpoint.load(into=into, options=LoadOptions(**options))


def is_right(
    run: Callable[[], Any], into: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> bool:
    """Whether ``run`` leaves the right values in ``into``."""
    for tensor in into.values():
        tensor.zero_()
    run()
    return all(torch.equal(into[key].view(torch.int16), reference[key].view(torch.int16)) for key in into)


def usable(folder: Path, into: Mapping[str, torch.Tensor]) -> tuple[Arms, dict[str, str]]:
    """Arms that load what they should, and what is to be said about each peer."""
    with open_checkpoint(folder / "stored") as checkpoint:
        reference = checkpoint.load().tensors
    file = str(folder / "plain" / "model.safetensors")
    arms: Arms = {}
    notes = {"instanttensor": "left out: loads to CUDA devices only"}
    for name, (package, load) in PEERS.items():
        run = functools.partial(load, file, into)
        try:
            right = is_right(run, into, reference)
            notes[name] = version(package) if right else "left out: other values than were stored"
        except Exception as error:
            right, notes[name] = False, f"left out: {type(error).__name__}: {error}"
        if right:
            arms[name] = run
        print(f"{name}: {notes[name]}", flush=True)
    arms[OURS] = functools.partial(ours, folder / "stored", into)
    arms[UNVERIFIED] = functools.partial(ours, folder / "stored", into, verify=False)
    arms[PLAIN] = functools.partial(ours, folder / "plain", into)
    for name in (OURS, UNVERIFIED, PLAIN):
        assert is_right(arms[name], into, reference), name
    return arms, notes


def in_turns(
    arms: Arms, repeats: int, deadline: float, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each arm in each round; the rounds end early, but not before the third, at ``deadline``."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            before()
            begin = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def against_peers(
    kind: str, ours_: str, arms: Arms, seconds: Mapping[str, list[float]], targets: Mapping[str, str]
) -> list[Headline]:
    """How many times faster ours is than each peer."""
    return [
        ratio(
            f"{kind}, {ours_} over {name}",
            [theirs / mine for theirs, mine in zip(seconds[name], seconds[ours_], strict=True)],
            targets.get(name, targets[""]),
        )
        for name in PEERS
        if name in arms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no round begins")
    options = parser.parse_args()
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    headline: list[Headline] = []
    samples: dict[str, list[float]] = {}
    try:
        into = make(folder, int(options.gigabytes * 1e9))
        nbytes = sum(tensor.nbytes for tensor in into.values())
        data = folder / "stored" / "partition-00000-of-00001.bin"
        arms, notes = usable(folder, into)

        buffers = {kind: memory(data.stat().st_size, huge=kind == "huge") for kind in ("small", "huge")}
        cold: Arms = {
            f"raw O_DIRECT into {kind} pages, {n} threads": functools.partial(
                raw, data, n, buffers[kind], direct=True
            )
            for kind in buffers
            for n in (1, 4)
        }
        cold |= arms
        left = options.budget - (time.monotonic() - begin)
        seconds = in_turns(
            cold, options.repeats, time.monotonic() + 0.7 * left, functools.partial(drop, folder)
        )
        report("cold", seconds, nbytes, headline, samples)
        best = min((name for name in seconds if name.startswith("raw")), key=lambda n: sum(seconds[n]))
        for name in (OURS, PLAIN):
            shares = [limit / mine for limit, mine in zip(seconds[best], seconds[name], strict=True)]
            headline.append(ratio(f"cold, {name}, share of the best raw sweep", shares, ">= 0.95"))
        headline += against_peers("cold", OURS, arms, seconds, {"": ">= 1"})

        warm: Arms = {
            f"raw preadv, {n} threads": functools.partial(raw, data, n, buffers["small"], direct=False)
            for n in (1, 2)
        }
        warm |= arms
        with HostCache(data.stat().st_size + (64 << 20), pinned=False) as cache:
            with open_checkpoint(folder / "stored") as checkpoint:
                model = cache.load(checkpoint)
            warm["ours, host cache into parameters"] = functools.partial(model.load, into=into)
            warm["ours, host cache as views"] = model.load
            in_turns(warm, 1, 0.0)
            seconds = in_turns(warm, 2 * options.repeats, begin + options.budget)
            model.release()
        report("warm", seconds, nbytes, headline, samples)
        views = seconds["ours, host cache as views"]
        headline.append(
            Headline("pool hit: views", statistics.median(views), "s", min(views), max(views), "<= 0.010")
        )
        for name in (UNVERIFIED, OURS, PLAIN):
            headline += against_peers("warm", name, arms, seconds, {SAFETENSORS: ">= 0.95", "": "> 1"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_result(
        "vllm_serverless_loader_load",
        question="How fast are tensors loaded into existing CPU parameters, cold and resident?",
        headline=headline,
        samples=samples,
        folder=options.out,
        parameters={"bytes": nbytes, "file_system": file_system(options.folder)},
        peers=notes,
        identical="every arm filled the parameters with the stored bytes",
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

"""How fast does a model reach the GPU: from disk, from the page cache, from the store process, inside vLLM?

python benchmarks/vllm_serverless_loader_gpu.py [--out FOLDER] [--budget SECONDS] [--stages
pin,warm,store,cold,vllm]

Files of a Llama-3.1-8B shape (16 GB) are written to --memory-folder (a tmpfs, so that they are resident) and
a smaller one to --disk-folder. Arms of a stage take turns in one process; the limits (pinned copy, raw
O_DIRECT) are arms too. Each stage rewrites the result. Without a CUDA device it runs small, to try the
script.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from tiered_memory import PinnedArena  # noqa: E402
from vllm_serverless_loader import LoadOptions, StoreClient, open_checkpoint  # noqa: E402
from vllm_serverless_loader.checkpoint.index import CheckpointKey, PartitionIndex, TensorEntry, config_digest  # noqa: E402
from vllm_serverless_loader.checkpoint.safetensors_directory import read_header  # noqa: E402

CUDA = torch.cuda.is_available()
CHUNK = 16 << 20
CORES = len(os.sched_getaffinity(0))


def llama_config(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"] * 128, config["num_key_value_heads"] * 128
    found: dict[str, list[int]] = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        for name, shape in (
            ("input_layernorm", [hidden]),
            ("mlp.down_proj", [hidden, inner]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("post_attention_layernorm", [hidden]),
            ("self_attn.k_proj", [groups, hidden]),
            ("self_attn.o_proj", [hidden, heads]),
            ("self_attn.q_proj", [heads, hidden]),
            ("self_attn.v_proj", [groups, hidden]),
        ):
            found[f"{base}{name}.weight"] = shape
    found["model.norm.weight"] = [hidden]
    found["lm_head.weight"] = [vocabulary, hidden]
    return found


def write_model(folder: Path, config: Mapping[str, Any]) -> int:
    """A safetensors directory with small random bf16 values, written by many threads; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(config).items():
        nbytes = math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8)
    base = 8 + len(text)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(CHUNK // 2, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()
    fd = os.open(folder / "model.safetensors", os.O_WRONLY | os.O_CREAT)

    def write(offset: int) -> None:
        # Pieces differ from each other, so that a misplaced one is noticed.
        turn = (offset // CHUNK * 4098) % CHUNK
        length = min(CHUNK, end - offset)
        content = memoryview(block)
        for begin, stop in ((turn, CHUNK), (0, turn)):
            piece = content[begin:stop][: max(length, 0)]
            if len(piece):
                os.pwrite(fd, piece, base + offset)
            offset, length = offset + len(piece), length - len(piece)

    os.pwrite(fd, len(text).to_bytes(8, "little") + text, 0)
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(write, range(0, end, CHUNK)))
    os.close(fd)
    return end


def convert_fast(source: Path, target: Path) -> None:
    """The same tensors in our format (layout "full"), written by many threads.

    ``serverless-loader convert`` does this with one thread, which would take the whole budget here.
    """
    import xxhash

    target.mkdir()
    shutil.copy(source / "config.json", target)
    stored = read_header(source / "model.safetensors")
    entries, num_bytes = {}, 0
    for name, entry in stored.tensors.items():
        offset = -(-num_bytes // 256) * 256
        entries[name] = TensorEntry(entry.dtype, entry.shape, offset, entry.num_bytes)
        num_bytes = offset + entry.num_bytes
    num_bytes = -(-num_bytes // 4096) * 4096
    read_fd = os.open(stored.path, os.O_RDONLY)
    fd = os.open(target / "partition-00000-of-00001.bin", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, num_bytes)
    jobs = [(n, at) for n, e in entries.items() for at in range(0, e.num_bytes, CHUNK)]

    def move(job: tuple[str, int]) -> None:
        name, at = job
        length = min(CHUNK, entries[name].num_bytes - at)
        os.pwrite(fd, os.pread(read_fd, length, stored.tensors[name].offset + at), entries[name].offset + at)

    def checksum(number: int) -> str:
        return xxhash.xxh3_64_hexdigest(os.pread(fd, CHUNK, number * CHUNK))

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(move, jobs))
        checksums = tuple(pool.map(checksum, range(-(-num_bytes // CHUNK))))
    os.close(fd)
    os.close(read_fd)
    digest = config_digest(json.loads((source / "config.json").read_text()))
    index = PartitionIndex(0, 1, num_bytes, CHUNK, checksums, CheckpointKey(model=digest), entries)
    (target / "partition-00000-of-00001.json").write_text(index.to_json())


class Report:
    """Collects what stages find and rewrites the result after each."""

    def __init__(self, folder: Path, budget: float) -> None:
        self.folder, self.budget = folder, budget
        self.begin = time.perf_counter()
        self.headline: list[Headline] = []
        self.samples: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {"stage_seconds": {}, "failed": {}}

    @property
    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.budget - (time.perf_counter() - self.begin)

    def add(self, what: str, values: list[float], unit: str, target: str = "", note: str = "") -> None:
        """A headline figure: median and span."""
        self.headline.append(
            Headline(what, statistics.median(values), unit, min(values), max(values), target, note)
        )
        print(f"  {what}: {statistics.median(values):.4g} {unit}", flush=True)

    def stage(self, name: str, run: Callable[[], None], needs: float) -> None:
        """Run a stage if its time is left; a failure is recorded and the next stage runs."""
        if self.left < needs:
            self.facts["failed"][name] = f"not run: {self.left:.0f} s left, about {needs:.0f} s needed"
            self.write()
            return
        start = time.perf_counter()
        print(f"[{name}]", flush=True)
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.facts["failed"][name] = repr(error)[:300]
        self.facts["stage_seconds"][name] = round(time.perf_counter() - start, 1)
        self.write()

    def write(self) -> None:
        """Rewrite the result file."""
        write_result(
            "vllm_serverless_loader_gpu",
            question="How fast does a model reach the GPU from disk, page cache and store process?",
            headline=self.headline,
            samples=self.samples,
            folder=self.folder,
            **self.facts,
        )


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def pinning(report: Report, nbytes: int) -> None:
    """Seconds per GiB to have page-locked memory, by threads and by page size."""
    import mmap

    from tiered_memory import arena as arena_module

    def pin(threads: int, *, shared: bool = False, huge: bool = True) -> float:
        saved_advice = mmap.MADV_HUGEPAGE
        try:
            if not huge:
                mmap.MADV_HUGEPAGE = mmap.MADV_NOHUGEPAGE
            synchronize()
            start = time.perf_counter()
            with PinnedArena(nbytes, pinned=False, shared=shared, threads=threads) as made:
                if CUDA:
                    made.pin()
                else:
                    arena_module.populate(made.buffer.data_ptr(), nbytes, threads)
                return (time.perf_counter() - start) * 2**30 / nbytes
        finally:
            mmap.MADV_HUGEPAGE = saved_advice

    arms: dict[str, Callable[[], float]] = {
        "1 thread, 4 KiB pages": lambda: pin(1, huge=False),
        "16 threads, 4 KiB pages": lambda: pin(16, huge=False),
        "16 threads, huge pages": lambda: pin(16),
        "16 threads, shared memory": lambda: pin(16, shared=True),
    }
    for _ in range(3):
        for name, run in arms.items():
            report.samples.setdefault(f"pin: {name} (s/GiB)", []).append(run())
    for name in arms:
        target = "<= 0.2" if name.startswith("16 threads, huge") else ""
        report.add(f"pinning, {name}", report.samples[f"pin: {name} (s/GiB)"], "s/GiB", target)
    for page in ("enabled", "shmem_enabled"):
        path = Path("/sys/kernel/mm/transparent_hugepage") / page
        report.facts[f"transparent_hugepage_{page}"] = path.read_text().strip() if path.exists() else "absent"


def peers(folder: Path, device: str) -> dict[str, Callable[[], Any]]:
    """Other loaders that are installed; each loads all tensors onto the device."""
    from safetensors.torch import load_file

    file = str(folder / "model.safetensors")
    arms: dict[str, Callable[[], Any]] = {"safetensors": lambda: load_file(file, device=device)}
    try:
        from runai_model_streamer import SafetensorsStreamer

        def stream() -> dict[str, torch.Tensor]:
            with SafetensorsStreamer() as streamer:
                streamer.stream_file(file)
                return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}

        os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
        arms["runai_streamer"] = stream
    except Exception as error:
        print(f"  no runai_streamer: {error!r}"[:200])
    try:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        def fast() -> dict[str, torch.Tensor]:
            loader = SafeTensorsFileLoader(SingleGroup(), torch.device(device), nogds=True)
            loader.add_filenames({0: [file]})
            buffer = loader.copy_files_to_device()
            found = {name: buffer.get_tensor(name).clone() for name in loader.get_keys()}
            buffer.close()
            loader.close()
            return found

        arms["fastsafetensors"] = fast
    except Exception as error:
        print(f"  no fastsafetensors: {error!r}"[:200])
    return arms


def ours(folder: Path, device: str, into: Mapping[str, torch.Tensor] | None = None, **options: Any) -> Any:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.load(device, into=into, options=LoadOptions(**options)).tensors


def pinned_copy(nbytes: int) -> list[float]:
    """Bytes per second of copies from page-locked memory: the limit."""
    from tiered_memory import measure_bandwidth

    return list(measure_bandwidth("host_to_device", nbytes=nbytes, seconds=0.3).samples)


def warm(report: Report, plain: Path, stored: Path, nbytes: int, repeats: int) -> None:
    device = "cuda:0" if CUDA else "cpu"
    if CUDA:
        limit = pinned_copy(1 << 30)
        report.samples["pinned copy (B/s)"] = limit
        report.add("pinned copy", limit, "B/s")
    threads = min(16, CORES)
    all_arms = peers(plain, device)
    options: dict[str, Any] = {"io_threads": threads, "staging_chunks": 32}
    all_arms["ours, safetensors"] = lambda: ours(plain, device, chunk_bytes=4 << 20, **options)
    all_arms["ours, own format, verified"] = lambda: ours(stored, device, **options)
    all_arms["ours, own format, not verified"] = lambda: ours(stored, device, verify=False, **options)
    reference = all_arms["safetensors"]()
    arms = {}
    for name, run in all_arms.items():
        try:
            found = run()
        except Exception as error:
            report.facts["failed"][f"warm: {name}"] = repr(error)[:300]
            continue
        same = found.keys() == reference.keys() and all(
            torch.equal(found[key].to(device), reference[key]) for key in reference
        )
        del found
        report.facts.setdefault("identical", {})[name] = same
        arms[name] = run
    del reference
    seconds = interleaved(arms, repeats=repeats, warm_up=0, synchronize=synchronize)
    for name, values in seconds.items():
        report.samples[f"warm: {name}"] = values
        report.add(f"resident file to device, {name}", [nbytes / value for value in values], "B/s")
    for name in [name for name in seconds if name.startswith("ours")]:
        ratios = [a / b for a, b in zip(seconds["safetensors"], seconds[name], strict=True)]
        report.add(f"speed-up over safetensors, resident, {name}", ratios, "x", ">= 5.5" if CUDA else "")


@contextmanager
def store_process(memory: int, folder: Path) -> Iterator[str]:
    """A real store process; yields its socket once it answers."""
    socket = str(folder / "store.sock")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "plugins"), *sys.path])}
    command = [sys.executable, "-m", "vllm_serverless_loader", "store", "--memory", str(memory)]
    process = subprocess.Popen(
        [*command, "--socket", socket, "--io-threads", str(min(16, CORES))],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        print("  " + process.stdout.readline().strip()[-60:], flush=True)
        yield socket
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def store(report: Report, plain: Path, nbytes: int, repeats: int, socket: str) -> None:
    device = "cuda:0" if CUDA else "cpu"
    start = time.perf_counter()
    with StoreClient(socket) as client, client.open(plain):
        report.add("first request: file to pool", [nbytes / (time.perf_counter() - start)], "B/s")
    with StoreClient(socket) as client:
        end = time.perf_counter() + 20
        while CUDA and not client.status()["pinned"] and time.perf_counter() < end:
            time.sleep(0.2)
        report.facts["store_pool_pinned"] = client.status()["pinned"]
    with open_checkpoint(plain) as checkpoint:
        entries = checkpoint.index.tensors
    into = {name: torch.empty(e.shape, dtype=e.dtype, device=device) for name, e in entries.items()}
    threads = min(16, CORES)

    def load(push: bool) -> None:
        with StoreClient(socket, push=push) as client, client.open(plain) as model:
            options = LoadOptions(io_threads=threads, staging_chunks=32, chunk_bytes=4 << 20)
            model.load(into=into, options=options)

    def views() -> None:
        with StoreClient(socket) as client, client.open(plain) as model:
            model.load()

    arms: dict[str, Callable[[], None]] = {"views on the CPU": views, "own staging ring": lambda: load(False)}
    if CUDA:
        arms["store copies (CUDA IPC)"] = lambda: load(True)
    reference = {name: tensor.clone() for name, tensor in ours(plain, device, io_threads=threads).items()}
    for name, run in arms.items():
        for tensor in into.values():
            tensor.zero_()
        run()
        if name != "views on the CPU":
            same = all(torch.equal(into[key], reference[key]) for key in into)
            report.facts.setdefault("identical", {})[f"store: {name}"] = same
    del reference
    seconds = interleaved(arms, repeats=repeats, warm_up=1, synchronize=synchronize)
    limit = statistics.median(report.samples.get("pinned copy (B/s)", [0.0]))
    for name, values in seconds.items():
        report.samples[f"store: {name}"] = values
        if name == "views on the CPU":
            report.add("pool hit: views on the CPU", values, "s", "<= 0.010")
            continue
        rates = [nbytes / value for value in values]
        report.add(f"pool hit to device, {name}", rates, "B/s")
        if limit:
            share = [rate / limit for rate in rates]
            report.add(f"pool hit, {name}, share of a pinned copy", share, "", ">= 0.9")
    if CUDA:
        register(report, socket, plain, into, nbytes)


def register(report: Report, socket: str, plain: Path, into: Mapping[str, torch.Tensor], nbytes: int) -> None:
    """The third way: the engine page-locks the shared pool itself, once, then copies straight."""
    with StoreClient(socket, push=False) as client:
        start = time.perf_counter()
        client._arena.pin()
        once = time.perf_counter() - start
        values = []
        for _ in range(3):
            with client.open(plain) as model:
                synchronize()
                start = time.perf_counter()
                model.load(into=into)
                synchronize()
                values.append(time.perf_counter() - start)
        pool = client._arena.nbytes
    report.samples["store: registered memfd"] = values
    report.add("registering the shared pool in the engine", [once * 2**30 / pool], "s/GiB")
    report.add("pool hit to device, registered memfd", [nbytes / value for value in values], "B/s")


def cold(report: Report, plain: Path, stored: Path, nbytes: int, repeats: int) -> None:
    device = "cuda:0" if CUDA else "cpu"
    threads = min(16, CORES)

    def drop() -> None:
        for path in (*plain.glob("*.safetensors"), *stored.glob("*.bin")):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    arena = PinnedArena(16 * CHUNK + CHUNK, pinned=False)  # in huge pages where the system has them
    buffers = [arena.empty(CHUNK, align=2 << 20).zero_() for _ in range(16)]

    def raw(workers: int) -> None:
        fd = os.open(stored / "partition-00000-of-00001.bin", os.O_RDONLY | os.O_DIRECT)
        size = os.fstat(fd).st_size

        def read(worker: int) -> None:
            for offset in range(worker * CHUNK, size, workers * CHUNK):
                os.preadv(fd, [buffers[worker][: min(CHUNK, size - offset)].numpy().data], offset)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(read, range(workers)))
        os.close(fd)

    arms: dict[str, Callable[[], Any]] = {
        f"raw O_DIRECT, {n} threads": lambda n=n: raw(n) for n in (1, 4, 16)
    }
    arms |= {f"peer: {name}": run for name, run in peers(plain, device).items()}
    arms["ours, own format"] = lambda: ours(stored, device, io_threads=threads, staging_chunks=32)
    arms["ours, safetensors"] = lambda: ours(plain, device, io_threads=threads, staging_chunks=32)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            drop()
            synchronize()
            start = time.perf_counter()
            try:
                arms[name]()
            except Exception as error:
                report.facts["failed"][f"cold: {name}"] = repr(error)[:300]
                continue
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        if values:
            report.samples[f"cold: {name}"] = values
            report.add(f"cold file to device, {name}", [nbytes / value for value in values], "B/s")
    best = min(
        statistics.median(values) for name, values in seconds.items() if name.startswith("raw") and values
    )
    ratios = [best / value for value in seconds["ours, own format"]]
    report.add("cold, own format, share of the best raw sweep", ratios, "", ">= 0.95")


def vllm_arms(plain: Path, sharded: Path, socket: str) -> dict[str, dict[str, Any]]:
    """What each arm asks of vLLM; ``auto`` also writes the files of ``sharded_state``, after its figures."""
    model = {"model": str(plain)}
    threads = {"io_threads": min(16, CORES), "staging_chunks": 32}
    store_options = {**threads, "store": socket, "store_required": True}
    return {
        "auto": {**model, "load_format": "auto", "save_to": str(sharded)},
        "ours, store": {**model, "load_format": "serverless_llm", "extra": store_options},
        "ours, no store": {**model, "load_format": "serverless_llm", "extra": threads},
        "fastsafetensors": {**model, "load_format": "fastsafetensors"},
        "runai_streamer": {**model, "load_format": "runai_streamer", "extra": {"concurrency": 16}},
        "sharded_state": {"model": str(sharded), "load_format": "sharded_state"},
    }


def vllm_start(report: Report, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Full start-ups in processes of their own, the file resident."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    found: dict[str, dict[str, Any]] = report.facts.setdefault("vllm", {})
    for name, settings in arms.items():
        if report.left < 60:
            report.facts["failed"][f"vllm: {name}"] = f"not run: {report.left:.0f} s left"
            continue
        command = [sys.executable, __file__, "--engine", json.dumps(settings)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=report.left, check=False, env=environment
            )
            found[name] = json.loads(
                next(line for line in done.stdout.splitlines() if line.startswith('{"first'))
            )
        except (subprocess.TimeoutExpired, StopIteration) as error:
            report.facts["failed"][f"vllm: {name}"] = repr(error)[:100]
            if isinstance(error, StopIteration):
                print("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
            continue
        report.add(f"vLLM, {name}: load_weights", [found[name]["load_weights_s"]], "s")
        report.add(f"vLLM, {name}: process start to first token", [found[name]["first_token_s"]], "s")
        report.write()
    mine = found.get("ours, store")
    for name in found:
        if mine is not None and not name.startswith("ours"):
            report.facts.setdefault("vllm_ids_equal", {})[name] = found[name]["ids"] == mine["ids"]
            ratio = found[name]["load_weights_s"] / mine["load_weights_s"]
            target = ">= 5" if name == "auto" else "> 1"
            report.add(f"vLLM: load_weights, {name} over ours from the store", [ratio], "x", target)


def engine(settings: dict[str, Any]) -> None:
    """One vLLM start-up; prints one JSON line."""
    begin = time.perf_counter()
    import vllm_serverless_loader

    vllm_serverless_loader.register()
    from vllm import LLM, SamplingParams
    from vllm.model_executor import model_loader

    spent: list[float] = []
    loaders = set(model_loader._LOAD_FORMAT_TO_MODEL_LOADER.values())
    for owner in [loader for loader in loaders if "load_weights" in vars(loader)]:
        original = owner.load_weights

        def timed(self: Any, *arguments: Any, original: Any = original) -> None:
            start = time.perf_counter()
            original(self, *arguments)
            synchronize()
            spent.append(time.perf_counter() - start)

        owner.load_weights = timed
    llm = LLM(
        model=settings["model"],
        load_format=settings["load_format"],
        model_loader_extra_config=settings.get("extra", {}),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        gpu_memory_utilization=0.6,
        distributed_executor_backend="uni",
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(7 * i + j * j) % 250 + 2 for j in range(16)]} for i in range(4)]
    ids = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
    total = time.perf_counter() - begin
    print(json.dumps({"first_token_s": total, "load_weights_s": spent[-1], "ids": ids}), flush=True)
    if "save_to" in settings:
        target = Path(settings["save_to"])
        target.mkdir(parents=True)
        shutil.copy(Path(settings["model"]) / "config.json", target)
        llm.llm_engine.engine_core.save_sharded_state(path=str(target), pattern=None, max_size=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=200)
    parser.add_argument("--stages", default="pin,warm,store,cold,vllm")
    parser.add_argument("--memory-folder", default="/dev/shm")
    parser.add_argument("--disk-folder", default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-arms", default="", help="names of arms with ';' between; all by default")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine(json.loads(options.engine))
        return
    stages = options.stages.split(",")
    report = Report(options.out, options.budget)
    big = llama_config(32, 4096, 128256) if CUDA else llama_config(2, 512, 4096)
    small = llama_config(6, 4096, 32000) if CUDA else llama_config(2, 512, 4096)
    memory = Path(tempfile.mkdtemp(dir=options.memory_folder))
    disk = Path(tempfile.mkdtemp(dir=options.disk_folder))
    try:
        if "pin" in stages:
            report.stage("pin", lambda: pinning(report, (2 << 30) if CUDA else 64 << 20), 15)
        sizes: dict[str, int] = {}

        def make() -> None:
            if {"warm", "store", "vllm"} & set(stages):
                sizes["big"] = write_model(memory / "plain", big)
                convert_fast(memory / "plain", memory / "stored")
            if "cold" in stages:
                sizes["small"] = write_model(disk / "plain", small)
                convert_fast(disk / "plain", disk / "stored")
            report.facts["model_bytes"] = dict(sizes)

        report.stage("make files", make, 20)
        if "warm" in stages:
            report.stage(
                "warm",
                lambda: warm(report, memory / "plain", memory / "stored", sizes["big"], options.repeats),
                25,
            )
        shutil.rmtree(memory / "stored", ignore_errors=True)
        with ExitStack() as stack:
            socket = ""
            if {"store", "vllm"} & set(stages):
                socket = stack.enter_context(store_process(sizes["big"] + (1 << 30), disk))
            if "store" in stages:
                run = functools.partial(
                    store, report, memory / "plain", sizes["big"], options.repeats, socket
                )
                report.stage("store", run, 25)
            if "cold" in stages:
                run = functools.partial(cold, report, disk / "plain", disk / "stored", sizes["small"], 2)
                report.stage("cold", run, 30)
            if "vllm" in stages and CUDA:
                torch.cuda.empty_cache()
                engines = vllm_arms(memory / "plain", memory / "sharded", socket)
                chosen = options.vllm_arms.split(";") if options.vllm_arms else list(engines)
                run = functools.partial(vllm_start, report, {name: engines[name] for name in chosen})
                report.stage("vllm", run, 60)
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(disk, ignore_errors=True)
    print(json.dumps(report.facts["failed"]), json.dumps(report.facts["stage_seconds"]))


if __name__ == "__main__":
    main()

"""``serverless-loader``: convert, inspect and verify checkpoints; run the store; measure; simulate."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from vllm_serverless_loader.loading.options import LoadOptions, parse_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for damage found, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="serverless-loader", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="write a loading-optimised checkpoint of a model directory")
    convert.add_argument("model")
    convert.add_argument("out")
    convert.add_argument("--layout", choices=["full", "vllm"], default="vllm")
    convert.add_argument("--tensor-parallel-size", type=int, default=1)
    convert.add_argument("--dtype", default="auto")

    inspect = commands.add_parser("inspect", help="say what a checkpoint holds")
    inspect.add_argument("path")
    inspect.add_argument("--rank", type=int, default=0)
    inspect.add_argument("--tensors", action="store_true", help="one line a tensor")

    verify = commands.add_parser("verify", help="read everything and compare all checksums")
    verify.add_argument("path")

    store = commands.add_parser("store", help="run this machine's store process until it is interrupted")
    store.add_argument("--memory", required=True, help="size of the pool, e.g. 64GiB")
    store.add_argument("--socket", required=True)
    store.add_argument("--chunk", default="16MiB")
    store.add_argument("--io-threads", type=int, default=LoadOptions().io_threads)
    store.add_argument("--adapter-memory", default="1GiB", help="of LoRA adapters, beside the pool")
    store.add_argument("--remote-cache", help="folder for local copies of models given by URL")

    probe = commands.add_parser("probe", help="measure the links between this machine's memory tiers")
    probe.add_argument("--disk", default=".", help="a folder on the disk that holds models")
    probe.add_argument("--size", default="256MiB")

    simulate = commands.add_parser("simulate", help="compare placement policies on a bursty trace")
    simulate.add_argument("--servers", type=int, default=8)
    simulate.add_argument("--gpus", type=int, default=4, help="of each server")
    simulate.add_argument("--models", type=int, default=16)
    simulate.add_argument("--model-size", default="14GB")
    simulate.add_argument("--host-cache", default="64GB", help="of each server")
    simulate.add_argument("--requests-per-s", type=float, default=0.5)
    simulate.add_argument("--seconds", type=float, default=600.0)
    simulate.add_argument("--cv", type=float, default=4.0, help="burstiness; 1 is Poisson")
    simulate.add_argument(
        "--azure", help="CSV of the Azure Functions trace of 2019, instead of a Gamma process"
    )
    simulate.add_argument("--seed", type=int, default=0)

    doctor = commands.add_parser("doctor", help="say why the load format would not work (exit code 1)")
    doctor.add_argument("--model", help="model directory; checked if given")
    doctor.add_argument(
        "--extra-config", help="JSON as given to --model-loader-extra-config; checked if given"
    )

    options = parser.parse_args(arguments)
    try:
        return globals()[f"_{options.command}"](options)
    except (OSError, ValueError, MemoryError) as error:
        from vllm_serverless_loader.checkpoint.index import CorruptCheckpointError

        print(f"serverless-loader: {error}", file=sys.stderr)
        return 1 if isinstance(error, CorruptCheckpointError) else 2


def _convert(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.conversion import convert

    path = convert(
        options.model,
        options.out,
        layout=options.layout,
        tensor_parallel_size=options.tensor_parallel_size,
        dtype=options.dtype,
    )
    print(path)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.checkpoint.index import DTYPE_NAMES
    from vllm_serverless_loader.checkpoint.reader import open_checkpoint

    with open_checkpoint(options.path, rank=options.rank) as checkpoint:
        summary = {
            "format": "serverless_llm" if checkpoint.has_checksums else "safetensors",
            "rank": checkpoint.rank,
            "world_size": checkpoint.world_size,
            "num_bytes": checkpoint.num_bytes,
            "tensors": len(checkpoint.names),
            "key": vars(checkpoint.index.key),
        }
        print(json.dumps(summary))
        if options.tensors:
            for name, entry in checkpoint.index.tensors.items():
                print(
                    f"{entry.offset}\t{entry.num_bytes}\t{DTYPE_NAMES[entry.dtype]}\t{list(entry.shape)}\t{name}"
                )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.checkpoint.reader import open_checkpoint

    with open_checkpoint(options.path) as checkpoint:
        ranks = checkpoint.world_size
        note = (
            "all checksums agree" if checkpoint.has_checksums else "readable; safetensors hold no checksums"
        )
    for rank in range(ranks):
        with open_checkpoint(options.path, rank=rank) as checkpoint:
            checkpoint.verify()
    print(f"{options.path}: {ranks} partitions, {note}")
    return 0


def _store(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.loading.host_cache import HostCache
    from vllm_serverless_loader.loading.store import StoreServer

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    memory, chunk = parse_size(options.memory), parse_size(options.chunk)
    with (
        HostCache(memory, chunk_bytes=chunk, shared=True) as cache,
        StoreServer(
            cache,
            options.socket,
            options=LoadOptions(io_threads=options.io_threads),
            remote_cache=options.remote_cache,
            adapter_bytes=parse_size(options.adapter_memory),
        ),
    ):
        print(f"store: {cache.capacity_bytes} bytes at {Path(options.socket).resolve()}", flush=True)
        stopped.wait()
    return 0


def _probe(options: argparse.Namespace) -> int:
    import torch

    from tiered_memory import measure_bandwidth

    nbytes = parse_size(options.size)
    if nbytes < 1 << 20:
        raise ValueError(f"--size must be at least 1MiB to say something, got {options.size}")
    found = {
        "disk": measure_bandwidth("disk_read", path=options.disk, nbytes=nbytes).bytes_per_s,
        "host_copy": measure_bandwidth("host_copy", nbytes=nbytes).bytes_per_s,
    }
    if torch.cuda.is_available():
        found["host"] = measure_bandwidth("host_to_device", nbytes=nbytes).bytes_per_s
    print(json.dumps({link: round(value) for link, value in found.items()}))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.scheduling.cluster import ModelInfo
    from vllm_serverless_loader.scheduling.policies import (
        FirstAvailablePolicy,
        LocalityPolicy,
        RandomPolicy,
        StartupTimePolicy,
    )
    from vllm_serverless_loader.simulation.simulator import ServerSpec, simulate
    from vllm_serverless_loader.simulation.trace import Trace

    names = [f"model-{number}" for number in range(options.models)]
    models = {name: ModelInfo(name, (parse_size(options.model_size),)) for name in names}
    rate, seconds, seed = options.requests_per_s, options.seconds, options.seed
    if options.azure is None:
        trace = Trace.gamma(names, requests_per_s=rate, duration_s=seconds, cv=options.cv, seed=seed)
    else:
        trace = Trace.azure_functions(
            options.azure, names, requests_per_s=rate, duration_s=seconds, seed=seed
        )
    spec = ServerSpec(num_gpus=options.gpus, host_cache_bytes=parse_size(options.host_cache))
    for policy in (RandomPolicy, FirstAvailablePolicy, LocalityPolicy, StartupTimePolicy):
        result = simulate(trace, list(models.values()), [spec] * options.servers, policy(models))
        print(json.dumps({"policy": policy.__name__, **result.summary()}))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from vllm_serverless_loader.doctor import Problem, diagnose

    extra = None
    if options.extra_config is not None:
        try:
            extra = json.loads(options.extra_config)
        except ValueError as error:
            raise ValueError(f"--extra-config is not JSON: {error}") from error
    try:
        for line in diagnose(options.model, extra):
            print(line)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0

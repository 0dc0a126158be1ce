"""How long does vLLM take to load a LoRA adapter: from host memory, from the page cache, from disk?

python benchmarks/vllm_serverless_loader_adapters.py [--out FOLDER] [--folder DIR] [--adapters N]
    [--repeats N]

The real vLLM with room for one adapter, so that each one asked for is loaded: resolve, read, put into its
slot. Both resolvers are asked for the same adapters (40 MB, rank 64 in all linear layers) in turns. `cold`:
the pages of the adapter's file were dropped before; `resident`: the page cache holds them, for as long as it
likes. The adapters were put into host memory before, as by an earlier request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, write_result  # noqa: E402
from vllm_serverless_loader import AdapterCache  # noqa: E402

ARMS = ("file system, cold", "file system, resident", "host memory")
HIDDEN, LAYERS, RANK = 2048, 8, 64
SHAPES = {
    "self_attn.q_proj": (2048, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 2048),
    "mlp.gate_proj": (4096, HIDDEN),
    "mlp.up_proj": (4096, HIDDEN),
    "mlp.down_proj": (HIDDEN, 4096),
}


def write_base(folder: Path) -> Path:
    """A configuration; vLLM makes the weights up."""
    import transformers

    transformers.Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        torch_dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int) -> int:
    """A random adapter as PEFT saves it; bytes of its weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": RANK}
    config |= {"target_modules": [name.split(".")[1] for name in SHAPES], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure(folder: Path, count: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each load by arm, and bytes of an adapter."""
    from vllm import LLM
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    from vllm_serverless_loader.vllm_adapters import HostMemoryResolver

    base, adapters = write_base(folder / "base"), folder / "adapters"
    names = [f"adapter{number}" for number in range(count)]
    nbytes = max(write_adapter(adapters / name, base, seed) for seed, name in enumerate(names))
    llm = LLM(
        model=str(base),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        distributed_executor_backend="uni",
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=1,
        max_cpu_loras=1,
    )
    seconds: dict[str, list[float]] = {
        "file system, cold": [],
        "file system, resident": [],
        "host memory": [],
    }
    number = 0
    try:
        with AdapterCache(folder / "memory", 2 * count * nbytes) as cache:
            for name in names:
                cache.get(adapters / name)
            resolvers: dict[str, Any] = {
                arm: FilesystemResolver(str(adapters)) for arm in seconds if arm.startswith("file")
            }
            resolvers["host memory"] = HostMemoryResolver(adapters, cache.get)
            for turn in range(repeats + 1):
                for name in names:
                    for arm in list(seconds) if turn % 2 == 0 else list(seconds)[::-1]:
                        file = adapters / name / "adapter_model.safetensors"
                        if arm.endswith("cold"):
                            drop(file)
                        elif arm.endswith("resident"):
                            file.read_bytes()
                        number += 1
                        begin = time.perf_counter()
                        request = asyncio.run(resolvers[arm].resolve_lora(str(base), name))
                        request.lora_int_id, request.lora_name = number, f"{name}-{number}"
                        assert llm.llm_engine.add_lora(request)
                        if turn:  # the first one warms up
                            seconds[arm].append(time.perf_counter() - begin)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return seconds, nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds, nbytes = measure(Path(folder), options.adapters, options.repeats)
    headline = []
    for arm, values in seconds.items():
        milliseconds = [1e3 * value for value in values]
        headline.append(
            Headline(
                f"load from {arm}",
                statistics.median(milliseconds),
                "ms",
                min(milliseconds),
                max(milliseconds),
            )
        )
    for arm, target in (("file system, cold", ">= 4"), ("file system, resident", "")):
        ratios = [a / b for a, b in zip(seconds[arm], seconds["host memory"], strict=True)]
        what = f"{arm} over host memory"
        headline.append(Headline(what, statistics.median(ratios), "x", min(ratios), max(ratios), target))
    for row in headline:
        print(f"{row.what:40s} {row.value:8.2f} {row.unit}", flush=True)
    write_result(
        "vllm_serverless_loader_adapters",
        question="How long does vLLM take to load a LoRA adapter from host memory, page cache and disk?",
        headline=headline,
        samples=seconds,
        folder=options.out,
        parameters={"bytes": nbytes, "adapters": options.adapters, "rank": RANK},
    )


if __name__ == "__main__":
    main()

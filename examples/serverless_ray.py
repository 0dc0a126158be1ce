"""Three models on one machine, of which two fit in the DRAM pool, served by Ray; a client alternates between
them.

python examples/serverless_ray.py [--engine simulated|vllm]

For each request it prints which tier served the load, how long loading was estimated and how long the start
took. ``simulated`` loads real bytes through the real store, but computes hashes instead of tokens; ``vllm``
starts vLLM on a tiny random model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

ORDER = ("a", "b", "a", "c", "b", "a", "c", "c", "b", "a")
CPU_VLLM = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "distributed_executor_backend": "uni",
}


def write_models(folder: Path, engine: str, megabytes: int) -> dict[str, dict[str, Any]]:
    """Three models; returns their part of the cluster's configuration."""
    import torch

    from vllm_serverless_loader import write_partition

    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate("abc"):
        path = folder / name
        if engine == "vllm":
            from tests.support.tiny_models import write_tiny_model

            write_tiny_model("qwen3_moe", path, seed=number)
            found[name] = {"path": str(path), "num_gpus": 1, "engine": CPU_VLLM}
        else:
            write_partition(path, {"w": torch.full((megabytes << 20,), number, dtype=torch.uint8)})
            found[name] = {"path": str(path), "num_gpus": 1}
    return found


async def client(ingress: Any) -> list[dict[str, Any]]:
    """One request after the other; returns how each was started."""
    rows = []
    for model in ORDER:
        row: dict[str, Any] = {}
        tokens = 0
        async for item in ingress.generate.remote(model, [5, 6, 7, 8], {"max_tokens": 8, "temperature": 0.0}):
            if "start" in item:
                row = item["start"]
            else:
                tokens += 1
        rows.append({**row, "tokens": tokens})
        print(
            f"{model}  from {row['tier']:6s}  load: estimated {row['estimated_s']:6.3f} s, "
            f"measured {row['load_s']:6.3f} s; with a new process {row['startup_s']:6.2f} s; {tokens} tokens",
            flush=True,
        )
    return rows


def main() -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--megabytes", type=int, default=64, help="size of a simulated model")
    options = parser.parse_args()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray
    from ray import serve

    from vllm_serverless_loader.cli import parse_size
    from vllm_serverless_loader.ray_serve.app import CONTROLLER, build_app

    with tempfile.TemporaryDirectory() as name:
        models = write_models(Path(name), options.engine, options.megabytes)
        sizes = [sum(f.stat().st_size for f in Path(one["path"]).iterdir()) for one in models.values()]
        chunk = parse_size("1MiB")
        config = {
            "models": models,
            "host_cache_bytes": 2 * (max(sizes) + 2 * chunk),  # two of three models
            "chunk_bytes": chunk,
            "engine": options.engine,
            "keep_alive_s": 0.0,  # every request starts its model anew
        }
        # One GPU as far as Ray knows, so that the example runs on any machine.
        ray.init("local", num_cpus=2, num_gpus=1, log_to_driver=False)
        try:
            handle = serve.run(build_app(config), name="serverless", route_prefix="/")
            rows = asyncio.run(client(handle.options(stream=True)))
            controller = ray.get_actor(CONTROLLER)
            ray.get(controller.close.remote())
            ray.kill(controller)
        finally:
            serve.shutdown()
            ray.shutdown()
    return rows


if __name__ == "__main__":
    main()

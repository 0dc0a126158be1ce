"""The plugin's workload for ``moecap``: load a model's tensors, from here or there, in one format or another.

Arms: ``{format: safetensors | store, cache: cold | warm | pool}``. ``safetensors`` is the library of that
name, ``store`` our own format; ``cold`` drops the file's pages from the page cache first, ``warm`` leaves
them there, ``pool`` takes the tensors from a host cache that was filled before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moecap_eval import ArmConfig, Axis, BlockResult, Item
from moecap_eval.workload import RunContext, Sample, System, Workload
from vllm_serverless_loader.loading.options import check_names

FORMATS, CACHES = ("safetensors", "store"), ("cold", "warm", "pool")
_NO_ENGINE = "this workload loads tensors without an engine; see benchmarks/vllm_serverless_loader_gpu.py"


class ColdStartWorkload(Workload):
    """Each item is one load of the model in ``params.model`` (a safetensors directory) into parameters."""

    name: ClassVar[str] = "serverless_loader.cold_start"
    work_unit: ClassVar[str] = "GiB loaded"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("tensors_identical", "accuracy", "share", "higher", level="item", margin=0.0, headline=True),
        Axis("load_s", "performance", "s", "lower", level="item", headline=True),
        Axis("bytes_per_s", "performance", "B/s", "higher", level="item"),
        Axis("first_token_s", "performance", "s", "lower"),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """``params.loads`` loads."""
        check_names(params, ("model", "loads", "device"), self.name)
        return [Item(f"load-{number}", number) for number in range(int(params.get("loads", 8)))]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Check the arm and prepare the files.

        Raises:
            ValueError: an unknown option, or ``cache: pool`` with ``format: safetensors``, which has no pool.
        """
        check_names(arm.options, ("format", "cache"), f"arms.{arm.name}")
        kind, cache = arm.options.get("format", "store"), arm.options.get("cache", "warm")
        if kind not in FORMATS or cache not in CACHES:
            raise ValueError(
                f"arms.{arm.name}: format is one of {', '.join(FORMATS)}, cache one of {', '.join(CACHES)}; "
                f"got {kind!r} and {cache!r}"
            )
        if "model" not in context.params:
            raise ValueError(f"{self.name}: params.model must be a directory of safetensors files")
        if (kind, cache) == ("safetensors", "pool"):
            raise ValueError(f"arms.{arm.name}: the safetensors library has no pool; use format: store")
        device = context.params.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        return _ColdStart(Path(context.params["model"]), kind, cache, torch.device(device))


class _ColdStart(System):
    def __init__(self, model: Path, kind: str, cache: str, device: torch.device) -> None:
        from vllm_serverless_loader import HostCache, convert, open_checkpoint

        self._folder = Path(tempfile.mkdtemp(prefix="cold-start-"))
        self._kind, self._cache, self._device = kind, cache, device
        with open_checkpoint(model) as checkpoint:
            self._reference = {name: tensor.clone() for name, tensor in checkpoint.load().tensors.items()}
        self._into = {name: torch.zeros_like(t, device=device) for name, t in self._reference.items()}
        self._num_bytes = sum(tensor.nbytes for tensor in self._reference.values())
        self._path = model if kind == "safetensors" else convert(model, self._folder / "store", layout="full")
        self._files = [file for file in self._path.iterdir() if file.suffix in (".safetensors", ".bin")]
        self._pool: HostCache | None = None
        if cache == "pool":
            self._pool = HostCache(2 * self._num_bytes + (64 << 20))
            self._load()

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Load once an item, and compare every tensor bit by bit."""
        samples = [self._once(item) for item in items]
        result = BlockResult(work=len(items) * self._num_bytes / 2**30, samples=samples)
        result.values["first_token_s"] = None
        result.reasons["first_token_s"] = _NO_ENGINE
        return result

    def _once(self, item: Item) -> Sample:
        for tensor in self._into.values():
            tensor.zero_()
        if self._cache == "cold":
            for file in self._files:
                fd = os.open(file, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        begin = time.perf_counter()
        self._load()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - begin
        same = sum(_equal(self._into[name].cpu(), tensor) for name, tensor in self._reference.items())
        values = {
            "tensors_identical": same / len(self._reference),
            "load_s": seconds,
            "bytes_per_s": self._num_bytes / seconds,
        }
        return Sample(item.id, values)

    def _load(self) -> None:
        from safetensors import safe_open

        from vllm_serverless_loader import open_checkpoint

        if self._kind == "safetensors":
            for file in self._files:
                with safe_open(file, framework="pt", device=str(self._device)) as opened:
                    for name in opened.keys():  # noqa: SIM118 - a file, no mapping
                        self._into[name].copy_(opened.get_tensor(name))
            return
        with open_checkpoint(self._path) as checkpoint:
            if self._pool is None:
                checkpoint.load(into=self._into)
            else:
                with self._pool.load(checkpoint) as model:
                    model.load(into=self._into)

    def memory_bytes(self) -> dict[str, int]:
        """The pool, and the parameters where they are."""
        held = {"hbm" if self._device.type == "cuda" else "dram": self._num_bytes}
        if self._pool is not None:
            held["dram"] = held.get("dram", 0) + self._pool.capacity_bytes
        return held

    def close(self) -> None:
        """Free the pool and remove the converted files."""
        if self._pool is not None:
            self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))

"""vLLM's ``--load-format serverless_llm``. Every reference to vLLM's model loaders is in this file."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_serverless_loader.checkpoint.index import CheckpointKey
from vllm_serverless_loader.checkpoint.reader import Checkpoint, model_digest, open_checkpoint
from vllm_serverless_loader.checkpoint.writer import copy_other_files, write_partition
from vllm_serverless_loader.loading.host_cache import CachedModel
from vllm_serverless_loader.loading.options import LoadOptions, LoadReport, check_names, options_from
from vllm_serverless_loader.loading.store import StoreClient
from vllm_serverless_loader.metrics import record, register_collector

try:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
except ImportError as error:
    raise ImportError(
        f"serverless_llm needs vLLM 0.25.1 or newer (pip install 'graft-plugins[vllm]'): {error}"
    ) from error

logger = logging.getLogger("vllm.serverless_loader")

LOAD_FORMAT = "serverless_llm"
_OWN_KEYS = ("store", "store_required", "convert_to")


def register() -> None:
    """Register the load format (entry point ``vllm.general_plugins``). Idempotent.

    Raises:
        ImportError: this vLLM lacks what the loader hooks into; the message names it.
    """
    for owner, name in (
        (DefaultModelLoader, "_get_weights_iterator"),
        (ShardedStateLoader, "_filter_subtensors"),
    ):
        if not hasattr(owner, name):
            raise ImportError(
                f"serverless_llm: this vLLM has no {owner.__name__}.{name}; 0.25.1 to 0.32 have"
            )
    if not is_registered():
        register_model_loader(LOAD_FORMAT)(ServerlessLoader)
    register_collector()


def is_registered() -> bool:
    """Whether :func:`register` has run in this process."""
    from vllm.model_executor import model_loader

    return model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is ServerlessLoader


@dataclasses.dataclass(frozen=True)
class ExtraConfig:
    """What ``--model-loader-extra-config`` may hold, next to the fields of :class:`LoadOptions`.

    Attributes:
        options: how to read.
        store: socket of the machine's store process.
        store_required: raise if the store does not answer, instead of reading directly.
        convert_to: directory into which the weights are written, before vLLM post-processes them.
    """

    options: LoadOptions
    store: str | None = None
    store_required: bool = False
    convert_to: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ExtraConfig:
        """Check and parse.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"model_loader_extra_config must be an object, got {values!r}")
        known = [*(item.name for item in dataclasses.fields(LoadOptions)), *_OWN_KEYS]
        check_names(values, known, "model_loader_extra_config")
        own = {name: values[name] for name in _OWN_KEYS if name in values}
        for name, kind in (("store", str), ("convert_to", str), ("store_required", bool)):
            if own.get(name) is not None and not isinstance(own[name], kind):
                raise ValueError(
                    f"model_loader_extra_config: {name} must be a {kind.__name__}, got {own[name]!r}"
                )
        rest = {name: value for name, value in values.items() if name not in _OWN_KEYS}
        return cls(options_from(rest, "model_loader_extra_config"), **own)


class ServerlessLoader(BaseModelLoader):
    """Loads converted checkpoints and safetensors directories, directly or through the store process."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.extra = ExtraConfig.parse(load_config.model_loader_extra_config or {})
        self._default = _StreamingLoader(load_config, self._stream)
        self._ahead: Future[CachedModel | None] | None = None
        self._client: StoreClient | None = None
        self._progress = _Progress(0, shown=False)

    def download_model(self, model_config: Any) -> None:
        """Fetch the model's files if it is a name of the Hugging Face hub."""
        self._folder(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """As vLLM's; the store reads the checkpoint while the model is being built."""
        if self.extra.store is not None and self.extra.convert_to is None:
            folder, (rank, _) = self._folder(model_config), _rank_and_world_size()
            pool = ThreadPoolExecutor(1, "serverless-loader-ahead")
            self._ahead = pool.submit(self._lease, folder, rank)
            pool.shutdown(wait=False)
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill the model's parameters, before vLLM post-processes them.

        Raises:
            FileNotFoundError, ValueError, CorruptCheckpointError: see :func:`open_checkpoint`.
            ConnectionError: the store does not answer and ``store_required`` is set.
        """
        folder = self._folder(model_config)
        rank, world_size = _rank_and_world_size()
        if self.extra.convert_to is not None:
            self._default.load_weights(model, model_config)
            self._convert(model, model_config, folder)
            return
        begin = time.perf_counter()
        with ExitStack() as stack:
            opened = self._open(folder, rank, world_size, _key(model_config))
            stack.enter_context(opened)
            if self._client is not None:
                stack.callback(self._client.close)
            shown = rank == 0 and getattr(self.load_config, "use_tqdm_on_load", True)
            self._progress = stack.enter_context(_Progress(opened.num_bytes, shown=shown))
            if opened.index.key.layout == "vllm":
                state = ShardedStateLoader._filter_subtensors(model.state_dict())
                if isinstance(opened, Checkpoint):
                    opened.load(into=state, options=self.extra.options, progress=self._progress.advance)
                else:
                    opened.load(into=state, options=self.extra.options)
            else:
                self._default.opened = opened
                self._default.load_weights(model, model_config)
            report = self._report(opened, time.perf_counter() - begin)
        self._log(report, rank, opened)
        try:
            record(report, model=str(getattr(model_config, "served_model_name", "") or folder), rank=rank)
        except OSError as error:
            logger.warning("serverless_llm: /metrics will not show this load: %s", error)

    def _report(self, opened: Checkpoint | CachedModel, seconds: float) -> LoadReport:
        """What the load did; a model that the store had to read first has come from disk."""
        read = {"disk": self._progress.num_bytes} if self._progress.num_bytes else {}
        if isinstance(opened, CachedModel):
            read["host"] = opened.num_bytes
            if not opened.hit:
                read["disk"] = read.get("disk", 0) + opened.num_bytes
        source = "disk" if "disk" in read else "host"
        return LoadReport(max(read.values(), default=0), seconds, source, read)

    def _open(self, folder: Path, rank: int, world_size: int, key: CheckpointKey) -> Checkpoint | CachedModel:
        """The checkpoint, from the store if there is one."""
        ahead, self._ahead = self._ahead, None
        checkpoint = open_checkpoint(folder, rank=rank, world_size=world_size, expect=key)
        if self.extra.store is None:
            return checkpoint
        lease = ahead.result() if ahead is not None else self._lease(folder, rank)
        return checkpoint if lease is None else lease

    def _lease(self, folder: Path, rank: int) -> CachedModel | None:
        assert self.extra.store is not None
        try:
            self._client = StoreClient(self.extra.store)
            return self._client.open(folder, rank)
        except (ConnectionError, MemoryError) as error:
            if self.extra.store_required:
                raise
            warnings.warn(f"{error}; reading {folder} directly", RuntimeWarning, stacklevel=2)
            return None

    def _stream(self, folder: Path, opened: Checkpoint | CachedModel | None) -> Iterator[tuple[str, Tensor]]:
        """Tensors of an original-layout directory for vLLM's own weight loaders, on the model's device."""
        if opened is None or Path(opened.path).resolve() != folder.resolve():
            opened = open_checkpoint(folder)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        if isinstance(opened, CachedModel):
            return opened.tensors(device, options=self.extra.options)
        return opened.tensors(device, options=self.extra.options, progress=self._progress.advance)

    def _convert(self, model: nn.Module, model_config: Any, folder: Path) -> None:
        assert self.extra.convert_to is not None
        for name, module in model.named_modules():
            if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
                raise ValueError(
                    f"serverless_llm: {name} is quantised while loading, so there is no state to convert; "
                    "load the original directory"
                )
        target = Path(self.extra.convert_to)
        rank, world_size = _rank_and_world_size()
        state = ShardedStateLoader._filter_subtensors(model.state_dict())
        key = dataclasses.replace(_key(model_config), layout="vllm", model=model_digest(folder))
        write_partition(target, state, rank=rank, world_size=world_size, key=key)
        if rank == 0:
            copy_other_files(folder, target)
        logger.info("serverless_llm: rank %d of %d written to %s", rank, world_size, target)

    def _folder(self, model_config: Any) -> Path:
        name = getattr(model_config, "model_weights", None) or model_config.model
        if os.path.isdir(name):
            return Path(name)
        return Path(self._default._prepare_weights(name, None, model_config.revision, False, None)[0])

    def _log(self, report: LoadReport, rank: int, opened: Checkpoint | CachedModel) -> None:
        logger.info(
            "serverless_llm: rank %d: %.2f GiB from %s in %.3f s (%.2f GiB/s), layout %s",
            rank,
            report.num_bytes / 2**30,
            report.source,
            report.seconds,
            report.bandwidth / 2**30,
            opened.index.key.layout,
        )


class _Progress:
    """Bytes read from disk so far, with a bar once that has taken a second. Context manager."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total,
            desc=LOAD_FORMAT,
            unit="B",
            unit_scale=True,
            delay=1.0,
            leave=False,
            disable=not shown,
        )

    def advance(self, num_bytes: int) -> None:
        """Count bytes; may be called by several threads."""
        with self._lock:
            self.num_bytes += num_bytes
            self._bar.update(num_bytes)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class _StreamingLoader(DefaultModelLoader):
    """vLLM's default loader, its checks and secondary weights, with tensors from our reader."""

    def __init__(self, load_config: LoadConfig, stream: Any) -> None:
        plain = dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config={})
        super().__init__(plain)
        self.counter_before_loading_weights: float = 0.0
        self._stream = stream
        self.opened: Checkpoint | CachedModel | None = None

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Tensor]]:
        folder = Path(source.model_or_path)
        if not folder.is_dir():
            folder = Path(self._prepare_weights(source.model_or_path, None, source.revision, False, None)[0])
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        return ((source.prefix + name, tensor) for name, tensor in self._stream(folder, self.opened))


def _rank_and_world_size() -> tuple[int, int]:
    from vllm.distributed import (
        get_pp_group,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    size = get_tensor_model_parallel_world_size()
    pipeline = get_pp_group()
    return pipeline.rank_in_group * size + get_tensor_model_parallel_rank(), pipeline.world_size * size


def _key(model_config: Any) -> CheckpointKey:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size

    return CheckpointKey(
        layout="",
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization or "",
        tensor_parallel_size=get_tensor_model_parallel_world_size(),
        pipeline_parallel_size=get_pp_group().world_size,
    )


def convert_in_vllm(
    source: Path, target: Path, tensor_parallel_size: int, dtype: str, engine_arguments: dict[str, Any]
) -> None:
    """Start vLLM once; its ranks write their partitions in the middle of loading."""
    from vllm import LLM

    register()
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 1,
        "max_model_len": 128,
        "gpu_memory_utilization": 0.9,
        **engine_arguments,
    }
    llm = LLM(
        model=str(source),
        load_format=LOAD_FORMAT,
        model_loader_extra_config={"convert_to": str(target.resolve())},
        tensor_parallel_size=tensor_parallel_size,
        dtype=dtype,
        **arguments,
    )
    llm.llm_engine.engine_core.shutdown()

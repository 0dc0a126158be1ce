"""vLLM's LoRA resolver that takes adapters from host memory: the store process's, or its own."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from vllm_serverless_loader.loading.adapters import CONFIG, AdapterCache
from vllm_serverless_loader.loading.options import parse_size
from vllm_serverless_loader.loading.store import StoreClient

logger = logging.getLogger("vllm.serverless_loader")

NAME = "Serverless Loader Resolver"
FOLDER = "SERVERLESS_LOADER_ADAPTERS"
STORE = "SERVERLESS_LOADER_STORE"
MEMORY = "SERVERLESS_LOADER_ADAPTER_MEMORY"


class HostMemoryResolver(LoRAResolver):
    """Finds the adapter NAME in ``folder/NAME`` and gives vLLM its copy in memory.

    Args:
        folder: holds one folder for each adapter, as PEFT saves it.
        place: gives the folder in memory of an adapter's folder; where it fails vLLM gets the original.
    """

    def __init__(self, folder: str | os.PathLike[str], place: Callable[[Path], Path]) -> None:
        self.folder = Path(folder).resolve()
        self._place = place

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter, if it is there and was made for this model."""
        path = (self.folder / lora_name).resolve()
        if path == self.folder or not path.is_relative_to(self.folder) or not (path / CONFIG).is_file():
            return None
        config = json.loads((path / CONFIG).read_bytes())
        if config.get("peft_type") != "LORA" or config.get("base_model_name_or_path") != base_model_name:
            return None
        try:
            place = await asyncio.to_thread(self._place, path)
            if not (place / CONFIG).is_file():
                raise FileNotFoundError(f"{place} is not visible from this process")
        except (OSError, ValueError, MemoryError) as error:
            logger.warning("serverless_llm: adapter %s is read from disk: %s", lora_name, error)
            place = path
        # The server numbers adapters itself and overwrites the id.
        return LoRARequest(lora_name=lora_name, lora_int_id=abs(hash(lora_name)) + 1, lora_path=str(place))


def register() -> None:
    """Register the resolver if the environment names a folder of adapters. Idempotent.

    Raises:
        ValueError: the folder is not there, or the memory is no size.
    """
    folder = os.environ.get(FOLDER)
    if not folder or NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if not Path(folder).is_dir():
        raise ValueError(f"{FOLDER}: {folder} is not a folder")
    socket = os.environ.get(STORE)
    memory = parse_size(os.environ.get(MEMORY, "4GiB"))
    place = functools.partial(_from_store, socket) if socket else _OwnCache(memory)
    LoRAResolverRegistry.register_resolver(NAME, HostMemoryResolver(folder, place))


def _from_store(socket: str, path: Path) -> Path:
    with StoreClient(socket) as client:
        return client.adapter(path)


class _OwnCache:
    """A cache of this process, made when the first adapter is asked for."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes

    @functools.cached_property
    def _cache(self) -> AdapterCache:
        root = tempfile.mkdtemp(prefix="serverless-loader-adapters-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        return AdapterCache(root, self._capacity_bytes)

    def __call__(self, path: Path) -> Path:
        return self._cache.get(path)

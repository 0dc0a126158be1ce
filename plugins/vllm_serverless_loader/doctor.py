"""Why ``--load-format serverless_llm`` would not work, told without starting an engine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

GROUP, NAME = "vllm.general_plugins", "serverless_loader"


class Problem(Exception):
    """A reason why the load format would not work."""


def diagnose(
    model: str | os.PathLike[str] | None = None, extra_config: Mapping[str, Any] | None = None
) -> list[str]:
    """Run all checks.

    Args:
        model: directory to load, if there is one to check.
        extra_config: value of ``--model-loader-extra-config``, if there is one to check.

    Returns:
        What was found good, one line a check.

    Raises:
        Problem: the first thing that would keep the load format from working.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("xxhash", _check_xxhash),
        ("vllm", _check_registration),
        ("entry point", _check_entry_point),
        ("VLLM_PLUGINS", _check_filter),
    ]
    if extra_config is not None:
        checks.append(("extra config", lambda: _check_extra_config(extra_config)))
    if model is not None:
        checks.append(("model", lambda: _check_model(model)))
    return [f"{name}: {check()}" for name, check in checks]


def _check_xxhash() -> str:
    try:
        return f"version {importlib.import_module('xxhash').VERSION}"
    except ImportError as error:
        raise Problem("xxhash is missing (pip install 'graft-plugins[vllm]')") from error


def _check_registration() -> str:
    try:
        adapter = importlib.import_module("vllm_serverless_loader.vllm_loader")
        adapter.register()
    except ImportError as error:
        raise Problem(str(error)) from error
    if not adapter.is_registered():
        raise Problem("vLLM's registry of load formats does not name serverless_llm")
    return f"version {importlib.import_module('vllm').__version__}, load format registered"


def _check_entry_point() -> str:
    found = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not found:
        raise Problem(
            f"no entry point {NAME!r} in group {GROUP!r}; install graft-plugins where vLLM is installed"
        )
    return found[0].value


def _check_filter() -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        raise Problem(f"VLLM_PLUGINS={allowed!r} leaves it out; add {NAME}")
    return "not set" if allowed is None else f"includes {NAME}"


def _check_extra_config(values: Mapping[str, Any]) -> str:
    from vllm_serverless_loader.loading.store import StoreClient
    from vllm_serverless_loader.vllm_loader import ExtraConfig

    try:
        extra = ExtraConfig.parse(values)
        if extra.store is None:
            return "valid"
        with StoreClient(extra.store) as client:
            return f"valid; the store answers and holds {len(client.models())} models"
    except (ValueError, ConnectionError) as error:
        raise Problem(str(error)) from error


def _check_model(model: str | os.PathLike[str]) -> str:
    from vllm_serverless_loader.checkpoint.reader import open_checkpoint

    try:
        with open_checkpoint(model) as checkpoint:
            layout = checkpoint.index.key.layout
            kind = (
                f"layout {layout!r}, {checkpoint.world_size} partitions"
                if checkpoint.has_checksums
                else "safetensors"
            )
            return f"{len(checkpoint.names)} tensors, {checkpoint.num_bytes} bytes, {kind}"
    except (ValueError, OSError) as error:
        raise Problem(str(error)) from error

"""Why expert offload would be inactive: checks that name a reason, without starting an engine."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_moe_offload.config import MoEOffloadConfig

GROUP, NAME = "vllm.general_plugins", "moe_offload"
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Problem(Exception):
    """A reason why offload would not run."""


def diagnose(options: object = None, model: str | os.PathLike[str] | None = None) -> list[str]:
    """Run all checks.

    Args:
        options: value of ``additional_config``, or of its key ``moe_offload``, if there is one to check.
        model: folder with a config.json, if there is one to check.

    Returns:
        What was found good, one line a check.

    Raises:
        Problem: the first thing that would keep offload from running.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("vllm", _check_vllm),
        ("entry point", _check_entry_point),
        ("VLLM_PLUGINS", _check_filter),
        ("registration", _check_registration),
    ]
    if options is not None:
        checks.append(("options", lambda: _check_options(options)))
    if model is not None:
        checks.append(("model", lambda: _check_model(Path(model))))
    return [f"{name}: {check()}" for name, check in checks]


def _inactive(reason: str) -> Problem:
    return Problem(f"moe_offload is configured but the plugin is not active: {reason}")


def _check_vllm() -> str:
    from vllm_moe_offload.vllm_layer import probe

    try:
        probe()
    except ImportError as error:
        raise _inactive(str(error)) from error
    return f"version {importlib.import_module('vllm').__version__} has what the plugin hooks into"


def _check_entry_point() -> str:
    found = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not found:
        raise _inactive(
            f"no entry point {NAME!r} in group {GROUP!r}; install graft-plugins where vLLM is installed"
        )
    return found[0].value


def _check_filter() -> str:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        raise _inactive(f"VLLM_PLUGINS={allowed!r} leaves it out; add {NAME}")
    return "not set" if allowed is None else f"includes {NAME}"


def _check_registration() -> str:
    from vllm_moe_offload import vllm_layer

    try:
        vllm_layer.register()
    except Exception as error:
        raise _inactive(f"registering failed: {error}") from error
    if not vllm_layer.is_registered():
        raise _inactive("vLLM's registry of layers does not name it")
    return "vLLM's RoutedExperts and its subclasses are replaced"


def _check_options(options: object) -> str:
    if isinstance(options, Mapping) and NAME in options:
        options = options[NAME]
    elif isinstance(options, Mapping) and not options:
        raise _inactive(f"additional_config has no key {NAME!r}")
    try:
        MoEOffloadConfig.from_dict(options)  # type: ignore[arg-type]
    except ValueError as error:
        raise Problem(str(error)) from error
    return "valid"


def _check_model(folder: Path) -> str:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Problem(f"{path} is not JSON: {error}") from error
    text = config.get("text_config", config)
    for name in _EXPERT_COUNTS:
        if isinstance(text.get(name), int) and text[name] > 1:
            return f"{text[name]} experts a layer ({name})"
    raise _inactive(f"the model in {folder} has no routed experts (none of {', '.join(_EXPERT_COUNTS)})")

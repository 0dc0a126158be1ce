"""Why expert offload would be inactive: checks that name a reason, without starting an engine."""

from __future__ import annotations

import dataclasses
import difflib
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
        checks.append(("model", lambda: _check_model(Path(model), options)))
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
    _config_of(options)
    return "valid"


def _config_of(options: object) -> MoEOffloadConfig:
    if isinstance(options, Mapping) and NAME in options:
        options = options[NAME]
    elif isinstance(options, Mapping):
        known = {field.name for field in dataclasses.fields(MoEOffloadConfig)}
        # One of our own options, though perhaps misspelt, tells that these are the plugin's.
        if not any(difflib.get_close_matches(str(name), known, n=1) for name in options):
            found = f" (found {', '.join(map(str, options))})" if options else ""
            raise _inactive(f"additional_config has no key {NAME!r}{found}")
    try:
        return MoEOffloadConfig.from_dict(options)  # type: ignore[arg-type]
    except ValueError as error:
        raise Problem(str(error)) from error


def _check_model(folder: Path, options: object) -> str:
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
            _check_slots(text, text[name], options)
            return f"{text[name]} experts a layer ({name})"
    raise _inactive(f"the model in {folder} has no routed experts (none of {', '.join(_EXPERT_COUNTS)})")


def _check_slots(text: Mapping[str, Any], num_experts: int, options: object) -> None:
    """Refuse too few slots, as far as the model's config tells: not all of its layers need have experts."""
    top_k, layers = text.get("num_experts_per_tok"), text.get("num_hidden_layers")
    if options is None or not (isinstance(top_k, int) and isinstance(layers, int)):
        return
    config = _config_of(options)
    if config.cache_size is not None:
        return  # the size of an expert is not in the config
    try:
        config.num_slots(layers, num_experts, top_k, 1)
    except ValueError as error:
        raise Problem(str(error).partition(" (")[0] + " are needed") from error

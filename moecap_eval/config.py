"""Configuration of a run: one YAML file, read strictly.

A key nobody knows is an error that names its path and the nearest known key; nothing is started before the
whole file is understood.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecap_eval.cost import CostModel
from moecap_eval.workload import ArmConfig

AA_SUFFIX = "#aa"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATH_KEYS = {"model", "tasks", "path"}
_PATH_SUFFIXES = ("_path", "_dir", "_file")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CompareConfig(_Section):
    """How arms are compared.

    ``blocks`` (even) equal blocks of items; ``warm_up`` discarded calls per opened arm; ``margins`` replaces
    the equivalence margin of an axis by name; ``aa_control`` runs the baseline twice per block; without
    ``keep_alive`` an arm is closed as soon as another must work; an arm silent for ``timeout_s`` has failed.
    """

    baseline: str = ""
    blocks: int = Field(default=8, ge=2)
    warm_up: int = Field(default=1, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    aa_control: bool = True
    margins: dict[str, float] = Field(default_factory=dict)
    keep_alive: bool = True
    timeout_s: float = Field(default=1800.0, gt=0)


class HardwareConfig(_Section):
    """Hardware profile (a name or a YAML file) and whether utilisation uses its peaks or measured ones."""

    profile: str = "cpu-reference"
    peaks: Literal["spec", "measured"] = "measured"


class _Document(_Section):
    name: str
    workload: str
    params: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any] | None]
    compare: CompareConfig = CompareConfig()
    hardware: HardwareConfig = HardwareConfig()
    cost: dict[str, Any] | None = None
    limit: int | None = Field(default=None, ge=2)


@dataclass(frozen=True)
class RunConfig:
    """A validated configuration.

    ``params`` and arm options have their relative paths resolved; ``content`` is the canonical form as
    written (defaults filled in, paths as given) and ``digest`` its SHA-256, so that a folder of records
    stays valid when it moves. ``limit`` caps the number of items.
    """

    name: str
    workload: str
    params: Mapping[str, Any]
    arms: tuple[ArmConfig, ...]
    compare: CompareConfig
    hardware: HardwareConfig
    cost: CostModel
    content: Mapping[str, Any]
    limit: int | None = None
    has_cost: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical content, hexadecimal."""
        canonical = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The run's seed: ``params.seed``, default 0."""
        return int(self.params.get("seed", 0))

    @property
    def workload_params(self) -> dict[str, Any]:
        """``params`` without the seed, as the workload receives them."""
        return {key: value for key, value in self.params.items() if key != "seed"}

    @property
    def slots(self) -> tuple[str, ...]:
        """Arm names of one block's slots: every arm, then the A/A slot where it is asked for."""
        names = tuple(arm.name for arm in self.arms)
        return (*names, self.compare.baseline + AA_SUFFIX) if self.compare.aa_control else names

    def restricted(self, arms: Sequence[str] | None = None, limit: int | None = None) -> RunConfig:
        """The same configuration for some of its arms and at most ``limit`` items.

        With fewer items than blocks the number of blocks falls to the largest even number that fits.

        Raises:
            ValueError: an unknown arm, no baseline among them, or fewer than 2 items.
        """
        config = self
        if arms is not None:
            known = [arm.name for arm in self.arms]
            for name in arms:
                if name not in known:
                    raise ValueError(f"arm {name!r} is not in the config (arms: {', '.join(known)})")
            if self.compare.baseline not in arms:
                raise ValueError(
                    f"compare.baseline {self.compare.baseline!r} is not an arm (arms: {', '.join(arms)})"
                )
            kept = {name: options for name, options in self.content["arms"].items() if name in arms}
            config = replace(
                config,
                arms=tuple(arm for arm in self.arms if arm.name in arms),
                content={**config.content, "arms": kept},
            )
        if limit is not None:
            if limit < 2:
                raise ValueError(f"limit must be at least 2 items, got {limit}")
            blocks = min(config.compare.blocks, limit - limit % 2)
            compare = config.compare.model_copy(update={"blocks": blocks})
            content = {**config.content, "compare": compare.model_dump(), "limit": limit}
            config = replace(config, compare=compare, content=content, limit=limit)
        return config


def load_config(path: str | Path, *, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML config; relative paths in it are resolved against its folder.

    Args:
        path: the YAML file.
        overrides: dotted key -> value, applied before validation (``{"compare.blocks": 12}``).

    Raises:
        ValueError: the file is not valid YAML or not a valid config; the message is one line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping with the keys {', '.join(_Document.model_fields)}")
    for dotted, value in (overrides or {}).items():
        _set_dotted(data, dotted, value)
    return parse_config(data, path.parent)


def parse_config(data: Mapping[str, Any], base_dir: str | Path = ".") -> RunConfig:
    """Validate a config given as a mapping.

    A string is taken as a path when its key is ``model``, ``tasks``, ``path`` or ends in ``_path``, ``_dir``
    or ``_file``, or when it contains a slash, and the path exists under ``base_dir``; of ``prefix:path`` (a
    task of lm_eval in a folder) the path's folder. Other strings stay.

    Raises:
        ValueError: with the path of the key at fault.
    """
    try:
        document = _Document.model_validate(dict(data))
    except ValidationError as error:
        raise ValueError(_first_error(error)) from None
    arms = {name: options or {} for name, options in document.arms.items()}
    compare = document.compare
    if not compare.baseline and arms:
        compare = compare.model_copy(update={"baseline": next(iter(arms))})
    _check_names(document.name, arms)
    if compare.baseline not in arms:
        raise ValueError(f"compare.baseline {compare.baseline!r} is not an arm (arms: {', '.join(arms)})")
    if compare.blocks % 2:
        raise ValueError(f"compare.blocks must be even, got {compare.blocks}")
    for axis, margin in compare.margins.items():
        if not margin > 0:
            raise ValueError(f"compare.margins.{axis} must be positive, got {margin}")
    if not isinstance(document.params.get("seed", 0), int):
        raise ValueError(f"params.seed must be an integer, got {document.params['seed']!r}")

    base = Path(base_dir)
    hardware = document.hardware
    if (base / hardware.profile).is_file():
        hardware = hardware.model_copy(update={"profile": str((base / hardware.profile).resolve())})
    content = document.model_dump() | {"arms": arms, "compare": compare.model_dump()}
    config = RunConfig(
        name=document.name,
        workload=document.workload,
        params=_resolve_paths(document.params, base),
        arms=tuple(ArmConfig(name, _resolve_paths(options, base)) for name, options in arms.items()),
        compare=compare,
        hardware=hardware,
        cost=CostModel.from_mapping(document.cost or {}),
        content=_plain(content),
        has_cost=bool(document.cost),
    )
    return config if document.limit is None else config.restricted(limit=document.limit)


def _check_names(name: str, arms: Mapping[str, Any]) -> None:
    if not arms:
        raise ValueError("arms: at least one arm is needed")
    for where, value in [("name", name), *(("arms", arm) for arm in arms)]:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{where}: {value!r} must consist of letters, digits, '.', '_' and '-'")


def unknown_key(dotted: str, known: Sequence[str]) -> str:
    """The message for an unknown key, with the nearest known one or all of them."""
    near = difflib.get_close_matches(dotted.rsplit(".", 1)[-1], list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{dotted}: unknown key; {hint}"


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = _Document
        for part in first["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            section = annotation if isinstance(annotation, type) else _Document
        return unknown_key(dotted, list(section.model_fields))
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{dotted}: {message}, got {first['input']!r}"


def _resolve_paths(value: Any, base: Path, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _resolve_paths(item, base, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(item, base, key) for item in value]
    if isinstance(value, str) and value:
        is_path = "/" in value or key in _PATH_KEYS or key.endswith(_PATH_SUFFIXES)
        if is_path and (base / value).exists():
            return str((base / value).resolve())
        prefix, colon, rest = value.partition(":")
        if colon and "/" in rest and (base / rest).parent.is_dir():
            return f"{prefix}:{(base / rest).resolve()}"
    return value


def _plain(value: Any) -> Any:
    """JSON types only, so that the digest does not depend on how YAML spelled a value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _set_dotted(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{dotted}: {part!r} is not a mapping")
        node = child
    node[last] = value

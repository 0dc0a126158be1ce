"""The drop ratio of a checkpoint, in a JSON file beside it: ``step-000029999.ckpt.phdropout.json``.

Checkpoints stay plain. The file names the checkpoint it was made for by its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nerfstudio_phdropout.checks import check_ratio
from nerfstudio_phdropout.config import PHDropoutConfig
from nerfstudio_phdropout.search import DropoutSearchResult

SUFFIX = ".phdropout.json"
VERSION = 1


def sidecar_path(checkpoint: Path) -> Path:
    """Where the ratio of ``checkpoint`` is kept."""
    return checkpoint.with_name(checkpoint.name + SUFFIX)


def write_sidecar(checkpoint: Path, config: PHDropoutConfig, found: DropoutSearchResult | float) -> Path:
    """Write the ratio found for ``checkpoint`` beside it, aside first and then renamed.

    Args:
        checkpoint: an existing file.
        config: settings of the search.
        found: a search's result, or a ratio given by the user.
    """
    if isinstance(found, DropoutSearchResult):
        ratio, searched = found.ratio, {"evaluations": found.evaluations, "saturated": found.saturated}
    else:
        ratio, searched = float(found), {}
    check_ratio(ratio)
    content = {
        "version": VERSION,
        "ratio": ratio,
        "margin": config.margin,
        "quality": config.quality,
        "seed": config.seed,
        "checkpoint": checkpoint.name,
        "sha256": _digest(checkpoint),
        **searched,
    }
    path = sidecar_path(checkpoint)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)
    return path


def read_ratio(path: Path, step: int | None = None) -> float:
    """The ratio in a sidecar file, once it is sure that it belongs to the checkpoint in use.

    Args:
        path: the sidecar.
        step: training step of the checkpoint in use, if known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a sidecar, another version, or made for another checkpoint.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run ns-phdropout to search the dropout ratio")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version, ratio, name, digest = (content[key] for key in ("version", "ratio", "checkpoint", "sha256"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a PH-Dropout sidecar ({error!r}); run ns-phdropout again") from error
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}, this release reads {VERSION}; run ns-phdropout again"
        )
    check_ratio(ratio)
    checkpoint = path.with_name(path.name.removesuffix(SUFFIX))
    if step is not None and checkpoint.name != f"step-{step:09d}.ckpt":
        raise ValueError(
            f"{path} belongs to {checkpoint.name}, but the checkpoint of step {step} is loaded; "
            "run ns-phdropout again"
        )
    if name != checkpoint.name or not checkpoint.exists() or _digest(checkpoint) != digest:
        raise ValueError(
            f"{path} was made for another checkpoint than {checkpoint.name} beside it; run ns-phdropout again"
        )
    return float(ratio)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

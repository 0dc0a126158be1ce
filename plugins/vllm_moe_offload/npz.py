"""Files of arrays that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def save_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write a compressed ``.npz``; a file already there is replaced only by a complete one."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(target)

"""Lets torchvision's CUDA wheel import beside a CPU build of torch (development environment only).

Package indexes serve one Linux wheel of torchvision, linked against CUDA. Beside CPU torch its extension
does not load, and its Python code then registers fake kernels for operators that nobody defined. Defining
the two it expects, with no kernel behind them, is enough for everything the frameworks here use
(transforms, datasets, models). ``tools/environment.py`` copies this file into the environment with a
``.pth`` line that imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DefineOperatorsFirst:
    """Meta path finder: finds nothing, but defines the operators when torchvision is first asked for."""

    library: object = None

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Define the operators once, then step aside."""
        if name != "torchvision" or cls.library is not None:
            return None
        import torch

        cls.library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _OPERATORS:
            cls.library.define(schema)
        return None


sys.meta_path.insert(0, _DefineOperatorsFirst)

"""What a selector has drawn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Drawn items: ``handles`` int64 [B], ``anchors`` int64 [B] (steps), ``probability`` float64 [B].

    ``weight``: importance weights float32 [B], None where all are 1.
    """

    handles: Tensor
    anchors: Tensor
    probability: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.handles)

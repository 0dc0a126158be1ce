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

    def __post_init__(self) -> None:
        if not len(self.handles) == len(self.anchors) == len(self.probability):
            raise ValueError(
                f"a selection of {len(self.handles)} handles has {len(self.anchors)} anchors and "
                f"{len(self.probability)} probabilities"
            )

    def __len__(self) -> int:
        return len(self.handles)

"""Windows: which steps of a trajectory a column receives, and where they are put."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Window:
    """``length`` positions around an anchor step ``t`` of a trajectory with ``n`` rows.

    The steps are ``first = clamp(t + offset, 0, n)`` up to ``clamp(t + offset + length, 0, n)``, both ends
    clamped independently. Padding:

    - ``"head"`` right-aligns the steps (a Decision Transformer's context is ``Window(K, 1 - K, "head")``
      ending at the anchor, or ``Window(K, 0, "head")`` starting there);
    - ``"tail"`` left-aligns them;
    - ``"around"`` puts step ``t + offset + j`` at position ``j``.
    """

    length: int
    offset: int = 0
    pad: Literal["head", "tail", "around"] = "tail"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a window needs a length of at least 1, got {self.length}")
        if self.pad not in ("head", "tail", "around"):
            raise ValueError(f"pad must be 'head', 'tail' or 'around', got {self.pad!r}")

    @property
    def pad_code(self) -> int:
        """0 tail, 1 head, 2 around: the form the loops take."""
        return ("tail", "head", "around").index(self.pad)

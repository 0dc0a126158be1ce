"""How many operators torch dispatches, views included: most of the host's time for a small batch."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class CountedOps(TorchDispatchMode):
    """``names`` of the operators called inside the ``with`` block; not those that only wrap NumPy memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() not in ("aten::detach", "aten::lift_fresh"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))

"""Refusals that several modules share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_ratio(dropout_ratio: float | Tensor) -> None:
    """Refuse a drop ratio, or any member of a tensor of them, outside [0, 1).

    Raises:
        ValueError: naming the offending value.
    """
    if isinstance(dropout_ratio, Tensor):
        inside = (dropout_ratio >= 0) & (dropout_ratio < 1)
        if bool(inside.all()):
            return
        value = float(dropout_ratio[~inside].reshape(-1)[0])
    else:
        value = float(dropout_ratio)
        if 0 <= value < 1:
            return
    raise ValueError(f"dropout_ratio must lie in [0, 1), got {value}")


def check_open_unit(name: str, value: float) -> None:
    """Refuse ``value`` outside (0, 1) or not a number.

    Raises:
        ValueError: naming the argument.
    """
    if not (0 < value < 1) or math.isnan(value):
        raise ValueError(f"{name} must lie in (0, 1), got {value}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse an integer tensor where a floating-point one is needed.

    Raises:
        TypeError: naming the argument and its type.
    """
    if not torch.is_floating_point(tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")

"""The initialisations by name: the authors' three, and the calibrated one."""

from __future__ import annotations

import difflib
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spe_layers.bands import Bands

Init = Literal["linear", "lecun", "uniform", "calibrated"]


def check_init(name: str, phase_std: float) -> None:
    """Refuse an unknown initialisation or a phase standard deviation that is not positive (ValueError)."""
    if name not in get_args(Init):
        close = difflib.get_close_matches(str(name), get_args(Init), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown init {name!r}, known: {', '.join(get_args(Init))}{hint}")
    if not (math.isfinite(phase_std) and phase_std > 0):
        raise ValueError(f"phase_std must be positive and finite, got {phase_std}")


@torch.no_grad()
def initialise(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    bands: Bands,
    *,
    in_features: int,
    phase_std: float = 1.0,
) -> None:
    """Fill weight [H, F] and bias [H] in place.

    - ``linear``: that of ``nn.Linear`` (the reference's speech model), both U(-1/sqrt F, 1/sqrt F).
    - ``lecun``: N(0, 1/F), bias 0 (the paper's 1-D study).
    - ``uniform``: U(-1, 1), bias 0 (the reference's NeRF).
    - ``calibrated``: N(0, phase_std^2 / E||e||^2), bias 0: every unit's phase has standard deviation
      ``phase_std`` over coordinates in [-1, 1], whatever the bands and amplitudes.
    """
    check_init(name, phase_std)
    bound = 1 / math.sqrt(weight.shape[1])
    if name == "linear":
        nn.init.uniform_(weight, -bound, bound)
    elif name == "lecun":
        nn.init.normal_(weight, std=bound)
    elif name == "uniform":
        nn.init.uniform_(weight, -1, 1)
    else:
        nn.init.normal_(weight, std=phase_std / math.sqrt(bands.mean_square(in_features)))
    if bias is not None:
        if name == "linear":
            nn.init.uniform_(bias, -bound, bound)
        else:
            nn.init.zeros_(bias)

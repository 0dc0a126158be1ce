"""Dropout in the hash encodings of a NeRF, where nearly all of its trained parameters are.

A hidden unit of the small network behind a hash encoding acts everywhere in the scene, so dropping it moves
seen and unseen places alike. Entries of the table are local, as Gaussians are; features of the encoding are
the levels of detail, which places that were never seen lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nerfstudio_phdropout.checks import check_ratio
from nerfstudio_phdropout.masks import UnitMask, drop_uniforms, refuse_fused

# Streams of layers count from 0; those of encodings start here.
_FIRST_STREAM = 1 << 20


def hash_encodings(module: nn.Module) -> dict[str, Any]:
    """Modules with a trained ``hash_table`` ``[entries, features a level]``, by name, as registered.

    Raises:
        RuntimeError: a fused tinycudann network.
        ValueError: there is none.
    """
    refuse_fused(module)
    found = {
        name: child
        for name, child in module.named_modules()
        if isinstance(getattr(child, "hash_table", None), nn.Parameter) and child.hash_table.ndim == 2
    }
    if not found:
        raise ValueError(f"no hash encoding in {type(module).__name__}; use layers='hidden'")
    return found


@contextmanager
def encoding_dropout(
    module: nn.Module,
    ratio: float,
    *,
    seed: int = 0,
    trial: int = 0,
    part: Literal["table", "features"] = "table",
    rescale: bool = True,
    select: Callable[[str], bool] | None = None,
) -> Iterator[list[str]]:
    """While open, a share of each hash encoding is dropped: entries of its table, or features of its output.

    At ratio 0 nothing is touched, so outputs are bitwise the plain model's. What was there before comes back
    however the block ends.

    Args:
        module: the trained network.
        ratio: in [0, 1).
        seed, trial: name the mask; the same pair gives the same output.
        part: ``table`` drops entries (rows), ``features`` columns of the output.
        rescale: divide what is kept by 1 - ratio.
        select: keep only the encodings whose name it accepts.

    Yields:
        Names of the encodings masked.

    Raises:
        ValueError: ratio outside [0, 1), no hash encoding, unknown ``part``.
        RuntimeError: a fused tinycudann network.
    """
    check_ratio(ratio)
    if part not in ("table", "features"):
        raise ValueError(f"part must be 'table' or 'features', got {part!r}")
    chosen = {name: e for name, e in hash_encodings(module).items() if select is None or select(name)}
    if not chosen:
        raise ValueError(f"no hash encoding in {type(module).__name__}; use layers='hidden'")
    scale = 1 / (1 - ratio) if rescale else 1.0
    with ExitStack() as stack:
        if ratio > 0:
            for number, encoding in enumerate(chosen.values()):
                source = {"seed": seed, "trial": trial, "stream": _FIRST_STREAM + number}
                if part == "table":
                    stack.enter_context(_masked_table(encoding.hash_table, ratio, source, scale))
                else:
                    units = int(encoding.get_out_dim())
                    mask = UnitMask(units, ratio, source=source, per_row=False, scale=scale)
                    hook = encoding.register_forward_hook(lambda _m, _i, output, mask=mask: mask(output))
                    stack.callback(hook.remove)
        yield list(chosen)


@contextmanager
def _masked_table(table: nn.Parameter, ratio: float, source: dict[str, int], scale: float) -> Iterator[None]:
    whole: Tensor = table.data
    kept = drop_uniforms(len(whole), device=whole.device, **source) >= ratio
    table.data = whole * (kept.to(whole.dtype) * torch.tensor(scale, dtype=whole.dtype))[:, None]
    try:
        yield
    finally:
        table.data = whole

"""Counter-based dropout masks and the hooks that apply them to any MLP of linear layers.

A unit is dropped iff its uniform is below the ratio, and the uniform depends on (seed, trial, stream, unit)
alone. So a larger ratio drops a superset, and the order of calls, the chunking of rays and the device do
not matter (PH-Dropout, arXiv 2410.05468, section 3, leaves the masks unseeded).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nerfstudio_phdropout.checks import check_ratio

_MASK32 = 0xFFFFFFFF
# A layer's output may be masked before these: they map 0 to 0 and commute with non-negative factors.
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64 that spreads every input bit (xor-shift and multiply)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def drop_uniforms(
    count: int, *, seed: int, trial: int, stream: int = 0, device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Uniform numbers of the units ``start .. start + count - 1``; a unit is dropped iff its number < ratio.

    Args:
        count: how many.
        seed, trial, stream: any integers; they name the sequence.
        device: where; the values are bitwise equal on every device.
        start: first unit of the sequence.

    Returns:
        ``[count]`` float32 in [0, 1), multiples of 2^-24.
    """
    digest = hashlib.blake2b(f"{seed}/{trial}/{stream}".encode(), digest_size=8).digest()
    low_key, high_key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    counter = torch.arange(start, start + count, dtype=torch.int64, device=device)
    bits = _mix((counter & _MASK32) ^ low_key)
    bits = _mix((bits + (counter >> 32) * 0x9E3779B9 + high_key) & _MASK32)
    return (bits >> 8).to(torch.float32) * 2.0**-24


def _linear_stacks(module: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[str, nn.Module]]]]:
    """Name, owner and members of each list or sequence that holds at least two linear layers."""
    owners: dict[str, nn.Module] = dict(module.named_modules())
    for name, stack in owners.items():
        if not isinstance(stack, nn.ModuleList | nn.Sequential):
            continue
        members = list(stack.named_children())
        if sum(isinstance(child, nn.Linear) for _, child in members) >= 2:
            owner = owners[name.rpartition(".")[0]] if name else stack
            yield name, owner, members


def refuse_fused(module: nn.Module) -> None:
    """Refuse a module that holds a fused tinycudann network.

    Raises:
        RuntimeError: naming it.
    """
    for name, child in module.named_modules():
        kind = type(child)
        if kind.__module__.split(".")[0] == "tinycudann" and kind.__name__.startswith("Network"):
            raise RuntimeError(
                f"{name or kind.__name__} is a fused tinycudann network and has no layers to mask; "
                "use implementation='torch'"
            )


def maskable_layers(module: nn.Module, layers: Literal["first", "hidden"] = "hidden") -> dict[str, nn.Linear]:
    """The linear layers whose output units may be dropped.

    An MLP is any ``ModuleList`` or ``Sequential`` with two or more ``Linear`` children.

    Args:
        module: a model, field or network.
        layers: ``first``: the first layer of each MLP; ``hidden``: every layer but the last, and the last
            one too when the MLP's ``out_activation`` is a ReLU (then it is a hidden layer of the field).

    Returns:
        Name inside ``module`` -> layer, in the order of registration.

    Raises:
        RuntimeError: a fused tinycudann network.
        ValueError: no MLP, or another value of ``layers``.
    """
    if layers not in ("first", "hidden"):
        raise ValueError(f"layers must be 'first' or 'hidden', got {layers!r}")
    refuse_fused(module)
    found: dict[str, nn.Linear] = {}
    for name, owner, members in _linear_stacks(module):
        linears = [(child_name, child) for child_name, child in members if isinstance(child, nn.Linear)]
        if layers == "first":
            chosen = linears[:1]
        elif isinstance(getattr(owner, "out_activation", None), nn.ReLU):
            chosen = linears
        else:
            chosen = linears[:-1]
        for child_name, child in chosen:
            found[f"{name}.{child_name}" if name else child_name] = child
    if not found:
        raise ValueError(f"no MLP with two or more Linear layers in {type(module).__name__}")
    return found


def _reader_of(module: nn.Module, target: nn.Linear) -> nn.Linear | None:
    """The next linear layer, if the activation between does not commute with a mask; else None."""
    for _, owner, members in _linear_stacks(module):
        children = [child for _, child in members]
        if not any(child is target for child in children):
            continue
        position = next(i for i, child in enumerate(children) if child is target)
        between: list[Any] = [getattr(owner, "activation", None)]
        for child in children[position + 1 :]:
            if isinstance(child, nn.Linear):
                commutes = all(a is None or isinstance(a, _HOMOGENEOUS) for a in between)
                return None if commutes else child
            between.append(child)
    return None


class UnitMask:
    """Drops units of one layer; the same for all rows, or another mask a row."""

    def __init__(
        self, units: int, ratio: float, *, source: dict[str, int], per_row: bool, scale: float
    ) -> None:
        self.units, self.ratio, self.per_row, self.scale = units, ratio, per_row, scale
        self.source = source
        self.rows_done = 0
        self.cache: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Mask the last ``units`` columns of ``values`` ([..., units] or [..., more + units])."""
        factors = self._factors(values)
        if values.shape[-1] == self.units:
            return values * factors
        head, tail = values.split([values.shape[-1] - self.units, self.units], dim=-1)
        return torch.cat([head, tail * factors], dim=-1)

    def _factors(self, values: Tensor) -> Tensor:
        if self.per_row:
            rows = values.numel() // values.shape[-1]
            uniforms = drop_uniforms(
                rows * self.units, start=self.rows_done * self.units, device=values.device, **self.source
            )
            self.rows_done += rows
            kept = uniforms.view(*values.shape[:-1], self.units) >= self.ratio
            return kept.to(values.dtype) * self.scale
        if self.cache is None or self.cache.device != values.device or self.cache.dtype != values.dtype:
            kept = drop_uniforms(self.units, device=values.device, **self.source) >= self.ratio
            self.cache = kept.to(values.dtype) * self.scale
        return self.cache


def _attach(module: nn.Module, layer: nn.Linear, mask: UnitMask) -> Any:
    reader = _reader_of(module, layer)
    if reader is None:
        return layer.register_forward_hook(lambda _module, _inputs, output: mask(output))

    def before_reader(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (mask(inputs[0]), *inputs[1:])

    return reader.register_forward_pre_hook(before_reader)


@contextmanager
def posthoc_dropout(
    module: nn.Module,
    ratio: float,
    *,
    seed: int = 0,
    trial: int = 0,
    layers: Literal["first", "hidden"] = "hidden",
    mask: Literal["trial", "sample"] = "trial",
    rescale: bool = True,
    select: Callable[[str], bool] | None = None,
) -> Iterator[list[str]]:
    """While open, hidden units of ``module`` are dropped: h <- h * m / (1 - ratio), m ~ Bernoulli(1 - ratio).

    At ratio 0 no hook is set, so outputs are bitwise the plain model's. Hooks go however the block ends.

    Args:
        module: the trained network; its parameters do not change.
        ratio: in [0, 1).
        seed, trial: name the mask; the same pair gives bitwise the same output.
        layers: see `maskable_layers`.
        mask: ``trial``: one mask for the whole block (a sub-network); ``sample``: another for every row.
        rescale: divide by 1 - ratio.
        select: keep only the layers whose name it accepts.

    Yields:
        Names of the layers masked; the mask of the i-th one has stream i.

    Raises:
        ValueError: ratio outside [0, 1), no MLP found, unknown ``mask``.
        RuntimeError: a fused tinycudann network.
    """
    check_ratio(ratio)
    if mask not in ("trial", "sample"):
        raise ValueError(f"mask must be 'trial' or 'sample', got {mask!r}")
    chosen = maskable_layers(module, layers)
    if select is not None:
        chosen = {name: layer for name, layer in chosen.items() if select(name)}
        if not chosen:
            raise ValueError(f"no MLP with two or more Linear layers in {type(module).__name__}")
    with ExitStack() as stack:
        if ratio > 0:
            scale = 1 / (1 - ratio) if rescale else 1.0
            for stream, layer in enumerate(chosen.values()):
                source = {"seed": seed, "trial": trial, "stream": stream}
                unit_mask = UnitMask(
                    layer.out_features, ratio, source=source, per_row=mask == "sample", scale=scale
                )
                stack.callback(_attach(module, layer, unit_mask).remove)
        yield list(chosen)

"""Where experts live when they have no slot. One expert is one record: all of its tensors, back to back."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiered_memory import Copy, PinnedArena

_RECORD_ALIGN = 4096  # direct I/O reads whole records
_TENSOR_ALIGN = 256  # widest vector load of a kernel, with room


@dataclass(frozen=True)
class Field:
    """One tensor of an expert: ``shape`` without the expert dimension, at byte ``offset`` of the record."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor of one expert."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SlabLayout:
    """How the tensors of one expert are placed in its record.

    Attributes:
        fields: the tensors, in order of name.
        nbytes: bytes of a record, a multiple of 4096.
        expert_nbytes: bytes of the tensors alone.
    """

    fields: tuple[Field, ...]
    nbytes: int

    @cached_property
    def expert_nbytes(self) -> int:
        """Bytes of an expert's tensors, without padding."""
        return sum(field.nbytes for field in self.fields)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SlabLayout:
        """Layout of the experts in ``tensors``, each ``[experts, ...]``.

        Raises:
            ValueError: no tensor, or numbers of experts that differ.
        """
        if not tensors or len({tensor.shape[0] for tensor in tensors.values()}) != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"experts: the tensors must have one common number of experts, got {shapes}")
        fields, offset = [], 0
        for name in sorted(tensors):
            tensor = tensors[name]
            field = Field(name, tuple(tensor.shape[1:]), tensor.dtype, offset)
            fields.append(field)
            offset += -(-field.nbytes // _TENSOR_ALIGN) * _TENSOR_ALIGN
        return cls(tuple(fields), max(-(-offset // _RECORD_ALIGN), 1) * _RECORD_ALIGN)

    def views(self, slabs: Tensor) -> dict[str, Tensor]:
        """The tensors inside records.

        Args:
            slabs: uint8 ``[n, nbytes]``, or ``[nbytes]`` for one record.

        Returns:
            name -> ``[n, ...]`` (``[...]``), sharing memory; the record is their leading stride.
        """
        return {
            field.name: slabs[..., field.offset : field.offset + field.nbytes]
            .view(field.dtype)
            .view((*slabs.shape[:-1], *field.shape))
            for field in self.fields
        }


class ExpertStore(ABC):
    """All experts of some layers of one shape.

    Attributes:
        layout: how an expert's record is laid out.
        num_layers: layers.
        num_experts: experts of each layer.
    """

    layout: SlabLayout
    num_layers: int
    num_experts: int

    def read(self, layer: int, expert: int, out: Tensor) -> None:
        """Copy an expert's record into ``out``, uint8 ``[layout.nbytes]`` on the CPU.

        Raises:
            IndexError: there is no such layer or expert.
            ValueError: ``out`` has another size.
        """
        self._check(layer, expert)
        if out.numel() != self.layout.nbytes or out.dtype != torch.uint8:
            raise ValueError(
                f"experts: out must be uint8 [{self.layout.nbytes}], got {out.dtype} {out.shape}"
            )
        self._read(layer, expert, out)

    def record(self, layer: int, expert: int) -> Tensor | None:
        """The expert's record in host memory without a copy, uint8 ``[layout.nbytes]``; None if not there."""
        return None

    def in_use(self, layer: int, expert: int, copy: Copy) -> None:  # noqa: B027 - a hook, most need none
        """``copy`` reads what :meth:`record` returned; it must stay as it is until the copy is done."""

    @abstractmethod
    def _read(self, layer: int, expert: int, out: Tensor) -> None: ...

    def _check(self, layer: int, expert: int) -> None:
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise IndexError(
                f"experts: layer {layer}, expert {expert} asked for; "
                f"there are {self.num_layers} layers of {self.num_experts}"
            )


class HostExpertStore(ExpertStore):
    """Experts in host memory, one arena a layer, pinned where a GPU can use that.

    Args:
        layers: for each layer its tensors, ``[experts, ...]`` each, all layers alike. They are copied.
        pin_memory: as ``pinned`` of :class:`tiered_memory.PinnedArena`.
        aligned_to: an address; every record starts a whole number of records away from it.

    Raises:
        ValueError: no layer, or layers that differ.
        MemoryError: the host lacks the memory, or it cannot be pinned.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        *,
        pin_memory: bool | None = None,
        aligned_to: int | None = None,
    ) -> None:
        if not layers:
            raise ValueError("experts: no layer given")
        self._pin_memory, self._aligned_to = pin_memory, aligned_to
        self._arenas: list[PinnedArena] = []
        self._slabs: list[Tensor] = []
        self.layout = SlabLayout.from_tensors(layers[0])
        self.num_experts = next(iter(layers[0].values())).shape[0]
        self.num_layers = 0
        for tensors in layers:
            self.add_layer(tensors)

    def add_layer(self, tensors: Mapping[str, Tensor]) -> None:
        """Append one more layer; afterwards the caller may drop its own copy.

        Raises:
            ValueError: the layer differs from the others.
            MemoryError: as the constructor.
        """
        layout = SlabLayout.from_tensors(tensors)
        num_experts = next(iter(tensors.values())).shape[0]
        if layout != self.layout or num_experts != self.num_experts:
            raise ValueError(
                f"experts: layer {self.num_layers} differs from layer 0 in names, shapes or dtypes"
            )
        # Pinned after the copy: populating twice would cost seconds per GiB.
        spare = 0 if self._aligned_to is None else layout.nbytes
        arena = PinnedArena(num_experts * layout.nbytes + spare, pinned=False)
        start = (
            0 if self._aligned_to is None else (self._aligned_to - arena.buffer.data_ptr()) % layout.nbytes
        )
        slabs = arena.buffer[start : start + num_experts * layout.nbytes].view(num_experts, layout.nbytes)
        for name, view in layout.views(slabs).items():
            view.copy_(tensors[name])
        if self._pin_memory or (self._pin_memory is None and torch.cuda.is_available()):
            try:
                arena.pin()
            except MemoryError as error:
                if self._pin_memory:
                    raise
                warnings.warn(
                    f"{error}; experts are copied from pageable memory", RuntimeWarning, stacklevel=2
                )
        self._arenas.append(arena)
        self._slabs.append(slabs)
        self.num_layers += 1

    def record(self, layer: int, expert: int) -> Tensor:  # noqa: D102
        self._check(layer, expert)
        return self._slabs[layer][expert]

    def _read(self, layer: int, expert: int, out: Tensor) -> None:
        out.copy_(self._slabs[layer][expert])

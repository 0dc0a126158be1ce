"""Experts in one file, and in host memory as far as that goes.

Layout of the file: a JSON header padded to whole pages, then the records in order of layer and expert, then
one 64-bit checksum (xxh3) a record. Records are multiples of a page, so that direct I/O reads them in place.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from tiered_memory import Copy, DirectReader, PinnedArena
from vllm_moe_offload.counters import count_moved
from vllm_moe_offload.store import ExpertStore, Field, SlabLayout

_MAGIC = "vllm_moe_offload experts 1"
_PAGE = 4096


class DiskExpertStore(ExpertStore):
    """Experts in a file that :meth:`create` wrote; every record is checked against its checksum when read.

    Attributes:
        path: the file.
        model_id: the model it belongs to.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], start: int, reader: DirectReader) -> None:
        self.path, self.model_id = path, str(header["model_id"])
        self.num_layers, self.num_experts = int(header["num_layers"]), int(header["num_experts"])
        fields = tuple(
            Field(field["name"], tuple(field["shape"]), getattr(torch, field["dtype"]), field["offset"])
            for field in header["fields"]
        )
        self.layout = SlabLayout(fields, int(header["nbytes"]))
        self._start, self._reader = start, reader
        count = self.num_layers * self.num_experts
        sums = torch.empty(count, dtype=torch.int64)
        expected = start + count * (self.layout.nbytes + sums.itemsize)
        if reader.nbytes != expected:
            raise OSError(
                f"expert file {path} is truncated: expected {expected} bytes, found {reader.nbytes}"
                if reader.nbytes < expected
                else f"expert file {path} is too long: expected {expected} bytes, found {reader.nbytes}"
            )
        reader.read_into(sums, start + count * self.layout.nbytes)
        self._sums: npt.NDArray[np.uint64] = sums.numpy().view(np.uint64)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], layers: Iterable[Mapping[str, Tensor]], *, model_id: str
    ) -> DiskExpertStore:
        """Write the experts of all layers, alike in shape, and open the file.

        A file already there is replaced only by a complete one.

        Args:
            path: the file.
            layers: for each layer its tensors, ``[experts, ...]`` each; taken one at a time.
            model_id: what :meth:`open` must be called with.

        Raises:
            ValueError: no layer, or layers that differ.
            OSError: the file cannot be written.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        sums: list[int] = []
        layout: SlabLayout | None = None
        num_experts = num_layers = 0
        with partial.open("wb") as file:
            for tensors in layers:
                own = SlabLayout.from_tensors(tensors)
                count = next(iter(tensors.values())).shape[0]
                if layout is None:
                    layout, num_experts = own, count
                    # The number of layers comes last; its digits have room.
                    file.write(_header(layout, 0, num_experts, model_id))
                elif (own, count) != (layout, num_experts):
                    raise ValueError(f"experts: layer {num_layers} differs from layer 0")
                num_layers += 1
                for expert in range(count):
                    data = _record(layout, tensors, expert).numpy().data
                    sums.append(xxhash.xxh3_64_intdigest(data))
                    file.write(data)
            if layout is None:
                raise ValueError("experts: no layer given")
            file.write(np.asarray(sums, dtype=np.uint64).tobytes())
            file.seek(0)
            file.write(_header(layout, num_layers, num_experts, model_id))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        return cls.open(target, model_id=model_id)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, model_id: str) -> DiskExpertStore:
        """Open a file of the model ``model_id``.

        Raises:
            ValueError: no such file format, or another model's.
            OSError: the file cannot be read, or is shorter than its header says.
        """
        reader = DirectReader(path)
        try:
            start, header = _read_header(reader)
            if header["model_id"] != model_id:
                raise ValueError(
                    f"expert file {path} was written for model {header['model_id']!r}, not {model_id!r}"
                )
            return cls(Path(path), header, start, reader)
        except BaseException:
            reader.close()
            raise

    def check(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare a layer's tensors with the checksums of the file.

        Raises:
            ValueError: the file holds other weights.
        """
        same = layer < self.num_layers and SlabLayout.from_tensors(tensors) == self.layout
        same = same and next(iter(tensors.values())).shape[0] == self.num_experts
        if same:
            for expert in range(self.num_experts):
                record = _record(self.layout, tensors, expert)
                key = layer * self.num_experts + expert
                same = same and xxhash.xxh3_64_intdigest(record.numpy().data) == int(self._sums[key])
        if not same:
            raise ValueError(
                f"expert file {self.path} holds other weights for layer {layer} than the model; delete it"
            )

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._reader.close()

    def _read(self, layer: int, expert: int, out: Tensor) -> None:
        key = layer * self.num_experts + expert
        self._reader.read_into(out, self._start + key * self.layout.nbytes)
        count_moved("disk->dram", self.layout.expert_nbytes)
        if xxhash.xxh3_64_intdigest(out.numpy().data) != int(self._sums[key]):
            raise OSError(f"expert file {self.path}: checksum mismatch in layer {layer}, expert {expert}")


class TieredExpertStore(ExpertStore):
    """A file of experts with a part of them in host memory, the least recently used going first.

    Args:
        disk: all experts.
        host_nbytes: host memory for records, at least one.
        pin_memory: as ``pinned`` of :class:`tiered_memory.PinnedArena`.

    Attributes:
        bytes_from_disk: bytes of experts read from the file so far.

    Raises:
        ValueError: ``host_nbytes`` holds no record.
        MemoryError: the host lacks the memory.
    """

    def __init__(self, disk: DiskExpertStore, host_nbytes: int, *, pin_memory: bool | None = None) -> None:
        self.layout, self.num_layers, self.num_experts = disk.layout, disk.num_layers, disk.num_experts
        count = min(host_nbytes // self.layout.nbytes, self.num_layers * self.num_experts)
        if count < 1:
            raise ValueError(
                f"moe_offload: host_memory of {host_nbytes} bytes holds no expert of {self.layout.nbytes}"
            )
        self._disk = disk
        self._arena = PinnedArena(count * self.layout.nbytes, pinned=pin_memory)
        self._records = self._arena.empty((count, self.layout.nbytes))
        self._free = list(range(count))
        self._place: OrderedDict[tuple[int, int], int] = OrderedDict()  # least recently used first
        self._busy: dict[int, Copy] = {}
        self.bytes_from_disk = 0

    def record(self, layer: int, expert: int) -> Tensor:
        """The expert's record in host memory, read from the file first if it is not there.

        It stays as it is until the next call, or, if :meth:`in_use` named a copy, until that is done.
        """
        self._check(layer, expert)
        key = (layer, expert)
        if key in self._place:
            self._place.move_to_end(key)
            return self._records[self._place[key]]
        place = self._free.pop() if self._free else self._evict()
        try:
            self._disk.read(layer, expert, self._records[place])
        except BaseException:
            self._free.append(place)
            raise
        self._place[key] = place
        self.bytes_from_disk += self.layout.expert_nbytes
        return self._records[place]

    def in_use(self, layer: int, expert: int, copy: Copy) -> None:  # noqa: D102
        place = self._place.get((layer, expert))
        if place is not None:
            self._busy[place] = copy

    def close(self) -> None:
        """Close the file and let go of the memory. Idempotent."""
        self._disk.close()
        self._arena.close()

    def _read(self, layer: int, expert: int, out: Tensor) -> None:
        out.copy_(self.record(layer, expert))

    def _evict(self) -> int:
        _, place = self._place.popitem(last=False)
        copy = self._busy.pop(place, None)
        if copy is not None:
            copy.synchronize()
        return place


def _record(layout: SlabLayout, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, view in layout.views(record).items():
        view.copy_(tensors[name][expert])
    return record


def _header(layout: SlabLayout, num_layers: int, num_experts: int, model_id: str) -> bytes:
    fields = [{**asdict(field), "dtype": str(field.dtype).removeprefix("torch.")} for field in layout.fields]
    text = json.dumps(
        {
            "format": _MAGIC,
            "num_layers": f"{num_layers:08d}",
            "num_experts": num_experts,
            "nbytes": layout.nbytes,
            "fields": fields,
            "model_id": model_id,
        }
    ).encode()
    size = -(-(len(text) + 16) // _PAGE) * _PAGE
    return f"{size:015d}\n".encode() + text.ljust(size - 16)


def _read_header(reader: DirectReader) -> tuple[int, dict[str, Any]]:
    """Bytes of the header and what it says."""
    try:
        size = int(_text(reader, 0, 16))
        header = json.loads(_text(reader, 16, size - 16))
        if header["format"] != _MAGIC:
            raise ValueError(f"format {header['format']!r}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{reader.path} is no file of experts: {error}") from error
    return size, header


def _text(reader: DirectReader, offset: int, length: int) -> str:
    data = torch.empty(max(length, 0), dtype=torch.uint8)
    reader.read_into(data, offset)
    return data.numpy().tobytes().decode()

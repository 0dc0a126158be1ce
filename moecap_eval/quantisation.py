"""Bytes of quantised weights, scales included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from moecap_eval.model_families import Weight


@dataclass(frozen=True)
class Quantisation:
    """How many bytes a quantised matrix takes with its scales."""

    method: str
    skipped: tuple[str, ...] = ()
    block: tuple[int, int] | None = None
    bits: int = 0
    group: int = 0

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> Quantisation | None:
        """The scheme of ``quantization_config``, None without one; ValueError names an unknown one."""
        options = data.get("quantization_config")
        if not options:
            return None
        method = options.get("quant_method")
        skipped = tuple(options.get("modules_to_not_convert") or options.get("ignored_layers") or ())
        if method == "fp8":
            size = options.get("weight_block_size")
            return cls("fp8", skipped, tuple(size) if size else None)
        if method == "mxfp4":
            return cls("mxfp4", skipped)
        if method in ("gptq", "awq"):
            return cls(method, skipped, bits=int(options["bits"]), group=int(options["group_size"]))
        raise ValueError(
            f"quantization_config.quant_method {method!r} is not supported "
            "(supported: awq, fp8, gptq, mxfp4); ModelSpec.from_checkpoint reads any scheme from the files"
        )

    def nbytes(self, weight: Weight, layer: int) -> int | None:
        """Bytes of one copy, or None where this scheme leaves the weight alone."""
        if not weight.linear or self._is_skipped(f"model.layers.{layer}.{weight.name}"):
            return None
        rows, cols = weight.shape
        if self.method == "fp8":
            block_rows, block_cols = self.block or (rows, cols)
            return rows * cols + 4 * math.ceil(rows / block_rows) * math.ceil(cols / block_cols)
        if self.method == "mxfp4":
            # Open Compute MX format: 32 elements of 4 bits share one 8-bit exponent.
            is_expert = weight.component == "routed_experts"
            return rows * cols // 2 + rows * cols // 32 if is_expert else None
        groups = math.ceil(cols / (self.group if self.group > 0 else cols))
        packed = rows * cols * self.bits // 8
        scales_and_zeros = groups * rows * 2 + groups * rows * self.bits // 8
        group_index = 4 * cols if self.method == "gptq" else 0
        return packed + scales_and_zeros + group_index

    def _is_skipped(self, name: str) -> bool:
        return any(
            pattern in name or fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")
            for pattern in self.skipped
        )

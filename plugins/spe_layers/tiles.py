"""How the fused kernels are cut into programs: one table, found by ``benchmarks/spe_layers_gpu.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Points and units of a tile, warps of a program, programs that a multiprocessor holds at once.

    ``registers`` caps those of a thread, where a few fewer let another program in.
    """

    points: int
    units: int
    warps: int = 4
    programs: int = 1
    registers: int | None = None


# By kernel and products a float is made of (3 for float32, 1 for TF32 and 16 bits), up to 64 features; H100.
TILES = {
    ("forward", 3): Tiles(64, 128, 4, 3, registers=168),
    ("forward", 1): Tiles(64, 128, 4, 3, registers=168),
    ("weight_grad", 3): Tiles(64, 128, 8, 2, registers=128),
    ("weight_grad", 1): Tiles(64, 128, 8, 2, registers=128),
    ("coordinate_grad", 3): Tiles(64, 64, 4),
    ("coordinate_grad", 1): Tiles(64, 64, 4, registers=168),
    ("stack", 1): Tiles(64, 256, 4),
}

# For more features, or less shared memory: no kernel needs more than 96 KiB with these.
SMALL_TILES = Tiles(32, 32, 4, 2)
LARGE_SHARED_MEMORY = 200 * 2**10

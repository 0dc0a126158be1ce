"""Errors that a caller may want to catch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tenplex.ptc import Box


class UncoveredRangeError(LookupError):
    """Nobody holds a range that the new layout needs.

    Attributes:
        key: name of the tensor.
        box: the range.
        ranks: source ranks that are lost, as far as the caller said so.
    """

    def __init__(self, key: str, box: Box, ranks: Sequence[int] = ()) -> None:
        self.key, self.box, self.ranks = key, box, tuple(ranks)
        super().__init__(
            f"no holder for {key}{box}; lost ranks: {list(self.ranks)}. "
            "Resume from the last checkpoint on disk."
        )


class ReplicaCorruptError(ValueError):
    """A block of a stored replica does not have the checksum it was written with."""

    def __init__(
        self, key: str, *, host: str, rank: int, version: int, block: int, got: int, want: int
    ) -> None:
        self.key, self.host, self.rank, self.version, self.block = key, host, rank, version, block
        super().__init__(
            f"replica of {key} (host {host}, rank {rank}, version {version}) is corrupt: "
            f"block {block}, CRC32 {got:08x} != {want:08x}"
        )

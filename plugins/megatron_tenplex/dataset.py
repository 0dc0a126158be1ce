"""Which samples each data-parallel rank trains on, independent of how many ranks there have been."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class DatasetProgress:
    """Samples consumed since the beginning of training, over all epochs."""

    consumed_samples: int = 0
    seed: int = 0
    num_samples: int = 0

    def to_json(self) -> dict[str, int]:
        """JSON values."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DatasetProgress:
        """What :meth:`to_json` wrote."""
        return cls(**content)


def check_batch(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Refuse a global batch that is no whole number of micro-batches on every rank."""
    if min(global_batch_size, micro_batch_size, dp_size) < 1:
        raise ValueError(
            f"batch sizes and dp_size must be at least 1, got {global_batch_size}, "
            f"{micro_batch_size} and {dp_size}"
        )
    if global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"global batch {global_batch_size} is not divisible by micro batch {micro_batch_size} "
            f"x data parallel size {dp_size}"
        )


def partition(batch: Sequence[int], micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Sequence[int]]:
    """Micro-batches of one rank: number ``j`` is positions ``(j * dp_size + dp_rank) * m`` onwards."""
    check_batch(len(batch), micro_batch_size, dp_size)
    starts = range(dp_rank * micro_batch_size, len(batch), dp_size * micro_batch_size)
    return [batch[start : start + micro_batch_size] for start in starts]


class ElasticBatchSampler(Sampler[list[int]]):
    """Endless micro-batches of sample indices.

    The stream of samples is one permutation after the other, one an epoch: ``s(i) = perm(seed, i // N)[i %
    N]``. Global batch ``k`` is ``s(kB) .. s((k+1)B - 1)``: it may cross epochs, nothing is dropped, and it is
    the same for every ``dp_size``. ``progress`` counts a global batch when its last micro-batch is handed
    out; with a prefetching DataLoader the trainer's own count is the one to save.

    Args:
        num_samples: size of the data set, N.
        global_batch_size: samples of one optimizer step over all ranks, B.
        progress: where to go on; its seed and ``num_samples`` must be those given here.

    Raises:
        ValueError: sizes do not divide, or ``progress`` belongs to another data set or seed.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        micro_batch_size: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        progress: DatasetProgress | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        check_batch(global_batch_size, micro_batch_size, dp_size)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank must be in 0..{dp_size - 1}, got {dp_rank}")
        progress = progress or DatasetProgress(0, seed, num_samples)
        if (progress.seed, progress.num_samples) != (seed, num_samples):
            raise ValueError(
                f"progress is of {progress.num_samples} samples with seed {progress.seed}, "
                f"not of {num_samples} with seed {seed}"
            )
        self.num_samples, self.global_batch_size, self.micro_batch_size = (
            num_samples,
            global_batch_size,
            micro_batch_size,
        )
        self.dp_rank, self.dp_size, self.seed, self.shuffle = dp_rank, dp_size, seed, shuffle
        self.progress = progress
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            first = self.progress.consumed_samples
            batch = [self._sample(first + i) for i in range(self.global_batch_size)]
            micro_batches = partition(batch, self.micro_batch_size, self.dp_rank, self.dp_size)
            for micro_batch in micro_batches[:-1]:
                yield list(micro_batch)
            self.progress = DatasetProgress(first + self.global_batch_size, self.seed, self.num_samples)
            yield list(micro_batches[-1])

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, self.num_samples)
        if not self.shuffle:
            return index
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = (epoch, torch.randperm(self.num_samples, generator=generator).tolist())
        return self._epoch[1][index]

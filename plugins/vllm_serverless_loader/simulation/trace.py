"""Requests over time: bursty renewal processes, or recorded function calls."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Trace:
    """``n`` requests in order of arrival.

    Attributes:
        arrival_s: float64 ``[n]``, seconds.
        model: int64 ``[n]``, index into ``models``.
        input_tokens, output_tokens: int64 ``[n]``.
        models: names.
    """

    arrival_s: npt.NDArray[np.float64]
    model: npt.NDArray[np.int64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    models: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def gamma(
        cls,
        models: Sequence[str],
        *,
        requests_per_s: float,
        duration_s: float,
        cv: float = 8.0,
        zipf: float = 0.0,
        input_tokens: int = 256,
        output_tokens: int = 128,
        seed: int = 0,
    ) -> Trace:
        """One Gamma renewal process for each model.

        Args:
            models: names, the most popular first.
            requests_per_s: of all models together, on average.
            duration_s: length of the trace.
            cv: coefficient of variation of the times between arrivals; 1 is Poisson, 8 very bursty.
            zipf: exponent of popularity; 0: all alike.
            input_tokens, output_tokens: of each request.
            seed: of the generator.

        Raises:
            ValueError: no model, or a number that is not positive.
        """
        if not models or min(requests_per_s, duration_s, cv) <= 0:
            raise ValueError("trace: models, requests_per_s, duration_s and cv must be positive")
        generator = np.random.default_rng(seed)
        weight = np.arange(1, len(models) + 1, dtype=np.float64) ** -zipf
        rates = requests_per_s * weight / weight.sum()
        times, owners = [], []
        for number, rate in enumerate(rates):
            arrivals = _renewals(generator, rate, duration_s, cv)
            times.append(arrivals)
            owners.append(np.full(len(arrivals), number))
        return cls._sorted(models, np.concatenate(times), np.concatenate(owners), input_tokens, output_tokens)

    @classmethod
    def azure_functions(
        cls,
        csv_path: str | os.PathLike[str],
        models: Sequence[str],
        *,
        requests_per_s: float,
        duration_s: float,
        input_tokens: int = 256,
        output_tokens: int = 128,
        seed: int = 0,
    ) -> Trace:
        """Calls per minute of the Azure Functions trace of 2019, scaled to a rate; functions go to models in
        turn.

        The file has the columns HashOwner, HashApp, HashFunction, Trigger, 1, 2, ..., 1440.

        Raises:
            ValueError: the file holds no calls in the first ``duration_s`` seconds, or has other columns.
        """
        minutes = int(np.ceil(duration_s / 60.0))
        counts = np.zeros((len(models), minutes))
        with open(csv_path, newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if header[:4] != ["HashOwner", "HashApp", "HashFunction", "Trigger"] or len(header) < 4 + minutes:
                raise ValueError(f"{csv_path}: not the schema of 2019, or less than {minutes} minutes")
            for number, row in enumerate(reader):
                counts[number % len(models)] += np.array(row[4 : 4 + minutes], dtype=np.float64)
        if not counts.sum():
            raise ValueError(f"{csv_path}: no calls in the first {minutes} minutes")
        generator = np.random.default_rng(seed)
        drawn = generator.poisson(counts * (requests_per_s * 60.0 * minutes / counts.sum()))
        owner, minute = np.nonzero(drawn)
        repeats = drawn[owner, minute]
        owners = np.repeat(owner, repeats)
        times = (np.repeat(minute, repeats) + generator.random(repeats.sum())) * 60.0
        inside = times < duration_s
        return cls._sorted(models, times[inside], owners[inside], input_tokens, output_tokens)

    @classmethod
    def _sorted(
        cls,
        models: Sequence[str],
        times: npt.NDArray[np.float64],
        owners: npt.NDArray[np.int64],
        input_tokens: int,
        output_tokens: int,
    ) -> Trace:
        order = np.argsort(times, kind="stable")
        length = len(order)
        return cls(
            times[order].astype(np.float64),
            owners[order].astype(np.int64),
            np.full(length, input_tokens, dtype=np.int64),
            np.full(length, output_tokens, dtype=np.int64),
            tuple(models),
        )


def _renewals(
    generator: np.random.Generator, rate: float, duration_s: float, cv: float
) -> npt.NDArray[np.float64]:
    """Arrival times below ``duration_s`` of a renewal process with Gamma distributed gaps."""
    shape, scale = cv**-2, cv**2 / rate
    parts = []
    start = 0.0
    while start < duration_s:
        gaps = generator.gamma(shape, scale, size=max(64, int(rate * duration_s)))
        parts.append(start + np.cumsum(gaps))
        start = float(parts[-1][-1])
    times = np.concatenate(parts)
    return times[times < duration_s]

"""What most workloads need beside the contract: checked and recorded options, seeded items, a stopwatch."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moecap_eval.workload import Item, System

if TYPE_CHECKING:
    import torch


def read_options(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of an arm, or a run's params, completed by defaults.

    Args:
        given: from the config.
        known: name -> default; a tuple lists what may be chosen, its first value is the default.
        where: how messages call the place, such as ``arms.fast`` or ``params``.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value that is not among the choices or of
            another type than its default (a whole number may stand for a fraction).
    """
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown option {name!r} (options: {', '.join(known)}){hint}")
        _check(value, known[name], f"{where}: {name}")
    defaults = {name: value[0] if isinstance(value, tuple) else value for name, value in known.items()}
    return {**defaults, **given}


def _check(value: Any, default: Any, what: str) -> None:
    if isinstance(default, tuple):
        if value not in default:
            raise ValueError(f"{what} must be one of {', '.join(map(str, default))}, got {value!r}")
        return
    kinds = (int, float) if isinstance(default, float) else type(default)
    is_switch = isinstance(default, bool)
    if not isinstance(value, kinds) or isinstance(value, bool) != is_switch:
        kind = type(default).__name__
        raise ValueError(f"{what} must be of type {kind}, such as {default!r}, got {value!r}")


def seeded_items(kind: str, count: int, seed: int) -> list[Item]:
    """``count`` items that are a seed each: ``<kind>-<seed>-<number>``, payload ``1000 * seed + number``."""
    return [Item(f"{kind}-{seed}-{number}", 1000 * seed + number) for number in range(count)]


class Stopwatch:
    """Adds up the time of the parts of a block that are its work: ``with watch: ...``.

    ``laps`` are the seconds of each part in order, ``seconds`` their sum. With a CUDA ``device``, what it was
    given is waited for before each reading of the clock, and ``peak_bytes`` is the most memory in use there
    since the watch was made; None on a CPU, where nobody counts it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.laps: list[float] = []
        self._on_gpu = str(device).startswith("cuda")
        self._begin = 0.0
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> float | None:
        """Of the device's allocator."""
        if not self._on_gpu:
            return None
        import torch

        return float(torch.cuda.max_memory_allocated())

    @property
    def seconds(self) -> float:
        """Of all laps."""
        return sum(self.laps)

    def _synchronize(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()

    def __enter__(self) -> Stopwatch:
        self._synchronize()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        self.laps.append(time.perf_counter() - self._begin)


class ConfiguredSystem(System):
    """A system that tells the records how it was configured, defaults included."""

    def __init__(self, options: Mapping[str, Any], params: Mapping[str, Any], seed: int = 0) -> None:
        self.options, self.params, self.seed = options, params, seed

    def describe(self) -> dict[str, Any]:
        """Options and params."""
        return {**self.options, **self.params}

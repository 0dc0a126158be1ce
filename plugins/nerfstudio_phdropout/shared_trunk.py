"""Trials of one network that differ only in what comes after the first mask: compute the rest once.

With one mask a trial, ray sampling, proposal networks, encodings and first linear layers give the same result
in every trial of a chunk of rays. While `memoized` is open, the forward of such a module runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def memoized(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Each module's first result stands for all calls inside the block, whatever the arguments.

    Hooks of the modules still run on every call. Lists in a result are copied, since callers append to them.
    """
    with ExitStack() as stack:
        for module in modules:
            _memoize(module, stack)
        yield


def _memoize(module: nn.Module, stack: ExitStack) -> None:
    if "forward" in vars(module):
        raise RuntimeError(f"forward of {type(module).__name__} is already replaced; cannot share its result")
    original: Callable[..., Any] = module.forward
    kept: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(original(*args, **kwargs))
        return _copy_lists(kept[0])

    vars(module)["forward"] = once
    stack.callback(vars(module).pop, "forward")


def _copy_lists(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copy_lists(item) for item in value)
    return list(value) if isinstance(value, list) else value

"""Workloads by name: entry points of installed packages, or ``package.module:Class``."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points

from moecap_eval.workload import ENTRY_POINT_GROUP, Workload


def list_workloads() -> dict[str, EntryPoint]:
    """Every registered workload, by name, in alphabetical order. Imports none of them."""
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return dict(sorted(found.items()))


def load_workload(name: str) -> Workload:
    """The workload of that name, made without arguments.

    Args:
        name: an entry point of the group ``moecap.workloads``, or ``package.module:Class``.

    Raises:
        ValueError: no such workload, it cannot be imported, or it is not a ``Workload``.
    """
    known = list_workloads()
    if name not in known and ":" not in name:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        raise ValueError(f"workload: no workload {name!r} is registered; {hint}")
    try:
        if name in known:
            cls = known[name].load()
        else:
            module_name, _, attribute = name.partition(":")
            cls = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"workload: {name!r} cannot be loaded: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Workload)):
        raise ValueError(f"workload: {name!r} is not a subclass of moecap_eval.Workload")
    return cls()

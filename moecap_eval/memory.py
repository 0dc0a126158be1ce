"""Whether the arms of a config fit into main memory together."""

from __future__ import annotations

from pathlib import Path

from moecap_eval.config import RunConfig
from moecap_eval.environment import total_memory_bytes

ARM_OVERHEAD_BYTES = 2**30


def memory_needed(config: RunConfig) -> int | None:
    """Bytes of main memory the arms need at least: weights and 1 GiB each; None without a model folder.

    With ``keep_alive`` all arms are counted, otherwise one.
    """
    model = Path(str(config.params.get("model", "")))
    weights = list(model.glob("*.safetensors")) if model.is_dir() else []
    if not weights:
        return None
    arms = len(config.arms) if config.compare.keep_alive else 1
    return arms * (sum(path.stat().st_size for path in weights) + ARM_OVERHEAD_BYTES)


def check_memory(config: RunConfig) -> str | None:
    """Why the arms cannot all be loaded into main memory, or None when they can or nothing is known."""
    needed, present = memory_needed(config), total_memory_bytes()
    if needed is None or present is None or needed <= present:
        return None
    gib = f"{needed / 2**30:.1f} GiB, {present / 2**30:.1f} GiB are present"
    text = f"{len(config.arms)} arms need at least {gib}"
    return f"{text}; set compare.keep_alive: false" if config.compare.keep_alive else text

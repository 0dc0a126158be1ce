"""What every engine gives: answers, and facts that make the accounting possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecap_eval.model_spec import ModelSpec


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``ttft_s`` runs from the moment the request got its place in the batch to its first token, ``tpot_s`` is
    the mean time of each further token; both are None where they are not defined or not recorded.
    """

    token_ids: tuple[int, ...]
    text: str
    ttft_s: float | None
    tpot_s: float | None


def spec_of(facts: Mapping[str, Any]) -> ModelSpec:
    """The spec of a running model, from the ``facts`` of its engine.

    Raises:
        ValueError: a ``model_type`` the accounting does not support.
    """
    return ModelSpec.from_config(
        facts["model_config"], weight_dtype=facts["weight_dtype"], kv_dtype=facts["kv_dtype"]
    )


def json_values(value: Any) -> Any:
    """A configuration as JSON values; what JSON does not know becomes its text."""
    if isinstance(value, dict):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_values(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)

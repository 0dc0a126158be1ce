"""Greedy text generation at a fixed concurrency: the base of the workloads of language-model plugins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moecap_eval.accounting import s_mbu, s_mfu
from moecap_eval.config import unknown_key
from moecap_eval.model_spec import ModelSpec
from moecap_eval.tasks import load_items
from moecap_eval.workload import (
    ArmConfig,
    Axis,
    BlockResult,
    Item,
    RunContext,
    Sample,
    StepRecord,
    System,
    Workload,
)

if TYPE_CHECKING:
    from moecap_eval.engines.vllm import Generation
    from moecap_eval.hardware import HardwareProfile

_DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "tasks": None,
    "limit": None,
    "max_new_tokens": 32,
    "concurrency": 32,
    "threads": None,
}


@dataclass(frozen=True)
class TextParams:
    """The ``params`` section of a text workload, checked.

    ``threads`` limits the threads of an engine on a CPU; small models are fastest, and steadiest, on one.
    """

    model: str
    tasks: str
    limit: int | None
    max_new_tokens: int
    concurrency: int
    threads: int | None = None

    @classmethod
    def from_mapping(cls, params: Mapping[str, Any]) -> TextParams:
        """Check types and names; ValueError says which key is wrong and what it may be."""
        for key in params:
            if key not in _DEFAULTS:
                raise ValueError(unknown_key(f"params.{key}", list(_DEFAULTS)))
        values = {**_DEFAULTS, **params}
        for key in ("model", "tasks"):
            if not isinstance(values[key], str) or not values[key]:
                raise ValueError(f"params.{key} is required: a path or a name, got {values[key]!r}")
        for key in ("limit", "max_new_tokens", "concurrency", "threads"):
            value = values[key]
            if key in ("limit", "threads") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"params.{key} must be a positive integer, got {value!r}")
        return cls(**values)


class TextGeneration(Workload):
    """Answers the questions of ``params.tasks`` with ``params.model`` in vLLM.

    Every block's items are offered at once and at most ``params.concurrency`` run at a time, so a request
    starts when another one ends. A subclass names itself, adds arm options, and turns them into engine
    arguments.
    """

    name: ClassVar[str] = "text_generation"
    work_unit: ClassVar[str] = "token"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("exact_match", "accuracy", "share of items", "higher", "item", margin=0.02, headline=True),
        Axis("ttft_s", "performance", "s", "lower", "item", margin=0.05),
        Axis("tpot_s", "performance", "s", "lower", "item", margin=0.05),
        Axis("s_mbu", "performance", "share of peak", "higher", margin=0.05),
        Axis("s_mfu", "performance", "share of peak", "higher", margin=0.05),
    )
    arm_options: ClassVar[tuple[str, ...]] = ("engine",)
    moved_bytes: ClassVar[str | None] = None

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """Questions of all tasks, interleaved."""
        checked = TextParams.from_mapping(params)
        return load_items(checked.tasks, checked.limit, seed)

    def open(self, arm: ArmConfig, context: RunContext) -> TextSystem:
        """Start the engine of one arm."""
        params = TextParams.from_mapping(context.params)
        for key in arm.options:
            if key not in self.arm_options:
                raise ValueError(unknown_key(f"arms.{arm.name}.{key}", list(self.arm_options)))
        arguments = {
            "max_num_seqs": params.concurrency,
            # The same items run several times in one engine (warm-up, A/A control): a cached prefix would
            # make every run after the first one cheaper.
            "enable_prefix_caching": False,
            "seed": context.seed,
            **self.engine_arguments(arm),
        }
        _check_model(params.model)
        from moecap_eval.engines.vllm import limit_threads, open_llm

        if params.threads is not None:
            limit_threads(params.threads)
        llm = open_llm(params.model, moved_bytes=self.moved_bytes, **arguments)
        return self.system(llm, params, context.hardware, arm)

    def engine_arguments(self, arm: ArmConfig) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for ``arm``; ValueError for a bad option."""
        engine = arm.options.get("engine") or {}
        if not isinstance(engine, Mapping):
            raise ValueError(f"arms.{arm.name}.engine must map vllm.LLM arguments to values, got {engine!r}")
        return dict(engine)

    def system(self, llm: Any, params: TextParams, hardware: HardwareProfile, arm: ArmConfig) -> TextSystem:
        """The system around the opened engine."""
        return TextSystem(llm, params, hardware)


def _check_model(model: str) -> None:
    """Refuse a local folder that cannot be a model; anything else may be a model id."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith(".") or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise ValueError(f"params.model {model!r}: no config.json there; give a model folder or a model id")


class TextSystem(System):
    """A running engine that answers blocks of questions."""

    def __init__(self, llm: Any, params: TextParams, hardware: HardwareProfile) -> None:
        from moecap_eval.engines import vllm as engine

        self.llm, self._params, self._engine = llm, params, engine
        self._facts = engine.facts(llm)
        self._hardware = hardware
        self._spec: ModelSpec | None = None
        self._no_spec = ""
        try:
            self._spec = engine.model_spec(llm)
        except ValueError as error:
            self._no_spec = str(error)

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Answer all items; ``work`` is the number of generated tokens."""
        self._engine.drain_steps(self.llm)
        answers = self._engine.generate(
            self.llm,
            [item.payload.prompt for item in items],
            max_new_tokens=[item.payload.max_new_tokens or self._params.max_new_tokens for item in items],
            stop=[item.payload.stop for item in items],
        )
        steps = self._engine.drain_steps(self.llm)
        result = BlockResult(
            work=float(sum(len(answer.token_ids) for answer in answers)),
            samples=[_sample(item, answer) for item, answer in zip(items, answers, strict=True)],
            steps=steps,
        )
        self._add_utilisation(result, steps)
        return result

    def _add_utilisation(self, result: BlockResult, steps: Sequence[StepRecord]) -> None:
        for name, measure in (("s_mbu", self._s_mbu), ("s_mfu", self._s_mfu)):
            try:
                result.values[name] = measure(steps)
            except ValueError as error:
                result.values[name], result.reasons[name] = None, str(error)

    @property
    def spec(self) -> ModelSpec | None:
        """What the accounting knows of the model; None for a family it does not support."""
        return self._spec

    def _require_spec(self) -> ModelSpec:
        if self._spec is None:
            raise ValueError(self._no_spec)
        return self._spec

    def _s_mbu(self, steps: Sequence[StepRecord]) -> float:
        return s_mbu(self._require_spec(), steps, self._hardware.peak_bytes_per_s)

    def _s_mfu(self, steps: Sequence[StepRecord]) -> float:
        return s_mfu(
            self._require_spec(), steps, self._hardware.peak_flops_per_s(self._facts["weight_dtype"])
        )

    def memory_bytes(self) -> dict[str, int]:
        """Weights and key/value cache by tier; nothing for a model the accounting does not know."""
        return self._engine.memory_bytes(self.llm) if self._spec is not None else {}

    def describe(self) -> dict[str, Any]:
        """Engine version, model configuration and dtypes."""
        return dict(self._facts)

    def close(self) -> None:
        """Shut the engine down."""
        self._engine.close(self.llm)


def _sample(item: Item, answer: Generation) -> Sample:
    scores = item.payload.score(answer.text)
    main = next(iter(scores.values()))
    token_bytes = b"".join(token.to_bytes(4, "little") for token in answer.token_ids)
    return Sample(
        item_id=item.id,
        values={"exact_match": main, "ttft_s": answer.ttft_s, "tpot_s": answer.tpot_s},
        digest=hashlib.sha256(token_bytes).hexdigest(),
        detail={"prompt": item.payload.prompt, "target": item.payload.target, "output": answer.text},
    )

"""Greedy text generation at a fixed concurrency: the base of the workloads of language-model plugins."""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moecap_eval.accounting import s_mbu, s_mfu
from moecap_eval.config import unknown_key
from moecap_eval.model_spec import ModelSpec
from moecap_eval.tasks import Choice, load_items
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
from moecap_eval.workloads.text_params import TextParams, listed

if TYPE_CHECKING:
    from moecap_eval.engines.generation import Generation
    from moecap_eval.hardware import HardwareProfile
    from moecap_eval.load import LoadReport

TRANSFORMERS = "transformers"
__all__ = ["TextGeneration", "TextParams", "TextSystem"]


class TextGeneration(Workload):
    """Answers the questions of ``params.tasks`` with ``params.model`` in vLLM.

    An arm ``{engine: {...}}`` passes arguments to ``vllm.LLM``; ``{engine: transformers}`` runs the same
    questions in Hugging Face Transformers, in groups of ``params.concurrency``.

    Every block's items are offered at once, or when ``params.arrivals`` says, and at most
    ``params.concurrency`` run at a time. Questions that are answered by comparing likelihoods (lm_eval's
    ``mmlu``, say) are scored on the same engine when the block has been timed. A subclass names itself, adds
    arm options, and turns them into engine arguments.
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

    def axes_for(self, params: Mapping[str, Any]) -> tuple[Axis, ...]:
        """With ``arrivals`` also latency from the scheduled arrival, and goodput for an objective."""
        arrivals = TextParams.from_mapping(params).arrivals
        if arrivals is None:
            return self.axes
        latency = Axis("latency_s", "performance", "s", "lower", "item", margin=0.05, headline=True)
        goodput = Axis("goodput", "performance", "answers/s", "higher", margin=0.05)
        return (*self.axes, latency, *([goodput] if arrivals.slo_s else []))

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """Questions of all tasks, interleaved."""
        checked = TextParams.from_mapping(params)
        items = load_items(listed(checked.tasks), checked.limit, seed)
        if all(isinstance(item.payload, Choice) for item in items):
            raise ValueError(
                f"params.tasks {checked.tasks!r} only compares likelihoods and generates nothing to time; "
                "add a task that does: tasks: [that one, this one]"
            )
        return items

    def open(self, arm: ArmConfig, context: RunContext) -> TextSystem:
        """Start the engine of one arm."""
        params = TextParams.from_mapping(context.params)
        for key in arm.options:
            if key not in self.arm_options:
                raise ValueError(unknown_key(f"arms.{arm.name}.{key}", list(self.arm_options)))
        if arm.options.get("engine") == TRANSFORMERS:
            return self._open_transformers(arm, params, context)
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

    def _open_transformers(self, arm: ArmConfig, params: TextParams, context: RunContext) -> TextSystem:
        others = sorted(set(arm.options) - {"engine"})
        if others:
            raise ValueError(f"arms.{arm.name}.{others[0]} needs vLLM, not engine: {TRANSFORMERS}")
        if params.arrivals is not None:
            raise ValueError(f"arms.{arm.name}: params.arrivals needs vLLM, not engine: {TRANSFORMERS}")
        _check_model(params.model)
        from moecap_eval.engines import hf

        if params.threads is not None:
            import torch

            torch.set_num_threads(params.threads)
        engine = hf.open_engine(params.model, max_num_seqs=params.concurrency)
        return TextSystem(engine, params, context.hardware, hf)

    def engine_arguments(self, arm: ArmConfig) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for ``arm``; ValueError for a bad option."""
        engine = arm.options.get("engine") or {}
        if not isinstance(engine, Mapping):
            raise ValueError(
                f"arms.{arm.name}.engine must be {TRANSFORMERS} or map vllm.LLM arguments to values, "
                f"got {engine!r}"
            )
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

    def __init__(self, llm: Any, params: TextParams, hardware: HardwareProfile, engine: Any = None) -> None:
        """``engine`` is the module of ``moecap_eval.engines`` that opened ``llm``; vLLM's by default."""
        if engine is None:
            from moecap_eval.engines import vllm as engine

        self.llm, self._params, self._engine = llm, params, engine
        self._facts = engine.facts(llm)
        self._hardware = hardware
        self._untimed_s = 0.0
        self._spec: ModelSpec | None = None
        self._no_spec = ""
        try:
            self._spec = engine.model_spec(llm)
        except ValueError as error:
            self._no_spec = str(error)

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Answer all questions; ``work`` is the number of generated tokens."""
        questions = [item for item in items if not isinstance(item.payload, Choice)]
        choices = [item for item in items if isinstance(item.payload, Choice)]
        if not questions:
            raise ValueError("a block holds no question that generates text: use fewer blocks")
        if choices and not hasattr(self._engine, "score_continuations"):
            raise ValueError(f"tasks that compare likelihoods need vLLM, not engine: {TRANSFORMERS}")
        with self._untimed():
            self._engine.drain_steps(self.llm)
        answers, load = self._answer(questions)
        with self._untimed():
            steps = self._engine.drain_steps(self.llm)
            result = BlockResult(
                work=float(sum(len(answer.token_ids) for answer in answers)),
                samples=[_sample(item, answer) for item, answer in zip(questions, answers, strict=True)],
                steps=steps,
                finish=partial(self._score, choices) if choices else None,
            )
            self._add_utilisation(result, steps)
            if load is not None:
                self._add_load(result, load)
        return result

    def _answer(self, questions: Sequence[Item]) -> tuple[list[Generation], LoadReport | None]:
        prompts = [item.payload.prompt for item in questions]
        limits = [item.payload.max_new_tokens or self._params.max_new_tokens for item in questions]
        stops = [item.payload.stop for item in questions]
        arrivals = self._params.arrivals
        if arrivals is None:
            return self._engine.generate(self.llm, prompts, max_new_tokens=limits, stop=stops), None
        # Seeded by the block's first item: every arm gets the same arrivals.
        due_s = arrivals.times(len(questions), zlib.crc32(questions[0].id.encode()))
        return self._engine.serve(self.llm, prompts, due_s, max_new_tokens=limits, stop=stops)

    def _add_load(self, result: BlockResult, load: LoadReport) -> None:
        for sample, latency_s in zip(result.samples, load.latency_s, strict=True):
            sample.values["latency_s"] = float(latency_s)
        slo_s = self._params.arrivals.slo_s if self._params.arrivals else None
        if slo_s is not None:
            result.values["goodput"] = load.goodput(slo_s)

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        """Let the clock of the block stand still: counters are read, nobody waits for an answer."""
        begin = time.perf_counter()
        yield
        self._untimed_s += time.perf_counter() - begin

    def clock(self) -> float:
        """Seconds, those spent on reading counters left out."""
        return time.perf_counter() - self._untimed_s

    def _score(self, items: Sequence[Item], result: BlockResult) -> None:
        from moecap_eval.tasks.lm_eval_bridge import score_choices

        for item, scores in zip(items, score_choices(self.llm, [i.payload for i in items]), strict=True):
            detail = {"prompt": item.payload.prompt, "target": item.payload.target, "scores": scores}
            values: dict[str, float | None] = {"exact_match": next(iter(scores.values()))}
            result.samples.append(Sample(item.id, values, detail=detail))

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

"""lm_eval tasks on an engine that is already running.

Generation tasks become questions, whose requests are the timed ones; each answer is scored by the task's own
filters and metric. Likelihood tasks become choices, scored on the same engine beside the clock.
``lm_eval:gsm8k`` names a task of lm_eval, ``lm_eval:my/folder/my_task`` one defined by a YAML file in that
folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecap_eval.tasks.jsonl import Choice, Question
from moecap_eval.workload import Item

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


_LIKELIHOODS = ("multiple_choice", "loglikelihood")


def task_items(spec: str) -> dict[str, list[Item]]:
    """Items of a task (or of each task of a group), with lm_eval's prompts and scores.

    Generation tasks give ``Question``s, tasks that compare likelihoods ``Choice``s. An item's id is
    ``<task>/<doc_id>/<doc_hash>``, lm_eval's own key of a document.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: an unknown task, one whose data cannot be had here, or one that scores whole documents.
    """
    tasks = _load_tasks(spec)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in ("generate_until", *_LIKELIHOODS):
            raise ValueError(
                f"lm_eval task {name!r} ({task.OUTPUT_TYPE}) scores whole documents and has no answers; get "
                f"its figures by moecap_eval.tasks.lm_eval_bridge.evaluate(llm, {spec!r})"
            )
    return {
        name: _choices(name, task) if task.OUTPUT_TYPE in _LIKELIHOODS else _questions(name, task)
        for name, task in tasks.items()
    }


def _load_tasks(spec: str) -> dict[str, ConfigurableTask]:
    manager, name = _manager(spec)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"lm_eval has no task {name!r}{hint} (lm_eval ls tasks lists them)")
    try:
        loaded = manager.load(name)
    except Exception as error:  # datasets raises a dozen kinds when data is out of reach
        raise ValueError(
            f"the data of lm_eval task {name!r} cannot be loaded here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); run once with a network so that "
            "`datasets` caches it, or export it elsewhere by `moecap list tasks --export TASK DIR` and use "
            "the JSONL file"
        ) from error
    return dict(loaded["tasks"])


def _manager(spec: str) -> tuple[Any, str]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm_eval tasks need lm_eval: pip install graft-plugins[eval]") from error
    folder, _, name = spec.rpartition("/")
    # Indexing lm_eval's own ten thousand files takes seconds: a folder stands for itself.
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else TaskManager()
    return manager, name


def _questions(name: str, task: ConfigurableTask) -> list[Item]:
    task.build_all_requests(rank=0, world_size=1)
    items = []
    for instance in task.instances:
        prompt, options = instance.args
        until = options.get("until") or []
        question = Question(
            task=name,
            prompt=prompt,
            target=str(task.doc_to_target(instance.doc)),
            stop=(until,) if isinstance(until, str) else tuple(until),
            max_new_tokens=options.get("max_gen_toks"),
            scorer=_Scorer(task, instance),
        )
        items.append(Item(_item_id(name, instance), question))
    return items


def _choices(name: str, task: ConfigurableTask) -> list[Item]:
    """One item a document, whatever number of likelihoods lm_eval asks for."""
    task.build_all_requests(rank=0, world_size=1)
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    items = []
    for instances in by_document.values():
        instances.sort(key=lambda instance: instance.idx)
        first = instances[0]
        choice = Choice(
            task=name,
            prompt=first.args[0],
            target=str(task.doc_to_target(first.doc)),
            pairs=tuple(instance.args for instance in instances),
            score=partial(_likelihood_scores, task, first.doc),
        )
        items.append(Item(_item_id(name, first), choice))
    return items


def _likelihood_scores(
    task: ConfigurableTask, document: Any, likelihoods: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    results = task.process_results(document, list(likelihoods))
    scores = {key: float(value) for key, value in results.items() if isinstance(value, int | float)}
    if not scores:
        raise ValueError(f"lm_eval task {task.config.task!r} gives no score for a single document")
    return scores


def score_choices(llm: Any, choices: Sequence[Choice]) -> list[dict[str, float]]:
    """Scores of each choice by metric, its likelihoods taken from the running engine ``llm``."""
    requests = [_Request(pair) for choice in choices for pair in choice.pairs]
    likelihoods = iter(engine_model(llm).loglikelihood(requests, disable_tqdm=True))
    return [choice.score([next(likelihoods) for _ in choice.pairs]) for choice in choices]


@dataclass(frozen=True)
class _Request:
    """What lm_eval's models read of an instance."""

    args: tuple[str, str]


def _item_id(name: str, instance: Any) -> str:
    return f"{name}/{instance.doc_id}/{_document_hash(instance.doc)}"


class _Scorer:
    """Applies a task's filters and metric to one answer."""

    def __init__(self, task: ConfigurableTask, instance: Any) -> None:
        self._task, self._instance = task, instance

    def __call__(self, output: str) -> dict[str, float]:
        self._instance.resps, self._instance.filtered_resps = [output], {}
        for pipeline in self._task._filters:
            pipeline.apply([self._instance])
        filtered = self._instance.filtered_resps
        scores = {}
        for pipeline_name, answer in filtered.items():
            for metric, value in self._task.process_results(self._instance.doc, [answer]).items():
                scores[f"{metric},{pipeline_name}"] = float(value)
        return scores


def _document_hash(document: Any) -> str:
    text = json.dumps(document, indent=2, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def export_jsonl(spec: str, folder: str | Path) -> list[Path]:
    """Write generation tasks as JSONL files for machines without a network; returns their paths.

    The files are scored by exact match: for tasks with another metric, scores differ from lm_eval's.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, items in task_items(spec).items():
        if any(isinstance(item.payload, Choice) for item in items):
            raise ValueError(f"lm_eval task {name!r} scores likelihoods, which a JSONL file cannot hold")
        path = target / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"
        lines = [json.dumps(_line(item), ensure_ascii=False) for item in items]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _line(item: Item) -> dict[str, Any]:
    question = item.payload
    return {
        "id": item.id,
        "prompt": question.prompt,
        "target": question.target,
        "split": "test",
        "stop": list(question.stop),
    }


def evaluate(llm: Any, spec: str, *, limit: int | None = None) -> Mapping[str, Mapping[str, float]]:
    """lm_eval's own evaluation of ``spec`` on the running engine ``llm``, of any output type.

    Returns:
        scores by task, then by ``metric,filter``. lm_eval's standard errors are left out: they are 0 at
        score 0; use ``moecap_eval.wilson_interval``.
    """
    import lm_eval

    manager, name = _manager(spec)
    _load_tasks(spec)
    found = lm_eval.simple_evaluate(
        model=engine_model(llm), tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return {
        task: {
            key: value
            for key, value in scores.items()
            if isinstance(value, int | float) and "," in key and "_stderr" not in key
        }
        for task, scores in found["results"].items()
    }


def engine_model(llm: Any) -> Any:
    """An ``lm_eval`` model over the running engine: no second load, the same requests."""
    from lm_eval.api.model import TemplateLM

    from moecap_eval.engines import vllm as engine

    class EngineModel(TemplateLM):
        """lm_eval's view of a running engine."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = llm.get_tokenizer()
            self._max_length = llm.llm_engine.vllm_config.model_config.max_model_len

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return int(bos) if bos is not None else self.eot_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_options: Any
        ) -> list[int]:
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            options = [request.args[1] for request in requests]
            until = [option.get("until") or [] for option in options]
            answers = engine.generate(
                llm,
                [request.args[0] for request in requests],
                max_new_tokens=[option.get("max_gen_toks") or 256 for option in options],
                stop=[[words] if isinstance(words, str) else list(words) for words in until],
            )
            return [answer.text for answer in answers]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
            pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
            # A context that does not fit loses its beginning, as in lm_eval.
            cut = [
                (context[-(self._max_length - 1 - len(rest)) :], rest)
                if len(context) + len(rest) >= self._max_length
                else (context, rest)
                for context, rest in pairs
            ]
            return engine.score_continuations(llm, cut)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [
                ([self.prefix_token_id], self.tok_encode(request.args[0], add_special_tokens=False))
                for request in requests
            ]
            too_long = [len(rest) for _, rest in windows if len(rest) + 1 >= self._max_length]
            if too_long:
                raise ValueError(
                    f"a document of {too_long[0]} tokens exceeds max_model_len {self._max_length}: "
                    "raise engine.max_model_len"
                )
            return [logprob for logprob, _ in engine.score_continuations(llm, windows)]

    return EngineModel()

"""Hugging Face Transformers as an engine: greedy answers, and the same records of its passes as of vLLM's.

Requests run in groups that begin together: one pass for all prompts of a group, padded on the left, then one
for each further token of those that are not done. Expert ids come from hooks on the router modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moecap_eval.engines.counters import PassCounters
from moecap_eval.engines.generation import Generation, json_values, spec_of
from moecap_eval.engines.passes import Announced, PassShape, step_fields
from moecap_eval.model_spec import ModelSpec
from moecap_eval.workload import StepRecord

_ROUTER_SUFFIX = "TopKRouter"


class HfEngine:
    """A model of Transformers with its tokenizer; made by ``open_engine``."""

    def __init__(self, model: Any, tokenizer: Any, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.cache_bytes = 0  # of the largest group so far
        eos = model.generation_config.eos_token_id
        self.eos = {eos} if isinstance(eos, int) else set(eos or ())
        try:
            self.spec: ModelSpec | None = spec_of(facts(self))
        except ValueError:  # a family the accounting does not know: passes are recorded all the same
            self.spec = None
        self.passes = _Passes(model, self.spec, max_num_batched_tokens)


def open_engine(
    model: str, *, max_num_seqs: int = 32, max_num_batched_tokens: int = 8192, dtype: str = "auto"
) -> HfEngine:
    """Load ``model`` on the GPU if there is one, else on the CPU.

    Args:
        model: a folder or a model id.
        max_num_seqs: requests of a group.
        max_num_batched_tokens: rows of its largest pass, padding included.
        dtype: of weights and cache; ``auto`` is the checkpoint's.

    Raises:
        ImportError: Transformers is not installed.
        RuntimeError: a model with MoE layers whose routers cannot be found.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("engine: transformers needs Transformers: pip install transformers") from error
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    return HfEngine(network.to(device).eval(), tokenizer, max_num_seqs, max_num_batched_tokens)


class _Passes:
    """Runs forward passes and records them."""

    def __init__(self, model: Any, spec: ModelSpec | None, max_rows: int) -> None:
        self._model = model
        routers = _routers(model)
        self._layer_ids = spec.moe_layers if spec else tuple(range(len(routers)))
        if len(self._layer_ids) != len(routers):
            raise RuntimeError(
                f"model has {len(self._layer_ids)} MoE layers but {len(routers)} modules named "
                f"*{_ROUTER_SUFFIX}: this version of Transformers routes elsewhere"
            )
        self._top_k = spec.top_k if spec else (routers[0].top_k if routers else 0)
        self._windows = sorted({layer.window for layer in spec.layers if layer.window}) if spec else []
        experts = spec.num_experts if spec else (routers[0].num_experts if routers else 0)
        self._token_ids = torch.zeros(max_rows, dtype=torch.int32, device=model.device)
        self._counters = PassCounters(
            num_layers=len(routers),
            num_experts=experts,
            top_k=self._top_k,
            input_ids=self._token_ids,
            device=model.device,
        )
        self._order: Tensor | None = None  # rows of the pass, those of padding last
        for slot, router in enumerate(routers):
            router.register_forward_hook(self._hook(self._counters.capture(slot)))

    def _hook(self, keep: Callable[[Tensor], None]) -> Callable[..., None]:
        def hand_over(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._order is not None:
                ids = next(part for part in reversed(output) if not part.is_floating_point())
                keep(ids.reshape(-1, ids.shape[-1])[self._order])

        return hand_over

    @torch.inference_mode()
    def run(self, rows: Tensor, mask: Tensor, cache: Any, past: Sequence[int]) -> Tensor:
        """The next token of each request.

        Args:
            rows: int64 ``[requests, length]``, new token ids, padded on the left.
            mask: int64 ``[requests, total]``, 1 for tokens and 0 for padding, cached positions included.
            cache: of Transformers; grows by the new rows.
            past: tokens of each request before.
        """
        length = rows.shape[1]
        is_token = mask[:, -length:].bool().flatten()
        self._order = torch.argsort(~is_token, stable=True)
        self._token_ids[: len(self._order)] = rows.flatten()[self._order]
        new = mask[:, -length:].sum(1).tolist()
        names = [str(number) for number in range(len(new))]
        tokens, computed = dict(zip(names, new, strict=True)), list(zip(names, past, strict=True))
        self._counters.begin(sum(new), Announced(sum(new), tokens, computed))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        output = self._model(
            input_ids=rows,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].argmax(-1)
        self._counters.end()
        self._order = None
        return chosen

    def drain(self) -> list[StepRecord]:
        return [
            StepRecord(
                **step_fields(PassShape.of(counts.note, self._windows), counts, self._layer_ids, self._top_k)
            )
            for counts in self._counters.drain()
        ]


def _routers(model: nn.Module) -> list[Any]:
    """The modules that choose experts, in the order of the layers."""
    suffix = _ROUTER_SUFFIX.lower()
    return [module for module in model.modules() if type(module).__name__.lower().endswith(suffix)]


def generate(
    engine: HfEngine,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[Sequence[str]] = (),
) -> list[Generation]:
    """Greedy answers to ``prompts``, in their order, in groups of at most ``max_num_seqs``.

    Args:
        engine: of ``open_engine``.
        prompts: text; the tokenizer adds what it adds (a leading BOS, say).
        max_new_tokens: for all, or one limit per prompt.
        stop: strings that end an answer, per prompt; none by default.

    Raises:
        ValueError: a prompt alone is longer than ``max_num_batched_tokens``.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    words = list(stop) or [()] * len(prompts)
    ids = [engine.tokenizer(prompt).input_ids for prompt in prompts]
    answers: list[Generation] = []
    while len(answers) < len(ids):
        first = len(answers)
        last = first + _group_size(engine, ids[first:])
        answers += _Group(engine, ids[first:last], limits[first:last], words[first:last]).answers()
    return answers


def _group_size(engine: HfEngine, ids: Sequence[Sequence[int]]) -> int:
    """How many of the next prompts fit one padded pass."""
    widest, size = 0, 0
    for prompt in ids[: engine.max_num_seqs]:
        widest = max(widest, len(prompt))
        if widest * (size + 1) > engine.max_num_batched_tokens:
            break
        size += 1
    if size == 0:
        raise ValueError(
            f"a prompt has {len(ids[0])} tokens, more than max_num_batched_tokens = "
            f"{engine.max_num_batched_tokens}: raise it"
        )
    return size


class _Group:
    """Requests that begin together; those that are done leave the batch."""

    def __init__(
        self,
        engine: HfEngine,
        ids: Sequence[Sequence[int]],
        limits: Sequence[int],
        stops: Sequence[Sequence[str]],
    ) -> None:
        self._engine, self._ids, self._limits, self._stops = engine, ids, limits, stops
        self._tokens: list[list[int]] = [[] for _ in ids]
        self._times: list[list[float]] = [[] for _ in ids]

    def answers(self) -> list[Generation]:
        """Run to the end."""
        from transformers import DynamicCache

        device = self._engine.model.device
        widest = max(map(len, self._ids))
        rows = torch.tensor([[0] * (widest - len(ids)) + list(ids) for ids in self._ids], device=device)
        mask = torch.tensor([[0] * (widest - len(ids)) + [1] * len(ids) for ids in self._ids], device=device)
        cache = DynamicCache(config=self._engine.model.config)
        alive, begin = list(range(len(self._ids))), time.perf_counter()
        while alive:
            past = [len(self._ids[n]) + len(self._tokens[n]) - 1 if self._tokens[n] else 0 for n in alive]
            chosen = self._engine.passes.run(rows, mask, cache, past)
            self._note_cache(mask)
            now = time.perf_counter() - begin
            for number, token in zip(alive, chosen.tolist(), strict=True):
                self._tokens[number].append(token)
                self._times[number].append(now)
            kept = [place for place, number in enumerate(alive) if not self._is_done(number)]
            if len(kept) < len(alive):
                index = torch.tensor(kept, dtype=torch.long, device=device)
                cache.batch_select_indices(index)
                mask, chosen = mask[index], chosen[index]
                alive = [alive[place] for place in kept]
            rows, mask = chosen[:, None], torch.cat((mask, mask.new_ones(len(alive), 1)), dim=1)
        return [self._answer(number) for number in range(len(self._ids))]

    def _note_cache(self, mask: Tensor) -> None:
        if self._engine.spec is not None:
            held = mask.numel() * self._engine.spec.kv_bytes_per_token
            self._engine.cache_bytes = max(self._engine.cache_bytes, held)

    def _text(self, number: int) -> str:
        return str(self._engine.tokenizer.decode(self._tokens[number], skip_special_tokens=True))

    def _is_done(self, number: int) -> bool:
        tokens = self._tokens[number]
        if tokens[-1] in self._engine.eos or len(tokens) >= self._limits[number]:
            return True
        stops = self._stops[number]
        return bool(stops) and any(word in self._text(number) for word in stops)

    def _answer(self, number: int) -> Generation:
        tokens, times, text = self._tokens[number], self._times[number], self._text(number)
        ends = [text.index(word) for word in self._stops[number] if word in text]
        tpot_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return Generation(tuple(tokens), text[: min(ends, default=len(text))], times[0], tpot_s)


def drain_steps(engine: HfEngine) -> list[StepRecord]:
    """The passes since the last drain, in order."""
    return engine.passes.drain()


def facts(engine: HfEngine) -> dict[str, Any]:
    """What the records need to know of the engine, as JSON values."""
    import transformers

    dtype = str(engine.model.dtype).removeprefix("torch.")
    return {
        "engine": f"transformers {transformers.__version__}",
        "model_config": json_values(engine.model.config.get_text_config().to_dict()),
        "weight_dtype": dtype,
        "kv_dtype": dtype,
    }


def model_spec(engine: HfEngine) -> ModelSpec:
    """The spec of the running model, with its dtypes; ValueError for an unknown family."""
    return spec_of(facts(engine))


def memory_bytes(engine: HfEngine) -> dict[str, int]:
    """Bytes by tier: on a GPU the allocator's count, on a CPU the weights and the largest cache so far."""
    if engine.model.device.type == "cuda":
        return {"hbm": torch.cuda.memory_allocated(engine.model.device)}
    return {"dram": sum(parameter.nbytes for parameter in engine.model.parameters()) + engine.cache_bytes}


def close(engine: HfEngine) -> None:
    """Give the model's memory back."""
    del engine.model, engine.passes

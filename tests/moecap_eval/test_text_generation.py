"""The text workload and lm_eval on one running engine with a random model."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecap_eval.accounting import s_mbu, s_mfu
from moecap_eval.engines import vllm as engine
from moecap_eval.hardware import load_hardware
from moecap_eval.model_spec import ModelSpec
from moecap_eval.tasks.lm_eval_bridge import engine_model, evaluate
from moecap_eval.workload import ArmConfig, RunContext
from moecap_eval.workloads.text_generation import TextGeneration, TextParams, TextSystem

sys.path.insert(0, str(Path(__file__).parent))
import tiny_configs as tiny

pytestmark = pytest.mark.vllm
HARDWARE = load_hardware("cpu-reference")


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("text")
    model = tiny.save_random_model(folder / "model")
    lines = [
        {"id": f"ask/{number}", "prompt": "abc"[: number % 3 + 1] * 2, "target": "x"} for number in range(12)
    ]
    (folder / "ask.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return {
        "model": str(model),
        "tasks": str(folder / "ask.jsonl"),
        "limit": 10,
        "max_new_tokens": 5,
        "concurrency": 3,
        "threads": 1,
    }


@pytest.fixture(scope="module")
def system(params: dict) -> Iterator[TextSystem]:
    context = RunContext(seed=7, out_dir=Path(), hardware=HARDWARE, params=params)
    opened = TextGeneration().open(ArmConfig("plain", {"engine": {"max_model_len": 96}}), context)
    yield opened
    opened.close()


def test_cap14_answers_scores_and_times_come_from_the_same_requests(system: TextSystem, params: dict) -> None:
    items = TextGeneration().items(params, 7)
    result = system.run(items)
    assert [sample.item_id for sample in result.samples] == [item.id for item in items]
    assert 10 <= result.work <= 50
    assert max(step.requests for step in result.steps) == 3
    assert sum(step.sampled_tokens for step in result.steps) == result.work
    for item, sample in zip(items, result.samples, strict=True):
        assert sample.values["exact_match"] == float(sample.detail["output"].strip() == "x")
        assert sample.detail["prompt"] == item.payload.prompt
        assert sample.values["ttft_s"] > 0
        assert sample.values["tpot_s"] is None or sample.values["tpot_s"] > 0


def test_cap14_equal_prompts_have_equal_digests(system: TextSystem, params: dict) -> None:
    samples = system.run(TextGeneration().items(params, 7)).samples
    by_prompt: dict[str, set] = {}
    for sample in samples:
        by_prompt.setdefault(sample.detail["prompt"], set()).add((sample.digest, sample.detail["output"]))
    assert len(by_prompt) == 3
    assert all(len(found) == 1 for found in by_prompt.values())
    assert len({next(iter(found))[0] for found in by_prompt.values()}) == 3
    again = system.run(TextGeneration().items(params, 7)).samples
    assert [sample.digest for sample in again] == [sample.digest for sample in samples]


def test_digest_is_of_the_token_ids(system: TextSystem, params: dict) -> None:
    item = TextGeneration().items(params, 7)[0]
    (sample,) = system.run([item]).samples
    (answer,) = engine.generate(system.llm, [item.payload.prompt], max_new_tokens=5)
    raw = b"".join(token.to_bytes(4, "little") for token in answer.token_ids)
    assert sample.digest == hashlib.sha256(raw).hexdigest()


def test_a_single_token_has_no_time_per_output_token(system: TextSystem) -> None:
    (answer,) = engine.generate(system.llm, ["abc"], max_new_tokens=1)
    assert answer.ttft_s > 0
    assert answer.tpot_s is None


def test_cap07_block_utilisation_equals_the_records(system: TextSystem, params: dict) -> None:
    result = system.run(TextGeneration().items(params, 7))
    facts = system.describe()
    spec = ModelSpec.from_config(
        facts["model_config"], weight_dtype=facts["weight_dtype"], kv_dtype=facts["kv_dtype"]
    )
    assert json.loads(json.dumps(facts)) == facts
    assert result.values["s_mbu"] == s_mbu(spec, result.steps, HARDWARE.peak_bytes_per_s)
    assert result.values["s_mfu"] == s_mfu(spec, result.steps, HARDWARE.peak_flops_per_s("bfloat16"))
    assert result.reasons == {}


def test_cap07_impossible_utilisation_is_null_with_its_reason(system: TextSystem, params: dict) -> None:
    slow = HARDWARE.with_peaks(
        {"read_bytes_per_s": 1.0, "copy_bytes_per_s": 1.0, "flops_per_s": {"bfloat16": 1.0}}, "2026-01-01"
    )
    stricter = TextSystem(system.llm, TextParams.from_mapping(params), slow)
    result = stricter.run(TextGeneration().items(params, 7)[:2])
    assert result.values["s_mbu"] is None
    assert "is too low or the model fits in the cache" in result.reasons["s_mbu"]
    assert result.values["s_mfu"] is None


def test_memory_is_reported_by_tier(system: TextSystem) -> None:
    memory = system.memory_bytes()
    assert set(memory) == {"dram"}
    assert memory["dram"] > engine.model_spec(system.llm).weight_bytes.total


def write_task(folder: Path, name: str, body: str, rows: list[dict]) -> str:
    data = folder / f"{name}.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f'test_split: test\ndoc_to_text: "{{{{q}}}}"\n{body}'
    )
    return f"{folder}/{name}"


def test_cap14_lm_eval_generation_scores_equal_lm_evals_own(system: TextSystem, tmp_path: Path) -> None:
    """Targets are the engine's own answers for half of the documents, so the score is 0.5 and not 0 or 1."""
    questions = ["ab", "ba", "cc", "abcabc"]
    answers = engine.generate(system.llm, questions, max_new_tokens=4, stop=[["\n"]] * 4)
    rows = [
        {"q": question, "a": answer.text if index % 2 else "no"}
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    body = (
        'doc_to_target: "{{a}}"\noutput_type: generate_until\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    spec = write_task(tmp_path, "echo", body, rows)
    workload = TextGeneration()
    items = workload.items({"model": "m", "tasks": f"lm_eval:{spec}"}, 0)
    ours = [sample.values["exact_match"] for sample in system.run(items).samples]
    assert sum(ours) / len(ours) == 0.5
    assert evaluate(system.llm, spec)["echo"]["exact_match,none"] == 0.5


def test_cap14_likelihoods_are_a_distribution(system: TextSystem, tmp_path: Path) -> None:
    """Over the whole vocabulary the probabilities of the next token sum to one; greedy is the largest."""
    model = engine_model(system.llm)
    context = model.tok_encode("abc")
    vocabulary = system.describe()["model_config"]["vocab_size"]
    scored = engine.score_continuations(system.llm, [(context, [token]) for token in range(vocabulary)])
    assert sum(math.exp(logprob) for logprob, _ in scored) == pytest.approx(1.0, abs=2e-2)
    greedy = [token for token, (_, is_greedy) in enumerate(scored) if is_greedy]
    (answer,) = engine.generate(system.llm, ["abc"], max_new_tokens=1)
    assert greedy == [answer.token_ids[0]]
    assert max(range(vocabulary), key=lambda token: scored[token][0]) == greedy[0]


def test_cap14_lm_eval_multiple_choice_on_the_running_engine(system: TextSystem, tmp_path: Path) -> None:
    """The chain rule gives each choice's likelihood from one-token scores; lm_eval must pick the same."""
    model = engine_model(system.llm)
    choices, questions = ["a", "b", "c"], ["ab", "ba", "cc", "abca", "bb"]
    best = []
    for question in questions:
        context = model.tok_encode(question)
        pairs = [(context, model.tok_encode(choice, add_special_tokens=False)) for choice in choices]
        scores = [score for score, _ in engine.score_continuations(system.llm, pairs)]
        best.append(scores.index(max(scores)))
    rows = [
        {"q": question, "label": index if number % 2 else (index + 1) % 3}
        for number, (question, index) in enumerate(zip(questions, best, strict=True))
    ]
    body = (
        'doc_to_target: label\ndoc_to_choice: ["a", "b", "c"]\noutput_type: multiple_choice\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    spec = write_task(tmp_path, "choose", body, rows)
    assert evaluate(system.llm, spec)["choose"]["acc,none"] == pytest.approx(2 / 5)


def test_cap14_choices_are_scored_beside_the_clock(system: TextSystem, params: dict, tmp_path: Path) -> None:
    """Questions of one source and choices of another in one block: lm_eval's own score of the choices."""
    rows = [{"q": question, "label": index % 3} for index, question in enumerate(["ab", "ba", "cc", "abca"])]
    body = (
        'doc_to_target: label\ndoc_to_choice: ["a", "b", "c"]\noutput_type: multiple_choice\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )
    spec = write_task(tmp_path, "pick", body, rows)
    tasks = [params["tasks"], f"lm_eval:{spec}"]
    items = TextGeneration().items({"model": "m", "tasks": tasks, "limit": 8}, 7)
    assert [item.id.split("/")[0] for item in items] == ["ask", "pick"] * 4
    result = system.run(items)
    assert [sample.item_id.split("/")[0] for sample in result.samples] == ["ask"] * 4
    tokens = sum(step.sampled_tokens for step in result.steps)
    result.finish(result)
    assert result.work == tokens
    scores = [s.values["exact_match"] for s in result.samples if s.item_id.startswith("pick/")]
    assert len(scores) == 4
    assert sum(scores) / 4 == evaluate(system.llm, spec)["pick"]["acc,none"]
    with pytest.raises(ValueError, match="only compares likelihoods and generates nothing to time"):
        TextGeneration().items({"model": "m", "tasks": f"lm_eval:{spec}"}, 7)
    with pytest.raises(ValueError, match="holds no question that generates text"):
        system.run(items[1::2])


def test_cap08_reading_counters_does_not_count_as_work(
    system: TextSystem, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = engine.drain_steps
    items = TextGeneration().items(params, 7)[:1]
    system.run(items)

    def slow_drain(llm: object) -> list:
        time.sleep(0.4)
        return drain(llm)

    monkeypatch.setattr(engine, "drain_steps", slow_drain)
    begin, begin_clock = time.perf_counter(), system.clock()
    system.run(items)
    elapsed, on_clock = time.perf_counter() - begin, system.clock() - begin_clock
    assert 0.8 <= elapsed - on_clock < elapsed


def test_cap23_open_loop_latency_runs_from_the_scheduled_arrival(
    system: TextSystem, params: dict, tmp_path: Path
) -> None:
    """Three requests are due at once, three a little later, three run at a time: a wait counts as latency."""
    trace = tmp_path / "trace.txt"
    trace.write_text("5.0\n5.0\n5.0\n5.2\n5.2\n5.2\n")
    given = {**params, "arrivals": {"trace_file": str(trace), "slo_s": 30.0}}
    names = [axis.name for axis in TextGeneration().axes_for(given)]
    assert names[-2:] == ["latency_s", "goodput"]
    items = TextGeneration().items(given, 7)[:6]
    served = TextSystem(system.llm, TextParams.from_mapping(given), HARDWARE)
    begin = served.clock()
    result = served.run(items)
    wall_s = served.clock() - begin
    latencies = [sample.values["latency_s"] for sample in result.samples]
    assert wall_s > 0.2
    assert all(0 < latency < wall_s for latency in latencies)
    assert result.values["goodput"] == pytest.approx(6 / wall_s, rel=0.05)
    closed = system.run(items)
    assert [sample.digest for sample in closed.samples] == [sample.digest for sample in result.samples]
    assert "latency_s" not in closed.samples[0].values
    strict = {**given, "arrivals": {"rate": 50.0, "slo_s": 1e-9}}
    assert TextSystem(system.llm, TextParams.from_mapping(strict), HARDWARE).run(items).values["goodput"] == 0


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ({"rat": 3}, r"params\.arrivals\.rat: unknown key; did you mean 'rate'\?"),
        ({"rate": 0}, r"params\.arrivals\.rate must be a positive number, got 0"),
        ({"slo_s": 1.0}, "needs either rate .* or trace_file"),
        (3, r"params\.arrivals must map"),
    ],
)
def test_cap23_arrivals_are_checked_before_anything_is_loaded(
    params: dict, arrivals: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextGeneration().items({**params, "arrivals": arrivals}, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concurency": 3}, r"params\.concurency: unknown key; did you mean 'concurrency'\?"),
        ({"concurrency": 0}, r"params\.concurrency must be a positive integer, got 0"),
        ({"threads": 0}, r"params\.threads must be a positive integer, got 0"),
        ({"limit": "all"}, r"params\.limit must be a positive integer"),
        ({"model": None}, r"params\.model is required"),
    ],
)
def test_params_are_checked_before_anything_is_loaded(params: dict, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextGeneration().items({**params, **change}, 0)


def test_arm_options_are_checked_before_anything_is_loaded(params: dict, tmp_path: Path) -> None:
    context = RunContext(seed=7, out_dir=Path(), hardware=HARDWARE, params=params)
    with pytest.raises(ValueError, match=r"arms\.fast\.engin: unknown key; did you mean 'engine'\?"):
        TextGeneration().open(ArmConfig("fast", {"engin": {}}), context)
    with pytest.raises(ValueError, match=r"arms\.fast\.engine must be transformers or map"):
        TextGeneration().open(ArmConfig("fast", {"engine": 3}), context)
    broken = RunContext(seed=7, out_dir=Path(), hardware=HARDWARE, params={**params, "model": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no config\.json there"):
        TextGeneration().open(ArmConfig("plain"), broken)

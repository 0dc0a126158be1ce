"""The shipped tiny_moe model: its tasks, held-out rule, accuracy and routing, in transformers and vLLM."""

import hashlib
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from examples.tiny_moe import evaluate, model, tasks, tokenizer, train

FOLDER = Path(evaluate.__file__).parent
ITEMS = tasks.read_items(FOLDER / "tasks")
TASK_NAMES = ("add", "get", "max", "rev", "rot", "sort")


def is_held_out(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest(), "big") % 10 == 0


def solve(prompt: str) -> str:
    """Answer a prompt from its text alone, written independently of the generators."""
    name, rest = prompt.removesuffix("=").split(" ", 1)
    if name == "rev":
        return "".join(reversed(rest))
    if name == "sort":
        return "".join(digit * rest.count(digit) for digit in "0123456789")
    if name == "add":
        left, right = rest.split("+")
        return f"{int(left) + int(right)}"
    if name == "rot":
        shift, word = rest.split()
        return "".join(chr((ord(c) - 97 + int(shift)) % 26 + 97) for c in word)
    if name == "get":
        pairs, key = rest.split("?")
        return {pair[0]: pair[1] for pair in pairs.split()}[key]
    left, right = rest.split()
    return left if int(left) > int(right) else right


@pytest.fixture(scope="module")
def tiny_model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def forward_results(tiny_model):
    """Correctness and expert activation matrices of all held-out items."""
    return evaluate.forward_items(tiny_model, ITEMS)


@pytest.fixture(scope="module")
def llm():
    engine = evaluate.open_vllm(FOLDER / "model")
    yield engine
    from vllm.distributed import cleanup_dist_env_and_memory

    del engine
    cleanup_dist_env_and_memory()


# Tasks and held-out rule


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(tasks.TASKS)), st.sampled_from(tasks.SPLITS), st.integers())
def test_draw_gives_the_right_answer_in_the_asked_split(task, split, seed):
    prompt, target = tasks.draw(task, split, random.Random(seed))
    assert target == solve(prompt)
    assert prompt.startswith(task + " ")
    assert prompt.endswith("=")
    assert is_held_out(prompt) == (split == "test")
    assert 1 <= len(target) <= 11


def test_draw_refuses_unknown_task_and_split():
    with pytest.raises(ValueError, match="task 'revv' does not exist; choose one of rev, sort"):
        tasks.draw("revv", "test", random.Random(0))
    with pytest.raises(ValueError, match="split 'dev' does not exist"):
        tasks.draw("rev", "dev", random.Random(0))


def test_cap02_shipped_items_are_right_held_out_and_enough():
    assert {file.stem for file in (FOLDER / "tasks").glob("*.jsonl")} == set(TASK_NAMES) == set(tasks.TASKS)
    for task in TASK_NAMES:
        assert sum(item.id.startswith(task + "/") for item in ITEMS) >= 86
    assert len({item.id for item in ITEMS}) == len({item.prompt for item in ITEMS}) == len(ITEMS)
    for item in ITEMS:
        assert item.split == "test"
        assert is_held_out(item.prompt)
        assert item.target == solve(item.prompt)


def test_cap02_shipped_items_come_from_the_generator_and_the_logged_seed():
    log = json.loads((FOLDER / "training_log.json").read_text())
    options = log["options"]
    again = tasks.held_out_items("test", options["items"], options["seed"])
    assert sorted(again, key=lambda item: item.id) == ITEMS


def test_cap02_no_held_out_prompt_occurs_in_training():
    test_prompts = {item.prompt for item in ITEMS}
    validation_prompts = {item.prompt for item in tasks.held_out_items("validation", 200, 7)}
    seen = {prompt for step in range(30) for prompt, _ in tasks.training_pairs(7, step, 1024)}
    assert len(seen) > 20_000
    assert not any(is_held_out(prompt) for prompt in seen)
    assert not seen & (test_prompts | validation_prompts)
    assert not test_prompts & validation_prompts


def test_training_pairs_depend_on_seed_and_step_alone():
    first = list(tasks.training_pairs(7, 3, 50))
    assert first == list(tasks.training_pairs(7, 3, 50))
    assert first != list(tasks.training_pairs(7, 4, 50))
    assert first != list(tasks.training_pairs(8, 3, 50))


def test_items_survive_writing_and_reading(tmp_path):
    items = tasks.held_out_items("validation", 3, 1)
    tasks.write_items(items, tmp_path)
    assert tasks.read_items(tmp_path) == sorted(items, key=lambda item: item.id)
    with pytest.raises(FileNotFoundError, match="holds no"):
        tasks.read_items(tmp_path / "nowhere")


# Tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_gives_bytes_after_bos_and_restores_any_text(text):
    assume(not any(name in text for name in tokenizer.SPECIAL_TOKENS))
    built = tokenizer.build_tokenizer()
    ids = built.encode(text).ids
    assert ids == [tokenizer.BOS_ID, *text.encode()]
    assert built.decode(ids, skip_special_tokens=True) == text


def test_shipped_tokenizer_is_the_built_one(tiny_tokenizer):
    shipped = json.loads((FOLDER / "model" / "tokenizer.json").read_text())
    assert shipped == json.loads(tokenizer.build_tokenizer().to_str())
    assert tiny_tokenizer("rev ab=")["input_ids"] == [257, *b"rev ab="]
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id) == (
        256,
        257,
        258,
    )
    assert tiny_tokenizer.decode([*b"ok", 258], skip_special_tokens=True) == "ok"


# Architecture and training functions


def test_cap02_shipped_model_is_a_small_bfloat16_qwen3_moe():
    weights = FOLDER / "model" / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    config = json.loads((FOLDER / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    wanted = {"num_hidden_layers": 6, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 260}
    assert wanted.items() <= config.items()
    count = 0
    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all()
            count += tensor.numel()
    assert count == 5_106_688


def test_dense_experts_equal_the_sparse_form_in_value_and_gradient():
    small = model.new_model(0, "cpu").double()
    experts = small.model.layers[0].mlp.experts
    x = torch.randn(19, 128, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(19, 32, dtype=torch.float64).topk(4)
    weight = (scores.values / scores.values.sum(-1, keepdim=True)).requires_grad_()
    results = []
    for kind in ("tiny_moe_dense", "eager"):
        small.set_experts_implementation(kind)
        output = experts(x, scores.indices, weight)
        parameters = (x, weight, experts.gate_up_proj, experts.down_proj)
        results.append((output, *torch.autograd.grad(output.square().sum(), parameters)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_balance_loss_equals_transformers_on_one_layer_and_is_top_k_when_even():
    logits = torch.randn(40, 32)
    mask = (torch.arange(40) % 3 > 0).long()
    expected = load_balancing_loss_func((logits,), 32, 4, mask.unsqueeze(0))
    torch.testing.assert_close(model.balance_loss((logits,), 4, mask), expected)
    even = torch.eye(8).repeat(4, 1).roll(1, 0) * 1e-3  # each of 8 experts is chosen equally often
    assert model.balance_loss((even,), 1, torch.ones(32)) == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 0] = 50.0
    assert model.balance_loss((collapsed,), 1, torch.ones(32)) == pytest.approx(8.0)


def test_training_labels_are_the_answer_and_its_end():
    ids, labels = train.TrainingBatches(seed=7, steps=1, batch_size=64)[0]
    for row_ids, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        text = bytes(i for i in row_ids if i < 256).decode()
        answer = [i for i in row_labels if i != train.IGNORED]
        prompt = text[: text.index("=") + 1]
        assert bytes(answer[:-1]).decode() == solve(prompt)
        assert answer[-1] == tokenizer.EOS_ID
        first = next(i for i, label in enumerate(row_labels) if label != train.IGNORED)
        assert row_ids[first] == ord("=")  # the label of a position is the next token


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    rate = train.LearningRate(peak=1.0, warm_up_steps=10, decay_steps=4)
    assert [rate.at(step) for step in (0, 4, 9, 500)] == [0.1, 0.5, 1.0, 1.0]
    rate.start_decay(500)
    rate.start_decay(900)
    assert [rate.at(step) for step in (500, 501, 503, 504)] == [1.0, 0.75, 0.25, 0.0]


@pytest.mark.parametrize(
    "option", ["--steps", "--batch-size", "--decay-steps", "--validate-every", "--items"]
)
def test_train_refuses_counts_below_one(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([option, "0"])
    assert stopped.value.code == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_train_writes_a_model_that_loads_a_log_and_items(tmp_path):
    options = "--device cpu --steps 3 --batch-size 4 --items 2 --validate-every 2 --workers 0"
    train.main([*options.split(), "--out", str(tmp_path)])
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert log["training_steps"] == 3
    assert [entry["step"] for entry in log["validation"]] == [2, 3]
    assert log["test"]["accuracy"]["tasks"].keys() == set(TASK_NAMES)
    assert len(tasks.read_items(tmp_path / "tasks")) == 12
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_experts"] == 32


# Accuracy


def test_accuracy_report_gives_wilson_intervals():
    items = [tasks.TaskItem(f"rev/{i}", "", "", "test") for i in range(10)]
    report = evaluate.accuracy_report(items, [True] * 8 + [False] * 2)
    row = report["tasks"]["rev"]
    # Wilson 1927: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, n, p = 1.959963984540054, 10, 0.8
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert (row["exact_match"], row["correct"], row["items"]) == (0.8, 8, 10)
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-9)


def check_accuracy(report):
    shares = {task: row["exact_match"] for task, row in report["tasks"].items()}
    assert set(shares) == set(TASK_NAMES)
    assert 0.70 <= report["mean"] <= 0.98
    assert min(shares.values()) < 0.95


def test_cap02_accuracy_by_greedy_generation_in_transformers(tiny_model, tiny_tokenizer, forward_results):
    answers = evaluate.generate_transformers(tiny_model, tiny_tokenizer, ITEMS)
    correct = evaluate.score(ITEMS, answers)
    check_accuracy(evaluate.accuracy_report(ITEMS, correct))
    # One forward pass judges like generation; left padding changes bfloat16 rounding of a few close calls.
    agreement = np.mean(np.array(correct) == np.array(forward_results[0]))
    assert agreement >= 0.99


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_cap02_recorded_accuracy_is_in_range_and_in_the_model_card(engine):
    report = json.loads((FOLDER / "results" / f"{engine}.json").read_text())["accuracy"]
    check_accuracy(report)
    card = (FOLDER / "README.md").read_text()
    for task, row in report["tasks"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| `{task}` |") and "%" in line)
        cell = f"{100 * row['exact_match']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        assert cell in line
    assert f"{100 * report['mean']:.1f} %" in card


# Routing


def test_eam_distances_equal_the_definition():
    generator = np.random.default_rng(0)
    matrices = generator.integers(0, 9, (5, 3, 8))
    found = evaluate.eam_distances(torch.from_numpy(matrices)).numpy()
    for a in range(5):
        for b in range(5):
            cosines = [
                x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(matrices[a], matrices[b], strict=True)
            ]
            assert found[a, b] == pytest.approx(1 - np.mean(cosines), abs=1e-12)


def test_routing_report_separates_tasks_in_a_known_case():
    items = [tasks.TaskItem(f"{task}/{i}", "", "", "test") for task in ("rev", "add") for i in range(4)]
    matrices = torch.zeros(8, 2, 4, dtype=torch.int64)
    matrices[:4, :, 0] = 5
    matrices[4:, :, 1] = 5
    report = evaluate.routing_report(items, matrices)
    within, between = {"requests_within", "halves_within"}, {"requests_between", "halves_between"}
    assert all(report[name] == pytest.approx(0) for name in within)
    assert all(report[name] == pytest.approx(1) for name in between)
    assert report["tasks"] == pytest.approx({"rev-rev": 0, "rev-add": 1, "add-add": 0})


def test_mo18_every_token_chooses_four_experts_in_every_layer(forward_results):
    _, matrices = forward_results
    tokens = torch.tensor([1 + len(item.prompt) + len(item.target) for item in ITEMS])
    assert torch.equal(matrices.sum(-1), (4 * tokens).unsqueeze(1).expand(-1, 6))


def test_mo18_distance_between_tasks_is_twice_that_within(forward_results):
    report = evaluate.routing_report(ITEMS, forward_results[1])
    assert report["requests_between"] >= 2 * report["requests_within"]
    assert report["halves_between"] >= 2 * report["halves_within"]
    for pair, distance in report["tasks"].items():
        first, second = pair.split("-")
        if first != second:
            own = max(report["tasks"][f"{first}-{first}"], report["tasks"][f"{second}-{second}"])
            assert distance >= 2 * own, pair
    recorded = json.loads((FOLDER / "results" / "transformers.json").read_text())["routing"]
    for name in ("requests_within", "requests_between", "halves_within", "halves_between"):
        assert report[name] == pytest.approx(recorded[name], rel=0.05)


def test_load_is_balanced_over_all_tasks(forward_results):
    load = forward_results[1].sum(0).float()
    share = load / load.sum(-1, keepdim=True)
    assert share.max() < 4 / 32  # no expert takes four times its even share
    assert (share > 0.1 / 32).float().mean() > 0.95  # nearly every expert is in use


# vLLM


@pytest.mark.vllm
def test_cap02_accuracy_by_greedy_generation_in_vllm(llm, forward_results):
    answers = evaluate.generate_vllm(llm, ITEMS)
    correct = evaluate.score(ITEMS, answers)
    check_accuracy(evaluate.accuracy_report(ITEMS, correct))
    assert np.mean(np.array(correct) == np.array(forward_results[0])) >= 0.98
    assert all(re.fullmatch(rf"[{string.ascii_lowercase}{string.digits}]*", answer) for answer in answers)


@pytest.mark.vllm
def test_mo18_routing_recorded_in_vllm_depends_on_the_task(llm, forward_results):
    """Expert activation matrices of single requests, counted by the routers of the running engine."""
    positions = [i for task in TASK_NAMES for i in task_positions(task)[:8]]
    counts = torch.zeros(6, 32, dtype=torch.int64)

    def bind(network):
        routers = [m.router for m in network.modules() if type(m).__name__ == "MoERunner"]
        for layer, router in enumerate(routers):
            router.set_capture_fn(lambda ids, layer=layer: count(layer, ids))
        return len(routers)

    def count(layer, ids):
        counts[layer] += torch.bincount(ids.flatten().long(), minlength=32)

    def unbind(network):
        for module in network.modules():
            if type(module).__name__ == "MoERunner":
                module.router.set_capture_fn(None)

    llm.reset_prefix_cache()
    assert llm.apply_model(bind) == [6]
    recorded = []
    try:
        for i in positions:
            counts.zero_()
            answer = evaluate.generate_vllm(llm, [ITEMS[i]])[0]
            # The pass that yields <eos> computes the answer's last token, so all of them are counted.
            tokens = 1 + len(ITEMS[i].prompt) + len(answer)
            assert torch.equal(counts.sum(-1), torch.full((6,), 4 * tokens))
            recorded.append(counts.clone())
    finally:
        llm.apply_model(unbind)
    matrices = torch.stack(recorded)
    report = evaluate.routing_report([ITEMS[i] for i in positions], matrices)
    assert report["requests_between"] >= 2 * report["requests_within"]
    assert report["halves_between"] >= 2 * report["halves_within"]
    same_request = evaluate.eam_distances(torch.cat([matrices, forward_results[1][positions]]))
    assert same_request[: len(positions), len(positions) :].diagonal().mean() < 0.02


def task_positions(task: str) -> list[int]:
    return [i for i, item in enumerate(ITEMS) if item.id.startswith(task + "/")]

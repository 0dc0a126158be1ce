"""JSONL tasks, scoring, and lm_eval tasks without an engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from moecap_eval.tasks import exact_match, load_items, until_stop
from moecap_eval.tasks.lm_eval_bridge import export_jsonl


def write_task(folder: Path, name: str, count: int, **extra: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [
        {
            "id": f"{name}/{index}",
            "prompt": f"{name} {index}=",
            "target": str(index),
            "split": "test",
            **extra,
        }
        for index in range(count)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_cap14_exact_match_up_to_the_first_stop_string() -> None:
    assert until_stop("  42 \nand more", ["\n"]) == "42"
    assert until_stop("a;b\nc", ["\n", ";"]) == "a"
    assert until_stop("abc") == "abc"
    assert exact_match(" 42\nthe rest", "42", ["\n"]) == 1.0
    assert exact_match("42 the rest", "42") == 0.0
    assert exact_match("", "") == 1.0


def test_cap14_every_stretch_holds_all_tasks(tmp_path: Path) -> None:
    for name, count in (("add", 30), ("rev", 20), ("max", 25)):
        write_task(tmp_path, name, count)
    items = load_items(tmp_path, limit=50, seed=3)
    tasks = [item.payload.task for item in items]
    assert len(items) == 48  # equally many of each
    assert all(set(tasks[index : index + 3]) == {"add", "rev", "max"} for index in range(0, 48, 3))
    assert len({item.id for item in items}) == 48
    assert [item.id for item in load_items(tmp_path, limit=50, seed=3)] == [item.id for item in items]
    assert [item.id for item in load_items(tmp_path, limit=50, seed=4)] != [item.id for item in items]
    assert Counter(item.payload.task for item in load_items(tmp_path)) == {"add": 20, "rev": 20, "max": 20}


def test_cap14_one_file_is_one_task(tmp_path: Path) -> None:
    path = write_task(tmp_path, "add", 4, stop=["\n"])
    items = load_items(path)
    assert {item.payload.task for item in items} == {"add"}
    question = items[0].payload
    assert question.score(f"{question.target}\njunk") == {"exact_match": 1.0}
    assert question.score("junk") == {"exact_match": 0.0}


def test_cap14_other_splits_are_left_out(tmp_path: Path) -> None:
    path = write_task(tmp_path, "add", 3)
    extra = {"id": "add/x", "prompt": "p", "target": "t", "split": "train"}
    path.write_text(path.read_text() + json.dumps(extra) + "\n")
    assert "add/x" not in {item.id for item in load_items(path)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"add\.jsonl:2: not valid JSON"),
        ("[1]", r"add\.jsonl:2: expected an object"),
        ('{"id": "a", "prompt": "p"}', r"add\.jsonl:2: 'target' must be a string, got None"),
        ('{"id": "a", "prompt": "p", "target": 3}', r"'target' must be a string, got 3"),
        ('{"id": "a", "prompt": "p", "target": "t", "stop": "x"}', "'stop' must be a list"),
        ('{"id": "add/0", "prompt": "p", "target": "t"}', "item id 'add/0' occurs twice"),
    ],
)
def test_cap14_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_task(tmp_path, "add", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_items(path)


def test_cap14_missing_tasks_and_small_limits(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a JSONL file, a folder of them, or lm_eval:<task>"):
        load_items(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.jsonl file"):
        load_items(tmp_path)
    write_task(tmp_path, "add", 5)
    write_task(tmp_path, "rev", 5)
    with pytest.raises(ValueError, match=r"limit 1 is below the number of tasks \(2\)"):
        load_items(tmp_path, limit=1)
    write_task(tmp_path, "none", 0)
    with pytest.raises(ValueError, match="task 'none' has no item"):
        load_items(tmp_path)


def write_lm_eval_task(folder: Path, output_type: str = "generate_until") -> str:
    """A local lm_eval task with two filters; returns its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.json"
    rows = [
        {"q": f"{a}+{b}", "answer": str(a + b), "choices": ["1", "2"]} for a in range(3) for b in range(3)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    if output_type == "generate_until":
        specific = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 6}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: digit, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    else:
        specific = """
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    name = f"moecap_{output_type}"
    (folder / f"{name}.yaml").write_text(
        f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{q}}}}="
{specific}"""
    )
    return f"{folder}/{name}"


def test_cap14_lm_eval_items_carry_lm_evals_prompt_and_score(tmp_path: Path) -> None:
    spec = write_lm_eval_task(tmp_path / "task")
    items = load_items(f"lm_eval:{spec}")
    assert len(items) == 9
    by_prompt = {item.payload.prompt: item for item in items}
    item = by_prompt["2+1="]
    task, doc_id, doc_hash = item.id.split("/")
    assert (task, doc_id, len(doc_hash)) == ("moecap_generate_until", "7", 64)
    assert (item.payload.stop, item.payload.max_new_tokens) == (("\n",), 6)
    assert item.payload.score("3") == {"exact_match,whole": 1.0, "exact_match,digit": 1.0}
    assert item.payload.score("it is 3") == {"exact_match,whole": 0.0, "exact_match,digit": 1.0}
    assert item.payload.score("4") == {"exact_match,whole": 0.0, "exact_match,digit": 0.0}


def test_cap14_lm_eval_tasks_are_exported_as_jsonl(tmp_path: Path) -> None:
    spec = write_lm_eval_task(tmp_path / "task")
    (path,) = export_jsonl(spec, tmp_path / "out")
    exported = load_items(path)
    original = {item.id: item.payload for item in load_items(f"lm_eval:{spec}")}
    assert {item.id for item in exported} == set(original)
    for item in exported:
        assert item.payload.prompt == original[item.id].prompt
        assert item.payload.target == original[item.id].target
        assert item.payload.stop == ("\n",)


def test_cap14_lm_eval_faults_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'gsm9k'; did you mean 'gsm8k'\?"):
        load_items("lm_eval:gsm9k")
    likelihoods = write_lm_eval_task(tmp_path / "likelihoods", "multiple_choice")
    with pytest.raises(ValueError, match=r"scores likelihoods .*evaluate\(llm"):
        load_items(f"lm_eval:{likelihoods}")
    spec = write_lm_eval_task(tmp_path / "gone")
    (tmp_path / "gone" / "data.json").unlink()
    with pytest.raises(ValueError, match=r"_generate_until' cannot be loaded here .*caches it, or export"):
        load_items(f"lm_eval:{spec}")

"""JSONL tasks, scoring, and lm_eval tasks without an engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from moecap_eval.tasks import Choice, exact_match, load_items, until_stop
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
    documents = write_lm_eval_task(tmp_path / "documents", "loglikelihood_rolling")
    with pytest.raises(ValueError, match=r"scores whole documents .*evaluate\(llm"):
        load_items(f"lm_eval:{documents}")
    likelihoods = write_lm_eval_task(tmp_path / "likelihoods", "multiple_choice")
    with pytest.raises(ValueError, match="which a JSONL file cannot hold"):
        export_jsonl(likelihoods, tmp_path / "exported")
    spec = write_lm_eval_task(tmp_path / "gone")
    (tmp_path / "gone" / "data.json").unlink()
    with pytest.raises(ValueError, match=r"_generate_until' cannot be loaded here .*caches it, or export"):
        load_items(f"lm_eval:{spec}")


def write_local_gsm8k(folder: Path) -> str:
    """lm_eval's own gsm8k, its data replaced by a local file."""
    import lm_eval

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question": f"What is {n} and 1,000?", "answer": f"One adds. #### {n + 1000:,}"} for n in range(8)
    ]
    (folder / "data.json").write_text("\n".join(map(json.dumps, rows)))
    own = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    files = f"{{train: {folder}/data.json, test: {folder}/data.json}}"
    (folder / "local_gsm8k.yaml").write_text(
        f"include: {own}\ntask: local_gsm8k\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {files}}}\nnum_fewshot: 2\n"
    )
    return f"lm_eval:{folder}/local_gsm8k"


def write_local_mmlu(folder: Path) -> str:
    """lm_eval's own template of mmlu, two subjects with local data."""
    import lm_eval

    folder.mkdir(parents=True, exist_ok=True)
    own = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    for subject in ("rivers", "hills"):
        rows = [
            {"question": f"{subject} {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4}
            for n in range(6)
        ]
        (folder / f"{subject}.json").write_text("\n".join(map(json.dumps, rows)))
        files = f"{{dev: {folder}/{subject}.json, test: {folder}/{subject}.json}}"
        (folder / f"{subject}.yaml").write_text(
            f"include: {own}\ntask: local_{subject}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {files}}}\n"
        )
    (folder / "local_mmlu.yaml").write_text("group: local_mmlu\ntask: [local_rivers, local_hills]\n")
    return f"lm_eval:{folder}/local_mmlu"


def test_cap14_gsm8k_extracts_answers_as_lm_eval_defines(tmp_path: Path) -> None:
    items = load_items(write_local_gsm8k(tmp_path))
    item = next(item for item in items if "What is 5 and" in item.payload.prompt.rsplit("Question:", 1)[1])
    assert item.payload.prompt.count("Question:") == 3  # two examples before it
    assert item.payload.stop == ("Question:", "</s>", "<|im_end|>")
    strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
    assert item.payload.score("so #### 1005") == {strict: 1.0, flexible: 1.0}
    assert item.payload.score("it is 1,005") == {strict: 0.0, flexible: 1.0}
    assert item.payload.score("it is 1006") == {strict: 0.0, flexible: 0.0}


def test_cap14_mmlu_is_one_choice_a_document(tmp_path: Path) -> None:
    items = load_items(write_local_mmlu(tmp_path))
    assert Counter(item.id.split("/")[0] for item in items) == {"local_rivers": 6, "local_hills": 6}
    choice = next(item.payload for item in items if "rivers 2?" in item.payload.prompt)
    assert isinstance(choice, Choice)
    assert choice.pairs == tuple((choice.prompt, f" {letter}") for letter in "ABCD")
    assert choice.prompt.endswith("rivers 2?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    for best in range(4):
        likelihoods = [(0.0 if letter == best else -1.0, False) for letter in range(4)]
        assert choice.score(likelihoods)["acc"] == float(best == 2)


def test_cap14_a_list_of_sources_shares_the_limit_and_mixes(tmp_path: Path) -> None:
    """Half of the items come from a folder of three tasks, half from one file; any stretch has both."""
    for name in ("one", "two", "three"):
        write_task(tmp_path / "folder", name, 20)
    single = write_task(tmp_path, "single", 50)
    items = load_items([tmp_path / "folder", single], limit=48)
    counts = Counter(item.payload.task for item in items)
    assert counts == {"one": 8, "two": 8, "three": 8, "single": 24}
    for start in range(0, 48, 6):
        assert Counter(item.payload.task for item in items[start : start + 6])["single"] == 3
    with pytest.raises(ValueError, match=r"limit 1 is below the number of task sources \(2\)"):
        load_items([tmp_path / "folder", single], limit=1)
    with pytest.raises(ValueError, match="occurs twice"):
        load_items([single, single])

"""Records survive what happens to files: torn ends, half blocks, damage, another schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moecap_eval import StepRecord, parse_config, read_records, run
from moecap_eval.records import RecordLog, digest_of, step_from_json

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data

CONFIG = config_data({"plain": {}, "fast": {"slowdown": 0.5}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(parse_config(CONFIG), folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    for path in finished.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_cap15_schema(finished):
    lines = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    assert {line["v"] for line in lines} == {1}
    assert [line["kind"] for line in lines[:3]] == ["run", "arm", "arm"]
    assert lines[-1]["kind"] == "end"
    assert {line["kind"] for line in lines} == {"run", "arm", "block", "sample", "end"}
    block = next(line for line in lines if line["kind"] == "block")
    assert block.keys() >= {
        "arm", "block", "slot", "wall_s", "work", "values", "energy_j", "energy_source", "usd"
    }  # fmt: skip
    sample = next(line for line in lines if line["kind"] == "sample")
    assert sample.keys() >= {"arm", "block", "item", "values", "digest", "detail"}
    assert sample["detail"].keys() == {"prompt", "target", "output"}
    for position, line in enumerate(lines):
        if line["kind"] == "block":
            own = lines[position - 8 : position]
            assert all(
                (s["kind"], s["arm"], s["block"]) == ("sample", line["arm"], line["block"]) for s in own
            )


def test_cap15_files_of_a_run(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "records.jsonl",
        "logs",
    }
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["hardware"]["name"] == "cpu-reference"


@pytest.mark.parametrize("kept", [0.1, 0.35, 0.5, 0.77, 0.99])
def test_cap15_cut_anywhere_reads_as_one_line_and_resumes(copy, kept):
    """A truncated file is refused by a reader, and a run goes on from its last whole block."""
    path = copy / "records.jsonl"
    content = path.read_bytes()
    cut = int(len(content) * kept)
    if content[cut - 1 : cut] == b"\n":
        cut -= 1
    path.write_bytes(content[:cut])
    with pytest.raises(
        ValueError, match=rf"{path}: line \d+ is cut off.*resumes it|first line is not a run header"
    ) as error:
        read_records(copy)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content[:cut]

    whole = content[: content[:cut].rfind(b"\n") + 1].count(b'"kind":"block"')
    summary = run(parse_config(CONFIG), copy)
    assert summary.completed == {"plain": 4, "fast": 4, "plain#aa": 4}
    assert path.read_bytes().startswith(content[: content[:cut].rfind(b"\n") + 1])
    assert whole < 12
    records = read_records(copy)
    assert all(len(samples) == 32 for samples in records.samples.values())
    assert all(len({s.item for s in samples}) == 32 for samples in records.samples.values())


def test_cap15_samples_without_their_block_line_never_happened(copy):
    path = copy / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"kind":"block"' in line)
    path.write_text("".join(lines[:last]))
    records = read_records(copy)
    assert sum(len(blocks) for blocks in records.blocks.values()) == 11
    assert sum(len(samples) for samples in records.samples.values()) == 11 * 8


@pytest.mark.parametrize("damage", [b'{"v":1,"kind":', b"\x00\xff", b"[1, 2]", b'{"v":2,"kind":"end"}'])
def test_cap15_damage_in_the_middle_is_named_and_left_alone(copy, damage):
    path = copy / "records.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[4] = damage
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    for action in (lambda: read_records(copy), lambda: run(parse_config(CONFIG), copy)):
        with pytest.raises(ValueError, match="line 5"):
            action()
    assert path.read_bytes() == before


def test_a_block_twice_is_refused(copy):
    path = copy / "records.jsonl"
    line = next(line for line in path.read_text().splitlines() if '"kind":"block"' in line)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"block \d of arm '.*' is recorded twice"):
        read_records(copy)


def test_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no records.jsonl: not the folder of a run"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(ValueError, match="the first line is not a run header"):
        read_records(tmp_path)


def test_reading_by_file_or_folder(finished):
    assert read_records(finished / "records.jsonl").done() == read_records(finished).done()


def test_steps_round_trip_and_only_the_last_attempt_counts(tmp_path):
    step = {
        "duration_s": 0.5,
        "tokens": 3,
        "requests": 1,
        "sampled_tokens": 1,
        "distinct_tokens": 3,
        "kv_tokens_read": 3,
        "attended_positions": 6,
        "experts_touched": {"0": 4, "2": 5},
        "experts_loaded": None,
        "moved_bytes": {"dram->hbm": 10},
        "invalid": None,
    }
    expected = StepRecord(0.5, 3, 1, 1, 3, 3, 6, {0: 4, 2: 5}, None, {"dram->hbm": 10}, None)
    assert step_from_json(step) == expected
    run(parse_config(CONFIG), tmp_path)
    lines = [
        {**step, "v": 1, "arm": "plain", "block": 0, "attempt": "killed"},
        {**step, "v": 1, "arm": "plain", "block": 0, "attempt": "later"},
        {**step, "v": 1, "arm": "plain", "block": 0, "attempt": "later"},
        {**step, "v": 1, "arm": "plain", "block": 99, "attempt": "later"},
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_records(tmp_path).steps == {("plain", 0): [expected, expected]}


def test_append_is_all_or_nothing_on_values_json_cannot_hold(tmp_path):
    header = {"config_digest": "x"}
    with RecordLog(tmp_path, header) as log:
        before = (tmp_path / "records.jsonl").read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            log.append([{"kind": "sample"}, {"kind": "block", "wall_s": float("nan")}])
        assert (tmp_path / "records.jsonl").read_bytes() == before


def test_digest_of_does_not_depend_on_order():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])

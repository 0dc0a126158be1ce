"""Strict configs: what is accepted, and the exact words for what is not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moecap_eval import load_config, parse_config

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data, write_config


def changed(path: str, value: object) -> dict:
    data = config_data({"plain": {}, "fast": {"slowdown": 0.5}})
    node = data
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("compare.blokcs", 8, "compare.blokcs: unknown key; did you mean 'blocks'?"),
        ("compare.baseline", "x", "compare.baseline 'x' is not an arm (arms: plain, fast)"),
        ("compare.blocks", 7, "compare.blocks must be even, got 7"),
        ("workloda", "x", "workloda: unknown key; did you mean 'workload'?"),
        ("hardware.peak", "spec", "hardware.peak: unknown key; did you mean 'peaks'?"),
        ("cost.device_us", 5, "cost.device_us: unknown key; did you mean 'device_usd'?"),
    ],
)
def test_cap01_mistakes_have_exact_messages(path, value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_config(changed(path, value))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("compare.blocks", "8", "compare.blocks: "),
        ("compare.confidence", 1.0, "compare.confidence: "),
        ("hardware.peaks", "guessed", "hardware.peaks: "),
        ("compare.margins", {"throughput": -1.0}, "compare.margins.throughput "),
        ("arms", {}, "arms: "),
        ("arms", {"a#aa": {}}, "arms: 'a#aa' must consist of"),
        ("params.seed", "seven", "params.seed must be an integer"),
        ("cost.pue", 0.5, "cost.pue must be at least 1"),
    ],
)
def test_values_out_of_range_name_their_key(path, value, where):
    with pytest.raises(ValueError, match="^" + where.replace("#", r"\#").replace(".", r"\.")):
        parse_config(changed(path, value))


def test_missing_key_is_named():
    data = config_data({"plain": {}})
    del data["workload"]
    with pytest.raises(ValueError, match=r"^workload: this key is required$"):
        parse_config(data)


def test_defaults_and_options(tmp_path):
    config = load_config(write_config(tmp_path / "c.yaml", {"plain": {}, "fast": {"slowdown": 0.5}}))
    assert [arm.name for arm in config.arms] == ["plain", "fast"]
    assert config.arms[1].options == {"slowdown": 0.5}
    assert config.slots == ("plain", "fast", "plain#aa")
    assert (config.seed, dict(config.workload_params)) == (3, {"items": 32})
    assert config.compare.confidence == 0.95
    assert config.cost.device_usd == 1000


def test_digest_ignores_spelling_and_place_but_not_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = load_config(write_config(tmp_path / "a" / "c.yaml", {"plain": {}, "fast": {}}))
    data = config_data({"plain": {}, "fast": {}})
    reordered = tmp_path / "b" / "c.yaml"
    reordered.write_text(yaml.safe_dump(dict(reversed(list(data.items()))), default_flow_style=True))
    assert load_config(reordered).digest == first.digest
    assert load_config(reordered, overrides={"compare.blocks": 6}).digest != first.digest


def test_relative_paths_follow_the_config_file(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "plain").mkdir()
    data = changed("params", {"model": "tiny", "hub": "owner/model", "mode": "plain"})
    config = parse_config(data, tmp_path)
    assert config.params["model"] == str(tmp_path / "tiny")
    assert config.params["hub"] == "owner/model"  # no such path: left for the workload to judge
    assert config.params["mode"] == "plain"  # a word that happens to be a folder's name
    assert config.digest == parse_config(data, os.curdir).digest


def test_restricting_arms_and_items():
    config = parse_config(config_data({"plain": {}, "fast": {}, "slow": {}}, blocks=8))
    fewer = config.restricted(["plain", "slow"], 5)
    assert [arm.name for arm in fewer.arms] == ["plain", "slow"]
    assert (fewer.compare.blocks, fewer.limit) == (4, 5)
    assert fewer.digest != config.digest
    again = parse_config(fewer.content)
    assert again.digest == fewer.digest, "the stored config of a restricted run must give the same run"
    with pytest.raises(ValueError, match="arm 'sow' is not in the config"):
        config.restricted(["plain", "sow"])
    with pytest.raises(ValueError, match=r"compare.baseline 'plain' is not an arm \(arms: slow\)"):
        config.restricted(["slow"])


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "3"])
def test_not_a_mapping(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"c.yaml: "):
        load_config(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_document_is_understood_or_refused_in_one_line(document):
    data = document if isinstance(document, dict) else {"name": document}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_config(data)
    assert "\n" not in str(error.value) or any("\n" in str(key) for key in data)


def test_lists_of_tasks_and_lm_eval_folders_are_resolved(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "some.jsonl").touch()
    data = {
        "name": "x",
        "workload": "w",
        "arms": {"a": {}},
        "params": {"tasks": ["some.jsonl", "lm_eval:own/my_task", "lm_eval:gsm8k", "lm_eval:none/task"]},
    }
    assert parse_config(data, tmp_path).params["tasks"] == [
        str(tmp_path / "some.jsonl"),
        f"lm_eval:{tmp_path}/own/my_task",
        "lm_eval:gsm8k",
        "lm_eval:none/task",
    ]

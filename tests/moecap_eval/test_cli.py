"""The command line as a user meets it: exit codes, one-line errors, formats."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from moecap_eval.cli import build_parser, main

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data, moecap, write_config

ARMS = {"plain": {"noise": 0.01}, "slow": {"noise": 0.01, "slowdown": 1.4}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "c.yaml", ARMS, items=64, blocks=8)
    done = moecap("run", config, "-o", folder / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'out' / 'report.html'}"
    assert "[39/" not in done.stderr
    assert "slow: block 1 of 8" in done.stderr
    return folder


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("moecap: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def test_cap01_every_example_of_the_help_is_a_command() -> None:
    parser = build_parser()
    examples = [line for line in parser.format_help().splitlines() if line.startswith("  moecap ")]
    names = [parser.parse_args(line.split("   ")[0].split()[1:]).command.__name__ for line in examples]
    assert names == ["_run", "_run", "_doctor", "_report", "_plan", "_gate"]


def bad(folder: Path, path: str, value: object) -> Path:
    data = config_data(ARMS)
    node = data
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    config = folder / "bad.yaml"
    config.write_text(yaml.safe_dump(data))
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("compare.blokcs", 8, "compare.blokcs: unknown key; did you mean 'blocks'?"),
        ("compare.baseline", "x", "compare.baseline 'x' is not an arm (arms: plain, slow)"),
        ("workload", "moe_offload.generat", "no workload 'moe_offload.generat' is registered"),
        ("arms.slow.slowdwn", 2, "arms.slow: arms.slow.slowdwn: unknown key; did you mean 'slowdown'?"),
    ],
)
def test_cap01_mistakes_are_one_line_and_exit_2(tmp_path, path, value, message):
    done = moecap("run", bad(tmp_path, path, value), "-o", tmp_path / "out")
    assert done.returncode == 2
    assert message in one_line(done.stderr)


def test_cap01_unreadable_model_folder(tmp_path):
    data = config_data({"plain": {}})
    data["workload"] = "moecap_eval.workloads.text_generation:TextGeneration"
    (tmp_path / "tasks.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "prompt": "a", "target": "b", "split": "test"}) + "\n" for i in range(8)
        )
    )
    data["params"] = {"model": str(tmp_path / "no" / "model"), "tasks": "tasks.jsonl"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    done = moecap("run", tmp_path / "c.yaml", "-o", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "no" / "model") in one_line(done.stderr)


def test_cap01_unwritable_output(tmp_path):
    config = write_config(tmp_path / "c.yaml", ARMS)
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    done = moecap("run", config, "-o", blocker / "out")
    assert done.returncode == 2
    assert "Not a directory" in one_line(done.stderr)
    done = moecap("run", config, "-o", blocker)
    assert done.returncode == 2
    one_line(done.stderr)
    assert blocker.read_text() == "mine"
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "Permission denied" in one_line(moecap("run", config, "-o", locked / "out").stderr)


@pytest.mark.parametrize("command", [("compare",), ("report",), ("gate", "--against", "x")])
def test_cap01_truncated_records(tmp_path, finished, command):
    folder = tmp_path / "out"
    folder.mkdir()
    content = (finished / "out" / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(content[: len(content) // 2])
    (folder / "report.html").write_text("an older report")
    done = moecap(command[0], folder, *command[1:])
    assert done.returncode == 2
    assert "is cut off" in one_line(done.stderr)
    assert (folder / "report.html").read_text() == "an older report"
    assert (folder / "records.jsonl").read_bytes() == content[: len(content) // 2]


def test_missing_config_and_bad_set(tmp_path):
    done = moecap("run", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert one_line(done.stderr) == f"moecap: {tmp_path / 'none.yaml'}: No such file or directory"
    config = write_config(tmp_path / "c.yaml", ARMS)
    done = moecap("run", config, "-o", tmp_path / "out", "--set", "compare.blocks")
    assert done.returncode == 2
    assert "expected dotted.key=value" in one_line(done.stderr)


def test_debug_shows_the_traceback(tmp_path):
    done = moecap("--debug", "run", tmp_path / "none.yaml")
    assert "Traceback" in done.stderr


def test_usage_is_exit_2():
    assert moecap("fly").returncode == 2
    assert moecap().returncode == 2


def test_set_arms_and_limit(tmp_path):
    config = write_config(tmp_path / "c.yaml", {**ARMS, "third": {}})
    done = moecap(
        "run",
        config,
        "-o",
        tmp_path / "out",
        "--set",
        "compare.aa_control=false",
        "--arms",
        "plain,third",
        "--limit",
        4,
    )
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert stored["compare"]["aa_control"] is False
    assert list(stored["arms"]) == ["plain", "third"]
    assert stored["limit"] == 4
    again = moecap("run", tmp_path / "out" / "config.yaml", "-o", tmp_path / "out")
    assert again.returncode == 0, again.stderr


def test_an_arm_that_fails_is_exit_1_and_still_reported(tmp_path):
    config = write_config(tmp_path / "c.yaml", {"plain": {}, "bad": {"fail_in_block": 0}})
    done = moecap("run", config, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "arm bad failed: RuntimeError: told to fail in block 0" in done.stderr
    assert "told to fail" in (tmp_path / "out" / "report.html").read_text()


def test_a_baseline_that_fails_is_exit_1_without_a_traceback(tmp_path):
    config = write_config(tmp_path / "c.yaml", {"plain": {"fail_in_block": 0}, "other": {}})
    done = moecap("run", config, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "arm plain failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_formats(finished):
    out = finished / "out"
    as_json = json.loads(moecap("compare", out, "--format", "json").stdout)
    assert as_json["baseline"] == "plain"
    row = next(r for r in as_json["rows"] if (r["axis"], r["arm"]) == ("throughput", "slow"))
    assert row.keys() >= {"axis", "arm", "baseline_value", "value", "estimate", "effect", "verdict", "reason"}
    assert row["estimate"].keys() == {"value", "low", "high", "p_value", "n", "confidence"}
    assert row["verdict"] == "worse"
    assert as_json["identical_outputs"] == {"slow": [64, 64]}
    markdown = moecap("compare", out, "--format", "markdown").stdout.splitlines()
    assert markdown[0].startswith("| axis | arm |")
    assert moecap("compare", out, "--baseline", "slow").returncode == 0
    assert moecap("compare", out, "--baseline", "x").returncode == 2


def test_cap25_gate(tmp_path, finished):
    same = moecap("gate", finished / "out", "--against", finished / "out")
    assert same.returncode == 0
    assert "0 worse" in same.stdout
    slower = {
        name: {**options, "slowdown": 1.1 * options.get("slowdown", 1.0)} for name, options in ARMS.items()
    }
    config = write_config(tmp_path / "c.yaml", slower, items=64, blocks=8)
    assert moecap("run", config, "-o", tmp_path / "out").returncode == 0
    tripped = moecap("gate", tmp_path / "out", "--against", finished / "out")
    assert tripped.returncode == 1
    assert "worse: slow on throughput" in tripped.stdout
    back = moecap("gate", finished / "out", "--against", tmp_path / "out")
    assert back.returncode == 0


def test_lists(tmp_path, capsys):
    assert main(["list", "hardware"]) == 0
    assert "cpu-reference" in capsys.readouterr().out
    assert main(["list", "arms", str(write_config(tmp_path / "c.yaml", ARMS))]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("plain (baseline)")
    assert main(["list", "arms"]) == 2
    assert main(["list", "workloads"]) == 0

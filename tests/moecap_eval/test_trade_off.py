"""CAP-22: fewer experts per token read fewer bytes and answer worse, and the report says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moecap_eval import compare, read_records
from moecap_eval.utilisation import utilisation

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import moecap

EXAMPLE = Path(__file__).parents[2] / "examples" / "fewer_experts.yaml"


@pytest.mark.vllm
@pytest.mark.slow
def test_cap22_half_of_the_experts_is_cheaper_and_worse(tmp_path: Path) -> None:
    done = moecap("run", EXAMPLE, "-o", tmp_path / "out", "--set", "compare.aa_control=false", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "out")
    rows = {(row.arm, row.axis): row for row in compare(records).rows}
    accuracy = rows["top-2", "exact_match"]
    assert accuracy.verdict == "worse"
    assert accuracy.estimate.high < -0.02
    per_token = {}
    for arm in ("top-4", "top-2"):
        used = utilisation(records, arm)
        per_token[arm] = used.bytes_by_component["routed_experts"] / used.tokens
    assert per_token["top-2"] < 0.8 * per_token["top-4"]
    assert "worse" in done.stdout

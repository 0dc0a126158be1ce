"""Does a Decision Transformer trained through the replay beat its data, with a naive loader's curve?

    python benchmarks/rl_replay_gear_decision_transformer.py [--run FILE]

Runs examples/rl_replay_gear_decision_transformer.py on CartPole, or reads the JSON that it wrote with --out,
and writes rl_replay_gear_decision_transformer.json. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from benchmarks.common import RESULTS, Headline, write_result

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "rl_replay_gear_decision_transformer.py"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=None, help="decision_transformer.json of an earlier run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.run is None:
        run = runpy.run_path(str(EXAMPLE))["main"]([])
    else:
        run = json.loads(options.run.read_text())
    rounds = [entry["return"] for entry in run["online"]]
    behaviour = f"> {run['behaviour_return']:.0f}, the behaviour policy"
    offline = run["offline_returns"]
    compared = len(run["oracle_losses"])
    headline = [
        Headline("mean return of the behaviour policy", run["behaviour_return"], "", target=""),
        Headline("mean return after offline training", run["offline_return"], "", min(offline), max(offline),
                 behaviour, f"{len(offline)} episodes"),
        Headline("mean return after online training", run["online_return"], "", min(rounds), max(rounds),
                 behaviour, "low and high: of the rounds before"),
        Headline("largest difference of the losses from a naive loop", run["largest_loss_difference"], "",
                 target="0", note=f"{compared} steps"),
        Headline("share of training time waiting for data", run["waiting_share"], "", target="",
                 note=f"{run['oracle_waiting_share']:.2f} with the naive loop"),
    ]  # fmt: skip
    sys.argv = sys.argv[:1]
    write_result(
        "rl_replay_gear_decision_transformer",
        question="Does a Decision Transformer trained through the replay beat its data, online too?",
        headline=headline,
        samples={},
        folder=options.out,
        run=run,
    )
    for row in headline:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

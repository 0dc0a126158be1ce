"""The command line: ``moecap`` and ``python -m moecap_eval``.

Exit codes: 0 done; 1 an arm failed, a gate tripped or the doctor found something missing; 2 wrong usage,
config or records; 130 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

Command = Callable[[argparse.Namespace], int]

_EXAMPLES = """examples:
  moecap run examples/synthetic.yaml              a first run, in seconds and without any framework
  moecap run CONFIG --set compare.blocks=12       the same config with more blocks
  moecap doctor CONFIG                            can this machine run it, and what is missing
  moecap report moecap_out/NAME                   the HTML report again, from the records
  moecap plan MODEL --tpot 0.02 --batch 8         machines that give a token every 20 ms
  moecap gate moecap_out/NAME --against EARLIER   exit code 1 if an arm got worse
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2, without a traceback."""
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print(
            "moecap: interrupted; what is recorded stays, the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"moecap: {_one_line(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="moecap",
        description="Cost, accuracy and performance, compared fairly.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _command(commands, "run", _run, "run a config, or what is missing of it; then compare and report")
    run.add_argument("config", metavar="CONFIG", type=Path)
    run.add_argument("-o", "--out", metavar="DIR", type=Path, help="default: moecap_out/<name>")
    run.add_argument("--arms", metavar="A,B", help="only these arms, the baseline among them")
    run.add_argument("--limit", metavar="N", type=int, help="at most N items")
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="replace a dotted key")

    compare = _command(commands, "compare", _compare, "compare the arms of a run")
    compare.add_argument("records", metavar="DIR", type=Path)
    compare.add_argument("--baseline", metavar="ARM")
    compare.add_argument("--format", choices=("text", "json", "markdown"), default="text")

    report = _command(commands, "report", _report, "write the HTML report of a run")
    report.add_argument("records", metavar="DIR", type=Path)
    report.add_argument("-o", "--out", metavar="FILE", type=Path, help="default: DIR/report.html")

    listing = _command(commands, "list", _list, "list workloads, tasks, hardware profiles or a config's arms")
    listing.add_argument("what", choices=("workloads", "tasks", "hardware", "arms"))
    listing.add_argument("config", metavar="CONFIG", nargs="?", type=Path)
    listing.add_argument("--export", metavar=("TASK", "DIR"), nargs=2, help="write an lm_eval task as JSONL")

    doctor = _command(
        commands, "doctor", _doctor, "say what this machine can do and whether a config can run"
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", type=Path)

    plan = _command(commands, "plan", _plan, "say which machines serve a model at a time per output token")
    plan.add_argument("model", metavar="MODEL", type=Path, help="a config.json or the folder that holds it")
    plan.add_argument("--tpot", metavar="SECONDS", type=float, required=True, help="time per output token")
    plan.add_argument("--batch", metavar="N", type=int, default=1, help="requests decoded together (1)")
    plan.add_argument("--context", metavar="N", type=int, default=1024, help="cached tokens of each (1024)")
    plan.add_argument(
        "--s-mbu", metavar="SHARE", type=float, default=1.0, help="bandwidth the engine reaches (1)"
    )
    plan.add_argument(
        "--s-mfu", metavar="SHARE", type=float, default=1.0, help="compute the engine reaches (1)"
    )
    plan.add_argument(
        "--hardware", metavar="NAME", action="append", help="a profile or its file; default: all"
    )
    plan.add_argument("--costs", metavar="FILE", type=Path, help="YAML: profile name -> cost section")

    gate = _command(commands, "gate", _gate, "fail when a run is worse than an earlier one")
    gate.add_argument("records", metavar="DIR", type=Path)
    gate.add_argument("--against", metavar="DIR", type=Path, required=True)
    return parser


def _command(commands: Any, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from moecap_eval.config import load_config
    from moecap_eval.progress import RunDisplay
    from moecap_eval.runner import run

    overrides = dict(_key_value(text) for text in arguments.set)
    config = load_config(arguments.config, overrides=overrides)
    out_dir = arguments.out or Path("moecap_out") / config.name
    arms = arguments.arms.split(",") if arguments.arms else None
    with RunDisplay() as display:
        summary = run(config, out_dir, arms=arms, limit=arguments.limit, progress=display.show)
    return _finish(summary.out_dir, summary.failed, summary.left_out)


def _finish(out_dir: Path, failed: dict[str, str], left_out: int) -> int:
    """Comparison, report, failures and the place of the report."""
    from moecap_eval.comparison import compare
    from moecap_eval.records import read_records
    from moecap_eval.report.html import write_report

    if left_out:
        print(f"{left_out} items were left out, so that all blocks are equal")
    for arm, message in failed.items():
        print(f"moecap: arm {arm} failed: {message}", file=sys.stderr)
    records = read_records(out_dir)
    if not records.blocks[records.baseline]:
        return 1
    _print_comparison(compare(records))
    print(f"report: {write_report(out_dir)}")
    return 1 if failed else 0


def _compare(arguments: argparse.Namespace) -> int:
    from moecap_eval.comparison import compare
    from moecap_eval.report.table import comparison_markdown

    comparison = compare(arguments.records, arguments.baseline)
    if arguments.format == "json":
        print(json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False))
    elif arguments.format == "markdown":
        print(comparison_markdown(comparison), end="")
    else:
        _print_comparison(comparison)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from moecap_eval.report.html import write_report

    print(f"report: {write_report(arguments.records, arguments.out)}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from moecap_eval import listing

    if arguments.what == "tasks" and arguments.export:
        print(listing.export_task(*arguments.export))
        return 0
    for line in listing.LISTS[arguments.what](arguments.config):
        print(line)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from moecap_eval.doctor import diagnose, doctor_text

    checks = diagnose(arguments.config)
    print(doctor_text(checks), end="")
    return 0 if all(check.ok for check in checks if check.required) else 1


def _plan(arguments: argparse.Namespace) -> int:
    from moecap_eval.hardware import list_profiles, load_hardware
    from moecap_eval.model_spec import ModelSpec
    from moecap_eval.plan import plan, read_costs
    from moecap_eval.report.table import plan_text

    rows = plan(
        ModelSpec.from_config(arguments.model),
        [load_hardware(name) for name in arguments.hardware or list_profiles()],
        tpot_s=arguments.tpot,
        batch=arguments.batch,
        context=arguments.context,
        s_mbu=arguments.s_mbu,
        s_mfu=arguments.s_mfu,
        costs=read_costs(arguments.costs) if arguments.costs else None,
    )
    print(plan_text(rows, s_mbu=arguments.s_mbu, s_mfu=arguments.s_mfu), end="")
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    from moecap_eval.comparison import compare_runs
    from moecap_eval.records import read_records

    comparison = compare_runs(read_records(arguments.records), read_records(arguments.against))
    worse = [row for row in comparison.rows if row.verdict == "worse"]
    for row in worse:
        print(f"worse: {row.arm} on {row.axis}: {row.baseline_value} before, {row.value} now")
    noisy = sum(row.verdict == "noisy" for row in comparison.rows)
    print(f"gate: {len(comparison.rows)} comparisons, {len(worse)} worse, {noisy} too noisy to judge")
    return 1 if worse else 0


def _print_comparison(comparison: Any) -> None:
    from rich.console import Console

    from moecap_eval.report.table import comparison_table, comparison_text, summary_lines

    if not sys.stdout.isatty():
        print(comparison_text(comparison), end="")
        return
    console = Console()
    if comparison.rows:
        console.print(comparison_table(comparison))
    for line in summary_lines(comparison):
        console.print(line, markup=False, highlight=False)


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"--set {text}: expected dotted.key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {text}: the value is not valid YAML") from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""``megatron-tenplex``: what would a change of layout cost, before anyone commits to it?"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_tenplex.layout import PRESETS, GPTShape, ParallelConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="megatron-tenplex", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="plan one change of layout; needs neither GPUs nor Megatron")
    _add_model_arguments(plan)
    plan.add_argument("--from", dest="source", required=True, metavar="LAYOUT", help="e.g. tp=2,pp=2,dp=2")
    plan.add_argument("--to", dest="target", required=True, metavar="LAYOUT", help="e.g. tp=4,pp=1,dp=2")
    plan.add_argument("--lost", type=int, nargs="*", default=[], metavar="RANK", help="ranks that are gone")
    plan.add_argument(
        "--placement",
        choices=["optimal", "identity"],
        default="optimal",
        help="optimal: workers change ranks so that less moves (default); identity: they keep them",
    )
    plan.add_argument("--relay", action="store_true", help="bytes that a host needs often cross once")
    plan.add_argument("--fan-out", action="store_true", help="receivers pass parts on where holders are few")
    plan.add_argument(
        "--source-policy",
        choices=["balanced", "first"],
        default="balanced",
        help="balanced: replica holders share the load (default); first: the lowest rank sends, as in the "
        "paper's code",
    )
    plan.add_argument("--picture", metavar="FILE", help="who sends what to whom, as .png, .svg or .pdf")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    simulate = commands.add_parser("simulate", help="bytes and planning time for 8 to 1024 ranks")
    _add_model_arguments(simulate)
    simulate.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 128, 256, 512, 1024],
        help="rank counts (default 8 to 1024, which takes minutes)",
    )
    simulate.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args(arguments)
    try:
        return {"plan": _plan, "simulate": _simulate}[options.command](options)
    except (OSError, ValueError, LookupError) as error:
        print(f"megatron-tenplex: {error}", file=sys.stderr)
        return 2


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, or a JSON file of GPTShape")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of the weights; bf16 (default) has fp32 masters",
    )
    parser.add_argument("--ranks-per-host", type=int, default=8, metavar="N", help="default 8")
    for name, default in (("intra", 300.0), ("inter", 40.0)):
        parser.add_argument(
            f"--{name}-host",
            type=float,
            default=default,
            metavar="GB/s",
            help=f"of one rank and direction, {'inside a' if name == 'intra' else 'between'} "
            f"host{'' if name == 'intra' else 's'}; default {default:g}",
        )


def load_shape(name: str) -> GPTShape:
    """A preset, or a JSON file with the fields of :class:`GPTShape`.

    Raises:
        ValueError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}, or a .json file"
        raise ValueError(f"unknown model {name!r}; {hint}")
    with open(name) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
    known = [field.name for field in fields(GPTShape)]
    for key in content if isinstance(content, dict) else ():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name}: unknown field {key!r}; {hint}")
    try:
        return GPTShape(**content)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _topology(options: argparse.Namespace) -> Any:
    from megatron_tenplex.topology import Topology

    return Topology(options.ranks_per_host, options.intra_host * 1e9, options.inter_host * 1e9)


def _plan(options: argparse.Namespace) -> int:
    from megatron_tenplex.layout import gpt_layout
    from megatron_tenplex.placement import assign_roles
    from megatron_tenplex.planner import lower_bound, plan_reshard
    from megatron_tenplex.ptc import ParallelTensorCollection

    shape, topology = load_shape(options.model), _topology(options)
    source = gpt_layout(shape, _complete(options.source), precision=options.precision)
    target = gpt_layout(shape, _complete(options.target), precision=options.precision)
    unknown = [rank for rank in options.lost if not 0 <= rank < source.world_size]
    if unknown:
        raise ValueError(f"--lost names ranks outside 0..{source.world_size - 1}: {unknown}")
    if options.lost:
        left = [() if r in options.lost else shards for r, shards in enumerate(source.shards)]
        source = ParallelTensorCollection(source.tensors, left)
    started = time.perf_counter()
    placement = tuple(range(target.world_size))
    if options.placement == "optimal":
        placement = assign_roles(source, target, topology=topology)
    plan = plan_reshard(
        source,
        target,
        placement=placement,
        topology=topology,
        relay=options.relay,
        fan_out=options.fan_out,
        source_policy=options.source_policy,
        lost=options.lost,
    )
    planning = time.perf_counter() - started
    summary = {
        "model": options.model,
        "parameters": shape.num_parameters,
        "from": options.source,
        "to": options.target,
        "workers": plan.num_workers,
        "placement": list(plan.placement),
        "remote_bytes": plan.remote_bytes,
        "minimum_bytes": lower_bound(source, target, placement=placement),
        "identity_bytes": lower_bound(source, target),
        "inter_host_bytes": plan.inter_host_bytes,
        "local_bytes": plan.local_bytes,
        "bottleneck_bytes": plan.bottleneck_bytes,
        "predicted_seconds": plan.predict(),
        "planning_seconds": planning,
        "links": [[a, b, n] for (a, b), n in plan.links().items()],
    }
    if options.picture:
        from megatron_tenplex.picture import draw_plan

        draw_plan(plan, options.picture, title=f"{options.model}: {options.source} → {options.target}")
    print(json.dumps(summary)) if options.json else _print_plan(summary, topology.host)
    return 0


def _complete(text: str) -> ParallelConfig:
    parallel = ParallelConfig.parse(text)
    return parallel if parallel.dp is not None else parallel.resolve(parallel.tp * parallel.pp * parallel.cp)


def _print_plan(summary: dict[str, Any], host: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_tenplex.planner import format_bytes

    console = Console()
    console.print(
        f"{summary['model']} ({summary['parameters'] / 1e9:.2f} B parameters): "
        f"{summary['from']} -> {summary['to']}",
        highlight=False,
    )
    table = Table("from", "to", "bytes", "link")
    for sender, receiver, nbytes in summary["links"]:
        link = "inside host" if host(sender) == host(receiver) else "between hosts"
        table.add_row(f"worker {sender}", f"worker {receiver}", format_bytes(nbytes), link)
    console.print(table)
    facts = Table(show_header=False)
    for name, value in (
        ("roles of the new layout on workers", " ".join(map(str, summary["placement"]))),
        ("bytes between workers", format_bytes(summary["remote_bytes"])),
        ("  the least possible for this placement", format_bytes(summary["minimum_bytes"])),
        ("  the least without moving roles", format_bytes(summary["identity_bytes"])),
        ("bytes between hosts", format_bytes(summary["inter_host_bytes"])),
        ("bytes that stay", format_bytes(summary["local_bytes"])),
        ("most sent or received by a worker", format_bytes(summary["bottleneck_bytes"])),
        ("expected time of the transfer", f"{summary['predicted_seconds']:.3g} s"),
        ("time to plan", f"{summary['planning_seconds']:.3g} s"),
    ):
        facts.add_row(name, value)
    console.print(facts)


def _simulate(options: argparse.Namespace) -> int:
    from megatron_tenplex.simulator import simulate

    rows = simulate(load_shape(options.model), options.ranks, _topology(options), options.precision)
    if options.json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return 0
    from rich.console import Console
    from rich.table import Table

    from megatron_tenplex.planner import format_bytes

    table = Table("ranks", "change", "from", "to", "moved", "identity", "between hosts", "time", "planning")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            row["change"],
            row["from"],
            row["to"],
            format_bytes(row["remote_bytes"]),
            format_bytes(row["identity_bytes"]),
            format_bytes(row["inter_host_bytes"]),
            f"{row['predicted_seconds']:.3g} s",
            f"{row['planning_seconds']:.3g} s",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

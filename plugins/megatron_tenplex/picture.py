"""A picture of a plan: who sends how much to whom."""

from __future__ import annotations

import os

import numpy as np

from megatron_tenplex.planner import ReshardPlan, format_bytes

_LABELLED = 16


def draw_plan(plan: ReshardPlan, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Write two panels: bytes by (sender, receiver), and bytes each worker sends, receives and keeps.

    Args:
        path: the ending chooses the format (.png, .svg, .pdf).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import EngFormatter

    count = plan.num_workers
    matrix = np.zeros((count, count))
    for (sender, receiver), nbytes in plan.links().items():
        matrix[sender, receiver] = nbytes
    kept = np.zeros(count)
    for move in plan.moves:
        if move.source == move.target and move.phase == 0:
            kept[move.target] += move.nbytes
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    figure.suptitle(f"{title}\n{plan.summary()}" if title else plan.summary(), fontsize=10)
    positive = matrix[matrix > 0]
    if positive.size:
        low = max(positive.min(), positive.max() / 1e4)
        shown = np.ma.masked_equal(matrix, 0)
        image = left.imshow(shown, cmap="viridis_r", norm=LogNorm(low, max(positive.max(), low * 1.01)))
        bar = figure.colorbar(image, ax=left, format=EngFormatter(unit="B"))
        bar.ax.minorticks_off()
    else:
        left.imshow(np.ma.masked_all((count, count)))
        left.text(0.5, 0.5, "nothing has to move", ha="center", transform=left.transAxes)
    if count <= _LABELLED:
        for (sender, receiver), nbytes in plan.links().items():
            dark = nbytes > (positive.max() * positive.min()) ** 0.5 if positive.size else False
            left.text(
                receiver,
                sender,
                format_bytes(nbytes).replace(" ", "\n"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
        for axis in (left.xaxis, left.yaxis):
            axis.set_ticks(range(count))
    per_host = plan.topology.ranks_per_host
    for border in range(per_host, count, per_host):
        left.axhline(border - 0.5, color="grey", linewidth=0.8)
        left.axvline(border - 0.5, color="grey", linewidth=0.8)
    left.set_xlabel("to worker")
    left.set_ylabel("from worker")
    workers = np.arange(count)
    right.bar(workers - 0.27, plan.sent_bytes, 0.27, label="sends", color="#0072B2")
    right.bar(workers, plan.received_bytes, 0.27, label="receives", color="#E69F00")
    right.bar(workers + 0.27, kept, 0.27, label="keeps", color="#999999")
    right.yaxis.set_major_formatter(EngFormatter(unit="B"))
    right.set_xlabel("worker")
    if count <= _LABELLED:
        roles = {worker: role for role, worker in enumerate(plan.placement)}
        right.set_xticks(
            workers, [f"{w}\nrank {roles[w]}" if w in roles else f"{w}\nidle" for w in range(count)]
        )
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)

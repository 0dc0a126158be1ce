"""Link prediction with PyG: which edges are missing? The import of the loader is the only changed line.

python examples/pyg_quiver_link_prediction.py [--epochs 5]

A stochastic block model with held-out edges stands in for a data set. Negative edges are drawn by the loader
and repeat with the batch, so that two runs see the same ones.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import stochastic_blockmodel_graph

from pyg_quiver import LinkNeighborLoader  # instead of: from torch_geometric.loader import LinkNeighborLoader


def split_communities(nodes: int = 1500, classes: int = 6) -> tuple[Data, Data]:
    """Dense inside classes; a tenth of the edges is held out, with as many pairs that are none."""
    torch.manual_seed(0)
    size = nodes // classes
    chance = torch.full((classes, classes), 0.001) + torch.eye(classes) * 0.03
    edge_index = stochastic_blockmodel_graph([size] * classes, chance)
    x = F.one_hot(torch.arange(classes).repeat_interleave(size), 32) + 0.7 * torch.randn(nodes, 32)
    data = Data(x=x, edge_index=edge_index)
    train, _, test = RandomLinkSplit(
        num_val=0.0, num_test=0.1, is_undirected=True, add_negative_train_samples=False
    )(data)
    return train, test


def area_under_curve(score: Tensor, label: Tensor) -> float:
    """Chance that an edge scores higher than a pair that is none."""
    return float((score[label == 1][:, None] > score[label == 0][None, :]).float().mean())


def main() -> None:
    """Train on links with sampled negatives, then rank the held-out ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    train, test = split_communities()
    model = GraphSAGE(32, 64, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = LinkNeighborLoader(
        train, num_neighbors=[10, 5], edge_label_index=train.edge_label_index, edge_label=train.edge_label,
        neg_sampling_ratio=1.0, batch_size=256, shuffle=True,
    )  # fmt: skip

    def scores(z: Tensor, pairs: Tensor) -> Tensor:
        return (F.normalize(z[pairs[0]]) * F.normalize(z[pairs[1]])).sum(1) * 5

    for epoch in range(options.epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            z = model(batch.x, batch.edge_index)
            label = (batch.edge_label > 0).float()
            F.binary_cross_entropy_with_logits(scores(z, batch.edge_label_index), label).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            z = model(test.x, test.edge_index)
        area = area_under_curve(scores(z, test.edge_label_index), test.edge_label)
        print(f"epoch {epoch}: area under the curve of held-out links {area:.3f}")


if __name__ == "__main__":
    main()

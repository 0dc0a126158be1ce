"""GraphSAGE in mini-batches with PyG: the import of the loader is the only line that is not plain PyG.

python examples/pyg_quiver_graphsage.py [--epochs 3] [--workers 0]

A stochastic block model stands in for a data set, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import stochastic_blockmodel_graph

from pyg_quiver import NeighborLoader  # instead of: from torch_geometric.loader import NeighborLoader


def communities(nodes: int = 2000, classes: int = 5) -> Data:
    """Dense inside classes, sparse between them; features say little by themselves."""
    torch.manual_seed(0)
    size = nodes // classes
    inside = torch.full((classes, classes), 0.002) + torch.eye(classes) * 0.02
    edge_index = stochastic_blockmodel_graph([size] * classes, inside)
    y = torch.arange(classes).repeat_interleave(size)
    x = F.one_hot(y, classes).float() + 2.0 * torch.randn(y.numel(), classes)
    train_mask = torch.rand(y.numel()) < 0.5
    return Data(x=x, y=y, edge_index=edge_index, train_mask=train_mask)


def main() -> None:
    """Train, then evaluate on the nodes that were held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    data = communities()
    model = GraphSAGE(data.num_features, 64, num_layers=2, out_channels=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = NeighborLoader(
        data, num_neighbors=[10, 5], input_nodes=data.train_mask, batch_size=128, shuffle=True,
        num_workers=options.workers, persistent_workers=options.workers > 0,
    )  # fmt: skip
    for epoch in range(options.epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index)[: batch.batch_size]
            F.cross_entropy(out, batch.y[: batch.batch_size]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            predicted = model(data.x, data.edge_index).argmax(1)
        accuracy = (predicted == data.y)[~data.train_mask].float().mean()
        print(f"epoch {epoch}: accuracy on held-out nodes {accuracy:.3f}")


if __name__ == "__main__":
    main()

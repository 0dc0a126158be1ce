"""A heterogeneous graph with PyG: again the import of the loader is the only changed line.

python examples/pyg_quiver_heterogeneous.py [--epochs 5]

Authors write papers, papers cite papers; the venue of a paper is to be found. The graph is made up.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.nn import HeteroConv, SAGEConv
from torch_geometric.transforms import ToUndirected

from pyg_quiver import NeighborLoader  # instead of: from torch_geometric.loader import NeighborLoader

PAPERS, AUTHORS, VENUES = 3000, 1000, 5


def library() -> HeteroData:
    """Authors mostly publish at one venue, and papers mostly cite papers of theirs."""
    torch.manual_seed(0)
    venue = torch.randint(0, VENUES, (PAPERS,))
    order = venue.argsort()  # papers of one venue follow each other
    home = torch.randint(0, VENUES, (AUTHORS,))
    paper = torch.arange(PAPERS).repeat(2)
    author = torch.randint(0, AUTHORS, (2 * PAPERS,))
    matching = torch.stack([home == v for v in range(VENUES)]).float()
    author = torch.where(
        torch.rand(2 * PAPERS) < 0.8, torch.multinomial(matching[venue[paper]], 1)[:, 0], author
    )
    near = (torch.randn(3 * PAPERS) * PAPERS / 20).long()
    cited = order[(order.argsort().repeat(3) + near).clamp(0, PAPERS - 1)]
    data = HeteroData()
    data["paper"].x = F.one_hot(venue, VENUES).float() + 2.5 * torch.randn(PAPERS, VENUES)
    data["paper"].y = venue
    data["paper"].train_mask = torch.rand(PAPERS) < 0.5
    data["author"].x = torch.randn(AUTHORS, 8)
    data["author", "writes", "paper"].edge_index = torch.stack([author, paper])
    data["paper", "cites", "paper"].edge_index = torch.stack([torch.arange(PAPERS).repeat(3), cited])
    return ToUndirected()(data)


class Model(torch.nn.Module):
    """Two layers of GraphSAGE, with weights of their own for each edge type."""

    def __init__(self, edge_types: list[tuple[str, str, str]], hidden: int = 32) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            HeteroConv({kind: SAGEConv((-1, -1), size) for kind in edge_types}) for size in (hidden, VENUES)
        )

    def forward(self, x: dict[str, Tensor], edge_index: dict[tuple[str, str, str], Tensor]) -> Tensor:
        """Scores of the venues for every paper."""
        first, second = self.layers
        hidden = {kind: value.relu() for kind, value in first(x, edge_index).items()}
        return second(hidden, edge_index)["paper"]


def main() -> None:
    """Train, then evaluate on the papers that were held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    data = library()
    model = Model(data.edge_types)
    loader = NeighborLoader(
        data,
        num_neighbors=[8, 4],
        input_nodes=("paper", data["paper"].train_mask),
        batch_size=128,
        shuffle=True,
    )
    first = next(iter(loader))
    model(first.x_dict, first.edge_index_dict)  # sizes of the lazy layers
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(options.epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            size = batch["paper"].batch_size
            out = model(batch.x_dict, batch.edge_index_dict)[:size]
            F.cross_entropy(out, batch["paper"].y[:size]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            predicted = model(data.x_dict, data.edge_index_dict).argmax(1)
        held_out = ~data["paper"].train_mask
        accuracy = (predicted == data["paper"].y)[held_out].float().mean()
        print(f"epoch {epoch}: accuracy on held-out papers {accuracy:.3f}")


if __name__ == "__main__":
    main()

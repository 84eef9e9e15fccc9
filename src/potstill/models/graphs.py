"""Graph classifiers over torch-geometric's layers: GIN, GCN and GAT on categorical node and edge labels.

N nodes, E edges, B graphs of a batch, D width, V classes, F label columns. Messages flow along `edge_index` from row 0
to row 1, so an undirected graph holds each edge twice and a computation tree holds child -> parent only.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from potstill.contracts.errors import DataError, ModelError, require


class LabelEmbedding(nn.Module):
    """The sum of one embedding a column of integer labels. [N] or [N, F] -> [N, D]."""

    def __init__(self, sizes: Sequence[int], width: int, what: str) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.sizes, self.what = list(sizes), what

    def forward(self, labels: Tensor) -> Tensor:
        labels = labels[:, None] if labels.dim() == 1 else labels
        sizes = self.sizes
        if labels.is_floating_point():
            raise DataError(
                f"{self.what} labels must be integers (categories), got {labels.dtype}. "
                "Bin or quantise continuous features first."
            )
        if labels.shape[1] != len(sizes):
            raise DataError(
                f"{self.what} labels have {labels.shape[1]} columns, but the model was built for {len(sizes)}."
            )
        if len(labels):
            low, high = labels.amin(0).tolist(), labels.amax(0).tolist()
            for column, size in enumerate(sizes):
                if low[column] < 0 or high[column] >= size:
                    raise DataError(
                        f"{self.what} labels of column {column} lie in {low[column]}..{high[column]}, "
                        f"but the model knows 0..{size - 1}."
                    )
        return torch.stack([embed(labels[:, i]) for i, embed in enumerate(self.columns)]).sum(0)


class GCNWithEdges(nn.Module):
    """Degree-normalised convolution whose messages see the edge, as in the Open Graph Benchmark's GCN.

    h = W x, d_i = 1 + indegree(i);  out_i = sum_j relu(h_j + e_ji) / sqrt(d_i d_j) + relu(h_i + root) / d_i.
    (GCNConv of torch-geometric takes one scalar an edge only.)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.root = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        hidden, (sender, receiver) = self.linear(hidden), edge_index
        degree = hidden.new_ones(len(hidden)).index_add(0, receiver, hidden.new_ones(len(receiver)))
        scale = (degree[sender] * degree[receiver]).rsqrt()
        message = scale[:, None] * (hidden[sender] + edge_attr).relu()
        return ((hidden + self.root).relu() / degree[:, None]).index_add(0, receiver, message)


def _convolution(architecture: str, width: int, has_edges: bool) -> nn.Module:
    pyg = require("torch_geometric.nn", "graphs")
    if architecture == "gin":
        mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return pyg.GINEConv(mlp, train_eps=True) if has_edges else pyg.GINConv(mlp, train_eps=True)
    if architecture == "gcn":
        return GCNWithEdges(width) if has_edges else pyg.GCNConv(width, width)
    return pyg.GATConv(width, width, edge_dim=width if has_edges else None)


class GraphClassifier(nn.Module):
    """Message passing, sum readout, one linear layer: PyG `Data` or `Batch` -> logits [B, V].

    `node_labels` and `edge_labels` are how many values each label column takes (an int for one column; no edge labels:
    0). The last layer is read out (jumping knowledge "last"): over the nodes of `data.root_mask` where the data has
    one, over all nodes otherwise.
    """

    kind: ClassVar[str] = "graph_classifier"
    PACKAGED: ClassVar[dict[str, Callable[..., "GraphClassifier"]]] = {}

    def __init__(
        self,
        architecture: str,
        *,
        node_labels: int | Sequence[int],
        classes: int,
        edge_labels: int | Sequence[int] = 0,
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if architecture not in ("gin", "gcn", "gat"):
            raise ModelError(f"{architecture} is no packaged graph network. Known: gat, gcn, gin.")
        if layers < 1 or width < 1 or classes < 1:
            raise ModelError(
                f"{architecture} needs layers, width and classes of 1 or more, got {layers}, {width}, {classes}."
            )
        nodes = [node_labels] if isinstance(node_labels, int) else list(node_labels)
        edges = [edge_labels] if isinstance(edge_labels, int) else list(edge_labels)
        edges = [] if edges == [0] else edges
        self.name = architecture
        self.config: dict[str, Any] = {
            "architecture": architecture,
            "node_labels": nodes,
            "edge_labels": edges,
            "classes": classes,
            "width": width,
            "layers": layers,
            "dropout": dropout,
        }
        self.classes = classes
        self.embed_nodes = LabelEmbedding(nodes, width, "node")
        self.embed_edges = nn.ModuleList(LabelEmbedding(edges, width, "edge") for _ in range(layers if edges else 0))
        self.convolutions = nn.ModuleList(_convolution(architecture, width, bool(edges)) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)

    def embed(self, data: Any) -> Tensor:
        """Node embeddings after the last layer. [N, D]."""
        hidden = self.embed_nodes(data.x)
        for i, convolution in enumerate(self.convolutions):
            if i:
                hidden = self.dropout(hidden.relu())
            if self.embed_edges:
                if data.edge_attr is None:
                    raise DataError(f"{self.name} was built for edge labels, but the graphs have no edge_attr.")
                hidden = convolution(hidden, data.edge_index, edge_attr=self.embed_edges[i](data.edge_attr))
            else:
                hidden = convolution(hidden, data.edge_index)
        return self.dropout(hidden)

    def readout(self, data: Any) -> Tensor:
        """The sum of embeddings over root nodes where the data marks them, over all nodes otherwise. [B, D]."""
        hidden = self.embed(data)
        graph_N = getattr(data, "batch", None)
        if graph_N is None:
            graph_N = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        graphs = data.num_graphs if hasattr(data, "num_graphs") else 1
        roots_N = getattr(data, "root_mask", None)
        if roots_N is not None:
            hidden, graph_N = hidden[roots_N], graph_N[roots_N]
        return hidden.new_zeros(graphs, hidden.shape[1]).index_add(0, graph_N, hidden)

    def forward(self, data: Any) -> Tensor:
        return self.linear(self.readout(data))

    def fresh(self, seed: int, **changes: Any) -> Self:
        """The same architecture with new weights, a function of the seed alone; `changes` are of its options."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed & (2**63 - 1))
            return type(self)(**{**self.config, **changes})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, pretrained: bool = True) -> Self:
        """A folder that `save` wrote: config.json and model.safetensors (torch-geometric has no format of its own)."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{path} is no graph classifier: expected a folder with config.json and model.safetensors."
            )
        config = json.loads((folder / "config.json").read_text())
        try:
            model = cls(**config).to(dtype)
        except (KeyError, TypeError) as cause:
            raise ModelError(f"{folder / 'config.json'} does not describe a graph classifier: {cause}.") from cause
        if pretrained:
            weights = folder / "model.safetensors"
            if not weights.is_file():
                raise ModelError(f"{folder} has no model.safetensors. For fresh weights set pretrained: false.")
            model.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(weights).items()})
        return model

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


GraphClassifier.PACKAGED = {name: partial(GraphClassifier, name) for name in ("gin", "gcn", "gat")}

"""Graph classification: molecules that cross the blood-brain barrier or do not, and synthetic rings.

Graphs are PyG `Data` with x [N, F] integer labels, edge_index [2, E] (each bond twice), edge_attr where there are edge
labels, and y [1].
"""

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from potstill import assets
from potstill.contracts import keyed
from potstill.contracts.errors import DataError, require
from potstill.tasks.base import Source

log = logging.getLogger(__name__)

CONVERTER = 1  # part of the cache's name: raise it when the graphs change
MODELS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "gin"},
    "student": {"name": "gin", "options": {"width": 32, "layers": 2}},
}


def b3db(split: Literal["scaffold", "random"] = "scaffold", test: float = 0.2, size: int | None = None) -> Source:
    """B3DB (Meng et al. 2021): 7,805 molecules that rdkit reads, with whether they cross the blood-brain barrier (1).

    Atoms and bonds have the categorical features of `torch_geometric.utils.from_smiles` (OGB's). split: "scaffold" keeps
    the molecules of one Bemis-Murcko scaffold together, those of the commonest scaffolds in train; "random" is keyed.
    """
    if split not in ("scaffold", "random"):
        raise DataError(f"data.split must be scaffold or random, got {split}.")
    if not 0 < test < 1:
        raise DataError(f"data.test is the share of molecules held out, strictly between 0 and 1, got {test}.")
    graphs, scaffolds = _converted()
    train, held_out = _by_scaffold(scaffolds, test) if split == "scaffold" else _at_random(len(graphs), test)
    order = keyed.permutation(keyed.key("b3db", "order"), len(train)).tolist()
    from torch_geometric.utils.smiles import e_map, x_map

    context = {
        "classes": 2,
        "node_labels": [len(values) for values in x_map.values()],
        "edge_labels": [len(values) for values in e_map.values()],
    }
    return Source(
        "b3db",
        "graphs",
        [graphs[train[i]] for i in order],
        [graphs[i] for i in held_out],
        context,
        MODELS,
        {"steps": 1000, "batch": 64, "lr": 1e-3},
    ).subset(size)


def _at_random(count: int, test: float) -> tuple[list[int], list[int]]:
    order = keyed.permutation(keyed.key("b3db", "split"), count).tolist()
    cut = round(test * count)
    return order[cut:], order[:cut]


def _by_scaffold(scaffolds: Sequence[str], test: float) -> tuple[list[int], list[int]]:
    """Whole groups, largest first, into train while they fit there."""
    groups: dict[str, list[int]] = {}
    for i, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(i)
    room = len(scaffolds) - round(test * len(scaffolds))
    train: list[int] = []
    held_out: list[int] = []
    for _, members in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        (train if len(train) + len(members) <= room else held_out).extend(members)
    return train, held_out


def _converted() -> tuple[list[Any], list[str]]:
    """All molecules as graphs, with their scaffolds; from the cache (safetensors and JSON) once they were made."""
    geometric = require("torch_geometric", "graphs")
    require("rdkit", "graphs")
    from safetensors.torch import load_file, save_file
    from torch_geometric.data import Data

    (relative, digest), *_ = assets.PACKAGES["b3db"].files.items()
    versions = f"{digest[:12]}-pyg{geometric.__version__}-v{CONVERTER}"
    folder = assets.cache_dir() / "graphs" / f"b3db-{versions}"
    if not (folder / "scaffolds.json").is_file():
        table = assets.asset("b3db") / relative
        with assets.lock(folder):
            if not (folder / "scaffolds.json").is_file():
                assets.say("Converting the molecules of B3DB to graphs, once")
                tensors, scaffolds = _graphs_of(table)
                with assets.replacing(folder) as made:
                    save_file(tensors, made / "graphs.safetensors")
                    (made / "scaffolds.json").write_text(json.dumps(scaffolds))
    stored = load_file(folder / "graphs.safetensors")
    nodes, edges = stored["nodes"].tolist(), stored["edges"].tolist()
    parts = zip(
        stored["x"].long().split(nodes),
        stored["edge_index"].long().split(edges, dim=1),
        stored["edge_attr"].long().split(edges),
        stored["y"].long().split(1),
    )
    graphs = [Data(x=x, edge_index=index, edge_attr=attr, y=y) for x, index, attr, y in parts]
    return graphs, json.loads((folder / "scaffolds.json").read_text())


def _graphs_of(table: Path) -> tuple[dict[str, Tensor], list[str]]:
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    from torch_geometric.utils import from_smiles

    with open(table, encoding="utf8", newline="") as file:
        found = [(row["SMILES"], row["BBB+/BBB-"] == "BBB+") for row in csv.DictReader(file, delimiter="\t")]
    with rdBase.BlockLogs():  # a warning a molecule on hydrogens and stereo marks
        rows = [row for row in found if Chem.MolFromSmiles(row[0]) is not None]
        graphs = [from_smiles(smiles) for smiles, _ in rows]
        scaffolds = [MurckoScaffoldSmiles(smiles) for smiles, _ in rows]
    if left_out := len(found) - len(rows):  # two of B3DB have an impossible valence
        log.info("b3db: %d of %d molecules left out, whose SMILES rdkit refuses", left_out, len(found))
    tensors = {
        "x": torch.cat([g.x for g in graphs]).to(torch.uint8),
        "edge_index": torch.cat([g.edge_index for g in graphs], 1).to(torch.int16).contiguous(),
        "edge_attr": torch.cat([g.edge_attr for g in graphs]).to(torch.uint8),
        "nodes": torch.tensor([g.num_nodes for g in graphs]),
        "edges": torch.tensor([g.edge_index.shape[1] for g in graphs]),
        "y": torch.tensor([label for _, label in rows]).to(torch.uint8),
    }
    return tensors, scaffolds


RINGS = ((0, 0, 1, 1, 2), (0, 1, 0, 1, 2))  # equal label counts, so that only the bonds tell the classes apart


def synthetic_rings(size: int = 200, test_size: int = 200, backbone: int = 10, labels: int = 5) -> Source:
    """Labelled trees with two copies of a 5-ring that the class decides, kind "graphs".

    The tree has `backbone` nodes with random labels out of `labels`; each ring hangs on a random node of it by one bond.
    Both rings have the same labels in another order: counting labels tells nothing, one round of messages does.
    """
    require("torch_geometric", "graphs")
    if labels < 3 or backbone < 1:
        raise DataError(f"synthetic_rings needs labels >= 3 and backbone >= 1, got {labels} and {backbone}.")
    if size < 2 or test_size < 2:
        raise DataError(f"data.size and data.test_size must be at least 2, got {size} and {test_size}.")
    train, test = (
        [_ring_graph(keyed.key("rings", part), i, backbone, labels) for i in range(count)]
        for part, count in (("train", size), ("test", test_size))
    )
    context = {"classes": 2, "node_labels": [labels], "edge_labels": 0}
    options = {"width": 32, "layers": 2}
    models: dict[str, dict[str, Any]] = {
        "teacher": {"name": "gin", "options": options},
        "student": {"name": "gin", "options": options},
    }
    return Source("synthetic_rings", "graphs", train, test, context, models, {"steps": 200, "batch": 32, "lr": 1e-2})


def _ring_graph(seed: int, i: int, backbone: int, labels: int) -> Any:
    from torch_geometric.data import Data

    label = i % 2
    draw = keyed.uniform(seed, torch.tensor(i), torch.arange(2 * backbone + 2))
    bonds = [(node, int(draw[node] * node)) for node in range(1, backbone)]  # each node hangs on an earlier one
    colours = (draw[backbone : 2 * backbone] * labels).long().tolist()
    for copy in range(2):
        first = len(colours)
        colours += RINGS[label]
        bonds += [(first + k, first + (k + 1) % 5) for k in range(5)]
        bonds.append((first + copy, int(draw[2 * backbone + copy] * backbone)))
    edge_index = torch.tensor(bonds + [(b, a) for a, b in bonds]).T.contiguous()
    return Data(x=torch.tensor(colours)[:, None], edge_index=edge_index, y=torch.tensor([label]))

"""Graph sources: B3DB as rdkit reads it, splits that keep scaffolds together, and rings that only bonds tell apart."""

from collections import Counter

import pytest
import torch

from potstill.contracts.errors import DataError
from potstill.tasks import molecules
from potstill.tasks.molecules import b3db, synthetic_rings

pytestmark = pytest.mark.needs("torch_geometric")


@pytest.fixture(scope="module")
def scaffold_split(asset_or_skip):
    pytest.importorskip("rdkit")
    return asset_or_skip(b3db)


@pytest.mark.needs("rdkit")
def test_b3db_is_whole(scaffold_split):
    train, test = scaffold_split.train, scaffold_split.test
    labels = Counter(int(g.y) for g in train + test)
    assert labels[1] + labels[0] == 7805  # two of 7,807 have an impossible valence
    assert abs(labels[1] - 4956) <= 2
    assert len(test) == pytest.approx(0.2 * 7805, abs=60)
    sizes = torch.tensor(scaffold_split.context["node_labels"])
    bonds = torch.tensor(scaffold_split.context["edge_labels"])
    for graph in train[:300] + test[:300]:
        assert (graph.x < sizes).all()
        assert (graph.edge_attr < bonds).all()
        both = torch.cat([graph.edge_index, graph.edge_index.flip(0)], 1)
        assert both.unique(dim=1).shape[1] == graph.edge_index.shape[1]  # each bond once in each direction
        assert graph.edge_index.numel() == 0 or int(graph.edge_index.max()) < len(graph.x)


@pytest.mark.needs("rdkit")
def test_stored_graphs_equal_fresh_ones(scaffold_split):
    """Through uint8 and int16 and back: row by row against the table."""
    import csv

    from rdkit import Chem
    from torch_geometric.utils import from_smiles

    from potstill.assets import asset

    graphs, scaffolds = molecules._converted()
    with open(asset("b3db") / "B3DB/B3DB_classification.tsv", encoding="utf8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if Chem.MolFromSmiles(row["SMILES"]) is not None]
    assert len(rows) == len(graphs) == len(scaffolds)
    for i in [0, 1, 1000, 4321, 7804]:
        fresh = from_smiles(rows[i]["SMILES"])
        assert torch.equal(graphs[i].x, fresh.x)
        assert torch.equal(graphs[i].edge_index, fresh.edge_index)
        assert torch.equal(graphs[i].edge_attr, fresh.edge_attr)
        assert int(graphs[i].y) == (rows[i]["BBB+/BBB-"] == "BBB+")


@pytest.mark.needs("rdkit")
def test_table_is_read_by_hand(tmp_path, caplog):
    """Ethanol, a carbon with five bonds (left out), toluene (a benzene scaffold) and a single atom without bonds."""
    lines = ["SMILES\tBBB+/BBB-", "CCO\tBBB+", "C(C)(C)(C)(C)C\tBBB+", "Cc1ccccc1\tBBB-", "[Na+]\tBBB-"]
    (tmp_path / "table.tsv").write_text("\n".join(lines) + "\n")
    with caplog.at_level("INFO"):
        tensors, scaffolds = molecules._graphs_of(tmp_path / "table.tsv")
    assert "1 of 4 molecules left out" in caplog.text
    assert scaffolds == ["", "c1ccccc1", ""]
    assert tensors["nodes"].tolist() == [3, 7, 1]
    assert tensors["edges"].tolist() == [4, 14, 0]
    assert tensors["y"].tolist() == [1, 0, 0]
    assert tensors["x"][:3, 0].tolist() == [6, 6, 8]  # the first column is the atomic number
    assert sorted(map(tuple, tensors["edge_index"][:, :4].T.tolist())) == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_scaffold_split_by_hand():
    train, test = molecules._by_scaffold(["b", "a", "c", "a", "b", "a", "d", "e", "f", "g"], 0.4)
    assert (train, test) == ([1, 3, 5, 0, 4, 2], [6, 7, 8, 9])
    train, test = molecules._by_scaffold(["a", "a", "b", "b", "c"], 0.4)
    assert (train, test) == ([0, 1, 4], [2, 3])  # b would not fit, so it is held out whole


@pytest.mark.needs("rdkit")
def test_scaffolds_do_not_cross_the_split(scaffold_split):
    graphs, scaffolds = molecules._converted()
    where = dict(zip([g.x.numpy().tobytes() + g.edge_index.numpy().tobytes() for g in graphs], scaffolds))
    of = lambda rows: {where[g.x.numpy().tobytes() + g.edge_index.numpy().tobytes()] for g in rows}
    assert not of(scaffold_split.train) & of(scaffold_split.test)


@pytest.mark.needs("rdkit")
def test_b3db_options(scaffold_split):
    random = b3db(split="random", test=0.1, size=50)
    assert (len(random.train), len(random.test)) == (50, 780)  # round half to even of 780.5
    with pytest.raises(DataError, match="data.split must be scaffold or random, got scafold"):
        b3db(split="scafold")
    with pytest.raises(DataError, match="data.test is the share of molecules held out"):
        b3db(test=0)


def test_rings_are_told_apart_by_bonds_alone():
    source = synthetic_rings(size=40, test_size=20, backbone=6)
    assert Counter(int(g.y) for g in source.train) == {0: 20, 1: 20}
    for graph in source.train:
        assert graph.x.shape == (16, 1)
        assert graph.edge_index.shape == (2, 2 * (5 + 12))  # a tree of 6, two rings and their bonds, twice
        ring = graph.x[6:11, 0]
        assert sorted(ring.tolist()) == [0, 0, 1, 1, 2]  # the class cannot be counted
        assert torch.equal(ring, graph.x[11:, 0])
        degrees = graph.edge_index[0].bincount(minlength=16)
        assert (degrees > 0).all()
        ends = {tuple(e) for e in graph.edge_index.T.tolist()}
        alike = sum((6 + k, 6 + (k + 1) % 5) in ends and ring[k] == ring[(k + 1) % 5] for k in range(5))
        assert alike == (2 if int(graph.y) == 0 else 0)
    seen = {graph.edge_index.numpy().tobytes() + graph.x.numpy().tobytes() for graph in source.train}
    assert len(seen) == 40
    assert torch.equal(synthetic_rings(size=10, backbone=6).train[7].x, source.train[7].x)


def test_rings_are_connected():
    import networkx
    from torch_geometric.utils import to_networkx

    assert all(networkx.is_connected(to_networkx(g, to_undirected=True)) for g in synthetic_rings(size=20).train)


def test_rings_refusals():
    with pytest.raises(DataError, match="needs labels >= 3 and backbone >= 1, got 2 and 10"):
        synthetic_rings(labels=2)
    with pytest.raises(DataError, match="must be at least 2, got 1 and 200"):
        synthetic_rings(size=1)

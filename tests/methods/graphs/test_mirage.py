"""Mirage: computation trees, canonical labels, frequent itemsets, bundles, storage."""

import itertools
import json
import random
import shutil
import sys
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from potstill import recipe
from potstill.contracts.errors import DataError, RecipeError
from potstill.evaluation.graphs import collate, drawn, judged
from potstill.methods.graphs.mirage import (
    Forest,
    Itemset,
    Mirage,
    Stored,
    baseline,
    best_of,
    bundle,
    distilled,
    fp_growth,
    herded,
    load_distilled,
    mine,
    narrowed,
    search,
    split,
    stored_graphs,
    stored_itemsets,
    supports_of,
    taken,
)
from potstill.models.graphs import GraphClassifier
from potstill.run import Run

pyg = pytest.importorskip("torch_geometric.data")


def random_graph(seed, nodes=9, edges=14, edge_labels=3, label=0):
    rng = random.Random(seed)
    pairs = rng.sample(list(itertools.combinations(range(nodes), 2)), edges)
    kinds = [rng.randrange(edge_labels) for _ in pairs] if edge_labels else None
    index = torch.tensor(pairs + [(v, u) for u, v in pairs]).T
    return pyg.Data(
        x=torch.tensor([[rng.randrange(3), rng.randrange(2)] for _ in range(nodes)]),
        edge_index=index,
        edge_attr=torch.tensor(kinds * 2)[:, None] if kinds else None,
        y=torch.tensor([label]),
    )


def renumbered(graph, seed):
    order = torch.randperm(len(graph.x), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    shuffle = torch.randperm(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    attributes = None if graph.edge_attr is None else graph.edge_attr[shuffle]
    return pyg.Data(x=graph.x[order], edge_index=place[graph.edge_index][:, shuffle], edge_attr=attributes), order


def network(name, layers, edge_labels):
    torch.manual_seed(1)
    return (
        GraphClassifier(name, node_labels=[3, 2], edge_labels=edge_labels, classes=2, width=7, layers=layers)
        .double()
        .eval()
    )


# --- what a message-passing network sees ----------------------------------------


@pytest.mark.parametrize("edge_labels", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["gin", "gat"])
def test_root_of_the_tree_sees_what_the_node_sees(name, depth, edge_labels):
    model, forest = network(name, depth, edge_labels), Forest()
    graph = random_graph(0, edge_labels=edge_labels)
    hidden = model.embed(graph)
    for node, tree in enumerate(forest.of_nodes(graph, depth)):
        data = bundle(forest, Itemset((tree,), 1, 0))
        assert_close(model.readout(data)[0], hidden[node], rtol=0, atol=1e-12 * hidden.abs().max().item())


def test_a_deeper_network_sees_past_the_leaves():
    """The law above is no accident: with more layers than hops the tree is too small, and GCN counts other degrees."""
    graph, forest = random_graph(0), Forest()
    tree = forest.of_nodes(graph, 2)[0]
    for name, layers in (("gin", 3), ("gcn", 2)):
        model = network(name, layers, 3)
        assert (model.readout(bundle(forest, Itemset((tree,), 1, 0)))[0] - model.embed(graph)[0]).abs().max() > 1e-3


def test_a_bundle_of_all_trees_reads_out_as_its_graph():
    graph = next(g for g in map(random_graph, range(99)) if len(set(Forest().of_nodes(g, 2))) == len(g.x))
    forest, model = Forest(), network("gin", 2, 3)
    data = bundle(forest, Itemset(tuple(sorted(forest.of_nodes(graph, 2))), 1, 0))
    assert int(data.root_mask.sum()) == len(graph.x)
    assert_close(model(data), model(graph), rtol=1e-12, atol=1e-12)
    both = model(collate([data, data]))
    assert_close(both, model(graph).expand(2, -1), rtol=1e-12, atol=1e-12)


def test_messages_flow_along_directed_edges():
    """0 -> 1: node 1 hears node 0, node 0 hears nobody."""
    forest = Forest()
    graph = pyg.Data(x=torch.tensor([5, 7]), edge_index=torch.tensor([[0], [1]]))
    assert [forest.canonical(t) for t in forest.of_nodes(graph, 2)] == ["5", "7(5)"]


def test_the_parent_is_a_child_again():
    forest = Forest()
    graph = pyg.Data(x=torch.tensor([1, 2]), edge_index=torch.tensor([[0, 1], [1, 0]]), edge_attr=torch.tensor([4, 4]))
    assert [forest.canonical(t) for t in forest.of_nodes(graph, 3)] == ["1(4:2(4:1(4:2)))", "2(4:1(4:2(4:1)))"]


# --- canonical labels ----------------------------------------


def labelled_trees(nodes):
    """Every rooted tree on 0..nodes-1 with parents before children, every labelling of nodes and edges by 0 and 1."""
    for parents in itertools.product(*(range(i) for i in range(1, nodes))):
        for labels in itertools.product(range(2), repeat=nodes):
            for edges in itertools.product(range(2), repeat=nodes - 1):
                yield parents, labels, edges


def planted(forest, parents, labels, edges):
    def grow(node):
        return forest.add(
            (labels[node],),
            [((edges[child - 1],), grow(child)) for child in range(1, len(labels)) if parents[child - 1] == node],
        )

    return grow(0)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_canonical_labels_are_isomorphism(nodes):
    """Against networkx: the root is told apart by an attribute; equal texts if and only if isomorphic."""
    nx = pytest.importorskip("networkx")
    forest, classes = Forest(), {}
    match = {
        "node_match": lambda a, b: a == b,
        "edge_match": lambda a, b: a == b,
    }
    for parents, labels, edges in labelled_trees(nodes):
        graph = nx.Graph()
        graph.add_nodes_from((i, {"label": label, "root": i == 0}) for i, label in enumerate(labels))
        graph.add_edges_from((i + 1, p, {"label": e}) for i, (p, e) in enumerate(zip(parents, edges)))
        tree = planted(forest, parents, labels, edges)
        classes.setdefault(forest.canonical(tree), (tree, []))[1].append(graph)
        assert classes[forest.canonical(tree)][0] == tree  # ids and texts agree
    for _, members in classes.values():
        assert all(nx.is_isomorphic(members[0], other, **match) for other in members[1:])
    for (_, a), (_, b) in itertools.combinations(classes.values(), 2):
        assert not nx.is_isomorphic(a[0], b[0], **match)


@pytest.mark.parametrize("seed", range(5))
def test_renumbering_changes_nothing(seed):
    graph = random_graph(seed)
    other, order = renumbered(graph, seed)
    forest, apart = Forest(), Forest()
    ids = forest.of_nodes(graph, 3)
    assert [ids[i] for i in order] == forest.of_nodes(other, 3)
    texts = [forest.canonical(ids[i]) for i in order]
    assert texts == [apart.canonical(t) for t in apart.of_nodes(other, 3)]  # other ids, the same texts


@pytest.mark.parametrize("edge_labels", [0, 3])
def test_parse_inverts_canonical(edge_labels):
    forest, other = Forest(), Forest()
    for tree in forest.of_nodes(random_graph(3, edge_labels=edge_labels), 3):
        text = forest.canonical(tree)
        assert forest.parse(text) == tree
        assert other.canonical(other.parse(text)) == text
        assert len(other.expand(other.parse(text))[0]) == len(forest.expand(tree)[0])


@pytest.mark.parametrize("text", ["", "1(2", "1)2", "1(2:3", "1(:3)", "1,2", "1..2", "x", "1()", "1(2]"])
def test_parse_refuses(text):
    with pytest.raises(DataError, match="is no canonical tree"):
        Forest().parse(text)


def test_depth_is_stored_not_enumerated():
    """A complete graph of 12 nodes to depth 30 would be 11^30 tree nodes; hash-consed it is one entry a level."""
    n = 12
    index = torch.tensor(list(itertools.permutations(range(n), 2))).T
    forest = Forest()
    trees = forest.of_nodes(pyg.Data(x=torch.zeros(n, dtype=torch.long), edge_index=index), 30)
    assert len(set(trees)) == 1
    assert len(forest.nodes) == 31


# --- frequent itemsets ----------------------------------------


@pytest.mark.parametrize("threshold", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_fp_growth_is_counting(seed, threshold):
    rng = random.Random(seed)
    rows = [(frozenset(i for i in range(7) if rng.random() < 0.5), rng.choice([1, 1, 2])) for _ in range(12)]
    found = list(fp_growth(rows, threshold))
    counted = {}
    for size in range(1, 8):
        for items in itertools.combinations(range(7), size):
            support = sum(n for row, n in rows if set(items) <= row)
            if support >= threshold:
                counted[frozenset(items)] = support
    assert dict(found) == counted
    assert len(found) == len(counted)  # none twice


def sets(*rows):
    return [frozenset(row) for row in rows]


def test_thresholds_are_absolute_and_of_each_class():
    rows, labels = sets([1], [1], [1, 2], [2], [2], [1]), [0, 0, 0, 1, 1, 1]
    assert mine(rows, labels, [3, 2]) == [Itemset((1,), 3, 0), Itemset((2,), 2, 1)]
    assert mine(rows, labels, [1, 3 - 2])[0] == Itemset((1,), 3, 0)
    assert Itemset((1, 2), 1, 0) in mine(rows, labels, [1, 1])


def test_exclusive_drops_what_is_frequent_in_two_classes():
    rows, labels = sets([1, 2], [1, 2], [1, 3], [1, 3], [4], [4]), [0, 0, 1, 1, 2, 2]
    kept = mine(rows, labels, [2, 2, 2], exclusive=True)
    assert [(i.trees, i.label) for i in kept] == [((1, 2), 0), ((2,), 0), ((1, 3), 1), ((3,), 1), ((4,), 2)]
    assert ((1,), 0) in [(i.trees, i.label) for i in mine(rows, labels, [2, 2, 2])]


def test_mining_refuses():
    rows, labels = sets([1, 2], [1], [1], [3]), [0, 0, 0, 1]
    with pytest.raises(DataError, match=r"in 4 of the 3 graphs of class 0: the largest support is 3. Lower"):
        mine(rows, labels, [4, 1])
    with pytest.raises(DataError, match="Class 2 has no training graphs"):
        mine(rows, labels, [1, 1, 1])
    with pytest.raises(DataError, match="more than 2 itemsets. Raise method.thresholds"):
        mine(rows, labels, [1, 1], max_itemsets=2)
    with pytest.raises(DataError, match="class 1 is frequent in another class too"):
        mine(sets([1, 2], [1]), [0, 1], [1, 1], exclusive=True)


# --- the distilled set ----------------------------------------


@pytest.fixture
def saved(tmp_path):
    forest = Forest()
    trees = sorted(set(forest.of_nodes(random_graph(1), 2)))
    itemsets = [Itemset(tuple(trees[:2]), 6, 0), Itemset((trees[1],), 3, 0), Itemset((trees[4],), 1, 1)]
    product = distilled(forest, itemsets, 2)
    product.save(tmp_path / "student")
    return itemsets, product.graphs, tmp_path / "student"


def test_saved_graphs_come_back(saved):
    itemsets, graphs, folder = saved
    loaded = load_distilled(folder)
    assert len(loaded) == 3
    for graph, back, itemset in zip(graphs, loaded, itemsets):
        for name in ("x", "edge_index", "edge_attr", "y", "support", "root_mask"):
            assert torch.equal(graph[name], back[name]), name
        assert int(back.support) == itemset.support
        assert int(back.y) == itemset.label
    about = json.loads((folder / "description.json").read_text())
    assert about["depth"] == 2
    again = Forest()
    for item, graph in zip(about["itemsets"], loaded):
        parsed = tuple(again.parse(about["trees"][t]) for t in item["trees"])
        assert len(graph.x) == sum(len(again.expand(tree)[0]) for tree in parsed)
    model = network("gin", 2, 3)
    assert_close(model(collate(loaded)), model(collate(graphs)))
    with pytest.raises(DataError, match="holds no distilled graphs"):
        load_distilled(folder / "elsewhere")


def test_single_nodes_keep_the_columns_of_edges(tmp_path):
    """An isolated atom next to a bond: no edges of its own, but batches with those who have."""
    forest = Forest()
    lone, bonded = forest.add((1,)), forest.add((1,), [((2,), forest.add((0,)))])
    product = distilled(forest, [Itemset((lone,), 1, 0), Itemset((bonded,), 1, 1)], 1)
    product.save(tmp_path)
    assert collate(load_distilled(tmp_path)).edge_attr.tolist() == [[2]]
    assert product.graphs[0].edge_index.shape == (2, 0)
    assert product.graphs[0].edge_attr.shape == (0, 1)


def test_support_weighted_draws(saved):
    _, graphs, _ = saved
    weights = supports_of(graphs)
    assert supports_of([random_graph(0)]) is None
    share = torch.bincount(drawn(3, 20_000, 0, 0, weights), minlength=3) / 20_000
    assert (share - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.015


def test_storage_by_hand():
    """A labelled edge: 2 + 2 labels, 2 ends, 1 edge label, class and two lengths."""
    graph = pyg.Data(
        x=torch.tensor([[1, 300], [2, 0]]),
        edge_index=torch.tensor([[0, 1], [1, 0]]),
        edge_attr=torch.tensor([[3], [3]]),
        y=torch.tensor([1]),
    )
    assert stored_graphs([graph]) == Stored(10, 4 * 2 + 2 + 1 + 3)  # 300 needs two bytes, so all node labels do
    directed = pyg.Data(x=graph.x, edge_index=graph.edge_index[:, :1], edge_attr=graph.edge_attr[:1], y=graph.y)
    assert stored_graphs([directed]).numbers == 10
    forest = Forest()
    a, b = forest.of_nodes(graph, 1)
    # each tree: 4 labels, 1 parent, 1 edge label, 1 length; shared by the itemsets; ids 1 + 2; 3 numbers an itemset
    assert stored_itemsets(forest, [Itemset((a,), 9, 0), Itemset((a, b), 7, 1)]).numbers == 2 * 7 + 3 + 6


def test_baselines_take_classes_in_turn_up_to_the_size():
    graphs = [random_graph(i, label=i % 2) for i in range(6)]
    one = stored_graphs(graphs[:1]).numbers
    assert taken([[4, 0, 2], [1, 3, 5]], graphs, 2 * one + 1) == [4, 1, 0]
    assert taken([[4, 0, 2], [1, 3, 5]], graphs, 2 * one) == [4, 1]
    assert taken([[4, 0], [1]], graphs, 10**9) == [4, 1, 0]


def test_herding_by_hand():
    """Unit rows at angles 0, 90 and 45 degrees: the middle first, then the two sides, each once."""
    import scipy.sparse

    assert herded(scipy.sparse.csr_matrix([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))[0] == 2
    # four e1 and one e2, mean (0.8, 0.2): w = (0.8, 0.2), (0.6, 0.4), then (0.4, 0.6), which asks for e2
    rows = [[1.0, 0.0], [5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert herded(scipy.sparse.csr_matrix(rows)) == [0, 1, 4, 2, 3]


def test_a_graph_without_edges_is_a_graph():
    """A lone atom: edge_attr is [0, 1]."""
    graph = pyg.Data(
        x=torch.tensor([[3]]),
        edge_index=torch.zeros(2, 0, dtype=torch.long),
        edge_attr=torch.zeros(0, 1, dtype=torch.long),
        y=torch.tensor([0]),
    )
    forest = Forest()
    assert [forest.canonical(tree) for tree in forest.of_nodes(graph, 2)] == ["3"]
    assert stored_graphs([graph]).numbers == 1 + 3


def test_continuous_features_are_refused():
    graph = random_graph(0)
    with pytest.raises(DataError, match=r"graph.x is torch.float32. Bin or quantise"):
        Forest().of_nodes(pyg.Data(x=torch.rand(2, 1), edge_index=graph.edge_index[:, :0]), 1)
    graph.edge_attr = graph.edge_attr.double()
    with pytest.raises(DataError, match="graph.edge_attr is torch.float64"):
        Forest().of_nodes(graph, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "must be 1 or more, got 0"),
        ({"repeats": 2, "keep": 3}, r"method.keep \(3\)"),
        ({"steps": 3}, "needs a method.step above 0"),
        ({"thresholds": 20}, r"a share in \(0, 1\], got 20"),
        ({"thresholds": [20, 0]}, r"counts of 1 or more"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Mirage(**options)


def test_threshold_candidates():
    assert Mirage(thresholds=[9, 5], step=2, steps=4).candidates([10, 10]) == [[9, 5], [7, 3], [5, 1]]
    assert Mirage(thresholds=0.3, step=0.1, steps=4).candidates([10, 25]) == [[3, 8], [2, 5], [1, 3]]
    with pytest.raises(ValueError, match="lists 2 counts, but the data has 3 classes"):
        Mirage(thresholds=[9, 5]).candidates([1, 1, 1])


# --- search, split, baselines, report ----------------------------------------


def test_search_keeps_the_best_quality_and_passes_over_what_cannot_be_mined():
    rows, labels = sets([1], [1], [1, 2], [2], [2], [1]), [0, 0, 0, 1, 1, 1]
    candidates = [[4, 4], [3, 2], [2, 2], [1, 1]]
    asked = []

    def quality(i, itemsets):
        asked.append((i, len(itemsets)))
        return {1: 0.7, 2: 0.7, 3: 0.6}[i]

    assert search(rows, labels, candidates, quality) == ([3, 2], mine(rows, labels, [3, 2]))
    assert [i for i, _ in asked] == [1, 2, 3]
    assert search(rows, labels, candidates, lambda i, _: i)[0] == [1, 1]
    assert search(rows, labels, [[3, 2]], None)[0] == [3, 2]  # one candidate needs no judge
    with pytest.raises(DataError, match="No set of trees occurs in 4"):
        search(rows, labels, [[5, 4], [4, 4]], quality)


def test_split_holds_out_the_same_share_of_every_class():
    graphs = [pyg.Data(y=torch.tensor([int(i >= 20)]), number=i) for i in range(30)]
    training, validation = split(graphs, 0.2, seed=0)
    assert Counter(int(g.y) for g in validation) == {0: 4, 1: 2}
    assert sorted(g.number for g in training + validation) == list(range(30))
    assert [g.number for g in validation] == [g.number for g in split(graphs, 0.2, seed=0)[1]]
    assert [g.number for g in validation] != [g.number for g in split(graphs, 0.2, seed=1)[1]]
    with pytest.raises(DataError, match="all 20 are of class 0"):
        split(graphs[:20], 0.2, seed=0)
    with pytest.raises(DataError, match="Class 1 has one training graph"):
        split(graphs[:21], 0.2, seed=0)


def test_baselines_are_real_graphs_of_every_class():
    graphs = [random_graph(i, label=i % 2) for i in range(10)]
    trees = [Forest().of_nodes(g, 1) for g in graphs]
    one = stored_graphs(graphs[:1]).numbers
    assert baseline("full", graphs, trees, one, 0) == graphs
    draws = {tuple(map(id, baseline("random", graphs, trees, 4 * one, seed))) for seed in range(5)}
    assert len(draws) > 1  # a function of the seed
    for kind in ("random", "herding"):
        chosen = baseline(kind, graphs, trees, 4 * one, 0)
        assert [int(g.y) for g in chosen] == [0, 1, 0, 1]
        assert len(set(map(id, chosen))) == 4
        assert stored_graphs(chosen).numbers >= 4 * one


def test_narrowed_graphs_keep_one_label_column():
    graph = random_graph(0)
    (narrow,) = narrowed([graph])
    assert torch.equal(narrow.x, graph.x[:, :1])
    assert torch.equal(narrow.edge_index, graph.edge_index)
    plain = random_graph(0, edge_labels=0)
    assert narrowed([plain])[0].edge_attr is None


def test_the_best_by_validation_are_reported():
    runs = [{"validation_auc": v, "test_auc": t} for v, t in ((0.5, 1.0), (0.9, 0.6), (0.7, 0.8))]
    report = best_of(runs, 2)
    assert report == pytest.approx({"test_auc": 0.7, "test_auc_std": 0.1, "validation_auc": 0.8})


# --- the whole method --------------------------------------------------------


def run_of(folder, **overrides):
    raw = {
        "method": {"name": "mirage", "depth": 2, "repeats": 2, "keep": 1},
        "judge": {"name": "gin", "options": {"width": 16, "layers": 2}},
        "data": {"task": "synthetic_rings", "size": 40, "test_size": 20},
        "train": {"steps": 60, "batch": 16, "lr": 0.01, "optimizer": "adam", "trackers": []},
    }
    return Run(recipe.resolve(recipe.apply(raw, overrides)), folder)


def test_from_recipe_to_folder(tmp_path):
    gat = [{"name": "gat", "options": {"width": 8, "layers": 2}}]
    whole = run_of(tmp_path / "a", committee=gat).execute()
    loaded = load_distilled(tmp_path / "a" / "student")
    assert len(loaded) == whole.metrics["graphs"]
    assert whole.metrics["test_auc"] > 0.9
    assert {"test_auc_gat", "validation_auc"} <= set(whole.metrics)
    assert whole.metrics["threshold_0"] == 4  # a quarter of the 16 of 20 graphs that are not held out
    description = json.loads((tmp_path / "a" / "student" / "description.json").read_text())
    assert [int(g.support) for g in loaded] == [row["support"] for row in description["itemsets"]]
    shutil.rmtree(tmp_path / "a" / "stages" / "judge-judge-1")  # as if it had been killed there
    assert run_of(tmp_path / "a", committee=gat).execute().metrics == whole.metrics


def test_baselines_and_options_through_the_recipe(tmp_path):
    full = run_of(tmp_path / "full", **{"method.subset": "full"}).execute().metrics
    assert (full["graphs"], full["stored_numbers"]) == (32, full["full_numbers"])
    chosen = run_of(tmp_path / "herding", **{"method.subset": "herding"}).execute().metrics
    mirage = run_of(tmp_path / "m", **{"method.sampling": "uniform", "method.labels": "first"}).execute().metrics
    assert mirage["stored_numbers"] <= chosen["stored_numbers"] < full["stored_numbers"]
    searched = {"method.thresholds": [99, 99], "method.step": 47, "method.steps": 3}
    assert run_of(tmp_path / "s", **searched).execute().metrics["threshold_1"] == 5
    assert not list((tmp_path / "s" / "stages").glob("judge-search*"))  # only one candidate could be mined


def test_what_judges_are_given(tmp_path, monkeypatch):
    """Weights are the supports only for Mirage's own set sampled so; every judge has a seed and a start of its own."""
    module, seen = sys.modules[Forest.__module__], []

    def spy(judge, items, **options):
        seen.append((judge, items, options))
        return judged(judge, items, **options)

    monkeypatch.setattr(module, "judged", spy)
    run_of(tmp_path / "a", **{"train.steps": 2, "train.weight_decay": 0.3}).execute()
    for judge, items, options in seen:
        assert options["weights"].tolist() == [int(item.support) for item in items]
        assert options["optimizer"].param_groups[0]["weight_decay"] == 0.3
        assert not set(map(id, options["validation"])) & set(map(id, options["test"]))
        assert judge.config["width"] == 16
    assert len({options["seed"] for *_, options in seen}) == len(seen) == 2
    seen.clear()
    run_of(tmp_path / "b", **{"train.steps": 2, "method.sampling": "uniform"}).execute()
    run_of(tmp_path / "c", **{"train.steps": 2, "method.subset": "random"}).execute()
    assert [options["weights"] for *_, options in seen] == [None] * 4
    run_of(tmp_path / "d", **{"train.steps": 2, "train.seed": 1}).execute()
    assert len({options["seed"] for *_, options in seen}) == 4  # b and c judge alike, d anew


def test_first_labels_narrow_graphs_and_judges_alike(tmp_path, monkeypatch):
    run = run_of(tmp_path, **{"train.steps": 2, "method.labels": "first"})
    for graph in [*run.source.train, *run.source.test]:
        monkeypatch.setattr(
            graph, "x", torch.cat([graph.x, torch.arange(len(graph.x))[:, None]], 1)
        )  # all atoms differ
    monkeypatch.setitem(run.source.context, "node_labels", [5, 99])
    assert run.model("judge").config["node_labels"] == [5, 99]
    run.execute()
    assert load_distilled(tmp_path / "student")[0].x.shape[1] == 1


def test_the_recipe_refuses(tmp_path):
    with pytest.raises(DataError, match=r"the largest support is \d+. Lower method.thresholds"):
        run_of(tmp_path, **{"method.thresholds": [99, 99]}).execute()
    with pytest.raises(DataError, match="Class 2 has no training graphs"):
        run_of(tmp_path, **{"judge.options.classes": 3}).execute()
    with pytest.raises(RecipeError, match="constant, unclipped rate"):
        run_of(tmp_path, **{"train.schedule": "cosine"}).execute()

"""Mirage: a graph data set distilled to its frequent sets of computation trees, with no model and no gradient.

    T_0(v) = (label(v), {})                                                computation trees of node v,
    T_l(v) = (label(v), {{ (label(uv), T_{l-1}(u)) : u in N(v) }})         as deep as the classifier has layers
    F_c = { S : sup_c(S) >= theta_c },  sup_c(S) = |{ G of class c : S a subset of the trees of G }|      (FP-growth)
    D = { (S, sup_c(S), c) : S in F_c };   train on S with p(S) = sup(S) / sum sup, readout over the roots of S

An L-layer message-passing network computes at v a function of T_L(v) alone, so a graph is the multiset of its trees and
any such network can learn from D. Exact for sum, mean and attention aggregation; GCN's degree normalisation sees other
degrees at the leaves, so for GCN it is an approximation.

Source: "Mirage: Model-Agnostic Graph Distillation for Graph Classification", arXiv 2310.09486 (ICLR 2024).
Departures: trees are hash-consed level by level, T_l from T_{l-1}: O(L E) where enumeration costs O(N deg^L); any
number of classes; thresholds may also be shares of a class. The released code draws 1000 support-weighted items, then
overwrites them with the plain list of itemsets: its path is `sampling: uniform`, with `exclusive: true` and
`min_occurrences: 2` in some of its scripts. As in the paper, a tree's multiplicity within a graph is dropped. Herding
is done on the counts of trees, since nothing here has a model to embed with; random and herded graphs are taken from
the classes in turn.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, RecipeError, require
from potstill.contracts.spec import MethodConfig
from potstill.evaluation.graphs import judged, labels_of
from potstill.methods import Role, method
from potstill.run import Result, Run
from potstill.training.optimizers import make_optimizer
from potstill.training.tracking import Journal

Label = tuple[int, ...]  # the values of a node's or an edge's label columns


class Forest:
    """Distinct rooted labelled trees, each stored once: tree id -> (label, sorted ((edge label, child id), ...)).

    Children are shared, so equal ids mean isomorphic trees, and a tree of depth L costs one entry.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[Label, tuple[tuple[Label, int], ...]]] = []
        self._ids: dict[tuple[Label, tuple[tuple[Label, int], ...]], int] = {}
        self._texts: dict[int, str] = {}

    @property
    def edge_columns(self) -> int:
        """How many labels an edge has: 0 for graphs without edge labels (or without edges)."""
        return next((len(children[0][0]) for _, children in self.nodes if children), 0)

    def add(self, label: Label, children: Iterable[tuple[Label, int]] = ()) -> int:
        """The id of a tree from its root's label and its children."""
        node = (label, tuple(sorted(children)))
        if node not in self._ids:
            self._ids[node] = len(self.nodes)
            self.nodes.append(node)
        return self._ids[node]

    def of_nodes(self, graph: Any, depth: int) -> list[int]:
        """The computation tree of depth `depth` of every node of a PyG graph, as ids. Children send to their parent."""
        labels, edges = _columns(graph.x, "x"), _edge_columns(graph)
        incoming: list[list[tuple[Label, int]]] = [[] for _ in labels]
        for sender, receiver, edge in zip(*graph.edge_index.tolist(), edges, strict=True):
            incoming[receiver].append((edge, sender))
        trees = [self.add(label) for label in labels]
        for _ in range(depth):
            trees = [self.add(label, ((e, trees[u]) for e, u in senders)) for label, senders in zip(labels, incoming)]
        return trees

    def canonical(self, tree: int) -> str:
        """A text equal for isomorphic trees only, whatever the ids: `6(0:8,1:6(0:1))` is label(edge:child,...)."""
        if tree not in self._texts:
            label, children = self.nodes[tree]
            parts = sorted((_text(edge) + ":" if edge else "") + self.canonical(child) for edge, child in children)
            self._texts[tree] = _text(label) + (f"({','.join(parts)})" if parts else "")
        return self._texts[tree]

    def parse(self, text: str) -> int:
        """The id of the tree that a canonical text describes."""
        position = 0

        def label() -> Label:
            nonlocal position
            start = position
            while position < len(text) and text[position] in "0123456789.":
                position += 1
            try:
                return tuple(int(part) for part in text[start:position].split("."))
            except ValueError:
                raise DataError(f"{text!r} is no canonical tree: expected a label at character {start}.") from None

        def subtree(root: Label) -> int:
            nonlocal position
            children = []
            if position < len(text) and text[position] == "(":
                while position < len(text) and text[position] in "(,":
                    position += 1
                    edge: Label = ()
                    child = label()
                    if position < len(text) and text[position] == ":":
                        position += 1
                        edge, child = child, label()
                    children.append((edge, subtree(child)))
                if position >= len(text) or text[position] != ")":
                    raise DataError(
                        f"{text!r} is no canonical tree: a parenthesis is not closed at character {position}."
                    )
                position += 1
            return self.add(root, children)

        tree = subtree(label())
        if position != len(text):
            raise DataError(f"{text!r} is no canonical tree: unexpected text at character {position}.")
        return tree

    def expand(self, tree: int) -> tuple[list[Label], list[int], list[Label]]:
        """A tree written out: label of each node (root first), parent of each node but the root, label of its edge."""
        labels, parents, edges, queue = [self.nodes[tree][0]], [], [], [(tree, 0)]
        for node, place in queue:  # grows while it is read: breadth first
            for edge, child in self.nodes[node][1]:
                queue.append((child, len(labels)))
                labels.append(self.nodes[child][0])
                parents.append(place)
                edges.append(edge)
        return labels, parents, edges


def _text(label: Label) -> str:
    return ".".join(map(str, label))


def _columns(values: Tensor, what: str) -> list[Label]:
    if values.is_floating_point():
        raise DataError(
            f"Mirage needs discrete labels, but graph.{what} is {values.dtype}. "
            "Bin or quantise continuous features to integers first."
        )
    values = values[:, None] if values.dim() == 1 else values
    return [tuple(row) for row in values.tolist()]


def _edge_columns(graph: Any) -> list[Label]:
    if graph.edge_attr is None:
        return [()] * graph.edge_index.shape[1]
    return _columns(graph.edge_attr, "edge_attr")


@dataclass(frozen=True)
class Itemset:
    """Trees that occur together in `support` training graphs of class `label`."""

    trees: tuple[int, ...]  # ids, ascending
    support: int
    label: int


def fp_growth(
    transactions: Iterable[tuple[Collection[int], int]], threshold: int
) -> Iterator[tuple[frozenset[int], int]]:
    """Every itemset of `transactions` (items, how often) that occurs `threshold` times or more, with its count.

    FP-growth (Han, Pei and Yin 2000): transactions share prefixes in a tree, and the sets that end in an item grow from
    that item's prefix paths. A generator, because the sets can be exponentially many and the caller may have enough.
    """
    transactions = list(transactions)
    support: Counter[int] = Counter()
    for items, count in transactions:
        for item in items:
            support[item] += count
    order = sorted((item for item, count in support.items() if count >= threshold), key=lambda i: (-support[i], i))
    rank = {item: i for i, item in enumerate(order)}
    root: dict[int, Any] = {}
    empty: tuple[int, ...] = ()
    places: dict[int, list[list[Any]]] = {
        item: [] for item in order
    }  # item -> its tree nodes [prefix, count, children]
    for items, count in transactions:
        children, prefix = root, empty
        for item in sorted((i for i in items if i in rank), key=rank.__getitem__):
            if item not in children:
                children[item] = [prefix, 0, {}]
                places[item].append(children[item])
            node = children[item]
            node[1] += count
            children, prefix = node[2], (*prefix, item)
    for item in reversed(order):
        yield frozenset([item]), support[item]
        for rest, count in fp_growth(((prefix, count) for prefix, count, _ in places[item]), threshold):
            yield rest | {item}, count


def mine(
    transactions: Sequence[frozenset[int]],
    labels: Sequence[int],
    thresholds: Sequence[int],
    *,
    exclusive: bool = False,
    max_itemsets: int = 10_000,
) -> list[Itemset]:
    """The frequent itemsets of every class, by falling support. `thresholds[c]`: graphs of class c that must hold it.

    `exclusive` drops the sets that are frequent in more than one class. A class left without a set is a `DataError`.
    """
    found: list[dict[frozenset[int], int]] = []
    for c, threshold in enumerate(thresholds):
        rows = [(items, 1) for items, label in zip(transactions, labels, strict=True) if label == c]
        if not rows:
            raise DataError(f"Class {c} has no training graphs, so nothing can be mined for it.")
        sets: dict[frozenset[int], int] = {}
        for items, support in fp_growth(rows, threshold):
            sets[items] = support
            if len(sets) > max_itemsets:
                raise DataError(
                    f"Threshold {threshold} of class {c} gives more than {max_itemsets} itemsets. "
                    "Raise method.thresholds or method.max_itemsets."
                )
        if not sets:
            largest = max(Counter(chain.from_iterable(items for items, _ in rows)).values(), default=0)
            raise DataError(
                f"No set of trees occurs in {threshold} of the {len(rows)} graphs of class {c}: the largest support is "
                f"{largest}. Lower method.thresholds."
            )
        found.append(sets)
    if exclusive:
        classes_of = Counter(chain.from_iterable(found))
        found = [{items: n for items, n in sets.items() if classes_of[items] == 1} for sets in found]
        for c, sets in enumerate(found):
            if not sets:
                raise DataError(
                    f"Every frequent itemset of class {c} is frequent in another class too, so method.exclusive leaves "
                    "none. Change method.thresholds, or set method.exclusive to false."
                )
    itemsets = [Itemset(tuple(sorted(s)), n, c) for c, sets in enumerate(found) for s, n in sets.items()]
    return sorted(itemsets, key=lambda i: (i.label, -i.support, i.trees))


def bundle(forest: Forest, itemset: Itemset) -> Any:
    """An itemset as a PyG training graph: the disjoint union of its trees, edges child -> parent, roots marked."""
    labels: list[Label] = []
    pairs: list[tuple[int, int]] = []
    edges: list[Label] = []
    roots: list[int] = []
    for tree in itemset.trees:
        nodes, parents, tree_edges = forest.expand(tree)
        start = len(labels)
        roots.append(start)
        labels += nodes
        edges += tree_edges
        pairs += [(start + child, start + parent) for child, parent in enumerate(parents, start=1)]
    data = require("torch_geometric.data", "graphs").Data(
        x=torch.tensor(labels, dtype=torch.long),
        edge_index=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous(),
        y=torch.tensor([itemset.label]),
        support=torch.tensor([itemset.support]),
        root_mask=torch.zeros(len(labels), dtype=torch.bool).index_fill(0, torch.tensor(roots), True),
    )
    if forest.edge_columns:
        data.edge_attr = torch.tensor(edges, dtype=torch.long).reshape(-1, forest.edge_columns)
    return data


@dataclass(frozen=True)
class Stored:
    """What keeping a set of graphs takes: how many numbers, and bytes with each kind in its smallest integer type."""

    numbers: int
    bytes: int

    @staticmethod
    def of(*kinds: Sequence[int]) -> "Stored":
        sized = [(len(kind), np.min_scalar_type(max(kind)).itemsize) for kind in kinds if len(kind)]
        return Stored(sum(n for n, _ in sized), sum(n * size for n, size in sized))


def stored_graphs(graphs: Sequence[Any]) -> Stored:
    """Real graphs: node labels, each undirected edge once (two ends and its label), class, and the two lengths."""
    nodes: list[int] = []
    ends: list[int] = []
    edge_labels: list[int] = []
    heads: list[int] = []
    for graph in graphs:
        triples = list(zip(*graph.edge_index.tolist(), _edge_columns(graph), strict=True))
        if Counter(triples) == Counter((v, u, e) for u, v, e in triples):
            triples = [(u, v, e) for u, v, e in triples if u <= v]
        nodes += chain.from_iterable(_columns(graph.x, "x"))
        ends += chain.from_iterable((u, v) for u, v, _ in triples)
        edge_labels += chain.from_iterable(e for _, _, e in triples)
        heads += [int(graph.y), len(graph.x), len(triples)]
    return Stored.of(nodes, ends, edge_labels, heads)


def stored_itemsets(forest: Forest, itemsets: Sequence[Itemset]) -> Stored:
    """Distilled: each distinct tree once (labels, parents, edge labels, length); ids, length, support, class a set."""
    trees = [forest.expand(tree) for tree in sorted({tree for itemset in itemsets for tree in itemset.trees})]
    return Stored.of(
        list(chain.from_iterable(chain.from_iterable(labels) for labels, _, _ in trees)),
        list(chain.from_iterable(parents for _, parents, _ in trees)),
        list(chain.from_iterable(chain.from_iterable(edges) for _, _, edges in trees)),
        [len(labels) for labels, _, _ in trees],
        [place for itemset in itemsets for place in range(len(itemset.trees))],  # ids of the kept trees, renumbered
        list(chain.from_iterable((len(i.trees), i.support, i.label) for i in itemsets)),
    )


@dataclass(frozen=True)
class GraphSet:
    """What a run leaves: PyG graphs to train on, and what they are."""

    graphs: list[Any]
    description: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write description.json, and graphs.safetensors in PyG's collated form: every attribute concatenated over the
        graphs, with the slices that cut it back. `load_distilled` reads it; nothing is pickled."""
        collate = require("torch_geometric.data.collate", "graphs").collate
        joined, slices, _ = collate(type(self.graphs[0]), self.graphs, increment=False, add_batch=False)
        tensors = {name: joined[name].contiguous() for name in slices}
        tensors |= {f"slices.{name}": torch.as_tensor(cut) for name, cut in slices.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "graphs.safetensors")
        (folder / "description.json").write_text(json.dumps(self.description, indent=1) + "\n")


def distilled(forest: Forest, itemsets: Sequence[Itemset], depth: int) -> GraphSet:
    """The itemsets as training graphs; their description is the set itself: canonical trees, itemsets, supports."""
    kept = sorted({tree for itemset in itemsets for tree in itemset.trees})
    number = {tree: i for i, tree in enumerate(kept)}
    rows = [{"trees": [number[t] for t in i.trees], "support": i.support, "label": i.label} for i in itemsets]
    description = {"depth": depth, "trees": [forest.canonical(tree) for tree in kept], "itemsets": rows}
    return GraphSet([bundle(forest, itemset) for itemset in itemsets], description)


def supports_of(graphs: Sequence[Any]) -> Tensor | None:
    """What support-weighted sampling draws by; None (uniform) for real graphs, which have no support."""
    return torch.cat([graph.support for graph in graphs]).double() if "support" in graphs[0] else None


def load_distilled(folder: str | Path) -> list[Any]:
    """The PyG graphs of a distilled set: x, edge_index, edge_attr, y, support, root_mask. Nothing is unpickled."""
    path = Path(folder) / "graphs.safetensors"
    if not path.is_file():
        raise DataError(f"{folder} holds no distilled graphs: expected {path.name} as `potstill run mirage` writes it.")
    tensors = load_file(path)
    names = [name for name in tensors if not name.startswith("slices.")]
    cuts = {name: tensors[f"slices.{name}"].tolist() for name in names}
    make = require("torch_geometric.data", "graphs").Data
    return [
        make(
            **{
                n: tensors[n][..., a:b] if n == "edge_index" else tensors[n][a:b]
                for n in names
                for a, b in [cuts[n][i : i + 2]]
            }
        )
        for i in range(len(cuts["y"]) - 1)
    ]


def herded(counts: csr_matrix) -> list[int]:
    """Rows by herding (Welling 2009): each row keeps the mean of the chosen near the mean of all; unit norms."""
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(1)).ravel())
    rows = counts.multiply(1 / np.maximum(norms, 1e-12)[:, None]).tocsr()  # a graph without nodes is a row of zeros
    mean = np.asarray(rows.mean(0)).ravel()
    score, free, order = rows @ mean, np.ones(len(norms), dtype=bool), []
    weight = score.copy()
    for _ in range(len(norms)):
        best = int(np.where(free, weight, -np.inf).argmax())
        order.append(best)
        free[best] = False
        weight = weight + score - np.asarray((rows @ rows[best].T).todense()).ravel()
    return order


def taken(orders: Sequence[Sequence[int]], graphs: Sequence[Any], numbers: int) -> list[int]:
    """Graphs from the classes in turn, each in its order, until at least `numbers` numbers are stored."""
    longest = max(map(len, orders))
    turns = [order[i] for i in range(longest) for order in orders if i < len(order)]
    sizes = list(accumulate(stored_graphs([graphs[i]]).numbers for i in turns))
    enough = next((i for i, size in enumerate(sizes, start=1) if size >= numbers), len(turns))
    return turns[:enough]


class Mirage(MethodConfig):
    subset: Literal["mirage", "random", "herding", "full"] = "mirage"  # what judges train on; the others are baselines
    labels: Literal["all", "first"] = "all"  # label columns of nodes and edges that trees and judges see
    depth: int = 3  # L, the hops of a tree: as many as the judge has layers
    thresholds: float | list[int] = (
        0.25  # theta, graphs of each class that must contain a set, or one share of every class
    )
    step: float | int = 0.0  # threshold search: lowered by this (in the unit of thresholds) ...
    steps: int = Field(1, ge=1)  # ... this many times less one; the best mean validation AUC is kept
    exclusive: bool = False  # drop the itemsets frequent in more than one class
    min_occurrences: int = Field(1, ge=1)  # drop trees that occur at fewer nodes of the training graphs
    sampling: Literal["support", "uniform"] = "support"
    max_itemsets: int = Field(10_000, ge=1)
    validation: float = Field(0.2, gt=0, lt=1)  # share of the training graphs of each class
    repeats: int = Field(10, ge=1)  # judges trained an architecture
    keep: int = Field(5, ge=1)  # of them, the best by validation AUC are reported

    @model_validator(mode="after")
    def _sensible(self) -> "Mirage":
        if self.depth < 1:
            raise RecipeError(f"method.depth is the number of hops and must be 1 or more, got {self.depth}.")
        if self.keep > self.repeats:
            raise RecipeError(f"method.keep ({self.keep}) of method.repeats ({self.repeats}) judges cannot be kept.")
        if self.steps > 1 and self.step <= 0:
            raise RecipeError("A threshold search (method.steps > 1) needs a method.step above 0.")
        low = min(self.thresholds) if isinstance(self.thresholds, list) else self.thresholds
        if low <= 0 or (isinstance(self.thresholds, float) and self.thresholds > 1):
            raise RecipeError(
                f"method.thresholds must be counts of 1 or more, one a class, or a share in (0, 1], "
                f"got {self.thresholds}."
            )
        return self

    def candidates(self, sizes: Sequence[int]) -> list[list[int]]:
        """Absolute thresholds of every class, one list a step of the search. `sizes`: graphs of each class."""
        if isinstance(self.thresholds, list):
            if len(self.thresholds) != len(sizes):
                raise RecipeError(
                    f"method.thresholds lists {len(self.thresholds)} counts, but the data has {len(sizes)} classes."
                )
            rows = [[int(start - i * self.step) for start in self.thresholds] for i in range(self.steps)]
        else:
            rows = [
                [math.ceil((self.thresholds - i * self.step) * size - 1e-9) for size in sizes]
                for i in range(self.steps)
            ]
        return [row for i, row in enumerate(rows) if i == 0 or min(row) >= 1]


def narrowed(graphs: Sequence[Any]) -> list[Any]:
    """The graphs with the first label column of nodes and edges alone: the kind of atom and of bond, for molecules."""
    make = require("torch_geometric.data", "graphs").Data

    def first(values: Tensor | None) -> Tensor | None:
        return None if values is None else values if values.dim() == 1 else values[:, :1]

    return [make(x=first(g.x), edge_index=g.edge_index, edge_attr=first(g.edge_attr), y=g.y) for g in graphs]


def split(graphs: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, validation): of every class the same share, at least one graph each, chosen by the seed."""
    labels = labels_of(graphs)
    if len(classes := labels.unique().tolist()) < 2:
        raise DataError(f"Mirage needs graphs of two classes or more, but all {len(graphs)} are of class {classes[0]}.")
    held: set[int] = set()
    for c in classes:
        rows = (labels == c).nonzero()[:, 0]
        if len(rows) < 2:
            raise DataError(f"Class {c} has one training graph; mining and validation need one each.")
        size = min(max(1, round(share * len(rows))), len(rows) - 1)
        held |= set(rows[keyed.permutation(keyed.key(seed, "validation", c), len(rows))[:size]].tolist())
    return [g for i, g in enumerate(graphs) if i not in held], [graphs[i] for i in sorted(held)]


def baseline(kind: str, graphs: Sequence[Any], trees: Sequence[Sequence[int]], numbers: int, seed: int) -> list[Any]:
    """Real graphs: all, or random or herded ones from every class in turn until they store `numbers` numbers."""
    if kind == "full":
        return list(graphs)
    labels, orders = labels_of(graphs), []
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero()[:, 0].tolist()
        if kind == "random":
            order = keyed.permutation(keyed.key(seed, "random", c), len(rows)).tolist()
        else:
            ids = np.concatenate([trees[i] for i in rows])
            places = np.repeat(np.arange(len(rows)), [len(trees[i]) for i in rows])
            order = herded(csr_matrix((np.ones(len(ids)), (places, ids))))
        orders.append([rows[i] for i in order])
    return [graphs[i] for i in taken(orders, graphs, numbers)]


def search(
    transactions: Sequence[frozenset[int]],
    labels: Sequence[int],
    candidates: Sequence[list[int]],
    quality: Callable[[int, list[Itemset]], float],
    **options: Any,
) -> tuple[list[int], list[Itemset]]:
    """The thresholds whose itemsets have the best `quality(number, itemsets)`, the first of equals, and these itemsets.

    Candidates that leave a class without a set, or with too many, are passed over; if all are, the last one's error says
    why. A single candidate is not judged.
    """
    mined: list[tuple[int, list[Itemset]]] = []
    for i, thresholds in enumerate(candidates):
        try:
            mined.append((i, mine(transactions, labels, thresholds, **options)))
        except DataError:
            if i == len(candidates) - 1 and not mined:
                raise
    best, itemsets = mined[0] if len(mined) == 1 else max(mined, key=lambda found: quality(*found))
    return candidates[best], itemsets


def best_of(runs: Sequence[dict[str, float]], keep: int) -> dict[str, float]:
    """Mean and deviation of the test AUC over the `keep` runs with the best validation AUC, and the mean of theirs."""
    kept = sorted(runs, key=lambda run: -run["validation_auc"])[:keep]
    tests = [run["test_auc"] for run in kept]
    validation = fmean(run["validation_auc"] for run in kept)
    return {"test_auc": fmean(tests), "test_auc_std": pstdev(tests), "validation_auc": validation}


@method(
    "mirage",
    data="graphs",
    judge=Role("graph_classifier", ready=False),
    committee=Role("graph_classifier", ready=False, optional=True, many=True),
)
def mirage(run: Run, config: Mirage) -> Result:
    if run.train.schedule != "constant" or run.train.warmup or run.train.clip:
        raise RecipeError(
            "mirage trains judges at a constant, unclipped rate: leave out train.schedule, warmup and clip."
        )
    few = config.labels == "first"
    train_graphs, test = (narrowed(g) if few else g for g in (run.source.train, run.source.test))
    training, validation = split(train_graphs, config.validation, run.seed)
    labels, judge, clock = labels_of(training).tolist(), run.model("judge"), Journal(run.folder).clock
    weighted = config.sampling == "support"

    def train_one(name: str, network: Any, graphs: list[Any], number: int) -> dict[str, float]:
        seed = keyed.key(run.seed, "judge", name, number)
        changes = {name: network.config[name][:1] for name in ("node_labels", "edge_labels")} if few else {}
        fresh, start = network.fresh(seed, **changes).to(run.device), time.perf_counter()
        outcome, _ = judged(
            fresh, graphs, validation=validation, test=test, seed=seed,
            weights=supports_of(graphs) if weighted else None,
            optimizer=make_optimizer(run.train.optimizer_spec(), fresh.parameters()),
            steps=run.train.steps, batch=run.train.batch, every=run.train.evaluate_every or 20,
        )  # fmt: skip
        clock(f"judge {name}", number, time.perf_counter() - start, run.train.steps * run.train.batch)
        return asdict(outcome)

    def train(name: str, network: Any, graphs: list[Any]) -> dict[str, float]:
        numbers = range(config.repeats)
        return best_of(
            [run.stage(f"judge-{name}-{i}", train_one, name, network, graphs, i) for i in numbers], config.keep
        )

    start = time.perf_counter()
    forest = Forest()
    trees = [forest.of_nodes(graph, config.depth) for graph in training]
    occurrences = Counter(chain.from_iterable(trees))
    transactions = [frozenset(t for t in ids if occurrences[t] >= config.min_occurrences) for ids in trees]
    clock("trees", 0, time.perf_counter() - start, len(training))

    start = time.perf_counter()
    thresholds, itemsets = search(
        transactions,
        labels,
        config.candidates([labels.count(c) for c in range(judge.classes)]),
        lambda i, found: train(f"search{i}", judge, [bundle(forest, s) for s in found])["validation_auc"],
        exclusive=config.exclusive,
        max_itemsets=config.max_itemsets,
    )
    clock("itemsets", 0, time.perf_counter() - start, len(training))

    size, whole = stored_itemsets(forest, itemsets), stored_graphs(training)
    if config.subset == "mirage":
        product = distilled(forest, itemsets, config.depth)
    else:
        product = GraphSet(baseline(config.subset, training, trees, size.numbers, run.seed), {"graphs": config.subset})
        size = stored_graphs(product.graphs)
    metrics = train("judge", judge, product.graphs)
    for i, other in enumerate(run.models("committee") if run.has("committee") else []):
        metrics[f"test_auc_{other.name}"] = train(f"committee{i}", other, product.graphs)["test_auc"]
    metrics |= {
        "graphs": len(product.graphs), "stored_numbers": size.numbers, "stored_bytes": size.bytes,
        "full_numbers": whole.numbers, "full_bytes": whole.bytes, "distinct_trees": len(occurrences),
    }  # fmt: skip
    metrics |= {f"threshold_{c}": threshold for c, threshold in enumerate(thresholds)}
    shown = [[i.label, i.support, "  ".join(map(forest.canonical, i.trees))] for i in itemsets[:50]]
    run.record(
        "itemsets", "table", "The most frequent sets of trees", columns=["class", "support", "trees"], rows=shown
    )
    return Result(student=product, metrics=metrics)

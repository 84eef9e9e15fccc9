"""Graph classifiers: masked readout, edge labels, the exactness of message passing on computation trees, saving."""

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import DataError, ModelError
from potstill.models.graphs import GCNWithEdges, GraphClassifier

pyg = pytest.importorskip("torch_geometric.data")


def path_graph(labels, edges=None, **more):
    n = len(labels)
    forward = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    attributes = None if edges is None else torch.tensor(edges * 2)[:, None]
    return pyg.Data(
        x=torch.tensor(labels)[:, None],
        edge_index=torch.cat([forward, forward.flip(0)], 1),
        edge_attr=attributes,
        **more,
    )


def classifier(name, **options):
    torch.manual_seed(0)
    options = {"node_labels": 4, "classes": 2, "width": 6, "layers": 2} | options
    return GraphClassifier.PACKAGED[name](**options).double().eval()


@pytest.mark.parametrize("edge_labels", [0, 3])
@pytest.mark.parametrize("name", ["gin", "gcn", "gat"])
def test_batching_and_renumbering_change_nothing(name, edge_labels):
    model = classifier(name, edge_labels=edge_labels)
    one, two = path_graph([0, 1, 2], [0, 1]), path_graph([3, 1, 2, 0], [2, 0, 1])
    batched = model(pyg.Batch.from_data_list([one, two]))
    assert_close(batched, torch.cat([model(one), model(two)]))
    order = torch.tensor([2, 0, 3, 1])  # new node i is old node order[i]
    place = order.argsort()
    renumbered = pyg.Data(x=two.x[order], edge_index=place[two.edge_index], edge_attr=two.edge_attr)
    assert_close(model(renumbered), model(two))
    assert (batched[0] - batched[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gin", "gcn", "gat"])
def test_edge_labels_reach_the_logits(name):
    model = classifier(name, edge_labels=3)
    assert (model(path_graph([0, 1, 2], [0, 1])) - model(path_graph([0, 1, 2], [0, 2]))).abs().max() > 1e-4


def test_readout_sums_roots_where_they_are_marked():
    model = classifier("gin")
    graph = path_graph([0, 1, 2])
    hidden = model.embed(graph)
    assert_close(model.readout(graph)[0], hidden.sum(0))
    graph.root_mask = torch.tensor([False, True, True])
    assert_close(model(graph)[0], model.linear(hidden[1] + hidden[2]))
    both = pyg.Batch.from_data_list([path_graph([3, 3], root_mask=torch.tensor([False, False])), graph])
    assert_close(model.readout(both), torch.stack([torch.zeros_like(hidden[0]), hidden[1] + hidden[2]]))


def test_gcn_with_edges_by_hand():
    """An edge 0 -> 1, so d = (1, 2): node 1 gets relu(h_0 + e) / sqrt(2) + relu(h_1 + root) / 2."""
    layer = GCNWithEdges(1).double()
    layer.load_state_dict(
        {n: torch.tensor(v) for n, v in (("root", [0.5]), ("linear.weight", [[1.0]]), ("linear.bias", [0.0]))}
    )
    out = layer(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[0], [1]]), torch.tensor([[2.0]]).double())
    assert_close(out, torch.tensor([[1.5], [3 / 2**0.5 + 3.5 / 2]]).double())


def test_layers_are_rectified_between():
    model, graph = classifier("gcn"), path_graph([0, 1, 2])
    first, second = model.convolutions
    hidden = first(model.embed_nodes(graph.x), graph.edge_index)
    assert (hidden < 0).any()
    assert_close(model.embed(graph), second(hidden.clamp_min(0), graph.edge_index))


def test_last_layer_is_neither_rectified_nor_shared():
    model = classifier("gin", layers=3)
    assert (model.embed(path_graph([0, 1, 2])) < 0).any()
    assert len({id(layer) for layer in model.convolutions}) == 3


@pytest.mark.parametrize("edge_labels", [0, [3, 2]])
def test_save_and_load(tmp_path, edge_labels):
    model = classifier("gat", node_labels=[4, 3], edge_labels=edge_labels, dropout=0.3)
    model.save(tmp_path)
    loaded = GraphClassifier.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    fresh = GraphClassifier.from_pretrained(tmp_path, pretrained=False)
    assert not torch.equal(fresh.linear.weight, model.linear.weight.float())


def test_fresh_weights_are_a_function_of_the_seed():
    model = classifier("gin")
    before = torch.random.get_rng_state()
    a, b, c = (model.fresh(seed).linear.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.fresh(1, classes=5).config == model.config | {"classes": 5}


def test_bad_input(tmp_path):
    model = classifier("gin", edge_labels=3)
    with pytest.raises(DataError, match=r"node labels must be integers.*Bin or quantise"):
        model(pyg.Data(x=torch.rand(3, 1), edge_index=torch.zeros(2, 0, dtype=torch.long)))
    with pytest.raises(DataError, match=r"column 0 lie in 0\.\.9, but the model knows 0\.\.3"):
        model(path_graph([0, 9], [0]))
    with pytest.raises(DataError, match=r"edge labels of column 0 lie in 5\.\.5"):
        model(path_graph([0, 1], [5]))
    with pytest.raises(DataError, match="no edge_attr"):
        model(path_graph([0, 1]))
    with pytest.raises(DataError, match="have 2 columns, but the model was built for 1"):
        model(pyg.Data(x=torch.zeros(3, 2, dtype=torch.long), edge_index=torch.zeros(2, 0, dtype=torch.long)))
    with pytest.raises(ModelError, match="expected a folder with config.json"):
        GraphClassifier.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs layers, width and classes of 1 or more"):
        classifier("gcn", layers=0)
    with pytest.raises(TypeError, match="heads"):
        classifier("gat", heads=2)

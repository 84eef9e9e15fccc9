"""AUC, draws and the judge's training on graphs."""

import pytest
import torch

from potstill.contracts.errors import DataError, NonFiniteError
from potstill.evaluation.graphs import auc, drawn, graph_logits, judged, labels_of
from potstill.models.graphs import GraphClassifier

pyg = pytest.importorskip("torch_geometric.data")


def test_auc_by_hand():
    """Log-odds 3 > 2 > 1 > 0 with labels 1 0 1 0: of four pairs three are ordered. A tie counts one half."""
    logits = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    assert auc(logits, torch.tensor([1, 0, 1, 0])) == pytest.approx(0.75)
    assert auc(-logits, torch.tensor([1, 0, 1, 0])) == pytest.approx(0.25)
    assert auc(torch.zeros(4, 2), torch.tensor([1, 0, 1, 0])) == pytest.approx(0.5)
    assert auc(logits * 1000, torch.tensor([1, 1, 0, 0])) == pytest.approx(1.0)  # probabilities would tie at 1


def test_auc_of_three_classes_is_the_mean_over_classes():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 6.0, 5.0]])  # the last: class 2, taken for class 1
    # class 0: 1; class 1: odds of row 1 are e^5/2, of row 2 e^6/(e^5+1), so 1; class 2: row 2 ranks first, so 1
    assert auc(logits, torch.tensor([0, 1, 2])) == pytest.approx(1.0)
    # labels 1 and 2 swapped: class 0: 1; class 1: the positive is row 2, which beats row 0 only, 1/2; class 2: row 1
    # (odds 1 / (e^5 + 1)) ties with row 0 and loses to row 2: 1/4
    assert auc(logits, torch.tensor([0, 2, 1])) == pytest.approx((1 + 0.5 + 0.25) / 3)


def test_auc_refuses():
    with pytest.raises(DataError, match="all 3 are of one"):
        auc(torch.zeros(3, 2), torch.tensor([1, 1, 1]))
    with pytest.raises(NonFiniteError, match="finite logits"):
        auc(torch.full((2, 2), torch.nan), torch.tensor([0, 1]))


def test_uniform_draws_use_every_item_once_an_epoch():
    epochs = [torch.cat([drawn(7, 3, seed=5, step=s, weights=None) for s in range(3 * e, 3 * e + 3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(7))
    assert not torch.equal(*epochs)


def test_weighted_draws_follow_the_weights_and_are_keyed():
    weights = torch.tensor([1.0, 0.0, 4.0, 5.0])
    n = 20_000
    rows = drawn(4, n, seed=3, step=0, weights=weights)
    share = torch.bincount(rows, minlength=4) / n
    assert share[1] == 0
    assert (share - weights / 10).abs().max() < 4 * (0.25 / n) ** 0.5
    assert torch.equal(rows, drawn(4, n, seed=3, step=0, weights=weights))
    assert not torch.equal(rows, drawn(4, n, seed=3, step=1, weights=weights))


def single(label):
    return pyg.Data(
        x=torch.tensor([[label]]), edge_index=torch.zeros(2, 0, dtype=torch.long), y=torch.tensor([label % 2])
    )


def trained(judge, items, *, lr=0.05, **options):
    optimizer = torch.optim.Adam(judge.parameters(), lr=lr)
    return judged(judge, items, optimizer=optimizer, **({"validation": items, "test": items, "seed": 1} | options))


def test_judged_learns_repeats_and_leaves_the_generator_alone():
    items = [single(0), single(1)]
    base = GraphClassifier("gin", node_labels=2, classes=2, width=8, layers=1, dropout=0.5)
    result, judge = trained(base.fresh(0), items, steps=40, batch=4, every=7)
    torch.rand(7)  # the global generator plays no part
    rng = torch.random.get_rng_state()
    again, twin = trained(base.fresh(0), items, steps=40, batch=4, every=7)
    assert result == again
    assert result.test_auc == 1.0
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), twin.parameters()))
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_the_best_validation_step_is_kept_even_the_untrained_one():
    """Validation wants the labels the other way round: a judge that starts so is best before it learns anything."""
    items, contrary = [single(0), single(1)], [single(0), single(1)]
    for graph in contrary:
        graph.y = 1 - graph.y
    base = GraphClassifier("gin", node_labels=2, classes=2, width=8, layers=1)
    start = next(s for s in range(50) if auc(graph_logits(base.fresh(s), contrary), labels_of(contrary)) == 1.0)
    kept, judge = trained(base.fresh(start), items, steps=40, batch=4, every=7, validation=contrary)
    assert (kept.step, kept.validation_auc, kept.test_auc) == (0, 1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), base.fresh(start).parameters()))
    right = next(s for s in range(50) if auc(graph_logits(base.fresh(s), items), labels_of(items)) == 1.0)
    assert trained(base.fresh(right), items, steps=40, batch=4, every=7)[0].step == 0  # the first of equals


def test_logits_are_taken_in_evaluation_mode():
    model, items = (
        GraphClassifier("gin", node_labels=2, classes=2, width=8, layers=1, dropout=0.5),
        [single(0), single(1)],
    )
    expected = graph_logits(model.eval(), items)
    torch.testing.assert_close(graph_logits(model.train(), items, batch=1), expected)
    assert model.training


def test_counts_are_weights():
    """One step on draws (0, 0, 0, 1) is one step on a list that holds item 0 three times."""
    base = GraphClassifier("gin", node_labels=2, classes=2, width=8, layers=1)
    items = [single(0), single(1)]
    seed = next(s for s in range(100) if drawn(2, 4, s, 0, torch.ones(2)).sum() == 1)

    def gradient(graphs, weights):
        model, taken = base.fresh(0), []
        model.linear.weight.register_hook(taken.append)
        trained(model, graphs, validation=items, test=items, steps=1, batch=4, seed=seed, weights=weights)
        return taken[0]

    torch.testing.assert_close(gradient(items, torch.ones(2)), gradient([items[0]] * 3 + [items[1]], None))


def test_bad_input():
    judge = GraphClassifier("gin", node_labels=2, classes=2, width=8, layers=1)
    with pytest.raises(DataError, match="set of graphs is empty"):
        trained(judge, [], steps=1, batch=1)
    with pytest.raises(NonFiniteError, match="loss became"):
        trained(judge, [single(0), single(1)], steps=9, batch=2, lr=1e30, every=9)

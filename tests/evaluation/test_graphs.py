"""AUC, draws and the judge's training on graphs."""

import pytest
import torch

from potstill.contracts.errors import DataError, NonFiniteError
from potstill.evaluation.graphs import JudgeTraining, auc, drawn, judged
from potstill.models.graphs import GraphClassifier

pyg = pytest.importorskip("torch_geometric.data")


def test_auc_by_hand():
    """Log-odds 3 > 2 > 1 > 0 with labels 1 0 1 0: of four pairs three are ordered. A tie counts one half."""
    logits = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    assert auc(logits, torch.tensor([1, 0, 1, 0])) == pytest.approx(0.75)
    assert auc(-logits, torch.tensor([1, 0, 1, 0])) == pytest.approx(0.25)
    assert auc(torch.zeros(4, 2), torch.tensor([1, 0, 1, 0])) == pytest.approx(0.5)
    assert auc(logits * 1000, torch.tensor([1, 0, 1, 0])) == pytest.approx(0.75)  # probabilities would tie at 1


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


def test_judged_learns_repeats_and_keeps_the_best_step():
    items = [single(0), single(1)]
    base = GraphClassifier("gin", node_labels=4, classes=2, width=8, layers=1, dropout=0.5)
    options = {"validation": items, "test": items, "training": JudgeTraining(steps=40, batch=4, lr=0.05, every=7)}
    rng = torch.random.get_rng_state()
    result, judge = judged(base.fresh(0), items, seed=1, **options)
    again, twin = judged(base.fresh(0), items, seed=1, **options)
    assert result == again
    assert result.test_auc == 1.0
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), twin.parameters()))
    assert torch.equal(torch.random.get_rng_state(), rng)
    reversed_items = [single(2), single(3)]  # never trained on: validation stays as it was drawn, step 0 may win
    for graph in reversed_items:
        graph.x = 3 - graph.x  # labels 1 and 0, with classes the other way round: learning makes it worse
    start = next(
        s
        for s in range(50)
        if judged(base.fresh(s), items, seed=1, validation=reversed_items, test=items, training=JudgeTraining(steps=0))[
            0
        ].validation_auc
        == 1.0
    )
    kept, _ = judged(base.fresh(start), items, seed=1, **(options | {"validation": reversed_items}))
    assert kept.step == 0
    assert kept.test_auc == 0.0


def test_counts_are_weights():
    """One step on draws (0, 0, 0, 1) is one step on a list that holds item 0 three times."""
    base = GraphClassifier("gin", node_labels=4, classes=2, width=8, layers=1)
    items, training = [single(0), single(1)], JudgeTraining(steps=1, batch=4, every=1)
    seed = next(s for s in range(100) if drawn(2, 4, s, 0, torch.ones(2)).sum() == 1)
    few, many = (GraphClassifier(**base.config) for _ in range(2))
    few.load_state_dict(base.state_dict()), many.load_state_dict(base.state_dict())

    def gradient(model, graphs, weights):
        taken = []
        model.linear.weight.register_hook(taken.append)
        judged(model, graphs, validation=items, test=items, training=training, seed=seed, weights=weights)
        return taken[0]

    torch.testing.assert_close(gradient(few, items, torch.ones(2)), gradient(many, [items[0]] * 3 + [items[1]], None))


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="set of graphs is empty"):
        judged(
            GraphClassifier("gin", node_labels=1, classes=2),
            [],
            validation=[],
            test=[],
            training=JudgeTraining(),
            seed=0,
        )

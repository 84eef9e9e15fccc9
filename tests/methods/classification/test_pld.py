"""PLD: the gradient's formula, the losses that it holds as special cases, its convexity, and what a run makes of options."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.errors import RecipeError
from potstill.divergences import Decreasing, FirstPlaces, TeacherSoftmax
from potstill.methods.classification.pld import PLD
from potstill.run import Run, open_folder

B, V = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
QUICK = {
    "method": {"name": "pld", "rows": 60},
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "teacher": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "train": {"steps": 3, "batch": 16, "trackers": [], "device": "cpu"},
}


def rows(seed, classes=V):
    return 2 * torch.randn(B, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(z, v=None, labels=LABELS, **options):
    return PLD(**options)(z, rows(1, z.shape[-1]) if v is None else v, labels)["pld"]


def test_one_place_is_cross_entropy():
    assert_close(value(rows(0), places=FirstPlaces(1)), F.cross_entropy(rows(0), LABELS, reduction="none"))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_the_paper(temperature):
    """sum_k a_k (sigma_k - e_{pi_k}), sigma_k the softmax over the classes not yet chosen; its rows sum to 0."""
    z, v = rows(0).requires_grad_(), rows(1)
    g = torch.autograd.grad(value(z, v, places=TeacherSoftmax(temperature)).sum(), z)[0]
    expected = torch.zeros_like(g)
    for i in range(B):
        others = sorted((c for c in range(V) if c != LABELS[i]), key=lambda c: -v[i, c])
        a = (v[i] / temperature).softmax(-1)
        for k, chosen in enumerate(order := [int(LABELS[i]), *others]):
            left = torch.tensor(order[k:])
            expected[i, left] += a[chosen] * z.detach()[i, left].softmax(-1)
            expected[i, chosen] -= a[chosen]
    assert_close(g, expected)
    assert_close(g.sum(-1), torch.zeros(B).double(), atol=1e-12, rtol=0)


def test_an_offset_is_free_and_a_scale_is_not():
    assert_close(value(rows(0) + 3.0), value(rows(0)))
    assert (value(2 * rows(0)) - value(rows(0))).abs().min() > 1e-3


def test_the_teachers_temperature_changes_weights_and_no_order():
    warm = value(rows(0), places=TeacherSoftmax(4.0))
    scaled = value(rows(0), rows(1) / 4)
    assert_close(warm, scaled)
    assert (warm - value(rows(0))).abs().min() > 1e-3


def test_two_classes_are_a_weighted_cross_entropy():
    v, labels = rows(1, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    a = v.softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert_close(value(rows(0, 2), v, labels), a * F.cross_entropy(rows(0, 2), labels, reduction="none"))


def test_unweighted_losses_are_negative_log_probabilities_of_orders():
    """exp(-loss) over the 24 orders of four classes sums to 1."""
    z = rows(0, 4)[:1]
    total = 0.0
    for order in itertools.permutations(range(4)):
        v = torch.empty(1, 4, dtype=torch.float64)
        v[0, list(order)] = torch.arange(4.0, 0.0, -1.0, dtype=torch.float64)  # the teacher ranks them so
        total = total + (-value(z, v, torch.tensor([order[0]]), places=FirstPlaces())).exp()
    assert_close(total, torch.ones(1).double())


def test_it_is_convex():
    v = rows(1)[:1]
    hessian = torch.autograd.functional.hessian(lambda z: value(z[None], v, LABELS[:1]).sum(), rows(0)[0])
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12


def test_normalised_and_unlabelled():
    assert_close(value(rows(0), places=FirstPlaces(), normalised=True), value(rows(0), places=FirstPlaces()) / V)
    likeliest = rows(1).argmax(-1)
    assert_close(value(rows(0), labelled=False), value(rows(0), labels=likeliest))
    assert_close(value(rows(0), labels=None, labelled=False), value(rows(0), labelled=False))


# ---------------------------------------------------------------- runs


def run_of(tmp_path, **changes):
    plan = recipes.resolve(recipes.apply(QUICK, changes))
    open_folder(tmp_path / "run", recipes.write(plan))
    return Run(plan, tmp_path / "run")


@pytest.mark.needs("sklearn")
def test_a_run_trains_on_the_ranking_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    run, seen = run_of(tmp_path, **{"method.places": "Decreasing", "method.normalised": True}), []
    fit = run.fit
    monkeypatch.setattr(run, "fit", lambda objective, *a, **k: (seen.append(objective), fit(objective, *a, **k)))
    metrics = run.execute().metrics
    (objective,) = seen
    assert objective.logit_loss == PLD(Decreasing(), normalised=True)
    assert (objective.cross_entropy, objective.distillation, objective.couples) == (0.0, 1.0, "position")
    batch = run.source.train.batch(torch.arange(8))
    assert set(objective.loss("student", batch, 0).terms) == {"pld"}
    assert 0 <= metrics["accuracy"] <= 1 and metrics["teacher_accuracy"] > 0.5


@pytest.mark.needs("sklearn")
def test_bad_options_are_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match=r"method.places: FirstPlace is no PlaceWeights. Did you mean FirstPlaces"):
        run_of(tmp_path, **{"method.places": "FirstPlace"})
    with pytest.raises(RecipeError, match=r"TeacherSoftmax.temperature must be positive"):
        run_of(tmp_path, **{"method.places": {"name": "TeacherSoftmax", "temperature": 0}})

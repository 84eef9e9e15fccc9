"""nd_loss, rkd and fitnet: the geometry of the ND loss in closed form, class means, schedules, and small runs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.errors import DataError, RecipeError
from potstill.methods.features.nd_loss import NormAndDirection, class_means
from potstill.models.images import ImageClassifier
from potstill.objectives.feature_terms import Scored
from potstill.objectives.logits import DKD, KD
from potstill.run import Run, open_folder
from potstill.tasks.base import Images
from potstill.teachers import LocalTeacher

QUICK = {
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 2}},
    "teacher": {"name": "mlp", "options": {"width": 16, "depth": 2}},
    "train": {"steps": 4, "batch": 16, "trackers": [], "device": "cpu"},
}
B, D, V = 6, 4, 3
LABELS = torch.arange(B) % V


pytestmark = pytest.mark.usefixtures("cache")


def run_of(name, tmp_path, **changes):
    plan = recipes.resolve(recipes.apply({"method": {"name": name, "rows": 100}, **QUICK}, changes))
    open_folder(tmp_path / "run", recipes.write(plan))
    return Run(plan, tmp_path / "run")


def trained(run, monkeypatch):
    seen, fit = [], run.fit
    monkeypatch.setattr(run, "fit", lambda objective, *a, **k: (seen.append((objective, k)), fit(objective, *a, **k)))
    return run.execute().metrics, seen


def rows(seed, n=B):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(width):
    torch.manual_seed(0)
    return ImageClassifier.PACKAGED["mlp"](size=8, width=width, depth=1)


def term(mode="nd", student=D, teacher=D, directions=None):
    means = rows(7, V) if directions is None else directions
    return NormAndDirection(mlp(student), LocalTeacher(mlp(teacher)), torch.zeros(2, 1, 8, 8), means, mode).double()


def value(own, theirs, **options):
    return term(**options)([own], [theirs], Scored(own, theirs, LABELS))


def test_the_two_branches_of_the_nd_loss():
    e = nn.functional.normalize(rows(7, V), dim=-1)[LABELS]
    theirs = rows(1)
    length = theirs.norm(dim=-1, keepdim=True)
    short = (0.5 * length * nn.functional.normalize(rows(2), dim=-1)).requires_grad_()
    g = torch.autograd.grad(value(short, theirs).sum(), short)[0]
    assert_close(g, -e / length)  # grows and turns
    long = (2 * length * nn.functional.normalize(rows(2), dim=-1)).requires_grad_()
    g = torch.autograd.grad(value(long, theirs).sum(), long)[0]
    assert_close((g * long).sum(-1), torch.zeros(B).double(), atol=1e-8, rtol=0)  # only turns
    assert g.abs().min() > 1e-4
    assert_close(value(long, theirs), value(3 * long, theirs))
    assert_close(value(2 * short, 2 * theirs), value(short, theirs))
    assert_close(value(length * e, theirs), torch.zeros(B).double(), atol=1e-12, rtol=0)


def test_the_halves_of_the_loss():
    own, theirs, e = rows(2), rows(1), rows(7, V)[LABELS]
    cosine = nn.functional.cosine_similarity(own, e, dim=-1)
    assert_close(value(own, theirs, mode="direction"), 1 - cosine)
    assert_close(value(own, theirs, mode="norm"), (own.norm(dim=-1) - theirs.norm(dim=-1)) ** 2)


def test_another_width_gets_a_transform():
    it = term(student=5)
    assert [type(m).__name__ for m in it.transform] == ["BatchNorm1d", "Dropout", "Linear"]
    assert (it.transform[2].in_features, it.transform[2].out_features) == (5, D)
    assert isinstance(term().transform, nn.Identity)


def test_class_means_by_hand():
    model = mlp(D)
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Images(images, torch.arange(9) % V)
    features = model.network.layers[0](images.flatten(1))
    expected = torch.stack([features[data.labels == c].mean(0) for c in range(V)])
    assert_close(class_means(model, data, V, "cpu", batch=4), expected)
    with pytest.raises(DataError, match="Class 3 has no training row"):
        class_means(model, data, V + 1, "cpu")


# ---------------------------------------------------------------- runs


@pytest.mark.needs("sklearn")
def test_nd_loss_runs_beside_any_logit_loss(tmp_path, monkeypatch):
    run = run_of("nd_loss", tmp_path, **{"method.base": {"name": "DKD", "beta": 2.0}, "method.control": True})
    metrics, ((objective, _), _) = trained(run, monkeypatch)
    assert objective.logit_loss == DKD(1.0, 2.0) and objective.features[0].coefficient == 2.0
    batch = run.source.train.batch(torch.arange(16))
    assert {"ce", "tckd", "nckd", "nd"} == set(objective.loss("student", batch, 0).terms)
    means = class_means(run.teacher().model, run.source.subset(100).train, 10, "cpu")
    assert_close(objective.features[0].directions, means)
    assert "feature_norm" in metrics and "teacher_direction_cosine" in metrics  # widths differ: none of the student's
    same = run_of("nd_loss", tmp_path / "same", student=QUICK["teacher"], **{"method.directions": "classifier"})
    metrics, ((objective, _),) = trained(same, monkeypatch)
    assert 0 <= metrics["direction_cosine"] <= 1
    assert_close(objective.features[0].directions, same.teacher().model.network.head.weight)


@pytest.mark.needs("sklearn")
def test_rkd_couples_the_batch_and_needs_no_projector(tmp_path, monkeypatch):
    run = run_of("rkd", tmp_path)
    _, ((objective, _),) = trained(run, monkeypatch)
    assert {t.name: t.coefficient for t in objective.features} == {"distance": 25.0, "angle": 50.0}
    assert not list(objective.features.parameters())
    assert objective.logit_loss == KD(4.0) and (objective.cross_entropy, objective.distillation) == (1.0, 0.0)
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run_of("rkd", tmp_path / "cut", **{"train.micro_batch": 8}).execute()


@pytest.mark.needs("sklearn")
def test_fitnet_takes_a_hint_first_and_distils_then(tmp_path, monkeypatch):
    run = run_of("fitnet", tmp_path)
    _, ((first, options), (second, _)) = trained(run, monkeypatch)
    assert options == {"stage": "hint", "steps": 2}
    (hint,) = first.features
    assert [s.layer for s in (*hint.student_stages, *hint.teacher_stages)] == ["network.layers.0"] * 2
    assert not second.features and second.cross_entropy == 1.0
    assert [second.weight(s) for s in range(4)] == pytest.approx([4.0, 3.0, 2.0, 1.0])
    batch = run.source.train.batch(torch.arange(8))
    v, z = run.teacher().model(batch.images), run.student()(batch.images)
    soft = -((v / 3).softmax(-1) * (z / 3).log_softmax(-1)).sum(-1)
    assert_close(second.loss("student", batch, 0).terms["target"].mean(), 4 * soft.mean())


@pytest.mark.needs("sklearn")
def test_the_first_stage_of_fitnet_leaves_what_lies_above_alone(tmp_path, monkeypatch):
    run = run_of("fitnet", tmp_path)
    head = run.student().network.head.weight.detach().clone()
    guided = run.student().network.layers[0][0].weight.detach().clone()
    fit = run.fit
    after = []
    monkeypatch.setattr(
        run,
        "fit",
        lambda *a, **k: (fit(*a, **k), after.append([p.detach().clone() for p in run.student().parameters()])),
    )
    run.execute()
    by_shape = dict(zip([n for n, _ in run.student().named_parameters()], after[0]))
    assert torch.equal(by_shape["network.head.weight"], head)
    assert not torch.equal(by_shape["network.layers.0.0.weight"], guided)


@pytest.mark.needs("sklearn")
def test_fitnet_joint_is_one_stage(tmp_path, monkeypatch):
    _, ((objective, _),) = trained(run_of("fitnet", tmp_path, **{"method.joint": True}), monkeypatch)
    assert objective.features[0].coefficient == 100.0
    assert (objective.cross_entropy, objective.distillation) == (1.0, 0.0)

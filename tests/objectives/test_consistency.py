"""The consistency tangent on exact Gaussians in float64, its gradient, and what does not carry one."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.models.denoisers import MixtureDenoiser, OneStep, mlp_denoiser
from potstill.noise.gaussian import LogNormal, TrigFlow, spread
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.consistency import (
    Consistency,
    DiscreteConsistency,
    PathPoints,
    TimeWeight,
    moved,
    normalised,
    tangent,
    velocity,
)
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

SD, S = 0.5, 0.8
FLOW = TrigFlow(SD)
SGD = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)


class GaussianMap(nn.Module):
    """The exact consistency map of data N(0, S^2), y S / sqrt(S^2 + sigma^2); `tilt` moves it off, as a function of time."""

    shape = (1,)

    def __init__(self, tilt: float = 0.0) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.tensor([tilt], dtype=torch.float64))

    def forward(self, y, sigma, condition=None):
        sigma = spread(torch.as_tensor(sigma, dtype=torch.float64).expand(len(y)), y)
        return y * S / (S**2 + sigma**2).sqrt() * (1 + self.tilt * sigma / (1 + sigma))


def teacher() -> MixtureDenoiser:
    return MixtureDenoiser(GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), S))


def points(size: int = 64, dimension: int = 1) -> PointBatch:
    ids = torch.arange(size)
    return PointBatch(ids, S * keyed.normal_like(3, ids, torch.empty(size, dimension, dtype=torch.float64)))


def exact(tilt: float = 0.0, cls=Consistency, **options) -> Consistency:
    given = {"seed": 0, "optimizer": SGD, "warmup": 0, "sigma_data": SD, "ema": None, **options}
    if cls is Consistency:
        given = {"adaptive": False, "prior": False} | given
    return cls(OneStep(GaussianMap(tilt), 80.0), teacher(), **given)


# ---------------------------------------------------------------- the tangent


def test_the_exact_map_has_no_tangent_no_loss_and_no_gradient():
    objective, batch = exact(), points()
    at = objective.points(batch, 0)
    v = at.t_B.cos().square() * S**2 + at.t_B.sin().square() * SD**2
    assert_close(at.velocity, spread(at.t_B.sin() * at.t_B.cos() * (SD**2 - S**2) / v, at.x) * at.x)
    loss = objective.loss("student", batch, 0).value()
    assert loss < 1e-25
    (gradient,) = torch.autograd.grad(loss, list(objective.generator.parameters()))
    assert gradient.abs() < 1e-14
    assert exact(0.1).loss("student", batch, 0).value() > 1e-4


def test_without_warmup_the_tangent_is_cos_t_times_the_change_of_the_prediction():
    """By finite differences of f along the teacher's path; a sign or a factor of any part fails."""
    objective, batch = exact(0.3), points()
    at = objective.points(batch, 0)

    def f(by: float):
        x, t = at.x + by * at.velocity, at.t_B + by
        return moved(x, objective.student(x, t, None), t)

    h = 1e-5
    change = spread(at.t_B.cos(), at.x) * (f(h) - f(-h)) / (2 * h)
    g = raw_tangent(objective, at)
    assert g.abs().mean() > 0.01
    assert_close(g, change.detach(), rtol=1e-5, atol=1e-7)


def raw_tangent(objective: Consistency, at: PathPoints, step: int = 0) -> torch.Tensor:
    """The tangent before it is normalised."""
    kept = []
    original = objective.tangent
    objective.tangent = lambda *a: kept.append(original(*a)) or kept[-1]
    objective.direction(at, objective.student(at.x, at.t_B, at.condition), step)
    objective.tangent = original
    return kept[0].detach()


@pytest.mark.parametrize("derivative", ["semi", "backward", "central"])
def test_finite_differences_tend_to_the_exact_tangent(derivative):
    at = exact(0.3).points(points(), 0)
    true = raw_tangent(exact(0.3), at)
    error = lambda h: (raw_tangent(exact(0.3, derivative=derivative, h=h), at) - true).abs().max().item()
    assert error(1e-4) < 1e-3 and error(1e-2) / error(1e-3) == pytest.approx(
        100 if derivative == "central" else 10, rel=0.2
    )


def test_warmup_scales_all_but_the_teachers_part():
    x, v, u, change = (torch.randn(5, 3, dtype=torch.float64) for _ in range(4))
    t = torch.linspace(0.1, 1.4, 5, dtype=torch.float64)
    part = lambda r: tangent(x, t, v, u, change, r)
    assert_close(part(0.0), -spread(t.cos() ** 2, x) * (v - u))
    assert_close(part(0.25), 0.75 * part(0.0) + 0.25 * part(1.0))
    objective = exact(warmup=4)
    assert [objective.r(i) for i in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0] and exact(warmup=0).r(0) == 1.0


def test_normalised_tangents_are_shorter_than_one():
    g = torch.randn(4, 3, 2, 2, dtype=torch.float64) * torch.tensor([1e-3, 0.1, 1.0, 1e4]).view(-1, 1, 1, 1)
    norm = g.flatten(1).norm(dim=1)
    assert_close(normalised(g).flatten(1).norm(dim=1), norm / (norm + 0.1))
    root = norm / math.sqrt(12)
    assert_close(normalised(g, c=0.2, root_mean=True).flatten(1).norm(dim=1), norm / (root + 0.2))


# ---------------------------------------------------------------- the gradient


def test_the_gradient_in_the_networks_output_is_minus_twice_the_direction():
    objective, batch = exact(0.3, elements="sum"), points(8)
    at = objective.points(batch, 0)
    g = objective.direction(at, objective.student(at.x, at.t_B, None), 0)
    found = torch.autograd.grad(objective.loss("student", batch, 0).value(), objective.generator.denoiser.tilt)[0]
    F = objective.student(at.x, at.t_B, None) / SD
    expected = torch.autograd.grad((F * -2 * g).sum() / 8, objective.generator.denoiser.tilt)[0]
    assert_close(found, expected)
    mean = exact(0.3, elements="mean")
    wide = PointBatch(batch.ids_B, batch.points_BD)
    assert_close(mean.loss("student", wide, 0).value(), objective.loss("student", wide, 0).value())  # one element


def test_weights_multiply_the_loss_and_the_learned_one_is_paid_for():
    batch = points(8)
    base, prior, both = exact(0.3), exact(0.3, prior=True), exact(0.3, prior=True, adaptive=True)
    at = base.points(batch, 0)
    v = base.student(at.x, at.t_B, None)
    values = base.direction(at, v, 0).square().mean(1)
    assert_close(base.loss("student", batch, 0).value(), values.mean())
    weighted = values / (SD * at.t_B.tan())
    assert_close(prior.loss("student", batch, 0).value(), weighted.mean())
    assert_close(both.loss("student", batch, 0).value(), weighted.mean(), msg="it starts at 0")
    both.weight.double()
    with torch.no_grad():
        both.weight.map.bias.fill_(0.7)
    assert_close(both.loss("student", batch, 0).value(), (math.exp(0.7) * weighted - 0.7).mean())


def test_the_learned_weight_ends_at_minus_the_log_of_the_loss():
    """d/dw (e^w L - w) = 0."""
    weight, t = TimeWeight().double(), torch.linspace(0.05, 1.5, 40, dtype=torch.float64)
    values = 0.01 + t
    adam = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(400):
        adam.zero_grad()
        w = weight(t)
        (w.exp() * values - w).mean().backward()
        adam.step()
    assert_close(weight(t).detach(), -values.log(), rtol=0, atol=0.1)


def test_only_one_forward_pass_carries_a_gradient():
    """Nothing reaches the teacher, and the tangent's own student is held fixed: the gradient is linear in g."""
    objective, batch = exact(0.3), points(8)
    given = teacher()
    given.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    at = objective.points(batch, 0)
    assert not at.velocity.requires_grad
    v = objective.student(at.x, at.t_B, None)
    g = objective.direction(at, v, 0)
    assert v.requires_grad and not g.requires_grad
    assert set(objective.players) == {"student"}
    assert len(list(objective.players["student"].parameters())) == 1


# ---------------------------------------------------------------- training from data


def test_without_a_teacher_the_velocity_is_the_datas_own():
    objective = Consistency(OneStep(GaussianMap(), 80.0), None, seed=0, optimizer=SGD, sigma_data=SD, ema=None)
    distil = exact(times=LogNormal(-1.0, 1.4))
    batch = points(32)
    a, b = objective.points(batch, 5), distil.points(batch, 5)
    assert torch.equal(a.x, b.x) and torch.equal(a.t_B, b.t_B), "the same points, another velocity"
    x0 = batch.points_BD
    z = (a.x - spread(a.t_B.cos(), x0) * x0) / spread(a.t_B.sin(), x0)
    assert_close(a.velocity, spread(a.t_B.cos(), x0) * z - spread(a.t_B.sin(), x0) * x0)


def test_the_datas_velocity_is_the_teachers_on_average():
    """E[cos t z - sin t x0 | x_t] is the marginal velocity: regressing on x_t gives the teacher's slope."""
    ids = torch.arange(200_000)
    x0 = S * keyed.normal_like(1, ids, torch.empty(len(ids), 1, dtype=torch.float64))
    eps = keyed.normal_like(2, ids, x0)
    t = torch.full((len(ids),), 0.7, dtype=torch.float64)
    x = FLOW.mix(x0, eps, t)
    a, b = FLOW.velocity(0.7)
    slope = ((a * x0 + b * eps) * x).mean() / x.square().mean()
    one = torch.ones(1, 1, dtype=torch.float64)
    assert slope.item() == pytest.approx(velocity(teacher(), one, t[:1], FLOW).item(), abs=5e-3)


# ---------------------------------------------------------------- discrete time


def test_discrete_consistency_is_nearly_zero_on_the_exact_map_and_falls_with_the_grid():
    batch = points(256)
    value = lambda tilt, steps: (
        exact(tilt, DiscreteConsistency, steps=steps, shift=1.0).loss("student", batch, 0).value()
    )
    assert value(0.0, 400) < 1e-3 * value(0.0, 20), "errors of one step fall with its square"
    assert value(0.3, 400) > 10 * value(0.0, 400)


def test_discrete_targets_are_detached_and_end_in_the_data():
    objective = exact(0.3, DiscreteConsistency, steps=6, shift=2.0)
    rf = [2 * u / (1 + u) * 80 / 81 for u in (i / 6 for i in range(7))]
    assert_close(FLOW.ratio(objective.grid), torch.tensor([x / (1 - x) for x in rf], dtype=torch.float64))
    batch = points(64)
    at = objective.points(batch, 0)
    last = (FLOW.ratio(at.t_B) - FLOW.ratio(objective.grid[1])).abs() < 1e-4
    assert last.any()
    tilt = objective.generator.denoiser.tilt
    found = torch.autograd.grad(objective.loss("student", batch, 0).value(), tilt)[0]
    f = moved(at.x, objective.student(at.x, at.t_B, None), at.t_B)
    grid = objective.grid
    s = grid[(at.t_B[:, None] - grid).abs().argmin(1) - 1]
    after = moved(at.x, at.velocity, at.t_B - s)
    target = torch.where(
        last[:, None], after, moved(after, objective.student(after, s.clamp_min(1e-3), None), s)
    ).detach()
    assert_close(found, torch.autograd.grad(((f - target) ** 2).mean(), tilt)[0])


# ---------------------------------------------------------------- whole steps


def learned(**options) -> Consistency:
    torch.manual_seed(0)
    student = mlp_denoiser(dimension=1, width=16, depth=1)
    given = {"seed": 0, "optimizer": SGD, "warmup": 2, "ema": 0.9, **options}
    return Consistency(OneStep(student, 20.0), MixtureDenoiser(GaussianMixture(torch.zeros(1, 1), S)), **given)


def test_micro_batches_change_nothing():
    data = Points(torch.linspace(-1, 1, 20)[:, None])
    whole, cut = learned(), learned()
    for objective, micro in ((whole, None), (cut, 2)):
        Trainer(TrainSpec(steps=4, batch=6, micro_batch=micro, trackers=[], device="cpu")).fit(objective, data)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert whole.weight.map.weight.abs().sum() > 0, "the learned weight rides with the student"
    assert not torch.equal(whole.ema.average.denoiser.network.output.weight, torch.zeros(1, 16))


def test_training_brings_a_student_nearer_to_the_exact_map():
    adam = OptimizerSpec(optimizer="adam", lr=5e-3)
    objective = learned(optimizer=adam, warmup=20, times=LogNormal(0.0, 1.6), ema=0.95)
    z = keyed.normal_like(9, torch.arange(500), torch.empty(500, 1))
    error = lambda g: (g(z) - S * z).square().mean().sqrt().item()
    before = error(objective.generator)
    data = Points(S * keyed.normal_like(8, torch.arange(4000), torch.empty(4000, 1)))
    Trainer(TrainSpec(steps=200, batch=64, trackers=[], device="cpu")).fit(objective, data)
    assert error(objective.ema.average) < 0.75 * before, (before, error(objective.ema.average))


def test_refusals():
    with pytest.raises(RecipeError, match="at least 2 steps, got 1"):
        exact(cls=DiscreteConsistency, steps=1)
    with pytest.raises(RecipeError, match="batches of images or points"):
        exact().points(type("Other", (), {})(), 0)
    objective = learned()
    objective.generator.denoiser.network.layers.append(_Recurrent())
    with pytest.raises(ModelError, match="derivative: central"):
        objective.loss("student", PointBatch(torch.arange(3), torch.randn(3, 1)), 0)


class _Recurrent(nn.Module):
    """A layer without a forward-mode rule."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, state, level):
        return self.attend(state[:, None], state[:, None], state[:, None], need_weights=False)[0][:, 0]

"""sCM, rCM and TBCM: their formulas on exact Gaussians, their turns, and two steps on real architectures."""

import copy
from itertools import pairwise

import pytest
import torch
from tests.methods.diffusion.small import jittered, points
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import ImageBatch, PointBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.diffusion import rcm, scm, tbcm
from potstill.methods.diffusion.few_steps import generator_of
from potstill.models.denoisers import MixtureDenoiser, OneStep, mlp_denoiser, unet_tiny
from potstill.noise.gaussian import LogNormal, TrigFlow
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.consistency import DiscreteConsistency, PathPoints, moved, velocity
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

SGD = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)


def learned(module, teacher=None, **changes):
    """A small objective of a method's module; the student is the teacher's copy."""
    config = {scm: scm.SCM, rcm: rcm.RCM, tbcm: tbcm.TBCM}[module]
    given = {"sigma_init": 20.0, "warmup": 0, "ema": 0.9} | ({"fake": SGD} if module is rcm else {})
    torch.manual_seed(0)
    teacher = teacher or jittered(mlp_denoiser(width=16, depth=1))
    generator = OneStep(copy.deepcopy(teacher), 20.0)
    return module.objective_of(config.model_validate(given | changes), generator, teacher, SGD, 0)


# ---------------------------------------------------------------- rCM


def exact_point(s: float = 0.6):
    """1-D N(0, s^2) at sigma_d = 1: point, the exact teacher's velocity, the exact student's F and cos sin dF/dt."""
    flow, t = TrigFlow(1.0), torch.linspace(0.1, 1.4, 7, dtype=torch.float64)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    teacher = MixtureDenoiser(GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), s))
    F = lambda x, t: (
        (t.cos()[:, None] * x - x * s / (t.cos() ** 2 * s**2 + t.sin() ** 2).sqrt()[:, None]) / t.sin()[:, None]
    )
    v = velocity(teacher, x, t, flow)
    pace = t.cos() * t.sin()
    value, change = torch.func.jvp(F, (x, t), (pace[:, None] * v, pace))
    return PathPoints(x, t, v), value, change


def test_rcms_tangent_vanishes_on_the_exact_map_and_is_scms_without_warmup():
    at, F, change = exact_point()
    assert learned(rcm).tangent(at, F, change, 0).abs().max() < 1e-14
    other = F + 0.3 * at.x**2
    assert_close(learned(rcm).tangent(at, other, change, 0), learned(scm).tangent(at, other, change, 0))
    assert learned(rcm).tangent(at, other, change, 0).abs().max() > 0.01


def test_rcms_warmup_leaves_the_derivative_and_turns_the_rest():
    at, F, change = exact_point()
    objective, F = learned(rcm, warmup=4), F + 0.3
    cos, sin = at.t_B.cos()[:, None], at.t_B.sin()[:, None]
    assert_close(objective.tangent(at, F, change, 0), -cos * (F - at.velocity) - change)
    half = -cos * (1 - sin**2 / 4).sqrt() * (F - at.velocity) - 0.5 * cos * sin * at.x - change
    assert_close(objective.tangent(at, F, change, 2), half)


def test_rcms_score_term_is_the_papers():
    """lambda sum |x - sg[x - (f_S - f_T) / mean |x - f_T|]|^2 at x + sigma eps, without 1/2, gradient through one call."""
    objective, batch = learned(rcm, score_weight=0.3, rollout_steps=1), points()
    jittered(objective.matching.fake)
    loss = objective.loss("student", batch, 0)
    x = objective.matching.generate(batch, 0)
    at = objective.matching.compare(batch, 0, x)
    field = (at.fake - at.teacher) / (x.detach() - at.teacher).abs().mean(1, keepdim=True)
    expected = 0.3 * ((x - (x - field).detach()) ** 2).sum(1).mean()
    assert_close(loss.terms["matching"].mean(), expected)
    wrt = list(objective.generator.parameters())
    for a, b in zip(
        *(torch.autograd.grad(v, wrt, retain_graph=True) for v in (loss.terms["matching"].mean(), expected))
    ):
        assert_close(a, b)


def test_rollouts_take_falling_levels_and_every_length():
    objective = learned(rcm, rollout_steps=3, levels=LogNormal(3.0, 1.0)).matching
    seen = []
    original = objective.generator.denoiser.forward

    def watched(x, sigma, condition=None):
        seen.append((torch.as_tensor(sigma), torch.is_grad_enabled()))
        return original(x, sigma, condition)

    objective.generator.denoiser.forward = watched
    lengths = set()
    for step in range(12):
        seen.clear()
        objective.generate(points(), step)
        lengths.add(len(seen))
        assert (seen[0][0] == 20.0).all() and [g for _, g in seen] == [False] * (len(seen) - 1) + [True]
        assert all((b <= a).all() for (a, _), (b, _) in pairwise(seen))
    assert lengths == {1, 2, 3}


def test_rcms_turns_and_ends():
    """Consistency alone in the warm-up; then one student step to the fake score's others."""
    turns = lambda o: {n: [i for i in range(9) if p.when(i)] for n, p in o.players.items()}
    objective = learned(rcm, warmup=3, generator_every=3)
    assert turns(objective) == {"student": [0, 1, 2, 3, 6], "fake_score": [4, 5, 7, 8]}
    assert set(objective.loss("student", points(), 2).terms) == {"consistency"}
    assert set(objective.loss("student", points(), 3).terms) == {"consistency", "matching"}
    assert set(learned(rcm, consistency_weight=0.0).loss("student", points(), 0).terms) == {"matching"}
    alone = learned(rcm, score_weight=0.0)
    assert turns(alone) == {"student": list(range(9))}
    assert set(alone.loss("student", points(), 5).terms) == {"consistency"}


# ---------------------------------------------------------------- TBCM


def test_routes_fall_and_each_time_lies_in_its_stratum():
    objective = learned(tbcm, route_steps=16)
    ends, route = objective.ends, objective.route(3)
    assert len(ends) == len(route) == 16 and (ends.diff() < 0).all() and (route.diff() < 0).all()
    assert route[0] == ends[0] and ((route[1:] <= ends[:-1]) & (route[1:] >= ends[1:])).all()
    assert not torch.equal(route, objective.route(4))


def test_the_pairs_are_the_teachers_own_path():
    """Every stored state but the first; each follows from the one before by an exact step, the last ends in data."""
    objective, batch = learned(tbcm, route_steps=5), points(4)
    at = objective.points(batch, 0)
    assert at.x.shape == (16, 2) and not at.velocity.requires_grad
    x, v, t = at.x.view(4, 4, 2), at.velocity.view(4, 4, 2), at.t_B.view(4, 4)
    assert_close(t[:, 0], objective.route(0)[1:].to(t))
    for i in range(3):
        assert_close(moved(x[i], v[i], t[i] - t[i + 1]), x[i + 1])
    end = objective.flow.denoise(objective.teacher, x[3], t[3])
    assert_close(moved(x[3], v[3], t[3]), end)
    scaled = PointBatch(batch.ids_B, 100 * batch.points_BD)
    assert torch.equal(objective.points(scaled, 0).x, at.x), "no data is looked at"
    from_data = learned(tbcm, pairs="data")
    assert not torch.equal(from_data.points(scaled, 0).x, from_data.points(batch, 0).x)


def test_tbcm_calms_down():
    r = learned(tbcm, warmup=10, calm_from=20, calm_steps=10, calm_r=0.75).r
    assert [r(i) for i in (0, 5, 10, 20, 25, 30, 99)] == [0.0, 0.5, 1.0, 1.0, 0.875, 0.75, 0.75]


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("module", [scm, rcm, tbcm])
def test_micro_batches_change_nothing(module):
    data = Points(points(20).points_BD)
    whole, cut = learned(module, warmup=2), learned(module, warmup=2)
    start = copy.deepcopy(whole.state_dict())
    for objective, micro in ((whole, None), (cut, 2)):
        Trainer(TrainSpec(steps=4, batch=6, micro_batch=micro, trackers=[], device="cpu")).fit(objective, data)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    moved_ = {name.split(".")[0] for name, a in whole.state_dict().items() if not torch.equal(a, start[name])}
    assert {"generator", "ema"} | ({"matching"} if module is rcm else {"weight"}) <= moved_


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("module", [scm, rcm, tbcm])
def test_two_steps_of_a_unet_with_attention(module):
    teacher = jittered(unet_tiny(channels=1, size=8, classes=3, conditional=True, attention=True))

    class Images:
        def __len__(self):
            return 4

        def batch(self, rows, epoch=0):
            return ImageBatch(rows, keyed.normal_like(1, rows, torch.empty(len(rows), 1, 8, 8)), rows % 3)

    changes = {"route_steps": 3} if module is tbcm else {}
    objective = learned(module, teacher, guidance=1.5, **changes)
    start = copy.deepcopy(objective.generator.state_dict())
    Trainer(TrainSpec(steps=2, batch=2, trackers=[], device="cpu")).fit(objective, Images())
    assert any(not torch.equal(a, start[name]) for name, a in objective.generator.state_dict().items())
    assert objective.ema.average.generate(2).shape == (2, 1, 8, 8)


def test_choices():
    assert isinstance(learned(scm, discrete=True), DiscreteConsistency)
    assert learned(scm, distil=False).teacher is None
    with pytest.raises(RecipeError, match=r"must fall from sigma_init 2 and be positive, got \[3.0\]"):
        generator_of(None, 2.0, [3.0])

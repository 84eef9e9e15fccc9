"""CDM: its schedule, the Euler trajectory, its special cases, and two steps on a real architecture."""

import copy
from itertools import pairwise

import pytest
import torch
from tests.methods.diffusion.small import jittered, points
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import ImageBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.diffusion.cdm import CDM, TrajectoryMatching, objective_of
from potstill.models.denoisers import OneStep, mlp_denoiser, unet_tiny
from potstill.noise import samplers
from potstill.objectives.matching import DistributionMatching, TeacherError
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

SGD = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)


def learned(teacher=None, **changes) -> TrajectoryMatching:
    given = {"sigma_init": 20.0, "ema": 0.9, "fake": SGD, "guidance": 0.0, "longest": 5} | changes
    torch.manual_seed(0)
    teacher = teacher or jittered(mlp_denoiser(width=16, depth=1))
    generator = OneStep(copy.deepcopy(teacher), 20.0, [3.0, 1.0])
    return objective_of(CDM.model_validate(given), generator, teacher, SGD, 0)


def test_schedules_have_every_length_and_fall_within_their_range():
    objective = learned()
    schedules = [objective.schedule(step) for step in range(40)]
    assert {len(s) for s in schedules} == {1, 2, 3, 4, 5}
    for s in schedules:
        t = s / (1 + s)
        assert s[0] == 20.0 and (s.diff() < 0).all() and ((t[1:] >= 0.25) & (t[1:] <= 0.95)).all()
    assert learned(dynamic=False).schedule(3).tolist() == [20.0, 3.0, 1.0]


def test_the_trajectory_is_eulers_and_its_points_lie_on_straight_rectified_paths():
    objective, batch = learned(), points()
    step = next(i for i in range(40) if len(objective.schedule(i)) == 4)
    states, predictions, sigmas = objective.trajectory(batch, step)
    denoise = lambda x, sigma: objective.generator.denoiser(x, sigma)
    assert_close(samplers.euler(denoise, states[0], sigmas), states[-1], rtol=1e-4, atol=1e-5)
    assert not predictions.requires_grad
    t = sigmas / (1 + sigmas)
    rf = states * (1 - t).view(-1, 1, 1).float()  # x_t = (1 - t) x
    velocity = (rf - predictions) / t.view(-1, 1, 1).float()
    for i in range(3):
        assert_close(rf[i + 1], rf[i] + (t[i + 1] - t[i]).float() * velocity[i], rtol=1e-4, atol=1e-4)


def test_one_anchor_at_the_start_is_dmd2_twice():
    """N = 1, CA and CDM off: the field of distribution matching, without 1/2 and with the normaliser's floor."""
    objective, batch = learned(longest=1, beside_weight=0.0), points()
    jittered(objective.fake, 1)
    plain = DistributionMatching(
        objective.generator, objective.teacher, seed=0, optimizer=SGD, fake_optimizer=SGD, fake=objective.fake,
        levels=objective.levels, normaliser=TeacherError(eps=0.0, least=0.1), scale=2.0, ema=None,
    )  # fmt: skip
    a, b = (o.loss("generator", points(), 3).value() for o in (objective, plain))
    assert a > 0
    assert_close(a, b)
    wrt = list(objective.generator.parameters())
    for x, y in zip(torch.autograd.grad(a, wrt), torch.autograd.grad(b, wrt)):
        assert_close(x, y, rtol=1e-4, atol=1e-7)
    assert batch.memo == {}


def test_a_student_that_is_its_fake_and_its_teacher_rests():
    loss = learned().loss("generator", points(), 0)
    assert set(loss.terms) == {"matching", "beside"} and loss.value() == 0


def test_the_gradient_in_a_sample_is_minus_twice_the_normalised_gap():
    objective = learned(least=0.5)
    x, gap, teacher = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3), torch.randn(4, 3)
    (found,) = torch.autograd.grad(objective.pulled(x, gap, teacher).sum(), x)
    size = (teacher - x.detach()).abs().mean(1, keepdim=True).clamp_min(0.5)
    assert_close(found, -2 * gap / size / 3)


def test_the_fake_score_learns_the_next_prediction_in_velocities():
    objective, batch = learned(), points()
    step = next(i for i in range(40) if len(objective.schedule(i)) == 3)
    _, predictions, _ = objective.trajectory(batch, step)
    index = objective.anchors(batch, step, "fake anchor", 3)
    x = objective.fake_samples(batch, step)
    assert_close(x, torch.stack([predictions[min(int(i) + 1, 2), b] for b, i in enumerate(index)]))
    seed = keyed.key(0, "fake", step)
    sigma = objective.fake_levels(seed, batch.ids_B)
    t, eps = (sigma / (1 + sigma))[:, None], keyed.normal_like(seed, batch.ids_B, x)
    x_t = (1 - t) * x + t * eps
    v = (x_t - objective.fake(x_t / (1 - t), sigma)) / t
    expected = ((v - (eps - x)) ** 2).mean()
    assert_close(objective.loss("fake_score", batch, step).value(), expected, rtol=1e-3, atol=1e-5)


def test_the_fake_score_is_merged_with_the_student_after_each_of_its_steps():
    objective = learned(merge=0.25)
    jittered(objective.fake, 1)
    mine, other = (copy.deepcopy(list(m.parameters())) for m in (objective.fake, objective.generator.denoiser))
    objective.after_step("generator", 0)
    assert all(torch.equal(a, b) for a, b in zip(mine, objective.fake.parameters()))
    objective.after_step("fake_score", 0)
    for now, a, b in zip(objective.fake.parameters(), mine, other):
        assert_close(now, 0.75 * a + 0.25 * b)


def test_turns():
    players = learned().players
    assert list(players) == ["fake_score", "generator"], "the fake score moves first"
    assert [players["generator"].when(i) for i in range(4)] == [True, False, True, False]
    assert all(players["fake_score"].when(i) for i in range(4))


def test_micro_batches_change_nothing():
    data = Points(points(20).points_BD)
    whole, cut = learned(), learned()
    for objective, micro in ((whole, None), (cut, 2)):
        Trainer(TrainSpec(steps=4, batch=6, micro_batch=micro, trackers=[], device="cpu")).fit(objective, data)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


class Images:
    def __len__(self):
        return 4

    def batch(self, rows, epoch=0):
        return ImageBatch(rows, torch.full((len(rows), 1, 8, 8), torch.nan), rows % 3)


@pytest.mark.needs("diffusers")
def test_guidance_on_a_conditional_unet_that_sees_no_data():
    teacher = jittered(unet_tiny(channels=1, size=8, classes=3, conditional=True))
    objective = learned(teacher, guidance=7.0, longest=3)
    batch = Images().batch(torch.arange(4))
    x, sigma = torch.zeros(4, 1, 8, 8, requires_grad=True), torch.full((4,), 1.0, dtype=torch.float64)
    once = torch.autograd.grad(objective.guided(x, sigma, batch, 0).sum(), x)[0]
    objective.config = objective.config.model_copy(update={"guidance": 14.0})
    twice = torch.autograd.grad(objective.guided(x, sigma, batch, 0).sum(), x)[0]
    assert once.abs().sum() > 0
    assert_close(twice, 2 * once)
    start = copy.deepcopy(objective.generator.state_dict())
    Trainer(TrainSpec(steps=2, batch=2, trackers=[], device="cpu")).fit(objective, Images())
    after = objective.generator.state_dict()
    assert any(not torch.equal(a, start[name]) for name, a in after.items())
    assert all(a.isfinite().all() for a in after.values())


def test_refusals():
    with pytest.raises(RecipeError, match="guidance of cdm needs a conditional teacher. Write guidance: 0"):
        learned(guidance=7.0)
    with pytest.raises(RecipeError, match="anchor_low < anchor_high, got 0.9 and 0.3"):
        learned(anchor_low=0.9, anchor_high=0.3)
    teacher = mlp_denoiser(width=16, depth=1)
    with pytest.raises(RecipeError, match="merge of cdm needs a student of its teacher's architecture"):
        objective_of(CDM(guidance=0), OneStep(mlp_denoiser(width=8, depth=1), 20.0), teacher, SGD, 0)
    assert all(b < a for a, b in pairwise(OneStep(teacher, 80.0, CDM().steps).levels))

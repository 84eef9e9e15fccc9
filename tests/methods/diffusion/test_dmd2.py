"""DMD2: its direction, its discriminator on the fake score's features, its turns, and students of several calls."""

import copy

import pytest
import torch
from tests.objectives.gaussians import SGD, gradient, jittered, points, quadrature
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts import keyed
from potstill.contracts.errors import RecipeError
from potstill.divergences import ForwardKL, ReverseKL
from potstill.methods.diffusion.dmd2 import DMD2, BackwardSimulation, objective_of
from potstill.methods.diffusion.f_distill import FDistillation
from potstill.models.denoisers import OneStep, mlp_denoiser
from potstill.noise.gaussian import KarrasUniform
from potstill.objectives.matching import TeacherError
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer


def test_f_distill_of_the_reverse_kl_points_where_dmd2_does():
    options = {"normaliser": TeacherError()}
    dmd2 = gradient(quadrature(BackwardSimulation, **options))
    reverse, forward = (
        gradient(quadrature(FDistillation, divergence=d, **options)) for d in (ReverseKL(), ForwardKL())
    )
    assert_close(reverse, dmd2)
    assert not torch.allclose(forward, dmd2, rtol=1e-2)


def learned(**changes) -> BackwardSimulation:
    torch.manual_seed(0)
    teacher = jittered(mlp_denoiser(width=16, depth=2))
    levels = KarrasUniform(0.1, 3.0)
    given = {"levels": levels, "fake_levels": levels, "gan_levels": levels, "sigma_init": 2.0, "fake": SGD}
    config = DMD2.model_validate(given | changes)
    return objective_of(config, OneStep(copy.deepcopy(teacher), 2.0), teacher, SGD, 0)


def test_five_steps_of_the_fake_score_to_one_of_the_generator():
    moves = {name: [p.when(s) for s in range(6)] for name, p in learned().players.items()}
    assert moves == {"generator": [True, False, False, False, False, True], "fake_score": [True] * 6}


def test_the_discriminator_is_part_of_the_fake_score():
    objective = learned()
    assert objective.adversary.taps == ["layers.1"], "the last block alone"
    loss = objective.loss("fake_score", points(6), 1)
    assert {n: t.coefficient for n, t in loss.terms.items()} == {"denoising": 1.0, "generated": 1e-2, "real": 1e-2}
    assert objective.loss("generator", points(6), 0).terms["adversarial"].coefficient == 3e-3
    without = learned(discriminator_weight=0.0)
    assert without.adversary is None and set(without.loss("generator", points(6), 0).terms) == {"matching"}


def test_training_moves_generator_fake_score_and_heads_and_nothing_else():
    objective = learned(generator_every=2)
    start, frozen = copy.deepcopy(objective.state_dict()), copy.deepcopy(objective.teacher.state_dict())
    Trainer(TrainSpec(steps=3, batch=4, micro_batch=2, trackers=[], device="cpu")).fit(
        objective, Points(points(12).points_BD)
    )
    moved = {k.split(".")[0] for k, v in objective.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"generator", "fake", "heads"}
    assert all(torch.equal(v, frozen[k]) for k, v in objective.teacher.state_dict().items())


# ---------------------------------------------------------------- several calls


def test_backward_simulation_trains_one_call_on_what_the_student_itself_makes():
    objective, batch = learned(steps=[1.0, 0.5]), points(5)
    denoiser, levels = objective.generator.denoiser, [2.0, 1.0, 0.5]
    chosen = {}
    for step in range(12):
        u = float(keyed.uniform(keyed.key(0, "call", step), torch.zeros(1, dtype=torch.int64)))
        chosen.setdefault(int(u * 3), step)
    assert set(chosen) == {0, 1, 2}
    for call, step in chosen.items():
        x_t = 2.0 * objective.latents(batch, step)
        for i in range(call):
            x = denoiser(x_t, levels[i]).detach()
            x_t = x + levels[i + 1] * keyed.normal_like(keyed.key(0, "again", step, i), batch.ids_B, x)
        expected = denoiser(x_t, levels[call])
        found = objective.generate(batch, step)
        assert_close(found, expected)
        wrt = list(denoiser.parameters())
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), wrt) for x in (found, expected))):
            assert_close(a, b)  # only the last call has a gradient


def test_a_student_of_several_calls_is_sampled_so_and_keeps_its_levels(tmp_path):
    generator = learned(steps=[1.0]).generator
    ids = torch.arange(6)
    x = generator.sample(ids)
    assert_close(x, generator.denoiser.sample(ids, sigmas=[2.0, 1.0, 0.0], solver=_consistency()))
    generator.save(tmp_path / "student")
    again = OneStep.from_pretrained(tmp_path / "student")
    assert again.levels == [2.0, 1.0]
    assert_close(again.sample(ids), x)
    assert not torch.allclose(OneStep(generator.denoiser, 2.0).sample(ids), x)


def _consistency():
    from potstill.noise.samplers import consistency

    return consistency


def test_levels_must_fall():
    raw = {"method": {"name": "dmd2", "steps": [0.5, 1.0]}, "data": {"task": "mixture"}}
    with pytest.raises(RecipeError, match="must fall and be positive, got \\[0.5, 1.0\\]"):
        recipes.resolve(raw)
    with pytest.raises(RecipeError, match="first call's sigma_init 2.0, got 3.0"):
        learned(steps=[3.0])

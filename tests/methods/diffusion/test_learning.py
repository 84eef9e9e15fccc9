"""Every method with a learned fake score, for a few seconds: two Gaussians in the plane, a small teacher of them.

The student starts as the teacher asked once, which gives blurred samples between the modes; it must end far from there.
"""

import copy

import pytest
import torch

from potstill.contracts import keyed
from potstill.contracts.players import OptimizerSpec
from potstill.evaluation.samples import energy_distance
from potstill.methods.diffusion import diff_instruct, dmd, dmd2, sid, sim, uni_instruct
from potstill.models.denoisers import OneStep, mlp_denoiser
from potstill.noise import samplers
from potstill.noise.gaussian import KarrasUniform
from potstill.objectives.matching import DenoisingScoreMatching
from potstill.tasks.mixture import Points, mixture
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

ADAM = OptimizerSpec(optimizer="adam", lr=2e-3, betas=(0.0, 0.99))
LEVELS = KarrasUniform(smin=0.05, smax=4.0)


@pytest.fixture(scope="module")
def source():
    return mixture(modes=2, radius=1.0, std=0.2, size=2000, test_size=500)


@pytest.fixture(scope="module")
def teacher(source):
    torch.manual_seed(0)
    model = mlp_denoiser(width=32, depth=2)
    adam = OptimizerSpec(optimizer="adam", lr=5e-3, schedule="cosine")
    objective = DenoisingScoreMatching(model, optimizer=adam, seed=0)
    Trainer(TrainSpec(steps=300, batch=64, trackers=[], device="cpu")).fit(objective, source.train)
    return model


def distance(student: OneStep, source) -> float:
    return energy_distance(source.test.points, student.eval().sample(torch.arange(500)))


CASES = {
    "diff_instruct": (diff_instruct, {}),
    "dmd": (dmd, {"pair_steps": 6}),
    "dmd2": (dmd2, {"generator_every": 2, "gan_levels": LEVELS}),
    "dmd2 in two calls": (dmd2, {"generator_every": 2, "gan_levels": LEVELS, "steps": [0.8]}),
    "sid": (sid, {"alpha": 1.0}),
    "sim": (sim, {}),
    "uni_instruct": (uni_instruct, {"warmup": 0, "sid_until": 50}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_student_ends_nearer_to_the_data_than_it_began(name, source, teacher):
    module, options = CASES[name]
    given = {"levels": LEVELS, "fake_levels": LEVELS, "sigma_init": 2.5, "fake": ADAM, "ema": 0.95}
    config = module.METHOD.config.model_validate(given | options)
    generator, teacher = OneStep(copy.deepcopy(teacher), 2.5), copy.deepcopy(teacher)  # objectives freeze teachers
    start = distance(generator, source)
    extra = {}
    if name == "dmd":
        z = samplers.start([2], 1.0, keyed.key(0, "pairs"), torch.arange(500))
        extra = {"pairs": dmd.Pairs(z, dmd.draw_pairs(teacher, z, None, 2.5, config.pair_steps))}
    objective = module.objective_of(config, generator, teacher, ADAM, 0, **extra)
    steps = 160 if name.startswith("dmd2") else 100
    Trainer(TrainSpec(steps=steps, batch=64, trackers=[], device="cpu")).fit(objective, Points(source.train.points))
    end = distance(objective.ema.average, source)
    assert end < 0.4 * start

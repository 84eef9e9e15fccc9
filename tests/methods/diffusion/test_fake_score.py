"""What every one-step method with a fake score does: exact scores, real architectures, whole runs, refusals."""

from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.diffusion.fake_score import bottleneck
from potstill.models.denoisers import MixtureDenoiser, OneStep, affine, dit_tiny, mlp_denoiser, unet_tiny
from potstill.noise.gaussian import LogUniform
from potstill.noise.mixture import GaussianMixture
from potstill.run import Run, open_folder
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

NAMES = ["diff_instruct", "dmd", "dmd2", "sid", "sim", "uni_instruct"]
SMALL = {
    "dmd": {"pairs": 12, "pair_steps": 2},
    "dmd2": {"generator_every": 1},
    "uni_instruct": {"warmup": 0, "sid_until": 1},
}


def module(name: str):
    return import_module(f"potstill.methods.diffusion.{name}")


def config_of(name: str, **changes):
    return module(name).METHOD.config.model_validate({**SMALL.get(name, {}), **changes})


@pytest.mark.parametrize("name", NAMES)
def test_with_exact_scores_each_method_finds_the_teacher(name):
    """One Gaussian to another: the generator alone moves, and ends at the teacher's mean and spread."""
    mixture = GaussianMixture(torch.tensor([[1.0, -1.0]]), 0.5)
    generator = OneStep(affine(dimension=2, shift=0.0, scale=1.0), 1.0)
    options = {"regression": 0.0} if name == "dmd" else {}
    config = config_of(name, exact=True, levels=LogUniform(0.2, 1.0), ema=0, **options)
    adam = OptimizerSpec(optimizer="adam", lr=0.03)
    objective = module(name).objective_of(config, generator, MixtureDenoiser(mixture), adam, seed=0)
    assert list(objective.players) == ["generator"]
    Trainer(TrainSpec(steps=200, batch=64, trackers=[], device="cpu")).fit(objective, Points(torch.zeros(64, 2)))
    network = generator.denoiser.network
    assert_close(network.shift, mixture.means_KD[0], rtol=0, atol=0.12)
    assert_close(network.scale.abs(), torch.full((2,), 0.5), rtol=0, atol=0.12)


def jittered(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def run(folder, name, teacher, data, **sections):
    method = {"name": name, **SMALL.get(name, {})}
    raw = {"method": method, "teacher": str(teacher), "student": {"from": "teacher"}, "data": data}
    raw |= {"train": {"steps": 2, "batch": 4, "trackers": [], "lr": 1e-4}, "eval": {"limit": 12}, **sections}
    plan = recipes.resolve(raw)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.needs("diffusers", "sklearn", "PIL")
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_a_unet(name, tmp_path, untrained_judge):
    jittered(unet_tiny(channels=1, size=8, classes=10, conditional=True)).save(tmp_path / "teacher")
    result = run(
        tmp_path / "run", name, tmp_path / "teacher", {"task": "digits", "size": 64, "test_size": 40},
    )  # fmt: skip
    again = OneStep.from_pretrained(tmp_path / "run/student")
    assert_close(again.generate(3, seed=1), result.student.generate(3, seed=1))
    start = OneStep.from_pretrained(tmp_path / "run/student").denoiser.state_dict()
    before = unet_tiny(channels=1, size=8, classes=10, conditional=True).from_pretrained(tmp_path / "teacher")
    assert any(not torch.equal(v, start[k]) for k, v in before.state_dict().items())
    assert {"fid_own", "before_fid_own", "teacher_fid_own", "calls"} <= set(result.metrics)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_on_points(name, tmp_path):
    jittered(mlp_denoiser(width=16, depth=2)).save(tmp_path / "teacher")
    method = {"name": name, **SMALL.get(name, {})}
    if name == "dmd2":
        method["steps"] = [1.0]
    result = run(
        tmp_path / "run", name, tmp_path / "teacher", {"task": "mixture", "size": 32, "test_size": 40}, method=method
    )
    assert result.metrics["calls"] == (2 if name == "dmd2" else 1)
    assert {"energy_distance", "modes", "before_energy_distance"} <= set(result.metrics)


@pytest.mark.needs("diffusers")
def test_the_bottleneck():
    assert bottleneck(unet_tiny(channels=1, size=8)) == ["mid_block"]
    assert bottleneck(dit_tiny(channels=1, size=8, classes=2, conditional=True, layers=3)) == ["transformer_blocks.2"]
    assert bottleneck(mlp_denoiser(depth=2)) == ["layers.1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_recipe_resolves(name):
    assert recipes.resolve(recipes.read(name)).method.name == name


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    adam = OptimizerSpec()
    objective_of = module(name).objective_of
    exact = MixtureDenoiser(GaussianMixture(torch.zeros(1, 2), 1.0))
    with pytest.raises(RecipeError, match="exact: true takes teacher: exact-mixture and student: affine"):
        objective_of(config_of(name, exact=True), OneStep(mlp_denoiser(), 1.0), mlp_denoiser(), adam, 0)
    with pytest.raises(RecipeError, match="no network to start a fake score from, and no features"):
        objective_of(config_of(name), OneStep(affine(dimension=2), 1.0), exact, adam, 0)

"""What the one-step methods with a fake score share: options, the parts of an objective, and the way from teacher to
student. A method file adds its own choices to `options`, and its objective.

`exact: true` takes a Gaussian mixture as teacher and an affine student (`teacher: exact-mixture`, `student: affine`):
scores and ratio are formulas, so that nothing but the loss differs between methods.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Every, OptimizerSpec
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence
from potstill.methods.diffusion.comparison import compared
from potstill.models.denoisers import Condition, MixtureDenoiser, OneStep, guided
from potstill.noise.gaussian import LevelSampler, LogNormal
from potstill.objectives.blocks import Heads
from potstill.objectives.matching import AffineScore, DistributionMatching, condition_of, is_exact, tapped
from potstill.run import Result, Run

ADAM = OptimizerSpec(optimizer="adam", lr=1e-5, betas=(0.0, 0.999))  # Diff-Instruct, SiD and Uni-Instruct on CIFAR-10


def _has_curvature(divergence: FDivergence) -> FDivergence:
    log_ratio = torch.tensor([-1.0, 0.0, 1.0])
    if not (divergence.score_weight(log_ratio) > 0).any():
        raise ValueError(f"{divergence} has r^2 f''(r) = 0: its weight would never move the student. Take a smooth one")
    return divergence


# a divergence whose score weight is not 0
Curved = Annotated[Part(FDivergence), AfterValidator(_has_curvature)]  # type: ignore[valid-type]


class FakeScoreConfig(MethodConfig):
    levels: Part(LevelSampler) = LogNormal()  # type: ignore[valid-type]  # where teacher and fake score are compared
    fake_levels: Part(LevelSampler) = LogNormal()  # type: ignore[valid-type]  # where the fake score learns
    generator_every: int = Field(1, ge=1)  # steps of the fake score to one of the generator
    sigma_init: float = Field(2.5, gt=0)  # G(z) = D(sigma_init z; sigma_init)
    guidance: float = Field(1.0, ge=1)  # of the teacher; the fake score has none
    ema: float = Field(0.99965, ge=0, lt=1)  # half-life 0.5 million images at batch 256
    fake: OptimizerSpec = ADAM
    exact: bool = False  # mixture teacher, affine student: scores and ratio in closed form


def options(config: Any, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int) -> dict[str, Any]:
    """The arguments of an objective that follow from what all these configs share. `teacher` is a plain denoiser."""
    if config.exact and not is_exact(generator, teacher):
        raise RecipeError("method.exact: true takes teacher: exact-mixture and student: affine, on points.")
    if isinstance(teacher, MixtureDenoiser) and not config.exact:
        raise RecipeError(
            "A mixture has no network to start a fake score from, and no features for a discriminator. "
            "Set method.exact=true, or train a teacher."
        )
    return {
        "teacher": guided(teacher, config.guidance),
        "fake": AffineScore(generator) if config.exact else None,
        "seed": seed,
        "optimizer": optimizer,
        "fake_optimizer": config.fake,
        "levels": config.levels,
        "fake_levels": getattr(config, "fake_levels", None),
        "generator_when": Every(config.generator_every),
        "ema": config.ema or None,
    }


def bottleneck(denoiser: Any) -> list[str]:
    """The block halfway: a U-Net's middle one, else the last."""
    return [name for name in denoiser.taps if not name.startswith("up_blocks")][-1:]


def heads(teacher: Any, taps: Sequence[str] | None, condition: Condition) -> Heads:
    """A discriminator's heads on features of the teacher, or of the fake score, which is its copy."""
    if isinstance(teacher, MixtureDenoiser):
        raise RecipeError("A mixture has no features for a discriminator. Set method.exact=true, or train a teacher.")
    return Heads.on(tapped(teacher, taps, condition)).to(next(teacher.parameters()).device)


def distilled(run: Run, config: Any, objective_of: Callable[..., DistributionMatching]) -> Result:
    """Teacher and generator, the objective of a config, its training, and the comparison at the end."""
    teacher = run.model("teacher")
    generator = OneStep(run.student(), config.sigma_init)
    before = copy.deepcopy(generator).eval()
    torch.manual_seed(run.seed)  # the discriminator's first weights
    one = condition_of(run.source.train.batch(torch.zeros(1, dtype=torch.int64)).to(run.device), teacher)
    objective = objective_of(config, generator, teacher, run.train.optimizer_spec(), run.seed, one)
    run.fit(objective, run.source.train)
    return compared(run, objective, before)

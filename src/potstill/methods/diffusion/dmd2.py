"""DMD2: distribution matching without pairs, by a faster fake score and a discriminator on its features.

    v = (D_S - D_T)(x_t) / mean |x - D_T(x_t)|,  L_G = 1/2 mean |x - sg[x - v]|^2 + lambda mean softplus(-logit(x'_t))
    L_S = mean (1/sigma^2 + 1/sigma_d^2) |D_S(sg[x]_t) - sg[x]|^2 + mu [mean softplus(logit fake) + mean softplus(-logit real)]

The fake score and the heads on its bottleneck move in every step, the generator in one of five. The discriminator's
input is noised at levels of its own. With `steps`, the student takes several calls: it denoises from sigma_init, is
noised to the next level, and again; in training one of the levels is drawn a step, the input there is what the student
itself makes (backward simulation, without gradients), and the losses see the prediction at that level.

Source: "Improved Distribution Matching Distillation for Fast Image Synthesis", arXiv 2405.14867; the authors' EDM code.
Departures: 1e-6 is added below the fraction, where the code replaces what is not a number; in a step in which the
generator moves, the fake score sees the same noise through the moved generator, not the samples from before; the heads
are those of `objectives.blocks` (4x4 convolutions to a map of logits).
"""

from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import Part
from potstill.methods import Role, method
from potstill.methods.diffusion.fake_score import FakeScoreConfig, bottleneck, distilled, heads, options
from potstill.models.denoisers import Condition, OneStep
from potstill.noise.gaussian import KarrasIndex, LevelSampler
from potstill.objectives.matching import Adversary, DistributionMatching
from potstill.run import Result, Run

ADAMW = OptimizerSpec(lr=2e-6, weight_decay=0.01, warmup=500, clip=10.0)


class DMD2(FakeScoreConfig):
    levels: Part(LevelSampler) = KarrasIndex(low=20, high=980)  # type: ignore[valid-type]
    fake_levels: Part(LevelSampler) = KarrasIndex()  # type: ignore[valid-type]
    generator_every: int = Field(5, ge=1)  # 10 for SD 1.5
    sigma_init: float = Field(80.0, gt=0)
    steps: list[float] = []  # further noise levels of a student of several calls, falling
    ema: float = Field(0.0, ge=0, lt=1)
    fake: OptimizerSpec = ADAMW
    gan_weight: float = Field(3e-3, ge=0)  # lambda; 5e-3 for SDXL
    discriminator_weight: float = Field(1e-2, ge=0)  # mu; at 0 there is no discriminator
    gan_levels: Part(LevelSampler) = KarrasIndex()  # type: ignore[valid-type]
    taps: list[str] | None = None  # blocks of the fake score that the heads see; default: the bottleneck

    @field_validator("steps")
    @classmethod
    def _fall(cls, steps: list[float]) -> list[float]:
        if any(b >= a for a, b in pairwise(steps)) or any(not s > 0 for s in steps):
            raise ValueError(f"the levels of a student of several calls must fall and be positive, got {steps}")
        return steps


class BackwardSimulation(DistributionMatching):
    """Distribution matching of a generator of one or several calls."""

    def generate(self, batch: Batch, step: int) -> Tensor:
        levels, condition = self.generator.levels, self.condition(batch)
        u = keyed.uniform(keyed.key(self.seed, "call", step), torch.zeros(1, dtype=torch.int64))
        chosen = int(u * len(levels))  # one for all samples of the step, on all ranks
        x_t = levels[0] * self.latents(batch, step)
        with torch.no_grad():
            for call in range(chosen):
                x = self.generator.denoiser(x_t, levels[call], condition)
                noise = keyed.normal_like(keyed.key(self.seed, "again", step, call), batch.ids_B, x)
                x_t = x + levels[call + 1] * noise
        return self.generator.denoiser(x_t, levels[chosen], condition)


def objective_of(
    config: DMD2, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int, condition: Condition = None
) -> BackwardSimulation:
    if config.steps and config.steps[0] >= generator.sigma_init:
        raise RecipeError(
            f"method.steps must lie below the first call's sigma_init {generator.sigma_init}, got {config.steps[0]}."
        )
    given = options(config, generator, teacher, optimizer, seed)
    adversary = None
    if config.discriminator_weight > 0 and not config.exact:
        taps = config.taps or bottleneck(teacher)
        adversary = Adversary(
            heads(teacher, taps, condition), config.fake, taps, "fake", config.gan_weight,
            levels=config.gan_levels, joint=config.discriminator_weight,
        )  # fmt: skip
    generator.then = tuple(config.steps)
    return BackwardSimulation(generator, adversary=adversary, **given)


@method("dmd2", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def dmd2(run: Run, config: DMD2) -> Result:
    return distilled(run, config, objective_of)

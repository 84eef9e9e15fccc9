"""rCM: continuous-time consistency on data, kept sharp by score matching on the student's own rollouts.

    g = -cos(t) sqrt(1 - r^2 sin(t)^2) (F_sg - F_T) - r cos(t) sin(t) x_t - cos(t) sin(t) dF/dt,   g <- g / (|g| + 0.1)
    L_sCM = sum |F - F_sg - g|^2
    rollout: N ~ U{1..4} calls, x_t = cos(t) x + sin(t) eps between them, t falling; gradient through the last call alone
    L_DMD = sum |x - sg[x - (f_S - f_T) / mean |x - f_T|]|^2;   L = L_sCM + lambda L_DMD,  lambda = 0.01
    fake score: |x - f_S|^2 / sin(t)^2 on the rollouts

For `warmup` iterations the student learns consistency alone (r rises to 1); then one in `generator_every` moves the
student, the others the fake score.

Source: "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency", arXiv 2510.08431; the
authors' code, whose tangent has no r before dF/dt. Departures: N and the levels are keyed, N drawn as in the paper (the
code cycles); the fake score's loss is a mean over elements, not a sum; a rollout starts at sigma_init, not at t = pi/2; an
ordinary moving average; samples that are not finite stop the run. lambda presumes images: the
consistency direction is shorter than 1 whatever the number D of elements, the other field grows with sqrt(D).
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.players import Every, From, OptimizerSpec, Player, Unless
from potstill.contracts.spec import MethodConfig, Part
from potstill.contracts.terms import Loss
from potstill.methods import Role, method
from potstill.methods.diffusion.few_steps import distilled
from potstill.models.denoisers import OneStep, guided
from potstill.models.jvp import Derivative
from potstill.noise.gaussian import LevelSampler, LogNormal, spread
from potstill.objectives.consistency import Consistency, PathPoints
from potstill.objectives.matching import DistributionMatching, TeacherError
from potstill.run import Result, Run


class RCM(MethodConfig):
    score_weight: float = Field(0.01, ge=0)  # lambda; 0 is sCM alone
    consistency_weight: float = Field(1.0, ge=0)  # 0 is DMD alone
    times: Part(LevelSampler) = LogNormal(-0.8, 1.6)  # type: ignore[valid-type]
    levels: Part(LevelSampler) = LogNormal(0.0, 1.6)  # type: ignore[valid-type]  # of rollouts, comparison and fake score
    rollout_steps: int = Field(4, ge=1)
    generator_every: int = Field(5, ge=1)  # 10 for 14B
    warmup: int = Field(0, ge=0)  # H
    c: float = Field(0.1, gt=0)
    derivative: Derivative = "exact"
    h: float = Field(1e-4, gt=0)
    sigma_init: float = Field(80.0, gt=0)
    steps: list[float] = [5.8, 1.56]  # further calls, tan of 1.4 and 1.0
    guidance: float = Field(1.0, ge=1)  # 4.5 for Cosmos, 5 for Wan
    ema: float = Field(0.999, ge=0, lt=1)
    fake: OptimizerSpec = OptimizerSpec(lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01)


@dataclass(frozen=True)
class StudentTurn:
    """Every step of the warm-up, then one in `every`."""

    warmup: int
    every: int

    def __call__(self, step: int) -> bool:
        return step < self.warmup or From(self.warmup, Every(self.every))(step)


class Rollouts(DistributionMatching):
    """Distribution matching on the last of a random number of calls, at random falling levels."""

    rollout_steps = 4

    def generate(self, batch: Batch, step: int) -> Tensor:
        u = keyed.uniform(keyed.key(self.seed, "calls", step), torch.zeros(1, dtype=torch.int64))
        calls = 1 + int(u * self.rollout_steps)  # the same on all ranks
        condition, denoiser = self.condition(batch), self.generator.denoiser
        sigma_B = torch.full((len(batch),), self.generator.sigma_init, device=batch.ids_B.device)
        x_t = self.generator.sigma_init * self.latents(batch, step)
        with torch.no_grad():
            for call in range(calls - 1):
                x, seed = denoiser(x_t, sigma_B, condition), keyed.key(self.seed, "again", step, call)
                sigma_B = torch.minimum(sigma_B, self.levels(seed, batch.ids_B))
                x_t = x + spread(sigma_B, x) * keyed.normal_like(seed, batch.ids_B, x)
        return denoiser(x_t, sigma_B, condition)


class RegularisedConsistency(Consistency):
    """Consistency and, after the warm-up, the rollouts' matching in one update."""

    def __init__(
        self, generator: OneStep, teacher: Any, *, matching: Rollouts, consistency_weight: float, **given: Any
    ):
        super().__init__(generator, teacher, **given)
        self.matching, self.consistency_weight = matching, consistency_weight

    @property
    def players(self) -> dict[str, Player]:
        fake = {"fake_score": self.matching.players["fake_score"]} if self.matching.scale > 0 else {}
        return super().players | fake

    def tangent(self, at: PathPoints, student: Tensor, change: Tensor, step: int) -> Tensor:
        cos, sin, r = at.t_B.cos(), at.t_B.sin(), self.r(step)
        gap = spread(cos * (1 - (r * sin) ** 2).sqrt(), at.x) * (student - at.velocity)
        return -gap - spread(r * cos * sin, at.x) * at.x - change

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        if player == "fake_score":
            return self.matching.fake_loss(batch, step)
        found = super().loss(player, batch, step) if self.consistency_weight > 0 else Loss({})
        if self.matching.scale > 0 and step >= self.warmup:
            other = self.matching.generator_loss(batch, step)
            found = Loss(found.terms | other.terms, dict(found.metrics) | dict(other.metrics))
        return found


def objective_of(
    config: RCM, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int
) -> RegularisedConsistency:
    turn = StudentTurn(config.warmup, config.generator_every if config.score_weight > 0 else 1)
    asked = guided(teacher, config.guidance)
    matching = Rollouts(
        generator, asked, seed=seed, optimizer=optimizer, fake_optimizer=config.fake, levels=config.levels,
        fake_when=Unless(turn), normaliser=TeacherError(eps=0.0, least=1e-5), elements="sum",
        scale=2 * config.score_weight, ema=None,
    )  # fmt: skip
    matching.rollout_steps = config.rollout_steps
    return RegularisedConsistency(
        generator, asked, matching=matching, consistency_weight=config.consistency_weight, seed=seed,
        optimizer=optimizer, times=config.times, warmup=config.warmup, c=config.c, adaptive=False, prior=False,
        elements="sum", derivative=config.derivative, h=config.h, when=turn, ema=config.ema or None,
    )  # fmt: skip


@method("rcm", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def rcm(run: Run, config: RCM) -> Result:
    return distilled(run, config, objective_of)

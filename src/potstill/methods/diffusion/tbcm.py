"""TBCM: consistency on the teacher's own trajectories, which need no data.

    sig_k = linspace(1, smin, N), sig <- s sig / (1 + (s - 1) sig);  t_k = atan of sig / (1 - sig);  N = 16, s = 2.5   (2)
    route: tau_0 = t_0, tau_{i+1} ~ U(t_{i+1}, t_i), one draw a step                                                 (3)
    x_{i+1} = cos(delta) x_i - sin(delta) d_i,  delta = tau_i - tau_{i+1},  d_i = dx/dt of the teacher               (4)
    sCM's tangent and loss at every (x_i, tau_i, d_i) but the first, r over 4000 steps, 1 / (sigma_d tan t), e^w - w (5-9)
    after `calm_from` steps r falls to 0.75 in 2000                                                                  (8)

Source: "Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs",
arXiv 2511.20410; the authors' code. Departures: one guidance scale for all samples and no embedding of it in the student
(the code draws 4, 4.5 or 5 and tells it); all t_k are scaled so that t_0 = atan(sigma_init / sigma_d), not pi/2; no
filter of black images, which needs their latent; `pairs: data` takes sCM's pairs instead. A batch gives ids and
conditions alone.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import MethodConfig, Part
from potstill.methods import Role, method
from potstill.methods.diffusion.few_steps import distilled
from potstill.models.denoisers import OneStep, guided, rows
from potstill.models.jvp import Derivative
from potstill.noise.gaussian import LevelSampler, LogNormal
from potstill.objectives.consistency import Consistency, PathPoints, moved
from potstill.objectives.matching import condition_of
from potstill.run import Result, Run


class TBCM(MethodConfig):
    pairs: Literal["trajectory", "data"] = "trajectory"
    route_steps: int = Field(16, ge=2)  # N: teacher calls of a trajectory; N - 1 pairs
    shift: float = Field(2.5, gt=0)
    times: Part(LevelSampler) = LogNormal(0.2, 1.6)  # type: ignore[valid-type]  # of `pairs: data`
    warmup: int = Field(4000, ge=0)
    calm_from: int = Field(15000, ge=0)
    calm_steps: int = Field(2000, ge=1)
    calm_r: float = Field(0.75, ge=0, le=1)  # 1 leaves r alone
    c: float = Field(0.1, gt=0)
    derivative: Derivative = "exact"
    h: float = Field(1e-3, gt=0)
    sigma_init: float = Field(80.0, gt=0)
    steps: list[float] = [0.779]  # sigma_d tan(1): two calls
    guidance: float = Field(4.5, ge=1)
    ema: float = Field(0.0, ge=0, lt=1)


class TrajectoryConsistency(Consistency):
    """Consistency at the states of the teacher's trajectories."""

    def __init__(self, generator: OneStep, teacher: Any, *, config: TBCM, **given: Any) -> None:
        super().__init__(generator, teacher, **given)
        self.config = config
        shifted = lambda u: config.shift * u / (1 + (config.shift - 1) * u)
        sig = shifted(torch.linspace(1.0, shifted(0.001), config.route_steps, dtype=torch.float64))
        first = math.atan(generator.sigma_init / self.flow.sigma_data)
        self.ends = torch.atan2(sig, 1 - sig) * (first / (math.pi / 2))

    def r(self, step: int) -> float:
        calm = min(max((step - self.config.calm_from) / self.config.calm_steps, 0.0), 1.0)
        return super().r(step) * (1 - calm * (1 - self.config.calm_r))

    def route(self, step: int) -> Tensor:
        """Falling times, one from each stratum but the first: the same for all samples and ranks. [N]"""
        index = torch.arange(1, len(self.ends))
        u = keyed.uniform(keyed.key(self.seed, "route", step), index)
        return torch.cat([self.ends[:1], self.ends[1:] + u * (self.ends[:-1] - self.ends[1:])])

    def points(self, batch: Batch, step: int) -> PathPoints:
        if self.config.pairs == "data":
            return super().points(batch, step)
        condition = condition_of(batch, self.generator.denoiser)
        route = self.route(step).to(batch.ids_B.device)
        like = torch.empty(len(batch), *self.generator.shape, device=batch.ids_B.device)
        x = self.flow.sigma_data * keyed.normal_like(keyed.key(self.seed, "start", step), batch.ids_B, like)
        states: list[Tensor] = []
        velocities: list[Tensor] = []
        for i, t in enumerate(route):
            t_B = t.expand(len(batch))
            states.append(x)
            velocities.append(self.asked(self.teacher, x, t_B, condition))
            if i + 1 < len(route):
                x = moved(x, velocities[-1], t_B - route[i + 1])
        again = torch.arange(len(batch), device=batch.ids_B.device).repeat(len(route) - 1)
        t_B = route[1:].repeat_interleave(len(batch))
        return PathPoints(torch.cat(states[1:]), t_B, torch.cat(velocities[1:]), rows(condition, again))


def objective_of(
    config: TBCM, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int
) -> TrajectoryConsistency:
    return TrajectoryConsistency(
        generator, guided(teacher, config.guidance), config=config, seed=seed,
        optimizer=optimizer, times=config.times, warmup=config.warmup, c=config.c, derivative=config.derivative,
        h=config.h, ema=config.ema or None,
    )  # fmt: skip


@method("tbcm", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def tbcm(run: Run, config: TBCM) -> Result:
    return distilled(run, config, objective_of)

"""sCM: continuous-time consistency on TrigFlow, by distillation (sCD) or from data alone (sCT).

    x_t = cos(t) x0 + sin(t) z,  f = cos(t) x - sin(t) sigma_d F,  dx/dt = sigma_d F_teacher, or cos(t) z - sin(t) x0
    g = -cos(t)^2 (sigma_d F_sg - dx/dt) - r cos(t) sin(t) (x_t + sigma_d dF/dt),  r = min(1, step / 10000)
    L = e^w(t) / (sigma_d tan t) mean |F - F_sg - g / (|g| + 0.1)|^2 - w(t),   ln sigma ~ N(-1, 1.4^2)

Source: "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", arXiv 2410.11081; FastGen's code for
the numbers. Departures: any denoiser is a TrigFlow network by its noise-to-signal ratio, so the student starts as its
teacher whatever that predicts; w is a linear map of sines and cosines of ln tan(t), with the student's optimizer; one
call starts at sigma_init, not at t = pi/2. `discrete: true` takes neighbours of a time grid instead of the derivative.
"""

from typing import Any

from pydantic import Field

from potstill.contracts.players import OptimizerSpec
from potstill.contracts.spec import MethodConfig, Part
from potstill.methods import Role, method
from potstill.methods.diffusion.few_steps import distilled
from potstill.models.denoisers import OneStep, guided
from potstill.models.jvp import Derivative
from potstill.noise.gaussian import LevelSampler, LogNormal
from potstill.objectives.consistency import Consistency, DiscreteConsistency
from potstill.run import Result, Run


class SCM(MethodConfig):
    distil: bool = True  # sCD; false: sCT, where the teacher is only measured
    times: Part(LevelSampler) = LogNormal(-1.0, 1.4)  # type: ignore[valid-type]
    warmup: int = Field(10000, ge=0)  # steps in which r rises to 1
    c: float = Field(0.1, gt=0)
    root_mean: bool = True  # |g| as a root mean square (FastGen); false: the norm itself
    adaptive: bool = True
    prior: bool = True  # 1 / sigma
    derivative: Derivative = "exact"
    h: float = Field(1e-3, gt=0)  # step of a finite difference
    discrete: bool = False
    sigma_init: float = Field(80.0, gt=0)
    steps: list[float] = [0.821]  # levels of further calls: sCM samples in two
    guidance: float = Field(1.0, ge=1)
    ema: float = Field(0.9999, ge=0, lt=1)


def objective_of(config: SCM, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int) -> Consistency:
    return (DiscreteConsistency if config.discrete else Consistency)(
        generator, guided(teacher, config.guidance) if config.distil else None, seed=seed, optimizer=optimizer,
        times=config.times, warmup=config.warmup, c=config.c, root_mean=config.root_mean, adaptive=config.adaptive,
        prior=config.prior, derivative=config.derivative, h=config.h, ema=config.ema or None,
    )  # fmt: skip


@method("scm", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def scm(run: Run, config: SCM) -> Result:
    return distilled(run, config, objective_of)

"""Consistency on TrigFlow: a denoiser whose prediction stays the same along its teacher's trajectory.

    x_t = cos(t) x0 + sin(t) z,  z = sigma_d eps,  t in (0, pi/2);   f(x, t) = cos(t) x - sin(t) V(x, t)
    df/dt = -cos(t) (V - dx/dt) - sin(t) (x + dV/dt)                       along dx/dt, the teacher's velocity       (1)
    g = -cos(t)^2 (V - dx/dt) - r cos(t) sin(t) (x + dV/dt)                r = 1: cos(t) df/dt                       (2)
    g <- g / (|g| + c);   L = prior(t) e^w(t) |F - sg[F] - g|^2 - w(t),  F = V / sigma_d                             (3)

V is the velocity that a denoiser implies, so that any network serves, whatever it was trained to predict. V, dV/dt and g
carry no gradient but for the one F in (3), whose gradient is -2 g: the student moves along the tangent. Distillation
takes dx/dt from a teacher at x_t; without one it is cos(t) z - sin(t) x0 of the data: consistency training.

Source: sCM, arXiv 2410.11081. B samples; noise levels sigma = sigma_d tan(t).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Always, Objective, OptimizerSpec, Player, When
from potstill.contracts.terms import Loss, Term
from potstill.models.build import freeze
from potstill.models.denoisers import Condition, OneStep
from potstill.models.ema import EMA
from potstill.models.jvp import Derivative, jvp
from potstill.noise.gaussian import Denoise, LevelSampler, LogNormal, TrigFlow, spread
from potstill.objectives.matching import condition_of, per_sample, real_samples, sigma_data_of


def velocity(denoise: Denoise, x: Tensor, t_B: Tensor, flow: TrigFlow) -> Tensor:
    """V(x, t) = (cos(t) x - D) / sin(t): the dx/dt that a denoiser implies. Times in float64. [B, ...]"""
    return flow.from_x0("v", flow.denoise(denoise, x, t_B), x, t_B)


def moved(x: Tensor, velocity: Tensor, delta_B: Tensor) -> Tensor:
    """x after a step of `delta` back in time, exact for a constant prediction (DDIM). [B, ...]"""
    return spread(delta_B.cos(), x) * x - spread(delta_B.sin(), x) * velocity


def tangent(x: Tensor, t_B: Tensor, student: Tensor, teacher: Tensor, change: Tensor, r: float = 1.0) -> Tensor:
    """Equation 2 from both velocities and change = cos(t) sin(t) dV/dt of the student. [B, ...]"""
    cos, sin = t_B.cos(), t_B.sin()
    return -spread(cos**2, x) * (student - teacher) - r * (spread(cos * sin, x) * x + change)


def normalised(g: Tensor, c: float = 0.1, root_mean: bool = False) -> Tensor:
    """g / (|g| + c), the norm over a whole sample, in float64; root_mean: over the root of its size (FastGen). [B, ...]"""
    wide = g.double()
    norm_B = wide.flatten(1).norm(dim=1)
    if root_mean:
        norm_B = norm_B / math.sqrt(g[0].numel())
    return (wide / (spread(norm_B, wide) + c)).to(g.dtype)


class TimeWeight(nn.Module):
    """The learned w(t) of (3), a linear map of sines and cosines of ln tan(t). It starts at 0. [B] -> [B]"""

    def __init__(self, bands: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(-1.5, 1.5, bands).exp(), persistent=False)
        self.map = nn.Linear(2 * bands, 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        frequencies = self.get_buffer("frequencies")
        angle = t_B.tan().log().to(frequencies.dtype)[:, None] * frequencies
        return self.map(torch.cat([angle.sin(), angle.cos()], -1))[:, 0]


@dataclass(frozen=True)
class PathPoints:
    """Where consistency is asked for: points, their times (float64), and the velocity of the path through them."""

    x: Tensor
    t_B: Tensor
    velocity: Tensor
    condition: Condition = None


class Consistency(Objective):
    """Continuous-time consistency of a student along a teacher (equations 1 to 3).

    generator: a OneStep around the student; teacher: a frozen denoiser, or None for training from data. times: noise
    levels sigma, t = atan(sigma / sigma_d). warmup: steps in which r rises from 0 to 1. adaptive: learn w; prior:
    1 / sigma. elements: whether a sample's loss is the mean or the sum over its elements. derivative, h: see
    `models.jvp`. Subclasses override `points`, `tangent` or `r`.
    """

    def __init__(
        self,
        generator: OneStep,
        teacher: Any | None,
        *,
        seed: int,
        optimizer: OptimizerSpec,
        times: LevelSampler = LogNormal(-1.0, 1.4),
        warmup: int = 10000,
        c: float = 0.1,
        root_mean: bool = False,
        adaptive: bool = True,
        prior: bool = True,
        elements: Literal["mean", "sum"] = "mean",
        derivative: Derivative = "exact",
        h: float = 1e-3,
        when: When = Always(),
        sigma_data: float | None = None,
        ema: float | None = 0.999,
    ) -> None:
        super().__init__()
        self.generator = generator
        self._frozen = (freeze(teacher) if teacher is not None else None,)  # no submodule: never trained or saved
        self.weight = TimeWeight() if adaptive else None
        self.seed, self.optimizer, self.when = seed, optimizer, when
        self.times, self.warmup, self.prior = times, warmup, prior
        self.c, self.root_mean, self.elements = c, root_mean, elements
        self.derivative, self.h = derivative, h
        self.flow = TrigFlow(sigma_data or sigma_data_of(generator.denoiser))
        self.ema = EMA(generator, ema) if ema is not None else None

    @property
    def teacher(self) -> Any | None:
        return self._frozen[0]

    @property
    def players(self) -> dict[str, Player]:
        modules: list[nn.Module] = [self.generator, *([self.weight] if self.weight is not None else [])]
        return {"student": Player(modules, self.optimizer, when=self.when)}

    def train(self, mode: bool = True) -> "Consistency":
        """The student stays in evaluation mode: its derivative must not be that of another dropout mask."""
        super().train(mode)
        self.generator.eval()
        return self

    # ---------------------------------------------------------------- the choices of a method

    def r(self, step: int) -> float:
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def tangent(self, at: PathPoints, student: Tensor, change: Tensor, step: int) -> Tensor:
        return tangent(at.x, at.t_B, student, at.velocity, change, self.r(step))

    def points(self, batch: Batch, step: int) -> PathPoints:
        """Data under noise, one level a sample, with the teacher's velocity there, or the data's own."""
        x0, seed = real_samples(batch), keyed.key(self.seed, "consistency", step)
        t_B = self.flow.time(self.times(seed, batch.ids_B))
        eps = keyed.normal_like(seed, batch.ids_B, x0)
        x = self.flow.mix(x0, eps, t_B)
        condition = condition_of(batch, self.generator.denoiser)
        if self.teacher is None:
            a, b = self.flow.velocity(t_B)
            return PathPoints(x, t_B, spread(a, x) * x0 + spread(b, x) * eps, condition)
        return PathPoints(x, t_B, self.asked(self.teacher, x, t_B, condition), condition)

    # ---------------------------------------------------------------- one step

    def asked(self, denoiser: Any, x: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """A denoiser's velocity, without gradient."""
        with torch.no_grad():
            return velocity(lambda y, sigma: denoiser(y, sigma, condition), x, t_B, self.flow)

    def student(self, x: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The student's velocity."""
        return velocity(lambda y, sigma: self.generator.denoiser(y, sigma, condition), x, t_B, self.flow)

    def direction(self, at: PathPoints, student: Tensor, step: int) -> Tensor:
        """The normalised tangent that the student follows, without gradient."""
        with torch.no_grad():
            pace = at.t_B.cos() * at.t_B.sin()  # keeps the derivative finite at both ends
            along = (spread(pace, at.x) * at.velocity, pace)
            _, change = jvp(
                lambda x, t: self.student(x, t, at.condition), (at.x, at.t_B), along, self.derivative, h=self.h
            )
            return normalised(self.tangent(at, student.detach(), change, step), self.c, self.root_mean)

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        at = self.points(batch, step)
        v = self.student(at.x, at.t_B, at.condition)
        g = self.direction(at, v, step)
        values_B = per_sample(((v - v.detach()) / self.flow.sigma_data - g) ** 2, self.elements)
        metrics = {"tangent": Term.over(per_sample(g**2) * g[0].numel(), unit="sample")}
        return Loss({"consistency": Term.over(self.weighed(values_B, at.t_B), unit="sample")}, metrics)

    def weighed(self, values_B: Tensor, t_B: Tensor) -> Tensor:
        if self.prior:
            values_B = values_B / self.flow.ratio(t_B).to(values_B.dtype)
        if self.weight is None:
            return values_B
        w_B = self.weight(t_B).to(values_B.dtype)
        return w_B.exp() * values_B - w_B

    def after_step(self, player: str, step: int) -> None:
        if player == "student" and self.ema is not None:
            self.ema.update(self.generator)


class DiscreteConsistency(Consistency):
    """Consistency between neighbours of a grid: mean |f(x_t, t) - sg f(x_s, s)|^2, x_s one DDIM step of the path later.

    The grid has `steps` intervals between 0 and sigma_init; rectified-flow times are spread by `shift` as in rCM, which
    takes 48 and 5. `times`, warm-up and weights of the continuous form do not act.
    """

    def __init__(self, generator: OneStep, teacher: Any | None, *, steps: int = 48, shift: float = 5.0, **options: Any):
        super().__init__(generator, teacher, **{**options, "adaptive": False, "prior": False, "warmup": 0})
        if steps < 2:
            raise RecipeError(f"Discrete consistency needs a grid of at least 2 steps, got {steps}.")
        end = generator.sigma_init / (1 + generator.sigma_init)
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        rf = shift * u / (1 + (shift - 1) * u) * end
        self.grid = self.flow.time(rf / (1 - rf))  # rises from t = 0
        self.times = _OfGrid(tuple(self.flow.ratio(self.grid[1:]).tolist()))

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        at = self.points(batch, step)
        index_B = (at.t_B[:, None] - self.grid.to(at.t_B.device)).abs().argmin(1)
        s_B = self.grid.to(at.t_B.device)[index_B - 1]
        with torch.no_grad():
            after = moved(at.x, at.velocity, at.t_B - s_B)
            safe_B = s_B.clamp_min(self.grid[1].item() / 2)  # where s = 0, f is the point itself
            target = moved(after, self.student(after, safe_B, at.condition), s_B)
        found = moved(at.x, self.student(at.x, at.t_B, at.condition), at.t_B)
        return Loss({"consistency": Term.over(per_sample((found - target) ** 2, self.elements), unit="sample")})


class _OfGrid(LevelSampler):
    """One of given levels. No dataclass, so that recipes do not offer it."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        self.levels = levels

    def of_uniform(self, u: Tensor) -> Tensor:
        values = torch.tensor(self.levels, dtype=torch.float64, device=u.device)
        return values[(u * len(values)).long().clamp_max(len(values) - 1)]

"""CDM: distribution matching at any time, on the student's own trajectories of random length and beside them.

    x_t = (1 - t) x0 + t eps,  D = x - t v;  Delta = D_T - D_S or guidance at z = (1 - tau) sg[x] + tau eps
    rollout: N ~ U{1..28} Euler steps over [1, sorted N - 1 draws of U(0.25, 0.95)], no gradient                  (1, 2)
    anchor i ~ U{1..N} a sample;  x = D_theta(x_ti, t_i);  L(x, Delta) = mean |x - sg[x + Delta / nrm]|^2,
    nrm = max(mean |D_T - x|, 0.1)                                                                              (3, 4)
    CA: Delta = a (D_T(z, c) - D_T(z, none)), tau ~ U(0, t_i);   DM: Delta = D_T - D_S, tau ~ U(0, 1)              (5, 6)
    CDM: the same Delta for x' = D_theta(x_ti + (t' - t_i) v_i, t'), t' ~ U(0, 1), v_i kept from the rollout          (7)
    fake score: mean |v_S - (eps - x0)|^2, x0 the rollout's prediction one step after i; S <- 0.999 S + 0.001 theta    (9)

The fake score moves in every step, the student in every second. No data is looked at.

Source: "Continuous-Time Distribution Matching for Few-Step Diffusion Distillation", arXiv 2605.06376; the authors' code.
Departures: trajectories are kept as noise levels t / (1 - t), where an Euler step is the same; t = 1 is sigma_init; tau
and t' are drawn from 0.02 to 0.98, not clamped there (tau < t_i is). Guidance (CA) needs a teacher that knows "none".
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Every, OptimizerSpec
from potstill.contracts.spec import MethodConfig
from potstill.contracts.terms import Loss, Term
from potstill.methods import Role, method
from potstill.methods.diffusion.few_steps import distilled
from potstill.models.denoisers import OneStep
from potstill.noise.gaussian import ShiftedUniform, spread
from potstill.objectives.matching import Comparison, DistributionMatching, noised, per_sample
from potstill.run import Result, Run

LOW, HIGH = 0.02, 0.98
ADAMW = OptimizerSpec(lr=5e-6, weight_decay=1e-4, clip=1.0)


class CDM(MethodConfig):
    dynamic: bool = True  # false: the anchors are the calls of the student itself
    longest: int = Field(28, ge=1)
    anchor_low: float = Field(0.25, gt=0, lt=1)
    anchor_high: float = Field(0.95, gt=0, lt=1)
    guidance: float = Field(7.0, ge=0)  # a, the multiplier itself; 0 leaves CA out
    matching_weight: float = Field(1.0, ge=0)  # of DM
    beside_weight: float = Field(1.0, ge=0)  # of the CDM term
    least: float = Field(0.1, gt=0)  # of the normaliser
    capped: bool = True  # tau of CA below the anchor's time
    generator_every: int = Field(2, ge=1)
    merge: float = Field(0.001, ge=0, le=1)  # share of the student that flows into the fake score
    sigma_init: float = Field(80.0, gt=0)
    steps: list[float] = [3.0, 1.0, 1 / 3]  # t = 0.75, 0.5 and 0.25
    ema: float = Field(0.999, ge=0, lt=1)
    fake: OptimizerSpec = ADAMW


class TrajectoryMatching(DistributionMatching):
    """Distribution matching at anchors of the student's own trajectory."""

    def __init__(self, generator: OneStep, teacher: Any, *, config: CDM, **given: Any) -> None:
        super().__init__(generator, teacher, **given)
        self.config = config
        if config.guidance > 0 and getattr(teacher, "null_label", None) is None:
            raise RecipeError("method.guidance of cdm needs a conditional teacher. Write guidance: 0, or train one.")
        sizes = [[p.shape for p in model.parameters()] for model in (self.fake, generator.denoiser)]
        if config.merge > 0 and sizes[0] != sizes[1]:
            raise RecipeError("method.merge of cdm needs a student of its teacher's architecture. Write merge: 0.")

    # ---------------------------------------------------------------- the trajectory

    def schedule(self, step: int) -> Tensor:
        """Falling noise levels of a step's rollout, the same for all samples and ranks. [N]"""
        if not self.config.dynamic:
            return torch.tensor(self.generator.levels, dtype=torch.float64)
        seed, low, high = keyed.key(self.seed, "schedule", step), self.config.anchor_low, self.config.anchor_high
        count = 1 + int(keyed.uniform(seed, torch.zeros(1, dtype=torch.int64)) * self.config.longest)
        u = keyed.uniform(seed, torch.arange(1, count))
        t = (low + u * (high - low)).sort(descending=True).values
        return torch.cat([torch.tensor([self.generator.sigma_init], dtype=torch.float64), t / (1 - t)])

    def trajectory(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(states [N, B, ...], predictions of x0 [N, B, ...], levels [N]) of the student, without gradient."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            sigmas, condition = self.schedule(step).to(batch.ids_B.device), self.condition(batch)
            x = sigmas[0].float() * self.latents(batch, step)
            states, predictions = [], []
            with torch.no_grad():
                for i, sigma in enumerate(sigmas):
                    states.append(x)
                    predictions.append(self.generator.denoiser(x, sigma, condition))
                    if i + 1 < len(sigmas):
                        x = predictions[-1] + (sigmas[i + 1] / sigma).to(x.dtype) * (x - predictions[-1])
            return torch.stack(states), torch.stack(predictions), sigmas

        return batch.remember("trajectory", make)

    def anchors(self, batch: Batch, step: int, purpose: str, count: int) -> Tensor:
        """An index of the trajectory for each sample. [B]"""
        u_B = keyed.uniform(keyed.key(self.seed, purpose, step), batch.ids_B)
        return (u_B * count).long().clamp_max(count - 1)

    def fake_samples(self, batch: Batch, step: int) -> Tensor:
        _, predictions, sigmas = self.trajectory(batch, step)
        after_B = (self.anchors(batch, step, "fake anchor", len(sigmas)) + 1).clamp_max(len(sigmas) - 1)
        return predictions[after_B, torch.arange(len(batch), device=after_B.device)]

    # ---------------------------------------------------------------- the losses

    def pulled(self, x: Tensor, gap: Tensor, teacher: Tensor) -> Tensor:
        """mean |x - sg[x + Delta / nrm]|^2. [B]"""
        size_B = per_sample((teacher - x.detach()).abs()).clamp_min(self.config.least)
        return per_sample((x - (x + gap / spread(size_B, x)).detach()) ** 2)

    def matched(self, x: Tensor, batch: Batch, step: int, purpose: str) -> tuple[Tensor, Comparison]:
        """DM at an independent level and noise. [B]"""
        x_t, sigma_B = self.noised(x.detach(), batch, step, purpose)
        teacher, fake, _ = self.answers(x_t, sigma_B, self.condition(batch))
        return self.pulled(x, teacher - fake, teacher), Comparison(x, x_t, sigma_B, teacher, fake, None)

    def guided(self, x: Tensor, sigma_B: Tensor, batch: Batch, step: int) -> Tensor:
        """CA: the teacher's guidance at a level below the anchor's. [B]"""
        seed, condition = keyed.key(self.seed, "guide", step), self.condition(batch)
        highest_B = sigma_B / (1 + sigma_B) if self.config.capped else torch.ones_like(sigma_B)
        tau_B = (keyed.uniform(seed, batch.ids_B) * highest_B).clamp(LOW, HIGH)
        level_B = tau_B / (1 - tau_B)
        z = noised(x.detach(), level_B, seed, batch.ids_B)
        with torch.no_grad():
            teacher, free = self.teacher(z, level_B, condition), self.teacher(z, level_B, None)
        return self.pulled(x, self.config.guidance * (teacher - free), teacher)

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        states, predictions, sigmas = self.trajectory(batch, step)
        index_B = self.anchors(batch, step, "anchor", len(sigmas))
        row_B, sigma_B = torch.arange(len(batch), device=index_B.device), sigmas[index_B]
        start, kept, condition = states[index_B, row_B], predictions[index_B, row_B], self.condition(batch)
        terms: dict[str, Term] = {}
        metrics: dict[str, Term] = {}
        if self.config.guidance > 0 or self.config.matching_weight > 0:
            x = self.generator.denoiser(start, sigma_B, condition)
            if self.config.guidance > 0:
                terms["guidance"] = Term.over(self.guided(x, sigma_B, batch, step), unit="sample")
            if self.config.matching_weight > 0:
                values_B, at = self.matched(x, batch, step, "compare")
                terms["matching"] = Term.over(values_B, None, self.config.matching_weight, unit="sample")
                metrics["gap"] = Term.over(per_sample((at.fake - at.teacher).abs()), unit="sample")
        if self.config.beside_weight > 0:
            beside_B = self.levels(keyed.key(self.seed, "beside", step), batch.ids_B).double()
            x_t = kept + spread(beside_B / sigma_B, kept) * (start - kept)
            x = self.generator.denoiser(x_t, beside_B, condition)
            values_B, _ = self.matched(x, batch, step, "compare beside")
            terms["beside"] = Term.over(values_B, None, self.config.beside_weight, unit="sample")
        return Loss(terms, metrics)

    def fake_loss(self, batch: Batch, step: int) -> Loss:
        """In velocities: |v_S - (eps - x0)| = |D_S - x0| / tau."""
        x, seed = self.fake_samples(batch, step), keyed.key(self.seed, "fake", step)
        sigma_B = self.fake_levels(seed, batch.ids_B)
        error = self.fake(noised(x, sigma_B, seed, batch.ids_B), sigma_B, self.condition(batch)) - x
        values_B = ((1 + sigma_B) / sigma_B).to(x.dtype) ** 2 * per_sample(error**2)
        return Loss({"denoising": Term.over(values_B, unit="sample")})

    @torch.no_grad()
    def after_step(self, player: str, step: int) -> None:
        super().after_step(player, step)
        if player == "fake_score" and self.config.merge > 0:
            for mine, other in zip(self.fake.parameters(), self.generator.denoiser.parameters()):
                mine.lerp_(other, self.config.merge)


def objective_of(
    config: CDM, generator: OneStep, teacher: Any, optimizer: OptimizerSpec, seed: int
) -> TrajectoryMatching:
    if not config.anchor_low < config.anchor_high:
        raise RecipeError(f"cdm needs anchor_low < anchor_high, got {config.anchor_low} and {config.anchor_high}.")
    return TrajectoryMatching(
        generator, teacher, config=config, seed=seed, optimizer=optimizer, fake_optimizer=config.fake,
        levels=ShiftedUniform(1.0, LOW, HIGH), generator_when=Every(config.generator_every), fake_first=True,
        ema=config.ema or None,
    )  # fmt: skip


@method("cdm", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def cdm(run: Run, config: CDM) -> Result:
    return distilled(run, config, objective_of)

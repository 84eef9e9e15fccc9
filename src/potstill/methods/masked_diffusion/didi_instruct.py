"""DiDi-Instruct: a masked diffusion language model that writes in a few steps, by policy gradient on a density ratio.

    L(nu) = int omega(t) KL(q_nu(z_t) || q_theta(z_t)) dt,  q the marginals of corrupted student and teacher samples   (1)
    grad L = E_{t ~ pi, x ~ p_nu, z_t ~ q(. | x)} [ omega(t) / pi(t) R(z_t) grad log p_nu(x) ],  R = log q_nu / q_theta  (2)
    D(z_t) = P[real],  its logit = log q_theta / q_nu = -R at the optimum: the reward r, to be maximised                 (3)
    log p_nu(x) ~ log p_nu(x_tau | x_1) + log p_nu(x_t0 | x_tau),  tau ~ pi,  t = tau (coupled time)                     (4)
    L_D = 1/2 [ BCE(D real, 1 - s) + BCE(D fake, s) ] over masked tokens, s = 0.1
    r = mean over masked tokens of the logit clipped to +-8;  A = (r - mean) / std in the group of G, clipped to +-3
    L_S = -mean(omega / pi A log p_nu) + beta sum over jumps of c_j KL_j(teacher, student) - eta H

Sampling (`RewardGuided`): in the first half of the steps log p += h clamp(d s / d log p, -1, 1), s the sum of the logits at
masked positions of a soft input; in the second one of M candidates is taken with probability softmax(sum of its logits).

Source: "Ultra-Fast Language Generation via Discrete Diffusion Divergence Instruct", arXiv 2509.25035; the authors' code.
Departures: alpha at corruption is that of t, which the released step leaves undefined. A position that stays masked adds
its exact log-probability instead of the constant log 1e-10: equal gradients. omega is the derivative, not a finite
difference. SUBS holds for both sides of the KL, unless `raw_teacher` asks for the release's teacher with mass on the mask.
The grid of times ends at 0, so that the last jump is the clean-up. With `coupled_time` off, omega and pi are those of
the corruption's time. Student and discriminator have no dropout; spectral norms move once an update; the EMA's decay is
ramped up; a gradient that is not finite stops the run instead of being zeroed.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.contracts.players import From, Objective, OptimizerSpec, Player
from potstill.contracts.spec import MethodConfig, Part, Spec
from potstill.contracts.terms import Loss, Term
from potstill.divergences import ForwardKL, ReverseKL
from potstill.methods import method
from potstill.methods.masked_diffusion.comparison import judged
from potstill.models.build import freeze
from potstill.models.ema import EMA
from potstill.noise.masked import BetaTime, LogLinear, MaskSchedule, Predict, TimeSampler, ancestral, corrupt, jump
from potstill.objectives.masked import TokenDiscriminator, clipped_mean, predictor, trajectory, trajectory_logp
from potstill.rollouts.groups import group_advantages
from potstill.run import Result, Run
from potstill.tasks.tokens import TokenRows
from potstill.teachers.local import check_vocabulary


class Guidance(Spec):
    """The reward-guided sampler's numbers: those of the first release; a later one tilts from 30 to 40."""

    tilt: tuple[float, float] = (0.2, 1.0)  # h at the first and at the last tilted step, linear between
    tilted: float = Field(0.5, ge=0, le=1)  # share of the steps that tilt; the others choose among candidates
    candidates: int = Field(4, ge=1)  # M


class DiDiInstruct(MethodConfig):
    """The student's own optimizer is `train`: AdamW, lr 1e-6, warmup 1000, linear, clip 0.5, batch 128, 10,000 steps."""

    samples_per_group: int = Field(4, ge=2)  # G
    times: Part(TimeSampler) = BetaTime(1.0, 1.0)  # type: ignore[valid-type]  # pi; BetaTime(2, 2) in the first config
    jumps: Literal[1, 2] = 2  # 1: no score decomposition
    coupled_time: bool = True  # corrupt at the trajectory's tau; false: at a time of its own
    weight: Literal["constant", "simplified", "complete"] = "complete"  # 1, omega(t), omega(t) / pi(t)
    weight_range: tuple[float, float] = (0.1, 10.0)  # omega is clamped to it
    last_time: float = Field(1e-3, ge=0, lt=0.02)  # t0
    real: Literal["data", "teacher"] = "data"  # teacher: as the theory has it, samples drawn once before training
    teacher_samples: int = Field(4096, gt=0)
    teacher_steps: int | None = Field(None, gt=0)  # default: one a token
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)  # s
    reward_clip: float = Field(8.0, gt=0)
    advantage_clip: float = Field(3.0, gt=0)
    kl_beta: float = Field(1.0, ge=0)  # 0.05 in the first config
    kl_shares: tuple[float, float] = (0.01, 0.01)  # of the first and the second jump
    regularization: Literal["forward", "reverse", "jeffreys"] = "forward"  # KL(teacher || student), reversed, or both
    reverse_share: float = Field(0.5, ge=0, le=1)  # c of jeffreys
    entropy_beta: float = Field(0.02, ge=0)  # 5e-4 in the first config
    raw_teacher: bool = False
    schedule: Part(MaskSchedule) = LogLinear()  # type: ignore[valid-type]
    discriminator: OptimizerSpec = OptimizerSpec(lr=1e-5, warmup=1000, schedule="linear", end=1e-3, clip=1.0)
    discriminator_blocks: int = Field(4, ge=1)  # trained blocks of the trunk
    discriminator_warmup: int = Field(0, ge=0)  # steps before the student moves
    ema: float | None = Field(0.999, gt=0, lt=1)  # the student handed back is the average; null: the raw weights
    guidance: Guidance = Guidance()
    eval_steps: tuple[int, ...] = (4, 8)
    eval_samples: int = Field(512, gt=1)
    judge_order: int = Field(5, ge=1)  # of the n-gram model that judges samples


@dataclass
class Duel(Batch):
    """Trajectories and the corrupted texts that the discriminator compares; G rows a text, side by side."""

    states_SBL: Tensor
    alphas_SB: Tensor
    time_B: Tensor  # of the corruption
    fake_BL: Tensor
    real_BL: Tensor
    attention_BL: Tensor


class DiDi(Objective):
    """Two players: the discriminator moves first, the student is then paid by it."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        discriminator: Any,
        config: DiDiInstruct,
        *,
        optimizer: OptimizerSpec,
        seed: int,
    ) -> None:
        super().__init__()
        self.student, self.discriminator = student, discriminator
        self.teacher_logits = teacher.logits  # a bound method: the teacher stays outside the objective's modules
        self.config, self.optimizer, self.seed = config, optimizer, seed
        self.ema = EMA(student, config.ema) if config.ema is not None else None

    def train(self, mode: bool = True) -> "DiDi":
        return super().train(False)  # the policy that is scored must be the one that drew

    @property
    def players(self) -> dict[str, Player]:
        return {
            "discriminator": Player([self.discriminator], self.config.discriminator),
            "student": Player([self.student], self.optimizer, From(self.config.discriminator_warmup)),
        }

    def collect(self, batch: Batch, step: int) -> Duel:
        assert isinstance(batch, TokenBatch)
        config, mask_id, group = self.config, self.student.mask_id, self.config.samples_per_group
        text_BL, attention_BL = (x.repeat_interleave(group, 0) for x in (batch.tokens_BT, batch.attention_BT))
        ids_B = (batch.ids_B[:, None] * group + torch.arange(group, device=text_BL.device)).flatten()
        tau_B = config.times(keyed.key(self.seed, "tau"), ids_B)
        stops = [
            torch.ones_like(tau_B),
            *([tau_B] if config.jumps == 2 else []),
            torch.full_like(tau_B, config.last_time),
        ]
        alphas_SB = torch.stack([config.schedule.alpha(t) for t in stops])
        start_BL = text_BL.masked_fill(attention_BL, mask_id)
        states_SBL = trajectory(
            predictor(self.student.log_probs, attention_BL),
            start_BL,
            alphas_SB,
            mask_id,
            keyed.key(self.seed, "jumps"),
            ids_B,
        )
        time_B = tau_B if config.coupled_time else config.times(keyed.key(self.seed, "corruption time"), ids_B)
        alpha_B = config.schedule.alpha(time_B)
        fake_BL, real_BL = (
            corrupt(x, alpha_B, mask_id, keyed.key(self.seed, who), ids_B, attention_BL)
            for x, who in ((states_SBL[-1], "fake"), (text_BL, "real"))
        )
        return Duel(ids_B, states_SBL, alphas_SB, time_B, fake_BL, real_BL, attention_BL)

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        assert isinstance(batch, Duel)
        return self._discriminator(batch) if player == "discriminator" else self._student(batch)

    def _discriminator(self, duel: Duel) -> Loss:
        logits = self.discriminator(
            torch.cat([duel.real_BL, duel.fake_BL]), torch.cat([duel.attention_BL, duel.attention_BL])
        )
        smooth, terms, metrics = self.config.label_smoothing, {}, {}
        sides = ((duel.real_BL, 1 - smooth, "real"), (duel.fake_BL, smooth, "fake"))
        for logits_BL, (noisy_BL, label, name) in zip(logits.chunk(2), sides):
            where_BL = self._masked(noisy_BL, duel)
            bce_BL = binary_cross_entropy_with_logits(logits_BL, torch.full_like(logits_BL, label), reduction="none")
            terms[name] = Term.over(bce_BL, where_BL, 0.5, unit=f"{name} token")
            metrics[f"{name}_logit"] = Term.over(logits_BL.detach(), where_BL)
        return Loss(terms, metrics)

    def _student(self, duel: Duel) -> Loss:
        config, mask_id = self.config, self.student.mask_id
        reward_B, advantage_B = self.advantages(duel)
        predict, teach = (predictor(f, duel.attention_BL) for f in (self.student.log_probs, self.teacher_log_probs))
        logp_B, predictions = trajectory_logp(predict, duel.states_SBL, duel.alphas_SB, mask_id)
        weight_B = self.weights(duel.time_B).to(logp_B.dtype)
        terms = {"policy": Term.over(-weight_B * advantage_B * logp_B, unit="sequence")}
        metrics = {"reward": Term.over(reward_B), "jump_logp": Term.over(logp_B.detach())}
        for s, log_q_BLV in enumerate(predictions):
            state_BL = duel.states_SBL[s]
            where_BL, unit = self._masked(state_BL, duel), f"token of jump {s + 1}"
            log_q_NV = self._words(log_q_BLV[where_BL])
            entropy_N = -(log_q_NV.exp() * log_q_NV).sum(-1)
            terms[f"entropy_{s + 1}"] = Term.over(entropy_N, None, -config.entropy_beta / len(predictions), unit)
            if config.kl_beta:
                with torch.no_grad():
                    log_p_NV = self._words(teach(state_BL)[where_BL])
                kl_N = self.divergence(log_p_NV, log_q_NV)
                terms[f"kl_{s + 1}"] = Term.over(kl_N, None, config.kl_beta * config.kl_shares[s], unit)
        return Loss(terms, metrics)

    def advantages(self, duel: Duel) -> tuple[Tensor, Tensor]:
        """The rewards of the corrupted samples, and their clipped advantages within the groups. [B], [B]."""
        with torch.no_grad():
            logits_BL = self.discriminator(duel.fake_BL, duel.attention_BL)
            reward_B = clipped_mean(logits_BL, self._masked(duel.fake_BL, duel), self.config.reward_clip)
            advantage_B = group_advantages(reward_B, self.config.samples_per_group, eps=1e-8)
        return reward_B, advantage_B.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def weights(self, time_B: Tensor) -> Tensor:
        """omega(t) / pi(t), or less of it. [B], float64."""
        if self.config.weight == "constant":
            return torch.ones_like(time_B)
        omega_B = self.config.schedule.weight(time_B).clamp(*self.config.weight_range)
        return omega_B if self.config.weight == "simplified" else omega_B / self.config.times.log_density(time_B).exp()

    def divergence(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """The regulariser's, teacher p and student q. [N]."""
        share = {"forward": 0.0, "reverse": 1.0, "jeffreys": self.config.reverse_share}[self.config.regularization]
        parts = [
            weight * kl(teacher_logp=log_p_NV, student_logp=log_q_NV)
            for weight, kl in ((1 - share, ForwardKL()), (share, ReverseKL()))
            if weight
        ]
        return torch.stack(parts).sum(0)

    def teacher_log_probs(self, tokens_BL: Tensor, attention_BL: Tensor | None) -> Tensor:
        """At masked positions. The mask keeps its mass under `raw_teacher`. [B, L, V]."""
        logits_BLV = self.teacher_logits(tokens_BL, attention_BL).float()
        if not self.config.raw_teacher:
            logits_BLV[..., self.student.mask_id] = -torch.inf
        return logits_BLV.log_softmax(-1)

    def _words(self, values_NV: Tensor) -> Tensor:
        """Without the mask's column."""
        mask_id = self.student.mask_id
        return torch.cat([values_NV[:, :mask_id], values_NV[:, mask_id + 1 :]], 1)

    def _masked(self, tokens_BL: Tensor, duel: Duel) -> Tensor:
        return (tokens_BL == self.student.mask_id) & duel.attention_BL

    def after_step(self, player: str, step: int) -> None:
        if player == "discriminator":
            self.discriminator.refresh()
        elif self.ema is not None:
            self.ema.update(self.student)


@dataclass(frozen=True)
class RewardGuided:
    """Ancestral sampling guided by the discriminator, with the signature of `noise.masked.ancestral`.

    With tilt (0, 0) and one candidate it is `ancestral`, to the bit. Pass it as `sampler` of MaskedLM.samples.
    """

    discriminator: Any
    guidance: Guidance = field(default_factory=Guidance)

    def __call__(
        self,
        predict: Predict,
        tokens_BL: Tensor,
        mask_id: int,
        *,
        steps: int,
        seed: int,
        ids_B: Tensor,
        schedule: MaskSchedule = LogLinear(),
    ) -> Tensor:
        first, last = self.guidance.tilt
        tilted = round(self.guidance.tilted * steps)
        times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
        for step, (t, after) in enumerate(pairwise(times)):
            with torch.no_grad():
                log_p_BLV = predict(tokens_BL)
            here = keyed.key(seed, "ancestral", step)
            candidates = self.guidance.candidates
            if step < tilted:
                h, candidates = first + (last - first) * step / max(tilted - 1, 1), 1
                log_p_BLV = log_p_BLV + h * self.slope(log_p_BLV, tokens_BL, mask_id).clamp(-1, 1)
            alphas = schedule.alpha(t), schedule.alpha(after)
            seeds = [here, *(keyed.key(here, "candidate", m) for m in range(1, candidates))]
            next_MBL = torch.stack([jump(log_p_BLV, tokens_BL, *alphas, mask_id, s, ids_B) for s in seeds])
            tokens_BL = self.chosen(next_MBL, here, ids_B)
        return tokens_BL

    @torch.enable_grad()
    def slope(self, log_p_BLV: Tensor, tokens_BL: Tensor, mask_id: int) -> Tensor:
        """d (sum of the logits at masked positions) / d log p, whose exponential is the soft input. [B, L, V]."""
        log_p_BLV = log_p_BLV.detach().requires_grad_()
        masked_BL = tokens_BL == mask_id
        weights_VD = self.discriminator.trunk.network.get_input_embeddings().weight
        embedded_BLD = self.discriminator.trunk.embeddings(tokens_BL)
        embedded_BLD = torch.where(
            masked_BL[..., None], log_p_BLV.exp().to(weights_VD.dtype) @ weights_VD, embedded_BLD
        )
        logits_BL = self.discriminator(tokens_BL, embedded_BLD=embedded_BLD)
        (slope_BLV,) = torch.autograd.grad(logits_BL[masked_BL].sum(), log_p_BLV)
        return slope_BLV.masked_fill(~masked_BL[..., None], 0.0)

    @torch.no_grad()
    def chosen(self, next_MBL: Tensor, seed: int, ids_B: Tensor) -> Tensor:
        """One candidate a row, with probability softmax over M of its summed logits. [B, L]."""
        if len(next_MBL) == 1:
            return next_MBL[0]
        score_MB = self.discriminator(next_MBL.flatten(0, 1)).sum(-1).view(next_MBL.shape[:2])
        m_M1 = torch.arange(len(next_MBL), device=ids_B.device)[:, None]
        pick_B = (score_MB + keyed.gumbel(keyed.key(seed, "choice"), ids_B[None], m_M1)).argmax(0)
        return next_MBL[pick_B, torch.arange(next_MBL.shape[1], device=pick_B.device)]


def texts_of(run: Run, teacher: Any, config: DiDiInstruct) -> TokenRows:
    """What the discriminator is shown as real."""
    data, length = run.tokens(), run.plan.data.length
    if config.real == "data":
        return data

    def sampled() -> Tensor:
        pieces = torch.arange(config.teacher_samples).split(256)
        seed = keyed.key(run.seed, "teacher samples")
        options = {"length": length, "steps": config.teacher_steps, "schedule": config.schedule}
        return torch.cat([teacher.samples(ids_B, seed=seed, **options).cpu() for ids_B in pieces])

    rows = run.stage("teacher-samples", sampled).tolist()
    return TokenRows([(row, [True] * length) for row in rows], data.fill)


@method("didi_instruct", student="masked_lm", teacher="masked_lm", data="text")
def didi_instruct(run: Run, config: DiDiInstruct) -> Result:
    teacher, student = freeze(run.model("teacher")), run.student()
    check_vocabulary(student, teacher)
    if student.vocabulary != teacher.vocabulary:
        raise ModelError(
            f"Student and teacher score {student.vocabulary} and {teacher.vocabulary} tokens; DiDi-Instruct needs one "
            "vocabulary, best a student that starts as the teacher: student: {from: teacher}."
        )
    longest = min(student.length, teacher.length)
    if run.plan.data.length > longest:
        raise DataError(f"data.length is {run.plan.data.length}, but the models reach {longest} tokens. Lower it.")
    torch.manual_seed(run.seed)  # the discriminator's first head
    discriminator = TokenDiscriminator(teacher, config.discriminator_blocks).to(run.device)
    objective = DiDi(student, teacher, discriminator, config, optimizer=run.train.optimizer_spec(), seed=run.seed)
    run.fit(objective, texts_of(run, teacher, config))
    best = objective.ema.average if objective.ema is not None else student.eval()
    guided = RewardGuided(objective.discriminator, config.guidance)
    models: dict[str, Any] = {"teacher": (teacher, ancestral), "student": (best, ancestral), "guided": (best, guided)}
    metrics = judged(
        run, models, config.eval_steps, samples=config.eval_samples, order=config.judge_order, schedule=config.schedule
    )
    return Result(best, metrics | run.evaluate(best))

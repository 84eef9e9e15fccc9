"""TSD-KD: the teacher ranks what the student proposes, and corrects it where it alone is unsure (arXiv 2603.13260).

    L = alpha L_ranking + L_direct + L_entropy                      on completions y that the student samples
    L_ranking = -mean_{t in opener} log prod_{j=1..k} exp z_t[pi(j)] / sum_{l=j..k} exp z_t[pi(l)]
    L_direct  = mean_t g_t JSD_t,   g_t = sg sigmoid((H_t(q) - H_t(p)) / tau)
    L_entropy = mean_{t in I} H_t(q)

z_t the student's logits, pi the student's k likeliest tokens in the teacher's order, best first (Plackett-Luce). The opener
is the fewest first positions with a share c of the response's entropy; I the share of its positions of highest entropy.
JSD has beta = 0.9 as the teacher's share. All at temperature 1. Without gate, ranking and entropy it is GKD.

Source: the paper's equations and its released code. Their `train.sh`: lr 5e-6 cosine, 10 % warm-up, 3 epochs, 4 x 4 x 8
prompts a step, 1,024 tokens in all, bfloat16; completions of 128, the default of the GKD trainer below it. `variant: code`
follows the code where it contradicts the paper, and the default follows the paper, because each looks like a slip:
    the normaliser of a place sums over the prefix l <= j of the ranking instead of the suffix, which is the loss of the
        reversed order: it drives the student away from the teacher's ranking;
    I is what lies above the 0.1 quantile of the batch: the 90 % of highest entropy, not 10 % (one position may differ);
    the opener is found once, along the concatenated rows of the batch, ends before the position that reaches c, and holds
        for every response.
Padding, which the code lets into I and into the counts, stays out in both. L_ranking averages over opener positions, as
the code does; the paper writes a sum. L_direct averages over all response tokens: over those of the batch (the code, and
our GKD) or first over each response (`average: sequence`, the paper's 1 / L). Unsourced: whether I is chosen in each
response or over the batch; the paper defines it for one response, and so do we. `random` draws opener and I of the same
shares at random, the control of the selection. `warm_start` stands for the pretrained student that the paper starts from.

Reported beside the usual: at held-out prompts and the student's own samples, its mean entropy, the share of answers that
are right in any of 4 samples (entropy minimisation may cost diversity), and Kendall's tau between both on the k candidates.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, JensenShannon, entropy, log_probs
from potstill.divergences.rankings import kendall_tau
from potstill.evaluation.text import graded
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.models.causal import evaluating
from potstill.objectives.states import TokenTerm
from potstill.objectives.token_terms import EntropyTerm, RankingTerm
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.local import sample
from potstill.run import Result, Run
from potstill.weighting import EntropyTop, Opener, Positions, RelativeConfidence, SampledShare, Uniform, Weighting

SAMPLES = 4  # answers to a held-out prompt


class TSDKD(MethodConfig):
    divergence: Part(FDivergence) = JensenShannon(0.9)  # type: ignore[valid-type]  # beta is the teacher's share
    direct: float = Field(1.0, ge=0)  # weight of L_direct
    gate: bool = True
    tau: float = Field(1.0, gt=0)  # of the gate
    ranking: float = Field(0.1, ge=0)  # alpha, weight of L_ranking
    k: int = Field(10, ge=1)  # candidates of the student
    opener: float = Field(0.1, gt=0, le=1)  # c; 1 ranks at the whole response
    entropy: float = Field(1.0, ge=0)  # weight of L_entropy
    uncertain: float = Field(0.1, gt=0, le=1)  # share of the positions in I
    random: bool = False  # opener and I of the same shares, drawn at random
    variant: Literal["paper", "code"] = "paper"
    average: Literal["token", "sequence"] = "token"
    on_policy: float = Field(1.0, ge=0, le=1)  # lambda; 0: the data's completions
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=128)
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction before
    warm_start_lr: float | None = Field(None, gt=0)

    def terms(self) -> tuple[TokenTerm, ...]:
        code = self.variant == "code"
        opener: Weighting = BatchOpener(self.opener) if code else Opener(self.opener)
        uncertain: Weighting = EntropyTop(1 - self.uncertain, scope="batch") if code else EntropyTop(self.uncertain)
        if self.random:
            opener, uncertain = SampledShare(self.opener, alpha=0.0), SampledShare(self.uncertain, alpha=0.0)
        terms = (
            RankingTerm(self.ranking, opener, self.k, self.variant),
            EntropyTerm(self.entropy, uncertain),
        )
        return tuple(term for term in terms if term.coefficient)


@dataclass(frozen=True)
class BatchOpener(Weighting):
    """1 for the first m positions of every row, m the 0-based place, along the rows of the batch one after the other, of
    the position where their entropies first add up to `share` of all."""

    share: float = 0.1
    needs = ("student_entropy_BR",)

    @property
    def couples(self) -> Literal["row", "batch"]:
        return "batch"

    def weigh(self, values: Positions) -> Tensor:
        assert values.student_entropy_BR is not None
        spent = values.student_entropy_BR.double().masked_fill(~values.mask_BR, 0.0).flatten().cumsum(0)
        place = (spent < self.share * spent[-1:] * (1 - 1e-9)).sum()
        return (torch.arange(values.mask_BR.shape[1], device=place.device) < place).float().expand(values.mask_BR.shape)


@method("tsd_kd", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def tsd_kd(run: Run, config: TSDKD) -> Result:
    if not (config.direct or config.ranking or config.entropy):
        raise RecipeError(
            "method.direct, method.ranking and method.entropy are all 0, so nothing is learnt: raise one."
        )
    student, teacher = run.student(), run.teacher()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    objective = TokenDistillation(
        student,
        teacher,
        config.divergence,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=config.rollouts,
        on_policy=config.on_policy,
        weighting=RelativeConfidence(config.tau) if config.gate else Uniform(),
        distillation=config.direct,
        average=config.average,
        extras=config.terms(),
    )
    run.fit(objective, run.prompts())
    result = compared(run, before=before, weighed=(objective, run.prompts()))
    return Result(student, {**result.metrics, **run.stage("own samples", own_samples, run, student, teacher, config)})


@torch.no_grad()
def own_samples(run: Run, student: Any, teacher: Any, config: TSDKD) -> dict[str, float]:
    """On held-out prompts, at what the student samples: entropy (nats a token), Kendall's tau on its k likeliest tokens,
    and, where the data has a score, the share of right answers and of prompts with one among `SAMPLES`."""
    prompts, size = run.prompts("test"), min(run.plan.eval.batch, 64)
    rows = torch.arange(min(run.plan.eval.limit or 256, len(prompts))).split(size)
    asked = [prompts.batch(some).to(run.device) for some in rows]
    tokens, sums, count = config.rollouts.max_new_tokens, torch.zeros(2, dtype=torch.float64), 0
    with evaluating(student):
        for batch in asked:
            out = sample(student, batch, max_new_tokens=tokens, seed=run.seed)
            ours, theirs = student.counted_logits(out), teacher.model.counted_logits(out)
            shared = min(ours.shape[-1], theirs.shape[-1])
            best, candidates = ours[:, :shared].topk(min(config.k, shared))
            tau = kendall_tau(best, theirs.gather(-1, candidates))
            sums += torch.stack([entropy(log_probs(ours)).double().sum(), tau.double().sum()]).cpu()
            count += len(ours)
    found = dict(zip(("sample_entropy", "kendall_tau"), (sums / max(count, 1)).tolist(), strict=True))
    if run.source.grade is not None:
        marks = graded(student, asked, run.source.grade, max_new_tokens=tokens, seed=run.seed, samples=SAMPLES)
        found |= {"sampled_accuracy": marks["accuracy"], "pass_at_4": marks["pass_rate"]}
    return found

"""UniSD: self-distillation with a richer context, and five components to switch on one loss (arXiv 2605.06597).

    y ~ q(. | x),   D_t = D( p(. | x, c, y_<t), q(. | x, y_<t) ),   c shows x's reference solution           (Eq. 1)
    L = mean_b [ sum_t w_t D_t / max(sum_t w_t, 1) ] + contrast L_con + features L_feat                      (Eqs. 1, 9)

q the student, p a copy of it that sees c. D: `alpha` 0 is KL(p || q), 1 is KL(q || p), else alpha KL(p || m) +
(1 - alpha) KL(q || m), m = alpha p + (1 - alpha) q (Eqs. 7-8), at the sampling temperature, without T^2.
    agreement   w from the spread of log p(y_t | x, c_k) over K further contexts (Eq. 2; `weighting.Agreement`), which are
                drawn at random, retrieved by the likeness of prompts, or instructions induced from rows
    ema         p is the student's average, moved every `ema_every` updates (Eq. 3); else the frozen start (beta 1; unsourced)
    contrast    max(0, margin + d+ - d-), d the gap of log q(y_t) to p in c and in a wrong answer's context (Eqs. 4-5)
    features    squared distance of the last hidden states (Eq. 6); the mean over them in the code, their sum in the paper
    clip        min(D_t, clip), or `clip_quantile` of the batch's D_t
`mode` sets the switches as the paper's arms do, and what a recipe writes beside it is kept: `unisd_star` is agreement by
token with retrieval, ema, contrast and features in one. `sft` learns the reference solutions instead: the baseline.

normalisation: "released" is Eq. 9, in which weights of a whole response cancel unless they add up to less than 1;
"counts" divides by the response's length, so that weights act between responses too.

Source: the paper and its code's defaults: lr 2e-5, cosine, 10 % warm-up, one epoch, 16 prompts a step of 1,024 tokens and
completions of 2,048, clip of the gradient 1, bfloat16 and `student.lora: {r: 64, alpha: 128, dropout: 0.05}` (train, data
and student sections of a recipe). gamma is 0.01 in its scripts.
Departs: Eq. 1 prints KL(q || p), the code's default is the forward KL, and so is ours. The code's average skips LoRA, so
that its teacher never moves; ours averages effective weights. Prompts' words, three shots and the pools (training rows) are
ours; retrieval is by TF-IDF unless `context.embedding` names a sentence encoder (the code: MiniLM). The weight of
`match_repr`, the features alone, is 1. Left out: the code's entropy mask, KL to the base, importance weights and skipped
first tokens, all off by default.
`known` is what the student knows and should keep: perplexity and JSD to the start are measured there, and a packaged student,
whose weights are fresh, is first trained on it (once, kept in the cache): it stands for the pretrained model.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig, Spec
from potstill.divergences import Clipped, FDivergence, ForwardKL, JensenShannon, ReverseKL
from potstill.evaluation.text import kept
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import accuracy, begun
from potstill.objectives.agreement import ContextDistillation, ContrastiveTerm, FeatureTerm
from potstill.objectives.states import TokenTerm
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Result, Run
from potstill.tasks.sources import load, validate
from potstill.tasks.tokens import token_rows
from potstill.teachers import EMATeacher, FrozenStart, PrivilegedTeacher
from potstill.teachers.contexts import (
    ByChance,
    BySimilarity,
    Context,
    ContextDropout,
    Demonstration,
    Instruction,
    Layout,
    Negative,
    few_shots,
    induce,
)
from potstill.teachers.privileged import PrivilegedContext
from potstill.weighting import Agreement, PerResponse, Uniform, Weighting

SAMPLES = 4  # completions of a held-out prompt that are graded
CONTEXTS = ("random", "retrieval", "induction")
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{
        f"agreement_{level[:3]}_{contexts}": {"agreement": level, "contexts": contexts}
        for level in ("sequence", "token")
        for contexts in CONTEXTS
    },
    "ema": {"ema": 0.9},
    "contrastive": {"contrast": 0.1},
    "match_joint": {"features": 0.1},
    "match_repr": {"features": 1.0, "distillation": 0.0},
    "clip": {"clip": 10.0},
    "unisd_star": {
        "agreement": "token", "contexts": "retrieval", "gamma": 0.001, "ema": 0.98, "contrast": 0.01, "margin": 0.1,
        "features": 0.01,
    },
    "sft": {},
}  # fmt: skip


class ContextSpec(Spec):
    """How contexts are written, and what they are made of."""

    example: str = Layout.example
    between: str = Layout.between
    whole: str = Layout.whole
    count: int = Field(3, ge=2)  # K
    shots: int = Field(3, ge=1)  # rows in one of the K; unsourced
    induced_from: int = Field(4, ge=1)  # rows that an instruction is made of; the paper has 3 to 5
    embedding: str = "tfidf"
    own: bool = False  # whether the row's own demonstration may be among the K
    length: int = Field(1024, ge=1)  # tokens of the teacher's prompt
    dropout: float = Field(0.0, ge=0, le=1)  # how often the demonstration is lost
    drop: Literal["all", "span"] = "all"

    @model_validator(mode="after")
    def _layout_is_whole(self) -> "ContextSpec":
        self.layout()
        return self

    def layout(self) -> Layout:
        return Layout(self.example, self.between, self.whole)


class UniSD(MethodConfig):
    mode: str = "unisd_star"
    alpha: float = Field(0.0, ge=0, le=1)
    rollouts: RolloutSpec = RolloutSpec(max_new_tokens=2048, temperature=0.7)
    distillation: float = Field(1.0, ge=0)  # weight of L_kd
    normalisation: Literal["released", "counts"] = "released"
    agreement: Literal["token", "sequence"] | None = None
    contexts: Literal["random", "retrieval", "induction"] = "random"
    context: ContextSpec = ContextSpec()
    gamma: float = Field(0.01, ge=0)
    statistic: Literal["variance", "range"] = "variance"
    ema: float | None = Field(None, ge=0, le=1)  # beta
    ema_every: int = Field(10, ge=1)
    contrast: float = Field(0.0, ge=0)
    margin: float = 0.5
    features: float = Field(0.0, ge=0)
    features_over: Literal["mean", "sum"] = "mean"
    clip: float | None = Field(None, gt=0)  # kappa, in nats
    clip_quantile: float | None = Field(None, gt=0, lt=1)
    known: dict[str, Any] | str | None = None  # a data section

    @model_validator(mode="before")
    @classmethod
    def _mode_sets_switches(cls, given: Any) -> Any:
        mode = given.get("mode", "unisd_star")
        if mode not in MODES:
            raise RecipeError(f"method.mode: {mode} is none of {', '.join(MODES)}.")
        return {**MODES[mode], **given}

    @model_validator(mode="after")
    def _one_clip(self) -> "UniSD":
        if self.clip is not None and self.clip_quantile is not None:
            raise RecipeError("method: clip and clip_quantile exclude each other. Leave one out.")
        return self

    @field_validator("known")
    @classmethod
    def _known_is_data(cls, given: Any) -> Any:
        if given is not None:
            validate(given)
        return given

    def divergence(self) -> FDivergence:
        ends: dict[float, FDivergence] = {0.0: ForwardKL(), 1.0: ReverseKL()}
        part = ends.get(self.alpha) or JensenShannon(self.alpha)
        return part if self.clip is None else Clipped(part, self.clip, per="position")

    def weighting(self) -> Weighting:
        if self.agreement is None:
            return Uniform()
        weights = Agreement(level=self.agreement, gamma=self.gamma, statistic=self.statistic)
        return PerResponse(of=weights, least=1.0) if self.normalisation == "released" else weights


@method("unisd", student="causal_lm", data="prompts")
def unisd(run: Run, config: UniSD) -> Result:
    student = begun(run, config.known)
    before = start_of(student)
    common: dict[str, Any] = {"optimizer": run.train.optimizer_spec(), "seed": run.seed, "average": "sequence"}
    if config.mode == "sft":
        objective = TokenDistillation(student, None, cross_entropy=1.0, **common)
    else:
        average = lambda beta: EMATeacher(student, beta, every=config.ema_every, ramp=False)
        who = FrozenStart(student) if config.ema is None else average(config.ema)
        seeing = lambda write: PrivilegedContext(student.tokenizer, write, config.context.length)
        objective = ContextDistillation(
            student,
            PrivilegedTeacher(who, seeing(demonstration(run, config))),
            config.divergence(),
            contexts=[seeing(write) for write in further(run, config, before)] if config.agreement else (),
            quantile=config.clip_quantile,
            rollouts=config.rollouts,
            weighting=config.weighting(),
            distillation=config.distillation,
            temperature=config.rollouts.temperature,
            extras=extras(config, PrivilegedTeacher(who, seeing(misleading(run, config)))),
            **common,
        )
    run.fit(objective, run.prompts())
    result = compared(run, before=before, teacher=before, weighed=(objective, run.prompts()))
    metrics = run.stage("kept", measured, run, config, {"": student, "before_": before})
    return Result(student, {**result.metrics, **metrics})


def demonstration(run: Run, config: UniSD) -> Context:
    """What the teacher sees: the row's own solution, which may be dropped."""
    options = config.context
    shown = Demonstration(options.layout())
    if not options.dropout:
        return shown
    return ContextDropout(of=shown, rate=options.dropout, drop=options.drop, seed=run.seed)


def misleading(run: Run, config: UniSD) -> Context:
    """What the negative teacher sees: a plausible wrong answer."""
    rows = run.source.train
    return Negative(config.context.layout(), pool=rows, rank=BySimilarity(rows, config.context.embedding))


def further(run: Run, config: UniSD, model: Any) -> list[Context]:
    """The K contexts whose agreement is asked."""
    options, rows = config.context, run.source.train
    if config.contexts == "induction":
        make = lambda: induce(
            model, rows, options.count, layout=options.layout(), examples=options.induced_from, seed=run.seed
        )
        told = Layout(whole="{examples}\n\n{prompt}")
        return [Instruction(told, text=text) for text in run.stage("induction", make)]
    rank = (
        ByChance(rows, run.seed) if config.contexts == "random" else BySimilarity(rows, options.embedding, options.own)
    )
    return few_shots(rows, rank, options.count, options.shots, options.layout())


def extras(config: UniSD, misled: PrivilegedTeacher) -> list[TokenTerm]:
    found: list[TokenTerm] = []
    if config.contrast:
        found.append(ContrastiveTerm(misled, config.contrast, config.margin, config.rollouts.temperature))
    if config.features:
        found.append(FeatureTerm(config.features, config.features_over))
    return found


def measured(run: Run, config: UniSD, models: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of samples without any context, where the source can grade, and what is left of the known."""
    metrics: dict[str, float] = {}
    if config.known is not None:
        data = validate(config.known)
        rows = token_rows(load(data).kind, load(data).test, run.context["tokenizer"], data.length)
        parts = torch.arange(min(len(rows), run.plan.eval.limit or 256)).split(run.plan.eval.batch)
        metrics |= kept(models[""], models["before_"], [rows.batch(part) for part in parts])
    if run.source.grade is not None:
        for name, model in models.items():
            metrics[f"{name}sampled_accuracy"] = accuracy(run, model, config.rollouts, samples=SAMPLES)
    return metrics

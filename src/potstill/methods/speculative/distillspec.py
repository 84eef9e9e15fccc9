"""DistillSpec: a draft distilled so that its target accepts more of what it proposes (arXiv 2310.08461).

p the target (`teacher`, frozen), q the draft (`student`), both causal language models over one vocabulary.

    acceptance of a drafted token   alpha_t = sum_v min(p_t(v), q_t(v)) = 1 - TVD(p_t, q_t)
    loss                            L = E_{(x, y) ~ G}[ (1 / |y|) sum_t D(p_t, q_t) ]                          (Eq. 2)
    of a prompt                     alpha(x) = 1 - E_{y ~ p}[ sum_t TVD(p_t, q_t) ] / E_{y ~ p}[ |y| ]          (Eq. 3)
    speed-up                        tau / (c gamma + 1), tau tokens a target call, c = draft step / target step

D: ForwardKL KL(p || q), ReverseKL KL(q || p), JensenShannon or TotalVariation; no gradient flows through the sampling of
y. If the per-token TVD on the draft's own texts is at most eps, then E alpha(x) >= 1 - T E[T / L_p(x)] eps, which is why
cheap draft samples do. Where y comes from is the paper's second axis, `data_source`:
    fixed: the data's completions · draft: sampled from q as it is · target: sampled from p
    mixed: fixed with probability `fixed_share`, else from the draft with probability `draft_share`, else from the target

Texts are sampled, compared and decoded at one temperature; alignment under greedy decoding is agreement of arg-maxima,
so both are measured. The baselines share the frame: GKD and ImitKD are mixed sources, f-Distill is TotalVariation on
them, and supervised KD is fixed text with ForwardKL.

Departs: the source is drawn once a step, keyed by (seed, step). The mixing parameters, the learning rate and the number of
steps are not sourced. The paper names no single best divergence; the default is the one of its theorem. TVD's gradient has
the size of a sign and fades where q saturates, so `warm_start` takes steps of ForwardKL on the data's text first; the
paper's drafts are fine-tuned on the task, which `fine_tune` steps of next-token prediction stand for, and the comparison
begins there. Lenient decoding (`lenience`) has its resampling rule as an option, because the paper's is not known. `control`
trains the same start on the same text without a teacher, for as long as the distillation took.
"""

from typing import Any, Literal

import torch
from pydantic import Field

from potstill.contracts.batch import PromptBatch
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, ForwardKL, TotalVariation
from potstill.evaluation.speculative import analytic_acceptance, assisted_generation, decode
from potstill.methods import method
from potstill.methods.language.comparison import compared, control, start_of
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.speculative import LOSSLESS, Lenience
from potstill.run import Result, Run
from potstill.teachers import LocalTeacher


class DistillSpec(MethodConfig):
    divergence: Part(FDivergence) = TotalVariation()  # type: ignore[valid-type]
    data_source: Literal["fixed", "draft", "target", "mixed"] = "draft"
    fixed_share: float = Field(0.5, ge=0, le=1)  # lambda of mixed; unsourced
    draft_share: float = Field(0.5, ge=0, le=1)  # beta of mixed; unsourced
    max_new_tokens: int = Field(64, gt=0)  # of a sampled text, and of a decoded one
    temperature: float = Field(1.0, gt=0)  # of sampling, comparing and decoding
    fine_tune: int = Field(0, ge=0)  # steps of next-token prediction that make the draft to start from
    warm_start: int = Field(0, ge=0)  # steps of ForwardKL on the data's text after that
    control: bool = False
    gamma: int = Field(7, ge=1)  # drafted tokens a block
    lenience: tuple[Lenience, ...] = ()  # lossy decodings measured besides, {kind, e, residual} each
    eval_prompts: int = Field(8, gt=0)  # held-out prompts that are decoded

    def shares(self) -> tuple[float, float]:
        """The share of steps with sampled texts, and among them the share that the target writes."""
        named = {"fixed": (0.0, 0.0), "draft": (1.0, 0.0), "target": (1.0, 1.0)}
        return named.get(self.data_source, (1 - self.fixed_share, 1 - self.draft_share))


@method("distillspec", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def distillspec(run: Run, config: DistillSpec) -> Result:
    draft, target = run.student(), run.teacher()
    how: dict[str, Any] = {"optimizer": run.train.optimizer_spec(), "seed": run.seed, "temperature": config.temperature}
    if config.fine_tune:
        alone = TokenDistillation(draft, None, cross_entropy=1.0, **how)
        run.fit(alone, run.tokens(), stage="fine-tune", steps=config.fine_tune)
    before = start_of(draft)
    if config.warm_start:
        warm = TokenDistillation(draft, target, ForwardKL(), **how)
        run.fit(warm, run.tokens(), stage="warm start", steps=config.warm_start)
    run.fit(objective_of(run, config, draft, target), run.prompts())
    without = control(run, before) if config.control else None
    result = compared(run, before=before, control=without)
    drafts = {"draft before": before, "draft after": draft, "control": without}
    drafts = {name: model for name, model in drafts.items() if model is not None}
    measured = run.stage("speculation", _measure, run, config, drafts, target.model)
    run.record(
        "4-speculation",
        "table",
        f"Speculative decoding, blocks of {config.gamma}",
        columns=["draft", "decoding", *COLUMNS],
        rows=measured["rows"],
        note="Acceptance: accepted over judged draft tokens. tau: tokens a target call. c: one draft step over one target "
        "step, measured one prompt at a time. Predicted speed-up tau / (c gamma + 1). transformers tau: the same from "
        "transformers' assisted generation. Lenient decoding changes the law of what is written.",
    )
    run.record(
        "5-acceptance",
        "table",
        "Acceptance without decoding, 1 - TVD",
        columns=["draft", *ANALYTIC.values()],
        rows=measured["analytic"],
        note="The bounds follow from the TVD on the draft's own texts; a bound below 0 says nothing.",
    )
    return Result(result.student, {**result.metrics, **measured["metrics"]})


def objective_of(run: Run, config: DistillSpec, draft: Any, target: LocalTeacher) -> TokenDistillation:
    """Equation 2 with the source G that the configuration names."""
    sampled, by_target = config.shares()
    return TokenDistillation(
        draft,
        target,
        config.divergence,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        rollouts=RolloutSpec(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        on_policy=sampled,
        policy=target if by_target else None,
        policy_share=by_target,
        average="sequence",
        temperature=config.temperature,
    )


COLUMNS = ["acceptance", "tau", "c", "predicted speed-up", "measured speed-up", "transformers tau"]
ANALYTIC = {
    "acceptance_target_texts": "on target texts",
    "acceptance_draft_texts": "on draft texts",
    "sequence_acceptance": "Eq. 3",
    "sharper_bound": "sharper bound",
    "bound": "theorem's bound",
}


def _measure(run: Run, config: DistillSpec, drafts: dict[str, Any], target: Any) -> dict[str, Any]:
    """Every draft before its target on the same held-out prompts, decoded and in closed form."""
    data = run.prompts("test")
    batch = data.batch(torch.arange(min(config.eval_prompts, len(data)))).to(run.device)
    prompts = [row[seen].tolist() for row, seen in zip(batch.tokens_BT, batch.attention_BT, strict=True)]
    how: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": run.seed,
    }
    decodings: list[tuple[str, bool, Lenience]] = [("sampling", False, LOSSLESS), ("greedy", True, LOSSLESS)]
    decodings += [(f"{rule.kind} e={rule.e:g}", False, rule) for rule in config.lenience]
    rows: list[list[Any]] = []
    analytic: list[list[Any]] = []
    metrics: dict[str, float] = {}
    decode(target, drafts["draft before"], prompts[:1], gamma=config.gamma, **{**how, "max_new_tokens": 2})  # warms up
    for name, draft in drafts.items():
        prefix = {"draft before": "before_", "draft after": "", "control": "control_"}[name]
        exact = analytic_acceptance(target, draft, [_bare(batch)], **how)
        analytic.append([name, *(exact[key] for key in ANALYTIC)])
        metrics |= {prefix + key: value for key, value in exact.items()}
        for decoding, greedy, rule in decodings:
            found = decode(target, draft, prompts, gamma=config.gamma, greedy=greedy, lenience=rule, **how)
            witness = None
            if rule is LOSSLESS:
                witness = assisted_generation(target, draft, prompts, gamma=config.gamma, greedy=greedy, **how)
            row = [
                found[k] for k in ("acceptance", "block_efficiency", "cost", "predicted_speedup", "measured_speedup")
            ]
            rows.append([name, decoding, *row, witness and witness["block_efficiency"]])
            kind = {"sampling": ""}.get(decoding, decoding.replace(" ", "_") + "_")
            for key in ("acceptance", "block_efficiency", "predicted_speedup", "measured_speedup"):
                metrics[f"{prefix}{kind}{key}"] = found[key]
            if witness:
                metrics[f"{prefix}{kind}transformers_block_efficiency"] = witness["block_efficiency"]
    for key in ("acceptance_target_texts", "block_efficiency", "greedy_block_efficiency"):
        metrics[f"{key}_gain"] = metrics[key] - metrics[f"before_{key}"]
    return {"rows": rows, "analytic": analytic, "metrics": metrics}


def _bare(batch: PromptBatch) -> PromptBatch:
    return PromptBatch(batch.ids_B, batch.tokens_BT, batch.attention_BT)

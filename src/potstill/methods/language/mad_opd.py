"""MAD-OPD: several teachers debate each prompt, then score the student's answer with the debate before their eyes.

    H  the transcript of R rounds of debate about s (`teachers.debate`, Eq. 5); the student never sees it
    w_k = softmax_k(c_k / 100 / tau),  c_k the confidence that teacher k reports at the end                   (Eqs. 6-7)
    L = E_{y ~ q}[ 1/|y| sum_t sum_k w_k D( p_k(. | s, H, y_<t), q(. | s, y_<t) ) ]                              (Eq. 8)

p_k are the teachers, q the student. A divergence to each teacher, then the weighted sum: not one to their mixture. D is
JSD_b = b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, with b = 0.5 where the task is agentic, and the reverse KL
KL(q || p), their code's b = 1, for code (Remark 1). Variants, the paper's baselines on the same prompts and steps:
    mt_opd: fixed weights and no debate · opd: one teacher · mt_seqkd: cross-entropy on what the teachers write, each prompt
    given to one of them by `shares`, once, before training

Source: arXiv 2605.01347 and its code: 2 teachers, 2 rounds, tau 1; lr 1e-5, cosine, 5% warm-up, weight decay 0.01, 128
prompts a step, clip 1, full fine-tuning (train section of a recipe); student and debaters sample at temperature 0.7, top p
0.8, top k 20, replies of 4,096 tokens; answers with more than 0.6 of their word 3-grams repeated do not count.
Departs: no repetition penalty on the student's samples; samples of loss below 1e-8 stay in the mean. The agentic loop runs
as their released training does, from the recorded history of a step (conversations, or prompts that hold it), and not yet
in an environment. How repetition is counted is unsourced: here 1 - (different 3-grams) / (all).
"""

from itertools import accumulate
from typing import Any, Literal

import torch
from pydantic import Field

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import Exact, FDivergence, Full, JensenShannon, ReverseKL, Support
from potstill.methods import Role, method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.graded import warm_start
from potstill.methods.language.writing import answers
from potstill.models.build import is_packaged
from potstill.objectives.panels import PanelDistillation
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.local import completions_of
from potstill.run import Result, Run, trained
from potstill.tasks.tokens import TokenRows
from potstill.teachers import LocalTeacher, PrivilegedTeacher
from potstill.teachers.debate import Debate, DebatePrompts, LocalSpeaker, transcript_context

BEST: dict[str, FDivergence] = {"agentic": JensenShannon(0.5), "code": ReverseKL()}  # Remark 1
SAMPLING = RolloutSpec(max_new_tokens=4096, temperature=0.7, top_p=0.8, top_k=20)


class MADOPD(MethodConfig):
    variant: Literal["mad_opd", "mt_opd", "opd", "mt_seqkd"] = "mad_opd"
    task: Literal["agentic", "code"] = "agentic"  # says which divergence where none is given
    divergence: Part(FDivergence) | None = None  # type: ignore[valid-type]
    support: Part(Support) = Full()  # type: ignore[valid-type]
    rounds: int = Field(2, ge=1)
    tau: float = Field(1.0, gt=0)
    confidence: bool = True  # False: `weights` instead of what the teachers report
    weights: list[float] | None = None  # of mt_opd, and of a debate without confidences; None: equal
    teacher: int = Field(0, ge=0)  # which one teaches in opd
    shares: list[float] = [0.7, 0.3]  # of the prompts, in mt_seqkd
    rollouts: RolloutSpec = SAMPLING
    replies: RolloutSpec = SAMPLING  # of the debaters, and of the writers of mt_seqkd
    prompts: DebatePrompts = DebatePrompts()
    context: int = Field(16384, ge=1)  # tokens of a teacher's prompt at most
    repetition: float = Field(0.6, ge=0, le=1)  # answers that repeat more do not count; 1: all do
    warm_start: int = Field(0, ge=0)  # steps of next-token prediction before, for a student that cannot write yet
    warm_start_lr: float | None = Field(None, gt=0)

    def estimator(self) -> Exact:
        return Exact(BEST[self.task] if self.divergence is None else self.divergence, self.support)


class UnrepeatedPanel(PanelDistillation):
    """PanelDistillation that leaves out the answers of which more than `repetition` is repeated."""

    repetition = 1.0

    def collect(self, batch: Batch, step: int) -> TokenBatch:
        out = super().collect(batch, step)
        texts = self.student.tokenizer.batch_decode(completions_of(out), skip_special_tokens=True)
        kept_B = torch.tensor([repeated_share(text) <= self.repetition for text in texts], device=out.counted_BT.device)
        out.counted_BT = out.counted_BT & kept_B[:, None]
        return out


def repeated_share(text: str, words: int = 3) -> float:
    """The share of a text's word n-grams that were there before; 0 for texts of fewer words."""
    said = text.split()
    grams = [tuple(said[i : i + words]) for i in range(len(said) - words + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def teachers_of(run: Run) -> list[LocalTeacher]:
    """The recipe's teachers. Where the data has lessons for several, packaged networks learn one each."""
    lessons, specs = run.source.context.get("lessons"), run.spec("teachers")
    assert isinstance(specs, list)
    if lessons is None or not all(is_packaged("causal_lm", spec) for spec in specs):
        return [LocalTeacher(model) for model in run.models("teachers")]
    if len(specs) != len(lessons):
        raise RecipeError(
            f"{run.source.name} has lessons for {len(lessons)} teachers, and the recipe has {len(specs)}."
        )
    learnt = lambda k, spec: trained(
        "causal_lm", spec, lessons[k], run.context, run.plan.data, run.seed, run.train.device, f"teachers.{k}"
    )
    return [LocalTeacher(learnt(k, spec).to(run.device), f"teacher {k}") for k, spec in enumerate(specs)]


def written(run: Run, teachers: list[LocalTeacher], config: MADOPD) -> dict[str, Any]:
    """What the teachers write on the training prompts, one of them on each (MT-SeqKD's data)."""
    prompts, rows = run.prompts(), []
    bounds = [bound / sum(config.shares) for bound in accumulate(config.shares)]
    numbers = torch.arange(len(prompts))
    coin_N = keyed.uniform(keyed.key(run.seed, "writer"), numbers)
    writer_N = torch.bucketize(coin_N, torch.tensor(bounds[:-1], dtype=coin_N.dtype))
    for k, teacher in enumerate(teachers):
        for out in answers(run, teacher.model, prompts, numbers[writer_N == k], "written", **config.replies.sampling):
            for row, attention, counted in zip(out.tokens_BT, out.attention_BT, out.counted_BT, strict=True):
                rows.append([row[attention].tolist(), counted[attention].tolist()])
    return {"rows": rows}


def worth(run: Run, teachers: list[LocalTeacher], debate: Debate, config: MADOPD) -> dict[str, float]:
    """How right each teacher's greedy answers to held-out prompts are, alone and with a debate before its eyes."""
    prompts = run.prompts("test")
    asked = prompts.batch(torch.arange(min(len(prompts), max(1, (run.plan.eval.limit or 256) // 2))))
    rows = debate(asked, keyed.key(run.seed, "held-out debate")).extra["rows"]
    found = {}
    for k, teacher in enumerate(teachers):
        longest = {"max_new_tokens": config.replies.max_new_tokens, "greedy": True}
        answer = LocalSpeaker(teacher.model, config.context, longest)
        forms = {"alone": [row["prompt"] for row in rows], "debated": [config.prompts.scoring(row, k) for row in rows]}
        for name, texts in forms.items():
            said = answer(texts, asked.ids_B, 0)
            marks = [run.source.grade(row, text) for row, text in zip(rows, said, strict=True)]  # type: ignore[misc]
            found[f"teacher_{k}_{name}"] = sum(marks) / len(marks)
    return found


@method(
    "mad_opd",
    student="causal_lm",
    teachers=Role("causal_lm", many=True),
    data=("prompts", "chat"),
)
def mad_opd(run: Run, config: MADOPD) -> Result:
    teachers, student = teachers_of(run), run.student()
    for name, given in (
        ("weights", config.weights),
        ("shares", config.shares if config.variant == "mt_seqkd" else None),
    ):
        if given is not None and (len(given) != len(teachers) or min(given) < 0 or sum(given) <= 0):
            raise RecipeError(f"method.{name} must have one number a teacher, none below 0, got {given}.")
    if config.replies.server is not None:
        raise RecipeError("method.replies.server: the teachers reply here, where their weights are. Leave server out.")
    if config.variant == "opd" and config.teacher >= len(teachers):
        raise RecipeError(f"method.teacher {config.teacher} is none of the {len(teachers)} teachers, from 0.")
    optimizer = run.train.optimizer_spec()
    warm_start(run, student, config.warm_start, config.warm_start_lr)
    before = start_of(student)
    if config.variant == "mt_seqkd":
        stored = run.stage("written", written, run, teachers, config)["rows"]
        copying = TokenDistillation(
            student, None, cross_entropy=1.0, optimizer=optimizer, seed=run.seed, average="sequence"
        )
        run.fit(copying, TokenRows(stored, student.pad_id))
        return compared(run, before=before, teacher=teachers[0].model)
    panel: list[Any] = teachers if config.variant != "opd" else [teachers[config.teacher]]
    weights: Any = config.weights if config.variant != "opd" else None
    debate, metrics = None, {}
    if config.variant == "mad_opd":
        replies = {name: value for name, value in config.replies.sampling.items() if name != "samples_per_prompt"}
        speakers = [LocalSpeaker(teacher.model, config.context, replies) for teacher in teachers]
        debate = Debate(speakers, config.rounds, config.prompts, config.tau if config.confidence else None)
        seeing = lambda k: transcript_context(config.prompts, k, student.tokenizer, config.context)
        panel = [PrivilegedTeacher(teacher, seeing(k)) for k, teacher in enumerate(teachers)]
        weights = "weights" if config.confidence else weights
    objective = UnrepeatedPanel(
        student,
        panel,
        config.estimator(),
        weights=weights,
        debate=debate,
        optimizer=optimizer,
        seed=run.seed,
        rollouts=config.rollouts,
        average="sequence",
    )
    objective.repetition = config.repetition
    run.fit(objective, run.prompts())
    if debate is not None and run.source.grade is not None:
        metrics = run.stage("worth", worth, run, teachers, debate, config)
        table = [
            [t.name, metrics[f"teacher_{k}_alone"], metrics[f"teacher_{k}_debated"]] for k, t in enumerate(teachers)
        ]
        columns = ["teacher", "alone", "after a debate"]
        run.record("1-debate", "table", "How right the teachers are on held-out prompts", columns=columns, rows=table)
    result = compared(run, before=before, teacher=panel[0].model)
    return Result(result.student, {**result.metrics, **metrics})

"""What the language methods report alike: teacher, student before and after, and a control, on text and on rollouts."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.evaluation.states import own_states
from potstill.evaluation.text import (
    compare,
    generation_speed,
    graded,
    size,
    token_divergences,
    watched,
)
from potstill.models.causal import evaluating
from potstill.objectives.policy import PolicyGradient
from potstill.objectives.tokens import TokenDistillation
from potstill.rollouts.local import completions_of, sample
from potstill.run import Result, Run
from potstill.weighting import Uniform

TEXTS = 4  # sentences and prompts that the report shows
TOP = 16  # likeliest tokens whose overlap is measured
LONGEST = 300  # tokens of a sentence that the report shows


def start_of(student: Any) -> Any:
    """The student as it is now, kept for the comparison."""
    return copy.deepcopy(student).requires_grad_(False).eval()


def control(run: Run, before: Any, stage: str = "control") -> Any:
    """The same start trained on the same text without a teacher, for as long as the distillation has taken.

    Its budget is time, because a step without a teacher is cheaper; it is read from the stages that stand finished.
    """
    seconds = run.stage("control-budget", run.seconds_spent, stage)
    model = copy.deepcopy(before).requires_grad_(True)
    objective = TokenDistillation(model, None, cross_entropy=1.0, optimizer=run.train.optimizer_spec(), seed=run.seed)
    run.fit(objective, run.tokens(), stage=stage, seconds=max(seconds, 1e-3), steps=100 * run.train.steps)
    return model


def compared(
    run: Run,
    *,
    before: Any | None = None,
    control: Any | None = None,
    teacher: Any | None = None,
    lengths: Sequence[int] = (),
    weighed: tuple[TokenDistillation | PolicyGradient, Any] | None = None,
) -> Result:
    """Measure, keep for the report, and hand back the student with its numbers.

    teacher: who is compared with where the method has no role of that name (the start itself, in self-distillation).
    lengths: of the student's samples whose likelihood under the teacher is measured.
    weighed: the objective, and the data it learnt from, whose weights the report shows where they differ by position.
    """
    student = run.student()
    if weighed is not None and not isinstance(weighed[0].weighting, Uniform):
        _show_weights(run, *weighed)
    students = {"student before": before, "student after": student, "control": control}
    students = {name: model for name, model in students.items() if model is not None}
    if teacher is None and (not run.loads("teacher") or run.aligned("teacher")):
        return _alone(run, students)
    teacher = teacher or run.model("teacher")
    values = run.stage("comparison", _measure, run, students, teacher, tuple(lengths))
    columns = ["model", "perplexity", "KL(p || q)", "KL(q || p)", "top-token agreement", "KL(q || p) on own rollouts"]
    columns += ["tokens/s", "parameters", "MB"]
    run.record(
        "1-comparison",
        "table",
        "Teacher, student and control",
        columns=columns,
        rows=values["rows"],
        note="p is the teacher, q the student, on held-out text unless said otherwise; nats per token. The control is the "
        "same start trained on the same text without a teacher, for the same time." if control is not None else
        "p is the teacher, q the student, on held-out text unless said otherwise; nats per token.",
    )  # fmt: skip
    if values["answers"]:
        run.record(
            "1-answers",
            "table",
            "Answers to held-out prompts, greedy",
            columns=["model", "accuracy", "tokens an answer"],
            rows=values["answers"],
            note=f"By the exact scorer of {run.source.name}.",
        )
    run.record(
        "2-samples",
        "texts",
        "Continuations of held-out prompts",
        columns=["teacher", *students],
        rows=values["samples"],
    )
    run.record(
        "3-divergence",
        "token_values",
        "Where teacher and student disagree: KL(p || q) at each token",
        sentences=values["sentences"],
        unit="nats",
    )
    states = values["states"]
    run.record(
        "4-states",
        "curves",
        "Along the student's own samples: KL(q || p) at the n-th token",
        series=[{"label": "student after", "x": list(range(1, 1 + len(states["by_place"]))), "y": states["by_place"]}],
        x_label="token",
        y_label="nats",
        note=f"Of the {TOP} likeliest tokens, teacher and student share {states['top_overlap']:.0%}; entropies: teacher "
        f"{states['teacher_entropy']:.2f}, student {states['student_entropy']:.2f} nats; different words "
        f"{states['distinct_1']:.1%}, different pairs {states['distinct_2']:.1%}.",
    )
    return Result(student=student, metrics=values["metrics"])


def _show_weights(run: Run, objective: TokenDistillation | PolicyGradient, data: Any) -> None:
    if not (sentences := run.stage("weights", _weights, run, objective, data)):
        return
    run.record(
        "3-weights",
        "token_values",
        "What counts: each token's divergence, and over it its weight",
        sentences=sentences,
        unit="nats",
        note=f"The first training rows as the finished student continues them, weighed as one batch by {objective.weighting}. "
        "KL(q || p) where whole distributions are compared, else log q / p of the token. What has no weight is not always "
        "looked at, and then stands as 0.",
    )


@torch.no_grad()
def _weights(run: Run, objective: TokenDistillation | PolicyGradient, data: Any) -> list[dict[str, Any]]:
    """One row of each of the first prompts (or texts): what counts of it as tokens, its divergence and its weights."""
    objective.to(run.device)
    rows = torch.arange(min(TEXTS, len(data)))
    use = getattr(objective, "updates_per_rollout", 1)
    step = -(-run.train.steps // use) * use  # when new rollouts are due
    with evaluating(objective.student):
        batch = objective.collect(data.batch(rows).to(run.device), step)
        seen = objective.loss("student", batch, step).positions
    if "weights" not in seen:
        return []
    away_BR = seen["reverse_kl"] if "reverse_kl" in seen else -seen["log_ratio"]
    said, tokenizer, sentences = completions_of(batch), run.context["tokenizer"], []
    for b in range(0, len(batch), max(1, len(batch) // len(rows))):
        tokens = [tokenizer.convert_tokens_to_string([t]) for t in tokenizer.convert_ids_to_tokens(said[b][:LONGEST])]
        values, weights = (x_BR[b, : len(tokens)].tolist() for x_BR in (away_BR, seen["weights"]))
        before = batch.attention_BT[b] & (batch.counted_BT[b].cumsum(0) == 0)
        asked = tokenizer.decode(batch.tokens_BT[b][before], skip_special_tokens=True)
        sentences.append({"label": asked, "tokens": tokens, "values": values, "weights": weights})
    return sentences


def _alone(run: Run, students: Mapping[str, Any]) -> Result:
    """What is known of students whose teacher is not here (served, or its answers cached), or has other tokens."""
    values = run.stage(
        "comparison", lambda: {name: run.evaluate(model)["perplexity"] for name, model in students.items()}
    )
    run.record(
        "1-comparison",
        "table",
        "The student before and after",
        columns=["model", "perplexity"],
        rows=[[name, value] for name, value in values.items()],
        note="On held-out text. The teacher's weights are not here, or it has other tokens: nothing is compared with it.",
    )
    named = {"perplexity" if name == "student after" else f"{name.replace('student ', '')}_perplexity": value
             for name, value in values.items()}  # fmt: skip
    return Result(students["student after"], named | size(students["student after"]))


def _measure(run: Run, students: Mapping[str, Any], teacher: Any, lengths: Sequence[int]) -> dict[str, Any]:
    batches, prompts = _held_out(run)
    tokens = run.plan.data.length - run.plan.data.prompt_length
    shown = _first(prompts[0])
    rows: list[list[Any]] = []
    answers: list[list[Any]] = []
    written: list[TokenBatch] = []
    metrics: dict[str, float] = {}
    for name, model in students.items():
        on_text = compare(model, teacher, batches)
        rollouts = [
            sample(model, batch, max_new_tokens=tokens, seed=run.seed) for batch in watched(prompts, "rollouts")
        ]
        own = compare(model, teacher, rollouts)
        if name == "student after":
            written = rollouts
        row = [on_text["student_perplexity"], on_text["forward_kl"], on_text["reverse_kl"], on_text["agreement"]]
        row += [own["reverse_kl"], *_cost(model, shown, tokens)]
        rows.append([name, *row])
        prefix = "" if name == "student after" else name.replace("student ", "") + "_"
        named = {
            "perplexity": row[0], "forward_kl": row[1], "reverse_kl": row[2], "agreement": row[3], "rollout_reverse_kl": row[4],
        }  # fmt: skip
        if run.source.grade is not None:
            marks = graded(model, prompts, run.source.grade, max_new_tokens=tokens, seed=run.seed)
            named |= marks
            answers.append([name, marks["accuracy"], marks["answer_tokens"]])
        metrics |= {prefix + key: value for key, value in named.items()}
        metrics["teacher_perplexity"] = on_text["teacher_perplexity"]
    if run.source.grade is not None:
        marks = graded(teacher, prompts, run.source.grade, max_new_tokens=tokens, seed=run.seed)
        metrics["teacher_accuracy"] = marks["accuracy"]
        answers.insert(0, ["teacher", marks["accuracy"], marks["answer_tokens"]])
    cost = _cost(teacher, shown, tokens)
    rows.insert(0, ["teacher", metrics["teacher_perplexity"], 0.0, 0.0, 1.0, 0.0, *cost])
    metrics |= size(students["student after"])
    after, longest = students["student after"], max([tokens, *lengths])
    if longest > tokens:
        written = [sample(after, batch, max_new_tokens=longest, seed=run.seed) for batch in prompts]
    states = own_states(after, teacher, written, max_new_tokens=longest, k=TOP, lengths=lengths)
    metrics |= {name: value for name, value in states.items() if name != "by_place"}
    return {
        "rows": rows,
        "answers": answers,
        "states": states,
        "metrics": metrics,
        "samples": _samples(run, {"teacher": teacher, **students}, shown, tokens),
        "sentences": _sentences(run, students["student after"], teacher, batches),
    }


def _cost(model: Any, prompts: PromptBatch, tokens: int) -> list[float]:
    cost = size(model)
    return [generation_speed(model, prompts, max_new_tokens=tokens, repeats=1), cost["parameters"], cost["bytes"] / 1e6]


def _held_out(run: Run) -> tuple[list[TokenBatch], list[PromptBatch]]:
    """Test rows as token batches, and half as many prompts (a rollout costs more than a row)."""
    tokens, prompts = run.tokens("test"), run.prompts("test")
    size, limit = min(run.plan.eval.batch, 64), run.plan.eval.limit or 256
    batches = [tokens.batch(rows).to(run.device) for rows in torch.arange(min(limit, len(tokens))).split(size)]
    asked = min(max(1, limit // 2), len(prompts))
    return batches, [prompts.batch(rows).to(run.device) for rows in torch.arange(asked).split(size)]


def _first(prompts: PromptBatch) -> PromptBatch:
    return PromptBatch(prompts.ids_B[:TEXTS], prompts.tokens_BT[:TEXTS], prompts.attention_BT[:TEXTS])


def _samples(run: Run, models: Mapping[str, Any], first: PromptBatch, tokens: int) -> list[dict[str, str]]:
    tokenizer = run.context["tokenizer"]
    read = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    rows = [{"prompt": read(t[a])} for t, a in zip(first.tokens_BT, first.attention_BT)]
    for name, model in models.items():
        out = sample(model, first, max_new_tokens=tokens, temperature=0.7, seed=run.seed)
        for row, ids in zip(rows, completions_of(out)):
            row[name] = read(ids)
    return rows


def _sentences(run: Run, student: Any, teacher: Any, batches: list[TokenBatch]) -> list[dict[str, Any]]:
    tokenizer = run.context["tokenizer"]
    first = batches[0]
    texts = [
        tokenizer.decode(t[a], skip_special_tokens=True) for t, a in zip(first.tokens_BT[:TEXTS], first.attention_BT)
    ]
    found = token_divergences(student, teacher, texts, max_length=run.plan.data.length)
    readable = lambda ids: [tokenizer.convert_tokens_to_string([t]) for t in ids]
    return [{"tokens": readable(words), "values": values.tolist()} for words, values in found]

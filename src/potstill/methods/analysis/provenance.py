"""Provenance: which sentences of a distilled model come from its teacher, and training traces chosen by it (2512.20908).

    p^M(y) = exp( 1/K sum_k log p_M(tok_k | context, tok_<k) )          geometric mean over M's own K tokens of sentence y
    Shared   |p^S - p^D|, |p^T - p^D|, |p^T - p^S| <= alpha             (tested in this order)
    Teacher  p^T - p^S > beta       Student  p^S - p^T > beta       Boosted  otherwise

S the base student, T its teacher, D the student distilled from T's traces. On training traces, where there is no D, only
T and S are compared (Common where |p^T - p^S| <= beta), and of each problem's candidates the one with most Teacher
sentences is kept. Then D is S fine-tuned on the kept traces (next-token cross-entropy on the trace).

Unsourced and chosen here: alpha 0.05, the number of candidates (4), the split (at sentence ends and line ends). The
source was read second-hand, so equations carry no numbers. `average: character` is our option for tokenizers of different
granularity, for which the mean over tokens is biased. `prepare` first trains a fresh student on the rows' `shortcut`,
another style of answering: the laptop's stand-in for a pretrained base student.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError
from potstill.contracts.files import write_text
from potstill.contracts.spec import MethodConfig
from potstill.divergences import log_probs
from potstill.evaluation.text import watched
from potstill.methods import method
from potstill.models.causal import evaluating
from potstill.objectives.tokens import TokenDistillation
from potstill.rollouts.local import completions_of, sample
from potstill.run import Result, Run
from potstill.tasks.tokens import Completions, Prompts, padded, prompt_tokens

Selector = Literal["teacher_count", "random", "grape", "longest", "teacher_ratio", "fewest_teacher"]
CLASSES = ("shared", "teacher", "student", "boosted")
Span = tuple[int, int]


class Provenance(MethodConfig):
    select: Selector = "teacher_count"
    candidates: int = Field(4, ge=1)
    temperature: float = Field(1.0, gt=0)  # of the teacher's traces
    alpha: float = Field(0.05, ge=0)
    beta: float = Field(0.1, ge=0)
    average: Literal["token", "character"] = "token"
    minimum_length: int = Field(0, ge=0)  # characters; shorter sentences are not counted
    problems: int = Field(400, ge=1)  # training problems that get traces
    trace_length: int = Field(64, ge=1)  # new tokens of a trace
    prepare: int = Field(0, ge=0)  # steps on the rows' `shortcut` for a fresh student


def sentences(text: str) -> list[Span]:
    """Character spans of the sentences of a text: up to and with . ! ? ; before white space or the end, or a line end."""
    return [m.span() for m in re.finditer(r"\S.*?(?:[.!?;]+(?=\s|$)|(?=\n)|$)", text) if m.group().strip()]


def sentence_probabilities(
    model: Any, rows: Sequence[tuple[Any, str]], average: Literal["token", "character"] = "token", batch: int = 32
) -> list[list[float]]:
    """p^M of every sentence of each (prompt row, trace), the trace under teacher forcing in M's own tokenizer and template.

    A token belongs to the sentence in which it starts; tokens between sentences (white space) to the next one.
    """
    out: list[list[float]] = []
    with torch.no_grad(), evaluating(model):
        for start in watched(range(0, len(rows), batch), f"sentences under {model.name}"):
            out += _scored(model, rows[start : start + batch], average)
    return out


def _scored(model: Any, rows: Sequence[tuple[Any, str]], average: str) -> list[list[float]]:
    tokenizer, tokens, counted, owners = model.tokenizer, [], [], []
    for row, trace in rows:
        encoded = tokenizer(trace, add_special_tokens=False, return_offsets_mapping=True)
        prompt, ends = prompt_tokens(row, tokenizer, None), torch.tensor([stop for _, stop in sentences(trace)])
        first = [start for start, _ in encoded["offset_mapping"]]
        owners.append([int((ends <= start).sum()) for start in first])
        tokens.append(prompt + list(encoded["input_ids"]))
        counted.append([0] * len(prompt) + [1] * len(first))
    tokens_BT, attention_BT = padded(tokens, model.pad_id, "right")
    counted_BT = padded(counted, 0, "right")[0].bool()
    here = TokenBatch(torch.arange(len(rows)), tokens_BT, attention_BT, counted_BT).to(model.device)
    logp_N = log_probs(model.counted_logits(here)).gather(1, here.tokens_counted[:, None])[:, 0].double().cpu()
    found = []
    for (_, trace), owner, logp in zip(rows, owners, logp_N.split([len(o) for o in owners])):
        spans = sentences(trace)
        index = torch.tensor(owner, dtype=torch.int64).clamp(max=max(len(spans) - 1, 0))
        total = torch.zeros(len(spans), dtype=torch.float64).index_add_(0, index, logp)
        size = (
            torch.bincount(index, minlength=len(spans))
            if average == "token"
            else torch.tensor([b - a for a, b in spans])
        )
        found.append((total / size.clamp_min(1)).exp().tolist())
    return found


def classify(p_student: Tensor, p_teacher: Tensor, p_distilled: Tensor, alpha: float, beta: float) -> Tensor:
    """Index into CLASSES of each sentence. [n] each -> [n] int64."""
    gap = p_teacher - p_student
    shared = (
        ((p_student - p_distilled).abs() <= alpha) & ((p_teacher - p_distilled).abs() <= alpha) & (gap.abs() <= alpha)
    )
    kind = torch.full_like(gap, 3, dtype=torch.int64)
    kind[gap < -beta] = 2
    kind[gap > beta] = 1
    kind[shared] = 0
    return kind


def teacher_sentences(p_student: Sequence[float], p_teacher: Sequence[float], beta: float) -> list[bool]:
    """Which sentences of a training trace the teacher clearly prefers: p^T - p^S > beta."""
    return [t - s > beta for s, t in zip(p_student, p_teacher)]


def choose(select: Selector, candidates: Sequence[Mapping[str, Any]], beta: float, seed: int, minimum: int = 0) -> int:
    """Which candidate trace of a problem is kept; ties go to the earliest. Each has `text`, `student`, `teacher` (the
    probabilities of its sentences) and, for grape, `student_logp`: the mean log-probability of its tokens."""

    def count(c: Mapping[str, Any]) -> int:
        long = [b - a >= minimum for a, b in sentences(c["text"])]
        return sum(flag and keep for flag, keep in zip(teacher_sentences(c["student"], c["teacher"], beta), long))

    score: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "teacher_count": count,
        "fewest_teacher": lambda c: -count(c),
        "teacher_ratio": lambda c: count(c) / max(1, len(c["teacher"])),
        "longest": lambda c: len(c["text"]),
        "grape": lambda c: c["student_logp"],
    }
    if select == "random":
        return int(keyed.uniform(keyed.key(seed, "select"), torch.tensor([0])).item() * len(candidates))
    return max(range(len(candidates)), key=lambda i: (score[select](candidates[i]), -i))


def traces(
    run: Run, model: Any, rows: Sequence[Any], count: int, *, greedy: bool = False, temperature: float = 1.0
) -> list[list[str]]:
    """`count` completions of each prompt row, in the rows' order; [] for a prompt that does not fit."""
    config: Any = run.config
    prompts = Prompts(rows, model.tokenizer, run.plan.data.length, config.trace_length)
    place = {id(row): i for i, row in enumerate(rows)}
    found: list[list[str]] = [[] for _ in rows]
    for part in watched(list(torch.arange(len(prompts)).split(64)), f"traces of {model.name}"):
        batch = prompts.batch(part)
        out = sample(
            model, batch, max_new_tokens=config.trace_length, temperature=temperature, greedy=greedy,
            samples_per_prompt=count, seed=keyed.key(run.seed, "traces", model.name),
        )  # fmt: skip
        texts = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions_of(out)]
        for i, row in enumerate(batch.extra["rows"]):
            found[place[id(row)]] = texts[i * count : (i + 1) * count]
    return found


def scored_candidates(run: Run, teacher: Any, student: Any, rows: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """Every candidate trace of every problem, with its sentences' probabilities under teacher and student."""
    config: Any = run.config
    made = traces(run, teacher, rows, config.candidates, temperature=config.temperature)
    flat = [(row, text) for row, texts in zip(rows, made) for text in texts if text]
    if not flat:
        raise DataError("The teacher gave no trace: its completions are empty, or no prompt fits into data.length.")
    p_teacher = sentence_probabilities(teacher, flat, config.average)
    p_student = sentence_probabilities(student, flat, config.average)
    scored = iter(zip(p_student, p_teacher, flat))
    out: list[list[dict[str, Any]]] = []
    for texts in made:
        here = []
        for text in filter(None, texts):
            s, t, _ = next(scored)
            mean = sum(math.log(max(p, 1e-30)) for p in s) / max(1, len(s))
            here.append({"text": text, "student": s, "teacher": t, "student_logp": mean})
        out.append(here)
    return out


def fine_tune(run: Run, model: Any, rows: Sequence[Mapping[str, str]], stage: str, **changes: Any) -> None:
    data = Completions(rows, model.tokenizer, run.plan.data.length + run.config.trace_length)  # type: ignore[attr-defined]
    run.fit(
        TokenDistillation(model, None, cross_entropy=1.0, optimizer=run.train.optimizer_spec(), seed=run.seed),
        data,
        stage=stage,
        **changes,
    )


def analysed(run: Run, student: Any, teacher: Any, distilled: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """The distilled model's own answers to test problems, sentence by sentence under the three models."""
    config: Any = run.config
    answers = [texts[0] if texts else "" for texts in traces(run, distilled, rows, 1, greedy=True)]
    kept = [(row, text) for row, text in zip(rows, answers) if text]
    p_s, p_t, p_d = (sentence_probabilities(m, kept, config.average) for m in (student, teacher, distilled))
    grade = run.source.grade
    found = []
    for (row, text), s, t, d in zip(kept, p_s, p_t, p_d):
        spans = [text[a:b] for a, b in sentences(text)]
        kinds = classify(torch.tensor(s), torch.tensor(t), torch.tensor(d), config.alpha, config.beta).tolist()
        found.append({"sentences": spans, "classes": [CLASSES[k] for k in kinds], "student": s, "teacher": t, "distilled": d,
                      "right": grade(row, text) if grade else None})  # fmt: skip
    return {"traces": found, "answered": len(kept), "asked": len(rows)}


@method("provenance", student="causal_lm", teacher="causal_lm", data="prompts")
def provenance(run: Run, config: Provenance) -> Result:
    student, teacher = run.student(), run.model("teacher").eval()
    if config.prepare:
        rows = run.source.train
        if "shortcut" not in rows[0]:
            raise DataError(
                f"method.prepare trains on the rows' shortcut, and {run.source.name} has none. Give a trained student."
            )
        fine_tune(
            run,
            student,
            [{"prompt": r["prompt"], "completion": r["shortcut"]} for r in rows],
            "prepare",
            steps=config.prepare,
        )
    distilled = copy.deepcopy(student)
    problems = list(run.source.train[: config.problems])
    candidates = run.stage("candidates", scored_candidates, run, teacher, student.eval(), problems)
    picks = [
        (row, here[choose(config.select, here, config.beta, keyed.key(run.seed, i), config.minimum_length)])
        for i, (row, here) in enumerate(zip(problems, candidates)) if here
    ]  # fmt: skip
    chosen = [{"prompt": row["prompt"], "completion": pick["text"]} for row, pick in picks]
    fine_tune(run, distilled, chosen, "distil")
    report = run.stage("analysis", analysed, run, student, teacher, distilled, run.source.test)
    return _reported(run, config, report, picks, chosen, distilled)


def _reported(run: Run, config: Provenance, report: Any, picks: Any, chosen: Any, distilled: Any) -> Result:
    """Shares by class, by place and by correctness; the sweep over beta; the selection as a data set of its own."""
    found = report["traces"]
    flat = [
        (kind, i / max(1, len(t["classes"]) - 1), t["right"], p)
        for t in found
        for i, (kind, p) in enumerate(zip(t["classes"], t["distilled"]))
    ]
    share = lambda rows: [sum(r[0] == c for r in rows) / max(1, len(rows)) for c in CLASSES]
    parts = {
        "all": flat,
        "first half": [r for r in flat if r[1] < 0.5],
        "second half": [r for r in flat if r[1] >= 0.5],
    }
    if run.source.grade:
        parts |= {"right answers": [r for r in flat if r[2]], "wrong answers": [r for r in flat if not r[2]]}
    mean_p = [sum(r[3] for r in flat if r[0] == c) / max(1, sum(r[0] == c for r in flat)) for c in CLASSES]
    table = [[name, len(rows), *share(rows)] for name, rows in parts.items()]
    run.record("1-provenance", "table", "Where the distilled model's sentences come from",
               columns=["sentences", "number", *CLASSES], rows=[*table, ["mean probability under it", "", *mean_p]],
               note="The classes as the paper tests them, in this order; boosted is the remainder.")  # fmt: skip
    sweep = []
    for beta in (0.05, 0.1, 0.15, 0.3):
        kinds: list[int] = []
        for t in found:
            p_s, p_t, p_d = (torch.tensor(t[who]) for who in ("student", "teacher", "distilled"))
            kinds += classify(p_s, p_t, p_d, config.alpha, beta).tolist()
        sweep.append([beta, *[kinds.count(c) / max(1, len(kinds)) for c in range(4)]])
    run.record("2-sweep", "table", "The same for other thresholds", columns=["beta", *CLASSES], rows=sweep)
    shown = [
        {"tokens": [s + " " for s in t["sentences"]], "values": [b - a for a, b in zip(t["student"], t["teacher"])]}
        for t in found[:6]
    ]
    run.record(
        "3-sentences",
        "token_values",
        "p of the teacher minus p of the base student, by sentence",
        sentences=shown,
        unit="probability",
    )
    counts = [sum(teacher_sentences(c["student"], c["teacher"], config.beta)) for _, c in picks]
    metrics = {f"share_{c}": s for c, s in zip(CLASSES, share(flat))} | {
        "kept_traces": float(len(picks)),
        "teacher_sentences_per_trace": sum(counts) / max(1, len(counts)),
        "trace_length": sum(len(c["text"]) for _, c in picks) / max(1, len(picks)),
        "answered": report["answered"] / report["asked"],
    }  # fmt: skip
    if run.source.grade:
        metrics["accuracy"] = sum(t["right"] for t in found) / report["asked"]
        metrics["kept_accuracy"] = sum(run.source.grade(row, pick["text"]) for row, pick in picks) / max(1, len(picks))
    if run.accelerator.is_main_process:
        write_text(run.folder / "selected.jsonl", "".join(json.dumps(row) + "\n" for row in chosen))
        write_text(run.folder / "sentences.jsonl", "".join(json.dumps(t) + "\n" for t in found))
    return Result(
        distilled, metrics, {"selection": run.folder / "selected.jsonl", "sentences": run.folder / "sentences.jsonl"}
    )

"""How good a finished language model is, and how near to its teacher: on held-out text and on its own rollouts.

N counted positions, V vocabulary. p is the teacher, q the student; means are over tokens, in nats. Works micro-batch by
micro-batch: [N, V] logits exist for one at a time.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, NonFiniteError
from potstill.divergences import FDivergence, ForwardKL, JensenShannon, ReverseKL, TotalVariation, log_probs
from potstill.models.causal import CausalLM, evaluating, shared_vocabulary
from potstill.rollouts.local import completions_of, sample

Item = TypeVar("Item")


def watched(items: Sequence[Item] | Iterable[Item], what: str) -> Iterator[Item]:
    """The items, with a progress bar where somebody watches."""
    console = Console(stderr=True)
    yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)


def text_batches(texts: Sequence[str], model: CausalLM, *, batch: int = 8, max_length: int = 512) -> list[TokenBatch]:
    """Texts in their order, cut to `max_length` tokens and padded on the right; every token but the first counts."""
    if not texts:
        raise DataError("There is no text to evaluate on.")
    rows = [model.tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    batches = []
    for start in range(0, len(rows), batch):
        here = rows[start : start + batch]
        width = max(1, *(len(row) for row in here))
        tokens = torch.tensor([[*row, *[model.pad_id] * (width - len(row))] for row in here], dtype=torch.int64)
        attention = torch.arange(width)[None] < torch.tensor([len(row) for row in here])[:, None]
        counted = attention.clone()
        counted[:, 0] = False
        batches.append(TokenBatch(torch.arange(start, start + len(here)), tokens, attention, counted))
    return batches


def perplexity(model: CausalLM, batches: Iterable[TokenBatch]) -> float:
    """exp of the mean negative log-likelihood over all counted tokens (long texts weigh more)."""
    total, count = _nll(model, watched(batches, "perplexity"))
    return _exp(total / _some(count))


@torch.no_grad()
def _nll(model: CausalLM, batches: Iterable[TokenBatch]) -> tuple[float, int]:
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            batch = batch.to(model.device)
            logp = log_probs(model.counted_logits(batch)).gather(1, batch.tokens_counted[:, None])
            total += -logp.double().sum().item()
            count += len(logp)
    if math.isnan(total):
        raise NonFiniteError(f"The log-likelihoods of {model.name} are NaN: its weights are broken.")
    return total, count


def evaluate_language_model(
    model: CausalLM, dataset: Any, *, batch: int, teacher: Any | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """perplexity on a dataset of TokenBatch and its number of tokens; with a teacher all that `compare` says.

    `teacher` is a CausalLM, or a local teacher that holds one.
    """
    if len(dataset) == 0:
        raise DataError("There is no text to evaluate on: the test split is empty.")
    parts = torch.arange(len(dataset)).split(batch)
    batches = (dataset.batch(rows) for rows in watched(parts, "evaluate"))
    if teacher is not None:
        found = _compare(model, getattr(teacher, "model", teacher), batches, temperature)
        return {"perplexity": found.pop("student_perplexity")} | found
    nll, count = _nll(model, batches)
    return {"perplexity": _exp(nll / _some(count)), "tokens": float(count)}


def compare(
    student: CausalLM, teacher: CausalLM, batches: Iterable[TokenBatch], *, temperature: float = 1.0
) -> dict[str, float]:
    """Both models on the same counted tokens, whole vocabulary.

    forward_kl KL(p || q), reverse_kl KL(q || p), total_variation, agreement (the same most likely word), all at
    `temperature`; student_perplexity, teacher_perplexity of the tokens (at temperature 1), and how many there are.
    """
    return _compare(student, teacher, watched(batches, "student and teacher"), temperature)


@torch.no_grad()
def _compare(
    student: CausalLM, teacher: CausalLM, batches: Iterable[TokenBatch], temperature: float
) -> dict[str, float]:
    sums: dict[str, float] = {}
    count, words = 0, shared_vocabulary(student, teacher)
    divergences = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "total_variation": TotalVariation()}
    with evaluating(student, teacher):
        for batch in batches:
            batch = batch.to(student.device)
            ours, theirs = _logits(student, batch, words), _logits(teacher, batch, words).to(student.device)
            log_q, log_p = log_probs(ours, temperature), log_probs(theirs, temperature)
            tokens = batch.tokens_counted[:, None]
            values = {name: d(teacher_logp=log_p, student_logp=log_q) for name, d in divergences.items()}
            values["agreement"] = ours.argmax(-1) == theirs.argmax(-1)
            values["student_nll"] = -log_probs(ours).gather(1, tokens)
            values["teacher_nll"] = -log_probs(theirs).gather(1, tokens)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum().item()
            count += len(tokens)
    means = {name: total / _some(count) for name, total in sums.items()}
    if any(math.isnan(mean) for mean in means.values()):
        raise NonFiniteError(f"{student.name} or {teacher.name} gives NaN logits: its weights are broken.")
    for who in ("student", "teacher"):
        means[f"{who}_perplexity"] = _exp(means.pop(f"{who}_nll"))
    return means | {"tokens": float(_some(count))}


def compare_on_rollouts(
    student: CausalLM,
    teacher: CausalLM,
    prompts: Sequence[PromptBatch],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    samples_per_prompt: int = 1,
    sampler: CausalLM | None = None,
) -> dict[str, float]:
    """`compare` at states that the student itself samples (or `sampler`), compared at the sampling temperature.

    `reverse_kl` is then what on-policy distillation minimises: the mean over visited states of KL(q || p).
    """
    rollouts = (
        sample(
            sampler or student,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            samples_per_prompt=samples_per_prompt,
        )
        for batch in watched(prompts, "rollouts")
    )
    return _compare(student, teacher, rollouts, temperature)


def answered(
    model: CausalLM, prompts: Iterable[PromptBatch], grade: Callable[[Any, str], float], **sampling: Any
) -> Iterator[tuple[list[float], list[list[int]]]]:
    """Of each batch the marks and the tokens of a model's answers; `sampling` is that of `rollouts.local.sample`."""
    for batch in watched(prompts, "answers"):
        out = sample(model, batch, **sampling)
        answers = completions_of(out)
        texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
        yield [float(grade(row, text)) for row, text in zip(out.extra["rows"], texts, strict=True)], answers


def graded(
    model: CausalLM,
    prompts: Sequence[PromptBatch],
    grade: Callable[[Any, str], float],
    *,
    max_new_tokens: int,
    seed: int = 0,
    samples: int = 1,
) -> dict[str, float]:
    """How right a model's answers are by `grade` (of a prompt's row and the answer, 0 to 1), and how long, in tokens.

    Greedy with one sample; with more, sampled at temperature 1, and `pass_rate` is the share of prompts that are
    answered fully right at least once.
    """
    scores: list[list[float]] = []
    lengths: list[int] = []
    how = {"max_new_tokens": max_new_tokens, "greedy": samples == 1, "seed": seed, "samples_per_prompt": samples}
    for marks, answers in answered(model, prompts, grade, **how):
        scores += [marks[i : i + samples] for i in range(0, len(marks), samples)]
        lengths += [len(answer) for answer in answers]
    _some(len(lengths))
    found = {
        "accuracy": sum(map(sum, scores)) / len(lengths),
        "answer_tokens": sum(lengths) / len(lengths),
    }
    return found | ({"pass_rate": sum(max(m) >= 1.0 for m in scores) / len(scores)} if samples > 1 else {})


@torch.no_grad()
def kept(student: Any, start: Any, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Perplexity after and before on some text, and the mean Jensen-Shannon divergence to the start, in nats per token."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with evaluating(student, start):
        for batch in batches:
            batch = batch.to(student.device)
            log_q, log_p = log_probs(student.counted_logits(batch)), log_probs(start.counted_logits(batch))
            tokens_N1 = batch.tokens_counted[:, None]
            apart = JensenShannon()(teacher_logp=log_p, student_logp=log_q)
            values = (apart, -log_q.gather(1, tokens_N1), -log_p.gather(1, tokens_N1))
            sums += torch.stack([value.double().sum().cpu() for value in values])
            count += len(log_q)
    jsd, after, before = (sums / count).tolist()
    return {"known_jsd": jsd, "known_perplexity": math.exp(after), "before_known_perplexity": math.exp(before)}


@torch.no_grad()
def token_divergences(
    student: CausalLM,
    teacher: CausalLM,
    texts: Sequence[str],
    *,
    divergence: FDivergence | None = None,
    batch: int = 8,
    max_length: int = 512,
) -> list[tuple[list[str], Tensor]]:
    """For a picture: each text's counted tokens as words and the divergence (forward KL) where each is predicted."""
    divergence, words = divergence or ForwardKL(), shared_vocabulary(student, teacher)
    pictures = []
    with evaluating(student, teacher):
        for rows in watched(text_batches(texts, student, batch=batch, max_length=max_length), "divergences"):
            here = rows.to(student.device)
            values = divergence(
                teacher_logp=log_probs(_logits(teacher, here, words).to(student.device)),
                student_logp=log_probs(_logits(student, here, words)),
            ).cpu()
            for row, value in zip(completions_of(here), values.split(here.counted_BT.sum(1).tolist()), strict=True):
                pictures.append((list(student.tokenizer.convert_ids_to_tokens(row)), value))
    return pictures


def generation_speed(
    model: CausalLM, prompts: PromptBatch, *, max_new_tokens: int = 64, repeats: int = 3, seed: int = 0
) -> float:
    """Sampled tokens per second, prompts read included: the median over `repeats` after one run to warm up."""
    speeds = []
    for repeat in range(repeats + 1):
        _wait(model)
        start = time.perf_counter()
        batch = sample(model, prompts, max_new_tokens=max_new_tokens, seed=seed, stop_ids=())
        _wait(model)
        if repeat:
            speeds.append(batch.counted_BT.sum().item() / (time.perf_counter() - start))
    return sorted(speeds)[len(speeds) // 2]


def size(model: CausalLM) -> dict[str, int]:
    """Parameters, each shared one once, and the bytes they take."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _logits(model: CausalLM, batch: TokenBatch, words: int) -> Tensor:
    return model.counted_logits(batch.to(model.device))[:, :words]


def _some(count: int) -> int:
    if not count:
        raise DataError(
            "No token counts: the texts are empty or of one token each, and nothing predicts a first token."
        )
    return count


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _wait(model: CausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

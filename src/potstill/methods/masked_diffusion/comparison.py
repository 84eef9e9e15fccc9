"""What every few-step masked diffusion method reports: how its samples read beside the teacher's, at equal steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.evaluation.masked import NGram, distinct, row_entropy
from potstill.noise.masked import LogLinear, MaskSchedule
from potstill.run import Run

SHOWN = 12


def judged(
    run: Run,
    models: Mapping[str, tuple[Any, Callable[..., Tensor]]],
    steps: Sequence[int],
    *,
    samples: int,
    order: int = 5,
    schedule: MaskSchedule = LogLinear(),
) -> dict[str, float]:
    """Samples of each (MaskedLM, sampler) at each number of steps; the teacher's at one step a token too.

    nll_N: nats per token of N-step samples under an n-gram model of the source's test text, entropy_N: of a row's own
    token frequencies, distinct_N: share of different 4-grams. Unprefixed numbers are those of "student"; nll_gain_N is
    the teacher's nll less the student's, entropy_drop_N the share of the teacher's entropy that the student lost.
    """
    length, vocabulary = run.plan.data.length, models["student"][0].vocabulary
    judge = NGram([row for row, _ in run.tokens("test").rows], vocabulary, order)
    given = run.tokens().rows[:samples]
    metrics = {"data_nll": judge.nll([row for row, _ in given])}
    rows, texts = [], []
    for n in (*steps, length):
        for name, (model, sampler) in models.items():
            if n == length and name != "teacher":  # at full length the teacher alone, as what there is to reach
                continue
            began = time.perf_counter()
            drawn_BL = model.samples(
                torch.arange(samples), seed=run.seed, length=length, steps=n, sampler=sampler, schedule=schedule
            ).cpu()
            speed = samples / (time.perf_counter() - began)
            numbers = judge.nll(drawn_BL.tolist()), row_entropy(drawn_BL), distinct(drawn_BL)
            prefix = "" if name == "student" else f"{name}_"
            metrics |= {f"{prefix}{key}_{n}": x for key, x in zip(("nll", "entropy", "distinct"), numbers)}
            rows.append([name, n, *numbers, speed])
            if n == max(steps):
                texts.append([model.tokenizer.decode(row, skip_special_tokens=True) for row in drawn_BL[:SHOWN]])
    run.record(
        "samples", "table", "Samples, read by an n-gram model of held-out text",
        columns=["samples of", "steps", "nll per token", "entropy of a row", "distinct 4-grams", "samples per second"],
        rows=rows, note=f"Training text itself: {metrics['data_nll']:.3f} nats per token.",
    )  # fmt: skip
    run.record(
        "texts", "texts", f"Samples in {max(steps)} steps", columns=list(models),
        rows=[dict(zip(models, row)) for row in zip(*texts)],
    )  # fmt: skip
    for n in steps:
        metrics[f"nll_gain_{n}"] = metrics[f"teacher_nll_{n}"] - metrics[f"nll_{n}"]
        metrics[f"entropy_drop_{n}"] = 1 - metrics[f"entropy_{n}"] / metrics[f"teacher_entropy_{n}"]
    return metrics

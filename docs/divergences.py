"""Draws the pictures of docs/divergences.md and writes the page: `python docs/divergences.py`."""

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("svg")
import matplotlib.pyplot as plt

from potstill.divergences import (
    Adaptive,
    Alpha,
    FDivergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    TotalVariation,
)

HERE = Path(__file__).parent
GRID = torch.linspace(-8, 8, 801, dtype=torch.float64)
MEMBERS: list[tuple[FDivergence, str, str]] = [
    (ForwardKL(), "sum p log(p / q)", "covers every mode of the teacher; infinite where q = 0 < p"),
    (ReverseKL(), "sum q log(q / p)", "seeks one mode; infinite where p = 0 < q"),
    (
        JensenShannon(0.5),
        "w KL(p, m) + (1 - w) KL(q, m), m = w p + (1 - w) q",
        "between both, bounded; w = teacher_share",
    ),
    (JensenShannon(0.1), "the same with teacher_share 0.1", "close to a scaled forward KL"),
    (SkewForwardKL(0.1), "KL(p, a p + (1 - a) q)", "the forward KL, bounded by log(1 / a)"),
    (SkewReverseKL(0.1), "KL(q, (1 - a) p + a q)", "the reverse KL, bounded by log(1 / a)"),
    (Alpha(0.3), "(sum p^a q^(1-a) - 1) / (a (a - 1))", "from reverse KL at 0 to forward KL at 1"),
    (TotalVariation(), "1/2 sum |p - q|", "what speculative decoding rejects; no curvature"),
    (SquaredHellinger(), "1 - sum sqrt(p q)", "symmetric and bounded"),
    (PearsonChi2(), "sum (p - q)^2 / q", "covers more fiercely than the forward KL"),
    (NeymanChi2(), "sum (p - q)^2 / p", "seeks more fiercely than the reverse KL"),
    (Jeffreys(), "KL(p, q) + KL(q, p)", "symmetric and unbounded"),
    (SoftenedReverseKL(), "sum (p + q) log((p + q) / (2 p))", "the reverse KL with a softened pull (f-distill)"),
    (Adaptive(), "head and tail weigh forward against reverse KL", "between both by where they differ; no generator"),
]


def normal(mean: float | Tensor, deviation: float | Tensor) -> Tensor:
    return (-((GRID - mean) ** 2) / (2 * torch.as_tensor(deviation) ** 2)).log_softmax(-1)


TEACHER = torch.logaddexp(normal(-3.0, 0.8) + math.log(0.65), normal(3.0, 0.8) + math.log(0.35)).log_softmax(-1)


def name_of(member: FDivergence) -> str:
    return "Adaptive" if isinstance(member, Adaptive) else repr(member).replace("()", "")


def best_normal(member: FDivergence) -> Tensor:
    """The normal distribution that is closest to the two-humped teacher: the better of several starts."""
    best, found = math.inf, TEACHER
    for start in (-3.0, 0.0, 3.0):
        place = torch.tensor([start, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([place], lr=0.05)
        for _ in range(600):
            student = normal(place[0], place[1].exp())
            value = member(teacher_logp=TEACHER, student_logp=student)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if value.item() < best:
            best, found = value.item(), normal(place[0].detach(), place[1].detach().exp())
    return found


def fits() -> None:
    columns = 4
    rows = -(-len(MEMBERS) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.1 * rows), sharex=True, sharey=True)
    for axis in axes.flat[len(MEMBERS) :]:
        axis.axis("off")
    for axis, (member, _, _) in zip(axes.flat, MEMBERS, strict=False):
        axis.fill_between(GRID[::5], TEACHER.exp()[::5], color="#d9d9d9", label="teacher p")
        axis.plot(GRID[::5], best_normal(member).exp()[::5], color="#0b5cad", label="closest normal q")
        axis.set_title(name_of(member), fontsize=9)
        axis.set_yticks([])
    axes.flat[0].legend(fontsize=7, frameon=False)
    save(figure, "fits")


def curves(file: str, title: str, value: object, limit: float) -> None:
    u = torch.linspace(-4, 4, 401, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    shown = [m for m, _, _ in MEMBERS if not isinstance(m, Adaptive)]
    for axis, group in zip(axes, (shown[:4], shown[4:8], shown[8:]), strict=True):
        for member in group:
            axis.plot(u, value(member, u), label=name_of(member))  # type: ignore[operator]
        axis.axvline(0, color="#cccccc", linewidth=0.8)
        axis.axhline(0, color="#cccccc", linewidth=0.8)
        axis.set_xlabel("log r = log p - log q")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel(title)
    axes[0].set_ylim(-limit, limit) if file == "gradients" else axes[0].set_ylim(0, limit)
    save(figure, file)


def save(figure: plt.Figure, name: str) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "potstill"  # the same picture gives the same file
    figure.savefig(HERE / "images" / f"divergences-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def page() -> str:
    table = "\n".join(f"| `{name_of(member)}` | {formula} | {what} |" for member, formula, what in MEMBERS)
    return f"""# Divergences

p is the teacher, q the student, r = p / q. Every member is D = sum q f(r), in nats, one value a position. The page is
made by `python docs/divergences.py`.

| member | value | what it does |
|---|---|---|
{table}

## What each one wants

The teacher has two humps, the student is a normal distribution: what is closest depends on the divergence. Those that
weigh by p cover both humps, those that weigh by q choose one.

![The closest normal distribution under each divergence](images/divergences-fits.svg)

## The pull on a student's log-probability

The derivative of D in log q of an outcome, divided by its q: f(r) - r f'(r), less its value at r = 1, which the softmax
takes off. Left of 0 the student says it too often and
is pushed down, right of 0 too seldom and is pulled up; where the curve is flat, nothing more is learned.

![Gradients against the log-ratio](images/divergences-gradients.svg)

## The weight of the score difference in one-step diffusion

r^2 f''(r), by which f-distill multiplies the difference of the scores. It is derived from f, as is all else; the total
variation has none, since its generator has no curvature.

![Score weights against the log-ratio](images/divergences-score-weight.svg)

## One of your own

```python
from dataclasses import dataclass
from potstill.divergences import FDivergence

@dataclass(frozen=True)
class Triangular(FDivergence):
    def f(self, log_ratio):  # (r - 1)^2 / (r + 1)
        return log_ratio.expm1() ** 2 / (log_ratio.exp() + 1)
```

It has a value with gradients, a score weight, estimates from samples, supports, and `linear_divergence`, which computes
it from hidden states and output heads without ever holding the logits of all positions.

## How fast

`python benchmarks/divergences.py` (with `pip install -e '.[bench]'`) measures it beside TRL, Liger and the bare matrix
products; the last figures are in [benchmarks](../benchmarks/README.md).
"""


def main() -> None:
    (HERE / "images").mkdir(exist_ok=True)
    fits()

    def pull(member: FDivergence, u: Tensor) -> Tensor:
        """f(r) - r f'(r), less its value at r = 1, which the softmax takes off."""
        both = torch.cat([u, torch.zeros(1, dtype=u.dtype)])
        raw = member.f(both) - torch.func.grad(lambda x: member.f(x).sum())(both)
        return raw[:-1] - raw[-1]

    curves("gradients", "dD / dlog q over q", pull, 4.0)
    curves("score-weight", "r^2 f''(r)", lambda member, u: member.score_weight(u), 4.0)
    (HERE / "divergences.md").write_text(page())


if __name__ == "__main__":
    main()

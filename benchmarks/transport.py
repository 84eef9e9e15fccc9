"""Sinkhorn between two batches of rows, forward and gradient, beside POT and geomloss at equal marginal error.

    pip install -e '.[bench]'
    python benchmarks/transport.py

The problem is SinKD's: batches of 8 to 64 rows of probabilities, L1 distances, epsilon 0.1. Each solver goes on until the
marginals of its plan are off by at most 1e-4 of the mass (L1), found by the loosest of its own settings that gets
there; the time is that of the cost, the plan and the gradient of <P, C> in the student's logits, the median of many calls
that take turns. Results go to benchmarks/results/transport.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divergences import machine
from potstill.divergences.transport import Sinkhorn, pairwise_cost

RESULTS = Path(__file__).parent / "results" / "transport.json"
EPSILON, ERROR, SECONDS = 0.1, 1e-4, 3.0
Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # student and teacher rows -> plan of mass 1, and <P, C>


def ours(gradient: str) -> Callable[[float], Solver]:
    def made(tolerance: float) -> Solver:
        part = Sinkhorn(EPSILON, 20, tolerance, 100_000, gradient=gradient, marginals="uniform")  # type: ignore[arg-type]

        def solve(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
            found = part.solve(pairwise_cost(student=student, teacher=teacher))
            return found.plan, found.value.sum()

        return solve

    return made


def pot(tolerance: float) -> Solver:
    import ot

    def solve(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        cost = torch.cdist(student, teacher, p=1)
        a = cost.new_full((len(cost),), 1 / len(cost))
        how = {"method": "sinkhorn_log", "numItermax": 100_000, "stopThr": tolerance, "warn": False}
        plan = ot.sinkhorn(a, a, cost, EPSILON, **how)
        return plan, (plan * cost).sum()

    return solve


def geomloss(scaling: float) -> Solver:
    from geomloss import SamplesLoss

    def cost_of(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, p=1)

    how = {"p": 1, "blur": EPSILON, "cost": cost_of, "debias": False, "backend": "tensorized", "scaling": scaling}
    value = SamplesLoss("sinkhorn", **how)
    potentials = SamplesLoss("sinkhorn", potentials=True, **how)

    def solve(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.requires_grad:  # its value is the dual's, whose gradient is the plan
            return student, value(student, teacher)
        f, g = (x.flatten() for x in potentials(student, teacher))
        plan = ((f[:, None] + g[None] - cost_of(student, teacher)) / EPSILON).exp() / len(student) ** 2
        return plan, (plan * cost_of(student, teacher)).sum()

    return solve


SOLVERS: dict[str, tuple[Callable[[float], Solver], list[float]]] = {
    "potstill, implicit gradient": (ours("implicit"), [ERROR]),
    "potstill, unrolled": (ours("unrolled"), [ERROR]),
    "POT, sinkhorn_log": (pot, [10.0**-k for k in range(2, 10)]),
    "geomloss, tensorized": (geomloss, [0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999]),
}


def rows(batch: int, classes: int, seed: int) -> Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * 2


def error_of(plan: Tensor) -> float:
    even = 1 / len(plan)
    return float((plan.sum(0) - even).abs().sum() + (plan.sum(1) - even).abs().sum())


def setting(
    made: Callable[[float], Solver], settings: list[float], student: Tensor, teacher: Tensor
) -> tuple[float, float]:
    """The loosest setting that reaches the error, or the best there is, and the error."""
    tried = []
    for value in settings:
        with torch.no_grad():
            tried.append((value, error_of(made(value)(student.softmax(-1), teacher.softmax(-1))[0])))
        if tried[-1][1] <= ERROR * 1.05:
            return tried[-1]
    return min(tried, key=lambda pair: pair[1])


def compared(batch: int, classes: int) -> list[dict[str, Any]]:
    student, teacher = rows(batch, classes, 0), rows(batch, classes, 1)
    results, calls = [], {}
    for name, (made, settings) in SOLVERS.items():
        chosen, error = setting(made, settings, student, teacher)
        solver = made(chosen)

        def call(solver: Solver = solver) -> None:
            logits = student.clone().requires_grad_()
            solver(logits.softmax(-1), teacher.softmax(-1))[1].backward()

        call()
        calls[name] = call
        results.append({"batch": batch, "classes": classes, "solver": name, "setting": chosen, "error": error})
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    ours_ms = statistics.median(times["potstill, implicit gradient"]) * 1e3
    for result in results:
        result["ms"] = statistics.median(times[result["solver"]]) * 1e3
        result["against_ours"] = result["ms"] / ours_ms
    return results


def main() -> None:
    torch.set_num_threads(1)  # the problems are small: more threads only wait for each other
    found: list[dict[str, Any]] = []
    print("| rows | classes | solver | ms | against ours | marginal error |\n|---|---|---|---|---|---|")
    for batch, classes in ((8, 3), (16, 3), (32, 3), (64, 3), (16, 1000), (32, 1000), (64, 1000)):
        for r in compared(batch, classes):
            found.append(r)
            cells = (
                r["batch"],
                r["classes"],
                r["solver"],
                f"{r['ms']:.2f}",
                f"{r['against_ours']:.2f}",
                f"{r['error']:.1e}",
            )
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(1), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

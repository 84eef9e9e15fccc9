"""Claims: what a paper says, as recipes that are run with paired seeds. The verdict is what came out."""

import json
import math
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from scipy import stats

from potstill import recipe as recipes
from potstill.catalogue import HERE, find
from potstill.contracts.errors import RecipeError, RunError
from potstill.contracts.files import read_json, write_json
from potstill.contracts.spec import Spec
from potstill.run import Run, open_folder

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


class Comparison(Spec):
    """One sentence of a claim: on `metric`, arm `better` beats arm `worse`, by more than `margin`.

    `reference` instead of `worse` compares with a fixed number. Without seeds that vary (a deterministic method) one
    seed decides.
    """

    metric: str
    better: str
    worse: str | None = None
    reference: float | None = None
    higher_is_better: bool = True
    margin: float = 0.0
    kind: Literal["superior", "not worse"] = "superior"  # not worse: within the margin counts

    @model_validator(mode="after")
    def _one_opponent(self) -> "Comparison":
        if (self.worse is None) == (self.reference is None):
            raise ValueError("needs exactly one of worse and reference")
        return self


class Claim(Spec):
    """A claim file."""

    method: str
    source: str  # where the paper says it
    statement: str
    recipe: str
    arms: dict[str, dict[str, Any]]  # overrides of the recipe, by arm
    seeds: list[int] = Field(min_length=1)
    comparisons: list[Comparison] = Field(min_length=1)
    note: str = ""


def load_claim(name: str) -> Claim:
    system = find(name)
    path = HERE / "claims" / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"{name} ({system.title}) has no claim to verify yet.")
    try:
        claim = Claim.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise RecipeError(f"{path.name}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}.") from None
    for comparison in claim.comparisons:
        for arm in filter(None, (comparison.better, comparison.worse)):
            if arm not in claim.arms:
                raise RecipeError(f"{path.name} compares arm {arm}, which it does not define.")
    return claim


def judge(better: Sequence[float], worse: Sequence[float], comparison: Comparison) -> dict[str, Any]:
    """Paired difference (positive when the claim's direction holds), its 95 % t interval, and the verdict.

    superior: reproduced when the whole interval lies above the margin, not reproduced when it lies below it.
    not worse: reproduced when the interval lies above -margin.
    """
    sign = 1.0 if comparison.higher_is_better else -1.0
    differences = [sign * (b - w) for b, w in zip(better, worse)]
    n = len(differences)
    mean = math.fsum(differences) / n
    bar = comparison.margin if comparison.kind == "superior" else -comparison.margin
    if n > 1:
        spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
        half = float(stats.t.ppf(0.975, n - 1)) * spread
        low, high = mean - half, mean + half
    else:
        low = high = mean
    verdict: Verdict = "reproduced" if low > bar else "not reproduced" if high <= bar else "inconclusive"
    if not all(map(math.isfinite, differences)):
        verdict = "inconclusive"
    return {"difference": mean, "low": low, "high": high, "pairs": n, "verdict": verdict, "differences": differences}


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """All reproduced, or any refuted, or undecided."""
    if all(v == "reproduced" for v in verdicts):
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts else "inconclusive"


def run_arm(claim: Claim, arm: str, seed: int, folder: Path) -> dict[str, float]:
    """One arm with one seed; a finished one is read back, an interrupted one goes on."""
    raw = recipes.apply(recipes.read(claim.recipe), claim.arms[arm] | {"train.seed": seed})
    raw.pop("output", None)
    plan = recipes.resolve(raw, f"claim {claim.method}, arm {arm}")
    text = recipes.write(plan)
    if (folder / "recipe.yaml").is_file() and (folder / "recipe.yaml").read_text() != text:
        raise RunError(f"{folder} was made from another recipe. Give verify another folder with --output.")
    if not (folder / "recipe.yaml").is_file():
        open_folder(folder, text)
    if not (folder / "result.json").is_file():
        Run(plan, folder).execute()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # arms are many; their numbers are what is kept
    return read_json(folder / "result.json")["metrics"]


def verify_claim(name: str, seeds: int | None = None, output: Path | None = None) -> Path:
    """Run a claim and write its verdict to claims/NAME.result.json. Resumable: finished arms are not run again."""
    claim, console = load_claim(name), Console()
    base = output or Path("runs") / "verify" / name
    chosen = claim.seeds[:seeds]
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in claim.arms}
    console.print(f"[bold]{find(name).title}[/bold]\n{claim.statement}")
    for seed in chosen:
        for arm in claim.arms:
            metrics = run_arm(claim, arm, seed, base / f"{arm}-{seed}")
            measured[arm].append(metrics)
            wanted = {c.metric for c in claim.comparisons if arm in (c.better, c.worse)}
            console.print(f"  {arm}, seed {seed}: " + ", ".join(f"{m} {metrics[m]:.4g}" for m in sorted(wanted)))
    rows = []
    for comparison in claim.comparisons:
        better = [m[comparison.metric] for m in measured[comparison.better]]
        worse = (
            [m[comparison.metric] for m in measured[comparison.worse]]
            if comparison.worse
            else [comparison.reference or 0.0] * len(better)
        )
        row = judge(better, worse, comparison)
        rows.append({**comparison.model_dump(), **row, "values": {"better": better, "worse": worse}})
        console.print(
            f"{comparison.better} over {comparison.worse or comparison.reference} on {comparison.metric}: "
            f"{row['difference']:+.4g} [{row['low']:+.4g}, {row['high']:+.4g}], {row['pairs']} pairs: "
            f"[bold]{row['verdict']}[/bold]"
        )
    verdict = overall([row["verdict"] for row in rows])
    path = HERE / "claims" / f"{name}.result.json"
    result = {
        "verdict": verdict, "comparisons": rows, "seeds": chosen, "statement": claim.statement, "source": claim.source,
        "note": claim.note, "versions": {p: version(p) for p in ("potstill", "torch", "transformers")},
    }  # fmt: skip
    try:
        write_json(path, result)
    except RunError:
        path = base / "result.json"
        write_json(path, result)
    console.print(f"Verdict: [bold]{verdict}[/bold]. Recorded in {path}")
    return path


def recorded(name: str) -> dict[str, Any] | None:
    """What verifying a claim came to, if it was run."""
    path = HERE / "claims" / f"{name}.result.json"
    return json.loads(path.read_text()) if path.is_file() else None

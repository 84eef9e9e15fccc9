"""From a run folder to `report.html`. Whatever is there is shown; an unfinished run's report says how far it came."""

import ast
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from potstill.catalogue import HERE, System, systems
from potstill.contracts.errors import RunError
from potstill.contracts.files import read_json, write_text
from potstill.report import numbers
from potstill.report.charts import SMOOTH_FROM, Series, line_chart, wide_range
from potstill.report.records import record_view
from potstill.training.tracking import read_journal

SOURCES = ("task", "text", "jsonl", "imagefolder", "hf")  # the key of `data` that names its source
OWNERS = ("teacher", "before", "control")  # `before_accuracy` is to be read beside `accuracy`, the student's
FOLDED = ("lr", "gradient_norm")  # how the optimizer fares, not how good the student is


def build_report(folder: Path) -> Path:
    """Write FOLDER/report.html, one file with everything in it, and return its path. A folder of no run is a RunError."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder} holds no recipe.yaml, so it is no run folder and there is nothing to report.")
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"shown": numbers.shown, "signed": numbers.signed, "bytes": numbers.size, "words": words}
    pages.trim_blocks = pages.lstrip_blocks = True
    write_text(folder / "report.html", pages.get_template("template.html").render(collect(folder)))
    return folder / "report.html"


def collect(folder: Path) -> dict[str, Any]:
    """What the template shows, from the run folder (title, arXiv id and claim: from the catalogue)."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    name = recipe["method"]["name"] if isinstance(recipe["method"], dict) else str(recipe["method"])
    system = systems().get(name)
    result = _json(folder / "result.json")
    metrics, timing = read_journal(folder / "metrics.jsonl"), read_journal(folder / "timing.jsonl")
    clocks = timing_view(timing)
    records = [record_view(path, folder) for path in sorted((folder / "records").glob("*.json"))]
    return {
        "folder": str(folder),
        "name": name,
        "title": system.title if system else name,
        "system": system,
        "finished": result is not None,
        "progress": None if result else _progress(metrics, clocks, recipe),
        "facts": facts(recipe, clocks, _json(folder / "environment.json")),
        "metrics": metric_view((result or {}).get("metrics", {})),
        "claim": claim_view(system),
        "records": sorted(records, key=lambda r: r["type"] != "table"),  # stable: file names order the rest
        "stages": [stage_view(stage, rows) for stage, rows in _by_stage(metrics).items()],
        "timing": clocks,
        "environment": environment_view(_json(folder / "environment.json") or {}),
        "files": files_view(folder, result or {}),
        "recipe": (folder / "recipe.yaml").read_text(),
        "about": _about(system),
    }


def facts(
    recipe: Mapping[str, Any], clocks: Sequence[Mapping[str, Any]], environment: Mapping[str, Any] | None
) -> dict[str, str]:
    """The run in one line: roles, data, seed, device, time."""
    sections = ("method", "data", "train", "eval", "output")
    found = {words(role): _model_name(spec) for role, spec in recipe.items() if role not in sections}
    if data := recipe.get("data"):
        found["data"] = _data_name(data)
    train = recipe.get("train") or {}
    found |= {key: numbers.shown(train[key]) for key in ("steps", "batch", "seed") if train.get(key) is not None}
    if environment:
        found["device"] = str(environment.get("device", numbers.NONE))
    if clocks:
        found["training time"] = numbers.duration(sum(clock["seconds"] for clock in clocks))
    return found


def metric_view(metrics: Mapping[str, float]) -> dict[str, Any]:
    """What was measured of several models becomes a table, a row a model; the rest are figures of their own.

    `model/metric` is so named; `teacher_accuracy` is the teacher's where there is a plain `accuracy`, the student's.
    """
    placed: dict[str, tuple[str, str]] = {}
    for key in metrics:
        owner, slash, metric = key.partition("/")
        prefix, _, rest = key.partition("_")
        if slash:
            placed[key] = owner, metric
        elif prefix in OWNERS and rest in metrics:
            placed |= {key: (prefix, rest), rest: ("student", rest)}
    count = Counter(metric for _, metric in placed.values())
    if max(count.values(), default=0) < 2:
        return {"single": metrics, "table": None}
    owners = sorted({owner for owner, _ in placed.values()}, key=lambda owner: (owner != "teacher", owner))
    columns = sorted(count, key=lambda metric: -count[metric])
    values = {place: metrics[key] for key, place in placed.items()}
    cells = [numbers.column([values.get((owner, metric)) for owner in owners]) for metric in columns]
    rows = [[words(owner), *row] for owner, row in zip(owners, zip(*cells))]
    single = {key: value for key, value in metrics.items() if key not in placed}
    return {"single": single, "table": {"columns": [words(m) for m in columns], "rows": rows}}


def claim_view(system: System | None) -> dict[str, Any] | None:
    """The claim of the run's method and what verifying it came to."""
    if system is None or not system.has_claim:
        return None
    from potstill.verify import load_claim, recorded

    claim, outcome = load_claim(system.name), recorded(system.name)
    return {"statement": claim.statement, "source": claim.source, "outcome": outcome}


def stage_view(stage: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A stage's curves, by player, losses first; learning rates and gradient norms apart."""
    keys = dict.fromkeys(
        k for row in rows for k, v in row.items() if k not in ("stage", "step") and numbers.is_number(v)
    )
    players: dict[str, list[dict[str, Any]]] = {}
    folded: list[dict[str, Any]] = []
    for key in sorted(keys, key=lambda k: not k.endswith("/loss")):
        player, _, metric = key.rpartition("/")
        twins = (k for k in keys if k != key and k.startswith(f"{player}/"))
        if metric == "loss" and any(all(row.get(key) == row.get(twin) for row in rows) for twin in twins):
            continue  # one term alone: its own curve says the same under a better name
        kept = [row for row in rows if numbers.is_number(row.get(key))]
        x, y = [row["step"] for row in kept], [row[key] for row in kept]
        svg, remark = line_chart([Series(key, x, y)], log_y=metric in FOLDED and wide_range(y), smooth=metric != "lr")
        last = next((v for v in reversed(y) if math.isfinite(v)), y[-1])
        chart = {"title": words(metric), "key": key, "svg": Markup(svg), "remark": remark, "last": last}
        if metric in FOLDED:
            folded.append({**chart, "title": f"{words(player)}: {words(metric)}"})
        else:
            players.setdefault(player, []).append(chart)
    return {
        "name": stage,
        "steps": rows[-1]["step"],
        "players": players,
        "folded": folded,
        "smooth": len(rows) >= SMOOTH_FROM,
    }


def timing_view(timing: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Speed of each stage, over the steps that were clocked (a resumed run clocks repeated steps again)."""
    views = []
    for stage, rows in _by_stage(timing).items():
        seconds = [row["seconds"] for row in rows]
        typical = median(seconds)
        views.append(
            {
                "stage": stage,
                "steps": len({row["step"] for row in rows}),
                "seconds": sum(seconds),
                "total": numbers.duration(sum(seconds)),
                "rate": 1 / typical if typical > 0 else math.inf,
                "samples": rows[-1]["samples"] / typical if typical > 0 else math.inf,
                "slowest": max(seconds),
                "repeated": len(rows) - len({row["step"] for row in rows}),
            }
        )
    return views


def environment_view(environment: Mapping[str, Any]) -> dict[str, str]:
    flat = {k: str(v) for k, v in environment.items() if not isinstance(v, Mapping)}
    for values in environment.values():
        if isinstance(values, Mapping):
            flat |= {str(k): str(v) for k, v in values.items()}
    return flat


def files_view(folder: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The student, what else the method made, and the rest of the folder, with sizes; the student file by file."""
    what = {"student": "the finished student"}
    what |= {path: words(name) for name, path in result.get("artefacts", {}).items()}
    what |= {
        "checkpoints": "to resume from",
        "stages": "what finished stages left",
        "metrics.jsonl": "every logged step",
    }
    views = []
    for path, purpose in what.items():
        place = folder / path
        files = [f for f in place.rglob("*") if f.is_file()] if place.is_dir() else [place] if place.is_file() else []
        if files:
            inside = sorted(((f.stat().st_size, str(f.relative_to(place))) for f in files), reverse=True)
            total = sum(count for count, _ in inside)
            views.append({"path": path, "what": purpose, "size": total, "inside": inside if path == "student" else []})
    return views


def words(key: str) -> str:
    """A key as a person would write it: `eval/reverse_kl` is eval / reverse KL."""
    known = {"lr": "learning rate"} | {short: short.upper() for short in ("kl", "nll", "auc", "ece", "mmd", "fid")}
    return " / ".join(" ".join(known.get(word, word) for word in part.split("_")) for part in str(key).split("/"))


def _about(system: System | None) -> str | None:
    """The method's docstring, read without importing it."""
    if system is None or not system.built:
        return None
    return ast.get_docstring(ast.parse((HERE / "methods" / system.family / f"{system.name}.py").read_text()))


def _by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _progress(
    metrics: Sequence[Mapping[str, Any]], clocks: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]
) -> str:
    if not metrics:
        return "no step logged yet"
    steps = (recipe.get("train") or {}).get("steps")
    last = metrics[-1]
    of = f" of {numbers.shown(steps)}" if steps and last["step"] <= steps else ""
    return f"stage {last['stage']}, step {numbers.shown(last['step'])}{of}"


def _data_name(data: Any) -> str:
    """`task: english` is english, `jsonl: notes.jsonl` is jsonl:notes.jsonl."""
    if isinstance(data, str):
        return data
    named = next((key for key in SOURCES if data.get(key)), None)
    return numbers.NONE if named is None else str(data[named]) if named == "task" else f"{named}:{data[named]}"


def _model_name(spec: Any) -> str:
    if isinstance(spec, list):
        return ", ".join(_model_name(s) for s in spec)
    if not isinstance(spec, Mapping):
        return str(spec)
    if "from" in spec:
        return f"cut from {spec['from']}" + (f", layers {spec['layers']}" if spec.get("layers") else "")
    return str(spec.get("name"))


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None

"""A run folder as a method leaves it, with every type of record, hostile text and numbers that are none."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image

HOSTILE = "<script>alert('&')</script>"
RECIPE = {
    "method": {"name": "vopd", "baseline": "exact", "divergence": {"name": "JensenShannon", "teacher_share": 0.1}},
    "student": {"from": "teacher", "layers": 2},
    "teacher": {"name": "llama-small"},
    "data": {"task": "tiny_stories", "length": 128},
    "train": {"steps": 400, "batch": 32, "lr": 1.0e-3, "seed": 7},
    "eval": {"batch": 250},
}
SENTENCE = [
    "The",
    " pot",
    " still",
    " is",
    " older",
    " than",
    " the",
    " column",
    ",",
    " and",
    " slower",
    ".",
    "\n",
    "Why",
    "?",
]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_journals(folder: Path, steps: int, batch: int = 32) -> None:
    random = np.random.default_rng(0)
    metrics, timing, at = [], [], 1.7e9
    for stage, total in (("warm_up", 40), ("distil", steps)):
        for step in range(1, total + 1):
            kl = 2.4 * math.exp(-step / 90) + 0.31 + 0.12 * random.normal()
            row = {"stage": stage, "step": step}
            if stage == "warm_up":
                row |= {"student/loss": kl + 1, "student/cross_entropy": kl + 1}
            else:
                row |= {
                    "student/loss": kl + 0.5,
                    "student/divergence": kl,
                    "student/cross_entropy": 0.5 + 0.02 * random.normal(),
                }
                row |= {"student/reverse_kl": kl * 1.1, "student/student_entropy": 2 + 0.1 * random.normal()}
                row |= {"critic/loss": 3.0 / step, "critic/lr": 1e-4, "critic/gradient_norm": 1.0 + random.random()}
                row["student/accepted"] = math.nan if step == 12 else 0.4 + 0.4 * step / total
                if step % 50 == 0:
                    row["eval/perplexity"] = 30 * math.exp(-step / 150) + 8
            row |= {"student/gradient_norm": 2 * random.random(), "student/lr": 1e-3 * min(1, step / 20)}
            metrics.append(row)
            seconds = 0.08 + 0.01 * random.random()
            at += seconds
            timing.append(
                {"stage": stage, "step": step, "seconds": round(seconds, 4), "samples": batch, "at": round(at, 1)}
            )
    timing[60:60] = timing[50:60]  # the run was interrupted and repeated ten steps
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))


def write_records(folder: Path) -> None:
    random = np.random.default_rng(1)
    records = folder / "records"
    x = np.linspace(0, 1, 64)
    write(
        records / "10_texts.json",
        {
            "type": "texts",
            "title": "The same prompts under three models",
            "columns": ["teacher", "student before", "student after"],
            "rows": [
                {
                    "prompt": "Once upon a time there was a small copper pot",
                    "teacher": "that lived on a shelf above the stove, and waited for the cook to light the fire.",
                    "student before": "that that the the shelf of of a stove and",
                    "student after": "that lived on a shelf. Every morning it waited for the fire.",
                },
                {
                    "prompt": HOSTILE,
                    "teacher": "Text with <b>tags</b> & entities.",
                    "student before": "",
                    "student after": "line one\nline two",
                },
            ],
        },
    )
    values = [abs(float(v)) for v in random.gamma(0.7, 0.5, len(SENTENCE))]
    write(
        records / "20_where_they_differ.json",
        {
            "type": "token_values",
            "title": "Reverse KL at every token of the student's rollouts",
            "unit": "nats",
            "note": "Hover over a token for its value.",
            "sentences": [
                {"label": "before", "tokens": SENTENCE, "values": [2.2 * v for v in values]},
                {"label": "after", "tokens": [*SENTENCE, HOSTILE], "values": [0.5 * v for v in values] + [math.nan]},
                {"tokens": ["one", " outlier", " at", " infinity"], "values": [0.1, 0.2, 40.0, math.inf]},
            ],
        },
    )
    write(
        records / "25_advantages.json",
        {
            "type": "token_values",
            "title": "Advantage of every token",
            "unit": "nats",
            "sentences": [{"tokens": SENTENCE, "values": [v - 0.4 for v in values]}],
        },
    )
    write(
        records / "30_ablation.json",
        {
            "type": "table",
            "title": "Student against its baselines",
            "columns": ["arm", "accuracy", "perplexity", "parameters", "interval"],
            "rows": [
                ["teacher", 0.9312, 8.113, 1843200, "–"],
                ["plain KL", 0.8709, 11.902, 460800, "0.861 to 0.880"],
                ["vopd", 0.9021, 10.4, 460800, "0.894 to 0.911"],
                ["diverged", math.nan, math.inf, 460800, None],
            ],
            "note": "Three seeds each.",
        },
    )
    write(
        records / "40_curves.json",
        {
            "type": "curves",
            "title": "Acceptance by draft length",
            "x_label": "draft length",
            "y_label": "accepted share ($ is no formula)",
            "series": [
                {"label": "teacher", "x": list(range(1, 9)), "y": [1.0] * 8},
                {"label": "before", "x": list(range(1, 9)), "y": [0.8**k for k in range(1, 9)]},
                {"label": "after", "x": list(range(1, 9)), "y": [0.93**k for k in range(1, 8)] + [None]},
            ],
        },
    )
    write(
        records / "45_spectrum.json",
        {
            "type": "curves",
            "title": "Spectrum",
            "x_label": "rank",
            "y_label": "singular value",
            "log_x": True,
            "log_y": True,
            "series": [{"label": "student", "x": list(range(1, 200)), "y": [k**-1.5 for k in range(1, 199)] + [0.0]}],
        },
    )
    write(
        records / "50_images.json",
        {
            "type": "images",
            "title": "Samples with one step",
            "files": [
                {"path": "records/a.png", "caption": "teacher, 40 steps"},
                {"path": "records/b.png", "caption": "student, 1 step"},
                {"path": "../outside.png", "caption": "elsewhere"},
            ],
        },
    )
    write(
        records / "60_text.json",
        {"type": "text", "title": "What stopped the run", "body": "The plateau rule fired at step 380.\nNothing else."},
    )
    write(records / "70_new.json", {"type": "hologram", "title": "A type of the future", "depth": [1, 2, HOSTILE]})
    write(records / "80_broken.json", {"type": "table", "title": "A table without rows", "columns": ["a"]})
    for name, phase in (("a", 0.0), ("b", 0.6)):
        grid = np.sin(9 * x[:, None] + phase) * np.cos(7 * x[None] + phase)
        image.imsave(records / f"{name}.png", grid, cmap="viridis")


def make_run(folder: Path, *, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    packages = {"potstill": "0.1.0", "torch": "2.9.0", "transformers": "5.2.0", "accelerate": "1.12.0"}
    write(folder / "environment.json", {"python": "3.12.4", "machine": "x86_64", "device": "cpu", "packages": packages})
    write_journals(folder, 400 if finished else 130)
    if not finished:
        return folder
    write_records(folder)
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(bytes(1_843_200))
    (folder / "student" / "config.json").write_text("{}")
    (folder / "student" / "tokenizer").mkdir()
    (folder / "student" / "tokenizer" / "tokenizer.json").write_text("{}" * 4000)
    (folder / "rollouts.jsonl").write_text("{}\n" * 100)
    metrics = {
        "speed_up": 3.2,
        "parameters": 460800.0,
        "teacher/accuracy": 0.9312,
        "teacher/perplexity": 8.113,
        "student/accuracy": 0.9021,
        "student/perplexity": 10.4,
        "student/diverged": math.nan,
    }
    write(
        folder / "result.json",
        {"metrics": metrics, "artefacts": {"last_rollouts": "rollouts.jsonl"}, "student_kind": "causal_lm"},
    )
    return folder


@pytest.fixture
def finished_run(tmp_path):
    return make_run(tmp_path / "finished")


@pytest.fixture
def unfinished_run(tmp_path):
    return make_run(tmp_path / "unfinished", finished=False)


CLAIM = {
    "method": "gkd",
    "source": "section 4",
    "statement": "Sampling from the student beats the data's text.",
    "recipe": "gkd",
    "arms": {"own": {"method.on_policy": 1.0}, "given": {"method.on_policy": 0.0}},
    "seeds": [0, 1, 2],
    "comparisons": [{"metric": "reverse_kl", "better": "own", "worse": "given", "higher_is_better": False}],
}


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """A claim of gkd's in the place of the packaged ones; returns a function that records an outcome for it."""
    from potstill import catalogue, verify

    catalogue.systems()
    here = tmp_path / "package"
    (here / "claims").mkdir(parents=True)
    for part in ("methods", "recipes"):
        (here / part).symlink_to(catalogue.HERE / part)
    (here / "claims" / "gkd.yaml").write_text(yaml.safe_dump(CLAIM))
    monkeypatch.setattr(catalogue, "HERE", here)
    monkeypatch.setattr(verify, "HERE", here)

    def record(differences):
        row = verify.judge(differences, [0.0] * len(differences), verify.Comparison(**CLAIM["comparisons"][0]))
        comparisons = [{**CLAIM["comparisons"][0], "reference": None, **row}]
        write(
            here / "claims" / "gkd.result.json",
            {"verdict": row["verdict"], "comparisons": comparisons, "seeds": [0, 1, 2]},
        )

    return record

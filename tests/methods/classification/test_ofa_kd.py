"""OFA-KD: what the exits and the head learn, which stages get one, and that the exported student has none."""

import json

import pytest
import torch
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.errors import RecipeError
from potstill.methods.classification.ofa_kd import OFA, powers
from potstill.models.images import ImageClassifier
from potstill.objectives.logits import SoftTarget
from potstill.objectives.targets import Powered
from potstill.run import Run, open_folder

QUICK = {
    "method": {"name": "ofa_kd", "rows": 60},
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 3}},
    "teacher": {"name": "convnet", "options": {"width": 4}},
    "train": {"steps": 3, "batch": 16, "trackers": [], "device": "cpu"},
}


pytestmark = pytest.mark.usefixtures("cache")


def run_of(tmp_path, **changes):
    plan = recipes.resolve(recipes.apply(QUICK, changes))
    open_folder(tmp_path / "run", recipes.write(plan))
    return Run(plan, tmp_path / "run")


def trained(run, monkeypatch):
    seen, fit = [], run.fit
    monkeypatch.setattr(run, "fit", lambda objective, *a, **k: (seen.append(objective), fit(objective, *a, **k)))
    return run.execute().metrics, seen[0]


def test_one_gamma_serves_all_or_each_has_its_own():
    assert powers(1.3, 2) == [1.3, 1.3, 1.3]
    assert powers([1.1, 1.2, 1.4], 2) == [1.1, 1.2, 1.4]
    with pytest.raises(RecipeError, match="method.gamma has 2 values; 2 exits and the head need 3, or one"):
        powers([1.0, 1.0], 2)
    assert OFA(temperature=2, form="paper").loss(1.5) == SoftTarget(Powered(1.5, 2.0, "paper"), 2.0)


@pytest.mark.needs("sklearn")
def test_a_run_trains_the_exits_and_exports_none(tmp_path, monkeypatch):
    run = run_of(tmp_path, **{"method.gamma": [1.1, 1.2, 1.4], "method.stages": [1, 3], "method.exits": 0.5,
                              "method.similarity": True, "train.steps": 20, "train.lr": 0.01})  # fmt: skip
    metrics, objective = trained(run, monkeypatch)
    (exits,) = objective.features
    assert [s.index for s in exits.student_stages] == [1, 3] and exits.coefficient == 0.5
    assert [loss.target.gamma for loss in exits.losses] == [1.1, 1.2]
    assert objective.logit_loss == SoftTarget(Powered(1.4))
    assert (objective.cross_entropy, objective.distillation) == (1.0, 1.0)
    assert "student/exits" in (run.folder / "metrics.jsonl").read_text()
    saved = ImageClassifier.from_pretrained(run.folder / "student")
    x = run.source.test.batch(torch.arange(8)).images
    assert_close(saved(x), run.student()(x))
    assert sum(p.numel() for p in saved.parameters()) == metrics["parameters"]
    table = json.loads((run.folder / "records" / "2-similarity.json").read_text())
    assert len(table["rows"]) == 3 and len(table["columns"]) == 4


@pytest.mark.needs("sklearn")
def test_exits_start_from_the_runs_seed_and_leave_the_student_alone(tmp_path, monkeypatch):
    """Without weight on them the student is trained as if there were none, bit for bit."""
    first, one = trained(run_of(tmp_path / "a", **{"method.exits": 1e-30}), monkeypatch)
    _, again = trained(run_of(tmp_path / "b", **{"method.exits": 1e-30}), monkeypatch)
    none, bare = trained(run_of(tmp_path / "c", **{"method.exits": 0}), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert not bare.features and first["nll"] == pytest.approx(none["nll"], abs=1e-6)


@pytest.mark.needs("sklearn")
def test_a_vision_transformer_learns_from_a_convolution(tmp_path, monkeypatch):
    student = {"name": "vit-xs", "options": {"width": 8, "depth": 2, "heads": 2}}
    _, objective = trained(run_of(tmp_path, student=student), monkeypatch)
    (exits,) = objective.features
    assert [(s.kind, s.class_tokens) for s in exits.student_stages] == [("tokens", 1)] * 2


@pytest.mark.needs("sklearn")
def test_bad_options_are_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match=r"gamma must be positive"):
        run_of(tmp_path, **{"method.gamma": 0})
    with pytest.raises(RecipeError, match=r"method.stages must name some of the student's stages 1..3, got \[4\]"):
        run_of(tmp_path, **{"method.stages": [4]}).execute()

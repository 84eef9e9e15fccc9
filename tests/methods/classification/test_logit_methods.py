"""kd, dkd, dist and logit_std: which loss each one is, what Z-scores change, and the same files on real architectures."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    ConvNextConfig,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from potstill import recipe as recipes
from potstill.contracts.batch import ImageBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.files import read_json
from potstill.contracts.players import OptimizerSpec
from potstill.methods.classification.comparison import ScaleTeacher
from potstill.methods.classification.logit_std import LogitStd
from potstill.models.images import ImageClassifier, _build
from potstill.objectives.logits import DIST, DKD, KD, LogitDistillation, Standardize
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher
from potstill.training.trainer import Trainer

METHODS = ["kd", "dkd", "dist", "logit_std"]
QUICK = {
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "teacher": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "train": {"steps": 2, "batch": 16, "trackers": [], "device": "cpu"},
}


def logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Fixed(torch.nn.Module):
    """A classifier of a table: the logits of a batch are rows of a parameter, or of a constant."""

    kind, name = "image_classifier", "table"

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table.clone())

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long()]


def batch(size: int, classes: int) -> ImageBatch:
    rows = torch.arange(size)
    return ImageBatch(rows, rows[:, None, None, None].double(), rows % classes)


def gradient(student_table, teacher_table, loss, transforms, **coefficients):
    """The gradient of the whole loss in the student's logits, one row a sample (times B: terms are means)."""
    student, teacher = Fixed(student_table), LocalTeacher(Fixed(teacher_table))
    objective = LogitDistillation(
        student, teacher, loss, optimizer=OptimizerSpec(), transforms=transforms, **coefficients
    )
    value = objective.loss("student", batch(*student_table.shape), 0).value()
    return value, torch.autograd.grad(value, student.table)[0] * len(student_table)


def run_of(name, tmp_path, overrides=(), raw=None, folder="run"):
    raw = recipes.apply({"method": {"name": name}, **(raw or QUICK)}, dict(overrides))
    plan = recipes.resolve(raw)
    open_folder(tmp_path / folder, recipes.write(plan))
    return Run(plan, tmp_path / folder)


# ---------------------------------------------------------------- the paper's laws, with its own constants


def test_logit_std_by_its_equation():
    """0.1 CE(z, y) + 9 * 2^2 KL(softmax(Z(v) / 2) || softmax(Z(z) / 2)), written out with the unbiased deviation."""
    z, v = logits(6, 5, seed=0), logits(6, 5, seed=1)
    config = LogitStd()
    value, _ = gradient(z, v, config.loss(), [Standardize()], cross_entropy=0.1, distillation=config.distillation)
    score = lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)
    p, q = (score(v) / 2).softmax(-1), (score(z) / 2).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert_close(value, 0.1 * F.cross_entropy(z, torch.arange(6) % 5) + 9 * 4 * kl.mean())


def test_the_distillation_gradient_has_no_component_along_shift_or_scale():
    z, v = logits(7, 9, seed=2), logits(7, 9, seed=3)
    both = dict(cross_entropy=0.0, distillation=9.0)
    _, g = gradient(z, v, KD(2.0), [Standardize()], **both)
    centred = z - z.mean(-1, keepdim=True)
    assert g.abs().max() > 1e-2
    assert_close(g.sum(-1), torch.zeros(7, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close((g * centred).sum(-1), torch.zeros(7, dtype=torch.float64), atol=1e-5, rtol=0)  # eps of the deviation
    for other in ([], [Standardize("teacher")], [Standardize(detach=True)]):  # what the property rests on
        _, g = gradient(z, v, KD(2.0), other, **both)
        assert ((g * centred).sum(-1).abs() > 1e-2).any()


@pytest.mark.parametrize("loss", [KD(2.0), DKD(1.0, 8.0, 2.0), DIST(temperature=2.0)], ids=repr)
def test_a_teacher_four_times_as_certain_teaches_the_same(loss):
    """And does not where only a temperature is shared."""
    z, v = logits(8, 4, seed=4), logits(8, 4, seed=5)
    weights = dict(cross_entropy=0.1, distillation=9.0)
    for transforms, same in (([Standardize()], True), ([], False)):
        plain, g = gradient(z, v, loss, transforms, **weights)
        sharp, h = gradient(z, v, loss, [ScaleTeacher(4.0), *transforms], **weights)
        assert torch.allclose(g, h, atol=1e-5) == same
        assert torch.allclose(plain, sharp, atol=1e-6) == same


def test_teacher_scale_multiplies_the_teacher_alone():
    z, v = logits(3, 4, seed=6), logits(3, 4, seed=7)
    student, teacher = ScaleTeacher(4.0)(z, v)
    assert torch.equal(student, z) and torch.equal(teacher, 4 * v)


# ---------------------------------------------------------------- options reach the objective


def objective_of(name, tmp_path, monkeypatch, overrides=()):
    """The objective that a method hands to the trainer."""
    seen = []
    run = run_of(name, tmp_path, overrides)

    class Enough(Exception):
        pass

    def stop(objective, dataset, **_):
        seen.append((objective, dataset))
        raise Enough

    monkeypatch.setattr(run, "fit", stop)
    with pytest.raises(Enough):
        run.plan.method.run(run, run.config)
    return seen[0]


@pytest.mark.needs("sklearn")
@pytest.mark.parametrize(
    "name, overrides, loss, weights, transforms, warmup",
    [
        ("kd", {}, KD(4.0), (0.1, 0.9), [], 0),
        ("kd", {"method.temperature": 2, "method.standardize": True}, KD(2.0), (0.1, 0.9), [Standardize()], 0),
        ("dkd", {"train.steps": 240}, DKD(1.0, 8.0, 4.0), (1.0, 1.0), [], 20),
        ("dkd", {"method.standardize": True, "method.warmup": 0}, DKD(1.0, 8.0, 4.0), (1.0, 1.0), [Standardize()], 0),
        ("dist", {"method.gamma": 2}, DIST(1.0, 2.0, 1.0), (1.0, 1.0), [], 0),
        ("dist", {"method.standardize": True}, DIST(), (1.0, 1.0), [Standardize()], 0),
        ("logit_std", {}, KD(2.0), (0.1, 9.0), [Standardize()], 0),
        ("logit_std", {"method.base": "dkd", "method.beta": 2, "train.steps": 240}, DKD(1.0, 2.0, 2.0), (1.0, 9.0),
         [Standardize()], 20),
        ("logit_std", {"method.base": "dist"}, DIST(temperature=2.0), (0.1, 9.0), [Standardize()], 0),
        ("logit_std", {"method.of": "teacher", "method.unbiased": False, "method.detach": True, "method.teacher_scale": 4},
         KD(2.0), (0.1, 9.0), [ScaleTeacher(4.0), Standardize("teacher", False, True)], 0),
    ],
)  # fmt: skip
def test_options_are_what_the_objective_gets(
    cache, tmp_path, monkeypatch, name, overrides, loss, weights, transforms, warmup
):
    objective, dataset = objective_of(name, tmp_path, monkeypatch, {**overrides, "method.rows": 50})
    assert objective.logit_loss == loss
    assert (objective.cross_entropy, objective.distillation) == weights
    assert objective.transforms == transforms
    assert objective.warmup == warmup
    assert len(dataset) == 50


@pytest.mark.needs("sklearn")
def test_bad_options_are_one_sentence(cache, tmp_path):
    with pytest.raises(RecipeError, match=r"alpha and beta belong to base: dkd, and base is kd"):
        run_of("logit_std", tmp_path, {"method.beta": 2})
    with pytest.raises(RecipeError, match=r"method.temperture is not a field of KDConfig. Did you mean temperature"):
        run_of("kd", tmp_path, {"method.temperture": 2})
    with pytest.raises(DataError, match=r"method.rows must lie in 1..120 for digits, got 500"):
        run_of("kd", tmp_path, {"method.rows": 500}).execute()
    coupled = {"train.micro_batch": 8}
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run_of("dist", tmp_path, coupled, folder="dist").execute()
    with pytest.raises(RecipeError, match=r"BatchNorm statistics couple.*train.batch_norm=local"):
        run_of("kd", tmp_path, {**coupled, "student": "resnet-xs"}, folder="norm").execute()


# ---------------------------------------------------------------- whole runs


@pytest.mark.needs("sklearn")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_reports_teacher_student_and_control(cache, tmp_path, name):
    run = run_of(name, tmp_path, {"method.control": True, "train.steps": 30, "train.lr": 0.02})
    metrics = run.execute().metrics
    table = json.loads((run.folder / "records" / "1-comparison.json").read_text())
    assert table["type"] == "table" and [row[0] for row in table["rows"]] == ["teacher", "student", "control"]
    by_name = {row[0]: dict(zip(table["columns"], row)) for row in table["rows"]}
    assert by_name["teacher"]["agreement with the teacher"] == 1.0
    assert by_name["teacher"]["KL(p || q)"] == pytest.approx(0, abs=1e-6)
    for key in ("accuracy", "nll", "ece"):
        assert metrics[key] == by_name["student"][key]
        assert metrics[f"teacher_{key}"] == by_name["teacher"][key]
        assert metrics[f"control_{key}"] == by_name["control"][key]
    saved = ImageClassifier.from_pretrained(run.folder / "student")
    assert run.evaluate(saved)["accuracy"] == metrics["accuracy"]
    assert metrics["accuracy"] > 0.3  # chance is 0.1


@pytest.mark.needs("sklearn")
def test_the_control_starts_where_the_student_started_and_sees_the_same_rows(cache, tmp_path):
    """Without a distillation term the two are the same training, bit for bit."""
    overrides = {"method.control": True, "method.cross_entropy": 1, "method.distillation": 0, "train.steps": 5}
    metrics = run_of("kd", tmp_path, overrides).execute().metrics
    again = run_of("kd", tmp_path, {**overrides, "train.seed": 1}, folder="other").execute().metrics
    assert again["nll"] != metrics["nll"]
    # stages have data orders of their own, so compare one full-batch step
    overrides |= {"train.batch": 120, "train.steps": 1, "train.optimizer": "sgd", "train.lr": 0.1}
    metrics = run_of("kd", tmp_path, overrides, folder="full").execute().metrics
    assert metrics["nll"] == pytest.approx(metrics["control_nll"], abs=1e-6)


# ---------------------------------------------------------------- real architectures and own pictures

SHARED = dict(num_channels=3, image_size=32)
TINY = {
    "resnet": ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(**SHARED, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8),
    "convnext": ConvNextConfig(num_channels=3, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "swin": SwinConfig(**SHARED, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, patch_size=4),
    "mobilenet_v2": MobileNetV2Config(num_channels=3, depth_multiplier=0.25, finegrained_output=False),
}  # fmt: skip


def save_tiny(name: str, folder, classes: int) -> str:
    config = copy.deepcopy(TINY[name])
    config.num_labels = classes
    torch.manual_seed(0)
    ImageClassifier(_build(config, name)).save(folder / f"{name}-{classes}")
    return str(folder / f"{name}-{classes}")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of eight PNGs."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for c, name in enumerate(("ash", "birch", "cedar")):
        (root / name).mkdir()
        for i in range(8):
            pixels = draw.integers(0, 80, (36, 40, 3), dtype=np.uint8)
            pixels[..., c] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def own(pictures, teacher: str, student) -> dict:
    return {**QUICK, "data": {"imagefolder": str(pictures), "side": 32}, "teacher": teacher, "student": student,
            "train": {**QUICK["train"], "batch": 4}}  # fmt: skip


@pytest.mark.parametrize("student", TINY)
@pytest.mark.parametrize("name", ["logit_std"])
def test_real_architectures_from_folders_on_own_pictures(tmp_path, pictures, name, student):
    """A student with a head of other classes gets a fresh one; what is saved can be loaded again."""
    teacher = save_tiny("convnext" if student == "resnet" else "resnet", tmp_path, classes=3)
    run = run_of(name, tmp_path, raw=own(pictures, teacher, save_tiny(student, tmp_path, classes=7)))
    before = {k: v.clone() for k, v in run.student().state_dict().items()}
    metrics = run.execute().metrics
    assert np.isfinite(list(metrics.values())).all()
    changed = sum(not torch.equal(before[k], v) for k, v in run.student().state_dict().items())
    assert changed > len(before) // 2
    saved = ImageClassifier.from_pretrained(run.folder / "student")
    assert saved.classes == 3 and saved.network.config.model_type == student
    assert read_json(run.folder / "result.json")["student_kind"] == "image_classifier"


def test_a_fresh_student_of_a_folders_architecture_takes_the_datas_shape(tmp_path, pictures):
    teacher, origin = save_tiny("resnet", tmp_path, classes=3), save_tiny("vit", tmp_path, classes=7)
    raw = own(pictures, teacher, {"name": origin, "pretrained": False})
    run = run_of("kd", tmp_path, {"data.side": 16}, raw=raw)
    run.execute()
    config = run.student().network.config
    assert (config.num_labels, config.num_channels, config.image_size) == (3, 3, 16)


def test_a_teacher_of_other_classes_is_refused_before_training(tmp_path, pictures, monkeypatch):
    teacher = save_tiny("resnet", tmp_path, classes=7)
    run = run_of("kd", tmp_path, raw=own(pictures, teacher, "resnet-xs"))
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(
        ModelError, match=r"^teacher .*resnet-7 knows 7 classes, but imagefolder:.* has 3\. Give a teacher"
    ):
        run.execute()


def test_a_missing_folder_names_what_could_be_written_instead(tmp_path, pictures):
    run = run_of("kd", tmp_path, raw=own(pictures, str(tmp_path / "nothing"), "resnet-xs"))
    with pytest.raises(ModelError, match=r"nothing is no model folder and no id that can be read.*resnet-xs"):
        run.execute()

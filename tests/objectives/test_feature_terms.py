"""Stages with their metadata, exits, hints and relations: shapes on real architectures, laws, and who gets a gradient."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ConvNextConfig, MobileNetV2Config, ResNetConfig, SwinConfig, ViTConfig

from potstill.contracts.batch import ImageBatch
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import relation_angles, relation_distances
from potstill.models.images import ImageClassifier, _build
from potstill.objectives.feature_terms import (
    Exits,
    Relations,
    Scored,
    Stage,
    TokenExit,
    exit_branch,
    features_at,
    penultimate,
    stage_at,
    stages_of,
)
from potstill.objectives.logits import KD, LogitDistillation, SoftTarget
from potstill.teachers import LocalTeacher
from potstill.training.checkpoint import load_weights, save_checkpoint

ADAM = OptimizerSpec(lr=1e-2)
SHARED = dict(num_channels=3, image_size=32)
NETWORKS = {
    "resnet": ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(**SHARED, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16, patch_size=8),
    "convnext": ConvNextConfig(num_channels=3, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4),
    "swin": SwinConfig(**SHARED, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, patch_size=4),
    "mobilenet_v2": MobileNetV2Config(num_channels=3, depth_multiplier=0.25, finegrained_output=False),
}  # fmt: skip
FOUND = {
    "resnet": [("network.resnet.encoder.stages.0", "map", 8), ("network.resnet.encoder.stages.1", "map", 16)],
    "vit": [(f"network.vit.layers.{i}", "tokens", 16) for i in (0, 1, 4, 5)],
    "convnext": [("network.convnext.encoder.stages.0", "map", 8), ("network.convnext.encoder.stages.1", "map", 16)],
    "swin": [("network.swin.encoder.layers.0.blocks.1", "tokens", 8), ("network.swin.encoder.layers.1", "tokens", 16)],
    "mobilenet_v2": [(f"network.mobilenet_v2.layer.{i}", "map", w) for i, w in ((2, 8), (5, 16), (13, 40), (15, 80))],
}


def network(name):
    torch.manual_seed(0)
    return ImageClassifier(_build(NETWORKS[name], name))


def packaged(name, **options):
    torch.manual_seed(0)
    return ImageClassifier.PACKAGED[name](size=8, **options)


def images(n=4, channels=1, size=8):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stages_of_real_architectures(name):
    model, x = network(name), images(2, 3, 32)
    stages = stages_of(model, x)
    assert [(s.layer, s.kind, s.width) for s in stages] == FOUND[name]
    assert [(s.index, s.of) for s in stages] == [(i, len(stages)) for i in range(1, len(stages) + 1)]
    if stages[0].kind == "tokens":
        assert [s.class_tokens for s in stages] == [int(name == "vit")] * len(stages)
    for stage in stages:
        branch = exit_branch(stage, 12, 10)
        with features_at(model, [stage]) as seen:
            model(x)
        assert branch(seen.of([stage])[0]).shape == (2, 10)
    assert penultimate(model, x).kind == "vector"
    assert model.training  # left as it was


def test_a_long_list_of_blocks_is_read_where_the_papers_code_reads_it():
    model = nn.Module()
    model.blocks = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    model.forward = model.blocks.forward
    assert [s.layer for s in stages_of(model, torch.randn(2, 3))] == [f"blocks.{i}" for i in (1, 3, 9, 11)]
    assert [s.layer for s in stages_of(model, torch.randn(2, 3), ["blocks.5"])] == ["blocks.5"]


def test_stages_that_cannot_be_read():
    with pytest.raises(ModelError, match="Linear has no list of stages .*Name the layers"):
        stages_of(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ModelError, match=r"h passes \[2, 3, 4, 5\] a sample: no vector"):
        _ = Stage("h", (2, 3, 4, 5)).kind
    with pytest.raises(ModelError, match="h has 12 tokens: no square of patches"):
        _ = Stage("h", (12, 8)).class_tokens
    assert [Stage("h", (n, 8)).class_tokens for n in (49, 50, 51)] == [0, 1, 2]
    with pytest.raises(ModelError, match="has no module 'network.stage'"):
        stage_at(packaged("convnet"), images(), "network.stage")


# ---------------------------------------------------------------- exit branches


def test_a_map_halves_once_for_each_stage_that_follows():
    convolutions = lambda branch: [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
    for index, of in ((1, 3), (2, 3), (3, 3)):
        branch = exit_branch(Stage("s", (8, 16, 16), index, of), 20, 10)
        strides = [c.stride[0] for c in convolutions(branch)]
        assert strides.count(2) == of - index
        x = branch[:-3](torch.randn(2, 8, 16, 16))
        assert x.shape == (2, 20, 16 // 2 ** (of - index), 16 // 2 ** (of - index))
        assert branch[-1].bias.abs().sum() == 0 and branch[-1].weight.std() < 0.03
    widths = [c.out_channels for c in convolutions(exit_branch(Stage("s", (8, 16, 16), 1, 4), 20, 10))]
    assert widths == [8, 8, 8, 16, 16, 16, 16, 32, 32, 32, 32, 20]  # channels double, the last is the width


def test_tokens_are_merged_to_seven_by_seven_and_class_tokens_go_round():
    for grid, merges in ((7, 0), (14, 1), (15, 1), (28, 2)):
        branch = exit_branch(Stage("s", (grid**2, 8), 1, 3), 12, 10)
        assert isinstance(branch, TokenExit) and len(branch.blocks) == 2
        side = branch.merge(torch.randn(2, grid**2, 8)).shape[1] ** 0.5
        assert side == -(-grid // 2**merges)
    branch = exit_branch(Stage("s", (50, 12), 3, 3), 12, 10)
    assert len(branch.blocks) == 1
    x = torch.randn(2, 50, 12, requires_grad=True)
    branch(x).sum().backward()
    assert x.grad.abs().sum((0, 2)).gt(0).all()  # the class token is read, and attends to all
    branch.blocks = nn.Identity()
    assert_close(branch(x), branch.head(x[:, 0]))


def test_exits_add_up_and_give_no_gradient_to_the_teacher():
    student, teacher = packaged("mlp", width=6, depth=2), LocalTeacher(packaged("convnet", width=4))
    x = ImageBatch(torch.arange(4), images(), torch.arange(4))
    stages = stages_of(student, x.images)
    assert [(s.layer, s.kind) for s in stages] == [("network.layers.0", "vector"), ("network.layers.1", "vector")]
    branches = [exit_branch(stage, 9, 10) for stage in stages]
    exits = Exits(stages, branches, [KD(1.0), SoftTarget()], coefficient=0.5)
    it = LogitDistillation(student, teacher, optimizer=ADAM, features=[exits])
    term = it.loss("student", x, 0).terms["exits"]
    v, h = teacher.model(x.images), student.network.layers[0](x.images.flatten(1))
    expected = KD(1.0)(branches[0](h), v, x.labels_B)["kd"].sum()
    expected = expected + SoftTarget()(branches[1](student.network.layers[1](h)), v, x.labels_B)["target"].sum()
    assert_close(term.total, expected)
    assert term.coefficient == 0.5
    term.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in branches[0].parameters())
    assert student.network.layers[0][0].weight.grad.abs().sum() > 0
    assert student.network.head.weight.grad is None
    assert all(p.grad is None for p in teacher.model.parameters())


def test_what_a_term_owns_is_trained_saved_and_resumed_but_is_no_part_of_the_student(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        student = packaged("mlp", width=6, depth=2)
        stages = stages_of(student, images())
        torch.manual_seed(seed)
        exits = Exits(stages, [exit_branch(s, 9, 10) for s in stages], [KD(1.0)] * 2)
        return LogitDistillation(student, LocalTeacher(packaged("convnet")), optimizer=ADAM, features=[exits])

    one, other = made(0), made(1)
    owned = {id(p) for p in one.features.parameters()}
    assert owned and owned <= {id(p) for p in one.players["student"].parameters()}
    assert not owned & {id(p) for p in one.student.parameters()}
    optimizer = torch.optim.Adam(one.players["student"].parameters())
    path = save_checkpoint(tmp_path, 1, one, {"student": optimizer}, {}, keep=1)
    load_weights(path, other)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = images()
    logits = one.student(x)
    one.student.save(tmp_path / "student")
    assert_close(ImageClassifier.from_pretrained(tmp_path / "student")(x), logits)


def test_exits_that_do_not_fit_are_refused():
    stage = Stage("s", (6,))
    with pytest.raises(RecipeError, match="one branch and one loss a stage, got 1 stages, 1 branches and 2 losses"):
        Exits([stage], [nn.Linear(6, 10)], [KD(), KD()])


# ---------------------------------------------------------------- relations


def test_relations_are_those_of_the_penultimate_features():
    student, teacher = packaged("resnet-xs", norm="group"), LocalTeacher(packaged("convnet", width=4))
    x = ImageBatch(torch.arange(6), images(6), torch.arange(6))
    terms = [Relations(student, teacher, x.images, kind, w) for kind, w in (("distance", 25.0), ("angle", 50.0))]
    it = LogitDistillation(student, teacher, optimizer=ADAM, features=terms)
    assert it.couples == "batch"
    found = it.loss("student", x, 0).terms
    pooled = lambda net: _before_head(net, x.images)
    f, t = pooled(student.network), pooled(teacher.model.network)
    assert_close(found["distance"].mean(), 25 * relation_distances(teacher=t, student=f).mean())
    assert_close(found["angle"].mean(), 50 * relation_angles(teacher=t, student=f).mean())


def _before_head(net, x):
    x = net.stem(x)
    for stage in net.stages:
        x = stage(x)
    return x.mean((-2, -1))


def test_relations_need_no_common_basis_width_or_scale():
    """A student that is a rotated, scaled, shifted and padded teacher has nothing to learn."""
    f = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double())[0]
    student = nn.functional.pad(3 * f @ rotation + 1, (0, 2))
    for kind in ("distance", "angle"):
        term = Relations(packaged("mlp"), LocalTeacher(packaged("mlp")), images(), kind)
        scored = Scored(f, f, torch.arange(6))
        assert_close(term([student], [f], scored), torch.zeros(6).double(), atol=1e-7, rtol=0)
        assert term([student.roll(1, 0)], [f], scored).min() > 1e-4
    with pytest.raises(RecipeError, match="Relations.kind must be one of distance, angle, similarity, got 'angles'"):
        Relations(packaged("mlp"), LocalTeacher(packaged("mlp")), images(), "angles")


def test_terms_of_one_name_are_numbered():
    student, teacher = packaged("resnet-xs", norm="group"), LocalTeacher(packaged("convnet", width=4))
    terms = [Relations(student, teacher, images(), "distance") for _ in range(2)]
    found = LogitDistillation(student, teacher, optimizer=ADAM, features=terms).loss(
        "student", ImageBatch(torch.arange(4), images(), torch.arange(4)), 0
    )
    assert {"distance_0", "distance_1"} <= set(found.terms)

"""CV-DD's identities: votes, what BatchNorm matching is zero at, replay by key, and labels that see their batch."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, softmax
from torch.testing import assert_close

from potstill import recipe
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.data.cv_dd import (
    CVDD,
    Recovery,
    Relabelled,
    SoftBatch,
    StoredLabels,
    committee_logits,
    cutmix,
    relabel,
    voters_of,
    votes,
)
from potstill.models.build import freeze
from potstill.models.images import ImageClassifier
from potstill.models.taps import tap_batchnorm
from potstill.objectives.logits import KD, LogitDistillation
from potstill.run import Run


def net(seed: int = 0, name: str = "convnet") -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier.PACKAGED[name](classes=4, channels=1, size=8)


def test_votes_go_from_equal_to_the_best():
    assert votes([60.0, 50.0, 55.0], 1e9) == pytest.approx([1 / 3] * 3)
    assert votes([60.0, 50.0, 55.0], 1e-3) == pytest.approx([1.0, 0.0, 0.0])
    a = [64, 60.6, 51.6, 59.4, 56.4]  # the paper's CIFAR-100 priors and the weights that follow
    assert votes(a, 10.0) == pytest.approx([0.323, 0.230, 0.093, 0.204, 0.151], abs=1e-3)
    assert votes(a, 5.0)[0] / votes(a, 5.0)[1] == pytest.approx(math.exp(3.4 / 5))


def test_pairs_take_turns_and_one_image_a_class_gets_the_best_two():
    five = [64, 60.6, 51.6, 59.4, 56.4]
    ten = CVDD(images_per_class=10)
    assert len({tuple(voters_of(i, five, ten, 0)) for i in range(10)}) == 10
    assert voters_of(0, five, CVDD(images_per_class=1), 0) == [0, 1]
    drawn = {tuple(voters_of(i, five, CVDD(images_per_class=50), 0)) for i in range(50)}
    assert len(drawn) > 6 and all(len(pair) == 2 for pair in drawn)
    assert voters_of(3, [1.0], CVDD(images_per_class=50), 0) == [0], "a committee of one votes alone: SRe2L++"


def plain(**changes) -> CVDD:
    """Recovery without augmentation, so that the batch is the images themselves."""
    return CVDD(**{"crop": 1.0, "flip": False, "jitter": 0, **changes})


def test_the_batch_norm_term_is_zero_at_its_own_statistics_and_blind_to_order():
    member, start = freeze(net()), torch.rand(4, 1, 8, 8) * 2 - 1
    objective = Recovery(start, [member], [1.0], plain(bn_weight=1.0), 0)
    batch = torch.empty(0)
    seen = objective.loss("images", batch, 0).terms["bn"].total
    assert seen > 0.1
    with torch.no_grad(), tap_batchnorm(member) as layers:
        x = objective.images[0]
        member(x)
    flipped = Recovery(start.flip(0), [member], [1.0], plain(bn_weight=1.0), 0)
    assert_close(flipped.loss("images", batch, 0).terms["bn"].total, seen, rtol=1e-4, atol=1e-4)
    # Layer by layer from the input: after each, the next layer's input is normalised by the new statistics.
    for name in list(layers):
        with torch.no_grad(), tap_batchnorm(member) as now:
            member(x)
        layer = member.get_submodule(name)
        layer.running_mean.copy_(now[name].mean_C)
        layer.running_var.copy_(now[name].variance_C)
    assert objective.loss("images", batch, 0).terms["bn"].total < 1e-3 * seen


def test_the_first_layer_counts_tenfold_and_members_by_their_votes():
    a, b, start = freeze(net(0)), freeze(net(1)), torch.rand(4, 1, 8, 8)
    of = lambda members, weights, **c: (
        Recovery(start, members, weights, plain(**c), 0).loss("images", None, 0).terms["bn"].total
    )
    both = of([a, b], [0.25, 0.75])
    assert_close(both, 0.25 * of([a], [1.0]) + 0.75 * of([b], [1.0]))
    once, first = of([a], [1.0], first_bn=1.0), of([a], [1.0], first_bn=0.0)
    assert_close(of([a], [1.0]), once + 9 * (once - first))


def test_recovery_moves_the_images_alone_and_keeps_them_in_range():
    member = freeze(net())
    objective = Recovery(torch.rand(4, 1, 8, 8), [member], [1.0], plain(), 0)
    objective.loss("images", None, 0).value().backward()
    assert objective.images[0].grad.abs().sum() > 0 and all(p.grad is None for p in member.parameters())
    objective.images[0].data.fill_(3.0)
    objective.after_step("images", 0)
    assert objective.images[0].max() == 1


def data(**changes) -> Relabelled:
    config = CVDD(**{"epochs": 3, "crop": 0.4, **changes})
    return Relabelled(torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(4).repeat(2), config, 5)


def test_replay_gives_the_very_images_that_were_labelled():
    rows, epochs = torch.tensor([3, 1, 6, 0]), torch.tensor([2, 2, 2, 2])
    first, again = data(), data()
    again.images = first.images
    assert torch.equal(first.batch(rows, epochs).images, again.batch(rows, epochs).images)
    assert not torch.equal(first.batch(rows, epochs).images, first.batch(rows, epochs - 1).images)


def test_labels_are_those_of_the_mixed_image_in_the_students_order():
    members = [freeze(net(0)), freeze(net(1, "resnet-xs"))]
    made = data(bssl=False)
    stored = relabel(made, members, [0.3, 0.7], 4, "s")
    made.labels, made.order = stored["labels"], {i: n for n, i in enumerate(stored["ids"].tolist())}
    from potstill.training.trainer import data_order

    batch = made.batch(*data_order(5, "s", 8, torch.arange(4, 8)))
    expected = 0.3 * members[0](batch.images) + 0.7 * members[1](batch.images)
    assert_close(batch.soft_BV, expected.half().float())
    assert sorted(stored["ids"].tolist()) == list(range(24)), "every image of every epoch is labelled once"


def test_cutmix_fills_a_box_from_the_reversed_batch():
    x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8)
    mixed = cutmix(x, 3, torch.arange(4))
    kept = mixed == x
    assert kept.any() and not kept.all() and torch.equal(mixed[~kept], x.flip(0)[~kept])


def test_batch_specific_labels_see_their_batch_mates_and_leave_the_members_alone():
    member, x = freeze(net()), torch.rand(6, 1, 8, 8)
    before = {k: v.clone() for k, v in member.state_dict().items()}
    alone = lambda bssl: committee_logits(x[:2], [member], [1.0], bssl)
    together = lambda bssl: committee_logits(x, [member], [1.0], bssl)[:2]
    assert_close(alone(False), together(False))
    assert (alone(True) - together(True)).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in member.state_dict().items()) and not member.training


def test_the_students_loss_is_cross_entropy_less_entropy_without_temperature_squared():
    student, soft, x = net(2).eval(), torch.randn(6, 4) * 3, torch.rand(6, 1, 8, 8)
    batch = SoftBatch(torch.arange(6), x, torch.zeros(6, dtype=torch.int64), soft_BV=soft)
    objective = LogitDistillation(
        student,
        StoredLabels(),
        KD(20.0, temperature_squared=False),
        optimizer=OptimizerSpec(),
        cross_entropy=0.0,
        distillation=1.0,
    )
    expected = kl_div(log_softmax(student(x) / 20, -1), softmax(soft / 20, -1), reduction="batchmean")
    assert_close(objective.loss("student", batch, 0).value(), expected)


def test_a_committee_of_one_is_the_same_bits_whatever_its_prior(tmp_path):
    """SRe2L++: with one member every vote is 1, so priors and temperatures change nothing."""
    tiny = {
        "method.images_per_class": 1, "method.recover_steps": 3, "method.epochs": 2, "data.size": 200, "data.test_size": 50,
        "committee": [{"name": "convnet"}], "train.batch": 10, "train.micro_batch": None, "method.init": "noise",
        "train.trackers": [], "method.priors": None,
    }  # fmt: skip
    images = []
    for name, changes in (
        ("a", {"method.voting": "equal"}),
        ("b", {"method.priors": [77.0], "method.recover_temperature": 1.0}),
    ):
        plan = recipe.resolve(recipe.apply(recipe.read("cv_dd"), {**tiny, **changes}))
        Run(plan, tmp_path / name).execute()
        images.append((tmp_path / name / "distilled" / "images.safetensors").read_bytes())
    assert images[0] == images[1]


def test_priors_must_match_the_committee(tmp_path):
    plan = recipe.resolve(
        recipe.apply(recipe.read("cv_dd"), {"method.priors": [50.0], "data.size": 200, "train.trackers": []})
    )
    with pytest.raises(RecipeError, match=r"priors has 1 entries for a committee of 4. Give one a member."):
        Run(plan, tmp_path).execute()

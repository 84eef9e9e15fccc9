import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from potstill.contracts.batch import Batch, ImageBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, TokenLogp
from potstill.contracts.spec import Part, Spec
from potstill.contracts.terms import divided
from potstill.divergences import ReverseKL
from potstill.models.images import ImageClassifier
from potstill.models.taps import batchnorm_coupled
from potstill.objectives.feature_terms import Hint
from potstill.objectives.logits import (
    DIST,
    DKD,
    KD,
    AboveThreshold,
    Confident,
    EntropyGate,
    LogitDistillation,
    LogitLoss,
    MutualDistillation,
    Softened,
    Standardize,
    Supervised,
    Tempered,
    class_thresholds,
)
from potstill.teachers.local import LocalTeacher

B, V = 6, 5
ADAM = OptimizerSpec(lr=1e-2)


def rows(seed, batch=B, classes=V, scale=2.0):
    return scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Table(nn.Module):
    """A student whose weights are its logits: gradients at the weights are gradients at the logits."""

    def __init__(self, logits):
        super().__init__()
        self.z = nn.Parameter(logits)

    def forward(self, images):
        return self.z[images.flatten().long()]


class Given:
    name, gives = "given", frozenset({FullLogits})

    def __init__(self, logits):
        self.logits = logits

    def score(self, batch, need):
        return FullLogits(self.logits[batch.ids_B])


def batch_of(size=B, start=0):
    ids = torch.arange(start, start + size)
    return ImageBatch(ids, ids.double().view(-1, 1, 1, 1), ids % V)


def objective(loss, teacher=None, student=None, **options):
    teacher = Given(rows(1) if teacher is None else teacher)
    return LogitDistillation(Table(rows(0) if student is None else student), teacher, loss, optimizer=ADAM, **options)


def gradient(objective, step=0):
    value = objective.loss("student", batch_of(), step).value()
    return value, torch.autograd.grad(value, objective.student.z)[0]


Z = (Standardize(),)
KD_ALONE = {"cross_entropy": 0.0, "distillation": 1.0}


def test_the_scale_of_the_teacher_is_free_with_z_scores_and_not_without():
    for loss in (KD(2.0), DKD(1.0, 2.0, 2.0)):
        stretched = 4 * rows(1) + 3
        for transforms, same in ((Z, True), ((), False)):
            options = {"transforms": transforms, "cross_entropy": 0.1, "distillation": 9.0}
            (_, a), (_, b) = gradient(objective(loss, **options)), gradient(objective(loss, stretched, **options))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-8) == same


def test_the_students_gradient_has_no_component_along_ones_nor_along_itself():
    centred = rows(0) - rows(0).mean(-1, keepdim=True)
    _, g = gradient(objective(KD(2.0), transforms=Z, **KD_ALONE))
    assert g.abs().max() > 1e-3
    assert_close(g.sum(-1), torch.zeros(B).double(), atol=1e-8, rtol=0)
    assert_close((g * centred).sum(-1), torch.zeros(B).double(), atol=1e-7, rtol=0)  # up to eps
    for of, radial in (("student", False), ("teacher", True)):
        _, g = gradient(objective(KD(2.0), transforms=[Standardize(of=of)], **KD_ALONE))
        assert ((g * centred).sum(-1).abs().max() > 1e-4) == radial
    _, g = gradient(objective(KD(2.0), transforms=[Standardize(detach=True)], **KD_ALONE))
    assert (g * centred).sum(-1).abs().max() > 1e-4


def test_z_scores_on_each_side():
    z, v = rows(0), rows(1)
    score = lambda x, unbiased=True: (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=unbiased, keepdim=True)
    for of, expected in (("both", (score(z), score(v))), ("teacher", (z, score(v))), ("student", (score(z), v))):
        assert_close(objective(KD(), transforms=[Standardize(of=of)]).compared(z, v), expected, rtol=1e-6, atol=1e-6)
    both = objective(KD(), transforms=[Standardize(unbiased=False)]).compared(z, v)
    assert_close(both, (score(z, False), score(v, False)), rtol=1e-6, atol=1e-6)


def test_cross_entropy_sees_the_raw_logits():
    """With a distillation weight of 0, the gradient is that of cross-entropy: (softmax(z) - one-hot) / B."""
    _, g = gradient(objective(KD(2.0), transforms=Z, cross_entropy=0.3, distillation=0.0))
    assert_close(g, 0.3 * (rows(0).softmax(-1) - nn.functional.one_hot(batch_of().labels_B, V)) / B)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1000.0])
def test_the_gradient_of_kd_is_temperature_times_the_gap_of_probabilities(temperature):
    """d/dz T^2 KL(p || q) = T (q - p); without T^2 it is (q - p) / T."""
    gap = (rows(0) / temperature).softmax(-1) - (rows(1) / temperature).softmax(-1)
    _, g = gradient(objective(KD(temperature), **KD_ALONE))
    assert_close(g, temperature * gap / B)
    _, g = gradient(objective(KD(temperature, temperature_squared=False), **KD_ALONE))
    assert_close(g, gap / temperature / B)


def test_the_gradient_of_kd_does_not_vanish_with_temperature():
    """T^2 KL tends to half the mean square of the centred logits' gap: gradient (z - v, centred) / V."""
    gap = rows(0) - rows(1)
    _, g = gradient(objective(KD(1e4), **KD_ALONE))
    assert_close(g, (gap - gap.mean(-1, keepdim=True)) / V / B, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_decoupled_kd_with_the_teachers_own_weight_is_kd(temperature):
    """KD = TCKD + (1 - p_target) NCKD, sample by sample."""
    for i in range(B):
        ids = torch.tensor([i])
        batch = ImageBatch(ids, ids.double().view(-1, 1, 1, 1), ids % V)
        rest = 1 - (rows(1)[i] / temperature).softmax(-1)[i % V].item()
        values, gradients = [], []
        for loss in (KD(temperature), DKD(1.0, rest, temperature)):
            it = objective(loss, **KD_ALONE)
            values.append(it.loss("student", batch, 0).value())
            gradients.append(torch.autograd.grad(values[-1], it.student.z)[0])
        assert_close(values[0], values[1])
        assert_close(gradients[0], gradients[1])


def test_decoupled_weights_multiply_their_own_part():
    one = DKD(1.0, 1.0, 2.0)(rows(0), rows(1), batch_of().labels_B)
    two = DKD(3.0, 5.0, 2.0)(rows(0), rows(1), batch_of().labels_B)
    assert_close(two, {"tckd": 3 * one["tckd"], "nckd": 5 * one["nckd"]})


def test_dist_is_free_of_affine_maps_of_the_probabilities():
    """Mixing each row's probabilities with the uniform is an affine map of the row, and, with one share for all rows,
    of each column too."""
    softened = lambda share: ((1 - share) * rows(0).softmax(-1) + share / V).log()
    common, each = softened(0.3), softened(torch.linspace(0.1, 0.8, B).double()[:, None])
    parts = lambda z, loss=DIST(): {k: v.mean() for k, v in loss(z, rows(1), batch_of().labels_B).items()}
    raw = parts(rows(0))
    assert_close(parts(common), raw, rtol=1e-6, atol=1e-6)
    assert_close(parts(each)["inter"], raw["inter"], rtol=1e-6, atol=1e-6)
    assert abs(parts(each)["intra"] - raw["intra"]) > 1e-3
    assert abs(parts(common, KD(1.0))["kd"] - parts(rows(0), KD(1.0))["kd"]) > 1e-3
    assert_close(
        parts(rows(1)), {"inter": torch.zeros(()).double(), "intra": torch.zeros(()).double()}, atol=1e-6, rtol=0
    )


def test_dist_by_hand():
    """1 - Pearson over rows and over columns, T^2 in front; the weights are each part's own."""
    z, v, t = rows(0), rows(1), 2.0
    p, q = (v / t).softmax(-1), (z / t).softmax(-1)
    correlation = lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1]
    inter = torch.stack([1 - correlation(a, b) for a, b in zip(p, q)])
    intra = torch.stack([1 - correlation(a, b) for a, b in zip(p.T, q.T)]).mean()
    got = DIST(beta=3.0, gamma=5.0, temperature=t)(z, v, batch_of().labels_B)
    assert_close(got["inter"], 3 * t**2 * inter, rtol=1e-6, atol=1e-6)
    assert_close(got["intra"], (5 * t**2 * intra).expand(B), rtol=1e-6, atol=1e-6)


def test_what_couples_the_batch_says_so():
    assert objective(DIST()).couples == "batch"
    assert objective(DIST(gamma=0.0)).couples == "position"
    assert objective(KD()).couples == "position"
    student = ImageClassifier.PACKAGED["resnet-xs"](size=8)
    assert batchnorm_coupled(Supervised(student, optimizer=ADAM).train())  # the trainer's own question


def test_micro_batches_change_nothing():
    for loss in (KD(2.0), DKD(), DIST(gamma=0.0), ReverseKL()):
        it = objective(loss, transforms=Z)
        whole = it.loss("student", batch_of(), 0)
        parts = [it.loss("student", b, 0).terms for b in (batch_of(2), batch_of(B - 2, start=2))]
        assert_close(divided(parts), divided([whole.terms]))
        assert_close(divided([whole.terms]), whole.value())


def test_an_f_divergence_is_a_loss_at_temperature_one():
    value, _ = gradient(objective(ReverseKL(), **KD_ALONE))
    q, p = rows(0).softmax(-1), rows(1).softmax(-1)
    assert_close(value, (q * (q / p).log()).sum(-1).mean())


def test_warm_up_scales_the_distillation_terms_alone():
    it = objective(DKD(), cross_entropy=0.5, distillation=8.0, warmup=20)
    for step, share in ((0, 0.0), (5, 0.25), (20, 1.0), (99, 1.0)):
        terms = it.loss("student", batch_of(), step).terms
        assert {name: t.coefficient for name, t in terms.items()} == {"ce": 0.5, "tckd": 8 * share, "nckd": 8 * share}


def test_metrics_and_positions():
    loss = objective(KD(2.0), warmup=10).loss("student", batch_of(), 0)
    p, q = (rows(1) / 2).softmax(-1), (rows(0) / 2).softmax(-1)
    kd_B = 4 * (p * (p / q).log()).sum(-1)
    assert_close(loss.positions["distance"], kd_B)  # unweighted: the warm-up does not hide it
    assert_close(loss.metrics["distance"].mean(), kd_B.mean())
    right = [int(z.argmax()) == i % V for i, z in enumerate(rows(0))]
    same = [int(z.argmax()) == int(v.argmax()) for z, v in zip(rows(0), rows(1))]
    assert loss.metrics["accuracy"].mean().item() == pytest.approx(sum(right) / B)
    assert loss.metrics["agreement"].mean().item() == pytest.approx(sum(same) / B)
    assert not any(t.total.requires_grad for t in loss.metrics.values())


def test_supervised_is_cross_entropy_with_smoothed_targets():
    for smoothing in (0.0, 0.2):
        it = Supervised(Table(rows(0)), optimizer=ADAM, label_smoothing=smoothing)
        target = (1 - smoothing) * nn.functional.one_hot(batch_of().labels_B, V) + smoothing / V
        assert_close(it.loss("student", batch_of(), 0).value(), -(target * rows(0).log_softmax(-1)).sum(-1).mean())


def test_batches_without_images_go_to_the_student_whole():
    class ByIds(Table):
        def forward(self, batch):
            return self.z[batch.ids_B]

    batch = Batch(torch.arange(B))
    batch.labels_B = torch.arange(B) % V
    it = Supervised(ByIds(rows(0)), optimizer=ADAM)
    assert_close(it.loss("student", batch, 0).value(), nn.functional.cross_entropy(rows(0), batch.labels_B))


def classifiers():
    torch.manual_seed(0)
    teacher = LocalTeacher(ImageClassifier.PACKAGED["convnet"](size=8, width=4))
    return ImageClassifier.PACKAGED["resnet-xs"](size=8, norm="group"), teacher


def test_the_teacher_is_neither_trained_nor_saved():
    student, teacher = classifiers()
    it = LogitDistillation(student, teacher, optimizer=ADAM)
    assert set(it.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    x = ImageBatch(torch.arange(4), torch.randn(4, 1, 8, 8), torch.arange(4))
    it.loss("student", x, 0).value().backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not teacher.model.training


def test_a_student_comes_closer_to_its_teacher():
    student, teacher = classifiers()
    it = LogitDistillation(student, teacher, KD(2.0), optimizer=ADAM, transforms=Z, cross_entropy=0.0, distillation=9.0)
    x = ImageBatch(torch.arange(16), torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    optimizer = torch.optim.Adam(it.players["student"].parameters(), 1e-2)
    values = []
    for step in range(25):
        value = it.loss("student", x, step).value()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]


def test_hints_compare_projected_layers_and_train_the_projector():
    student, teacher = classifiers()
    x = torch.randn(4, 1, 8, 8)
    hint = Hint(student, teacher, x, "network.stages.1", "network.stages.1", coefficient=2.0)
    assert student.training
    assert not teacher.model.training
    it = LogitDistillation(student, teacher, optimizer=ADAM, features=[hint])
    projector = set(map(id, hint.projector.parameters()))
    assert projector <= {id(p) for p in it.players["student"].parameters()}
    loss = it.loss("student", ImageBatch(torch.arange(4), x, torch.arange(4)), 0)
    stage = lambda net: net.stages[1](net.stages[0](net.stem(x)))
    gap = hint.projector(stage(student.network)) - stage(teacher.model.network)
    assert_close(loss.terms["hint"].mean(), 2 * gap.square().mean())
    loss.terms["hint"].mean().backward()
    assert hint.projector.map.weight.grad.abs().sum() > 0
    assert student.network.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.model.parameters())
    with pytest.raises(ModelError, match="Feature terms need a teacher in this process, and given gives logits alone"):
        LogitDistillation(student, Given(rows(1)), optimizer=ADAM, features=[hint])


def test_parts_are_written_by_name():
    class Config(Spec):
        loss: Part(LogitLoss) = KD()

    assert Config(loss="DIST").loss == DIST()
    assert Config(loss={"name": "DKD", "alpha": 1, "beta": 2.0}).loss == DKD(1.0, 2.0)
    assert Config(loss={"name": "KD", "divergence": "ReverseKL"}).loss == KD(4.0, ReverseKL())
    again = Config(**Config(loss=KD(2.0, ReverseKL())).model_dump())
    assert again.loss == KD(2.0, ReverseKL())
    with pytest.raises(ValidationError, match="temprature is not an option of KD. Did you mean temperature"):
        Config(loss={"name": "KD", "temprature": 2.0})


def test_bad_input_is_refused():
    with pytest.raises(RecipeError, match=r"KD\.temperature must be positive, got 0"):
        KD(0.0)
    with pytest.raises(RecipeError, match="Standardize.of must be both, teacher or student, got 'all'"):
        Standardize(of="all")
    with pytest.raises(RecipeError, match="label_smoothing must lie in"):
        Supervised(Table(rows(0)), optimizer=ADAM, label_smoothing=1.0)
    with pytest.raises(ModelError, match=r"Student logits are \[6, 5\], those of teacher given \[6, 7\]"):
        objective(KD(), teacher=rows(1, classes=7)).loss("student", batch_of(), 0)
    labelled = lambda labels: ImageBatch(torch.arange(2), torch.arange(2.0).view(-1, 1, 1, 1), torch.tensor(labels))
    for it in (objective(KD()), objective(DKD(), cross_entropy=0.0)):
        with pytest.raises(DataError, match=r"Labels lie in 1\.\.5, but the student knows the classes 0\.\.4"):
            it.loss("student", labelled([1, 5]), 0)
    with pytest.raises(DataError, match="A batch holds no samples"):
        objective(KD()).loss("student", batch_of(0), 0)
    served = Given(rows(1))
    served.gives = frozenset({TokenLogp})
    with pytest.raises(SignalError, match="LogitDistillation needs FullLogits, but teacher given gives TokenLogp"):
        LogitDistillation(Table(rows(0)), served, optimizer=ADAM)


def test_constant_logits_give_finite_gradients():
    value, g = gradient(objective(KD(2.0), student=torch.zeros(B, V).double(), transforms=Z, **KD_ALONE))
    assert math.isfinite(value.item())
    assert g.isfinite().all()


# ---------------------------------------------------------------- transforms and weights


def test_a_temperature_before_the_loss_is_one_in_it_but_for_its_square():
    before, _ = gradient(objective(KD(1.0), transforms=[Tempered(3.0, 3.0)], **KD_ALONE))
    inside, _ = gradient(objective(KD(3.0), **KD_ALONE))
    assert_close(9 * before, inside)
    z, v = objective(KD(), transforms=[Tempered(2.0, 4.0)]).compared(rows(0), rows(1))
    assert_close((z, v), (rows(0) / 2, rows(1) / 4))


def test_a_softened_teacher_gives_part_of_its_mass_to_all():
    z, v = objective(KD(), transforms=[Softened(0.2)]).compared(rows(0), rows(1))
    assert torch.equal(z, rows(0))
    assert_close(v.exp(), 0.8 * rows(1).softmax(-1) + 0.2 / V)
    assert_close(objective(KD(), transforms=[Softened(0.0)]).compared(rows(0), rows(1))[1], rows(1))


def test_transforms_are_applied_in_order():
    score = lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    z, _ = objective(KD(), transforms=[Standardize(), Tempered(2.0, 2.0)]).compared(rows(0), rows(1))
    assert_close(z, score(rows(0)) / 2, rtol=1e-6, atol=1e-6)


def test_weights_multiply_samples_and_leave_the_count():
    labels = batch_of().labels_B
    sure = 9 * nn.functional.one_hot(labels, V) * (torch.arange(B) < 2)[:, None]
    z, v = (
        rows(0) + sure.flip(0).roll(1, 1),
        rows(1) + sure,
    )  # the teacher is right on two rows, the student on two others
    kd_B = KD(2.0)(z, v, labels)["kd"]
    pair = {"student": z, "teacher": v, **KD_ALONE}
    for of, logits in (("teacher", v), ("student", z)):
        right_B = (logits.argmax(-1) == labels).double()
        value, _ = gradient(objective(KD(2.0), weights=[Confident(of)], **pair))
        assert_close(value, (right_B * kd_B).sum() / B)
    assert Confident("teacher")(z, v, labels).tolist() != Confident("student")(z, v, labels).tolist()
    gates = [Confident("teacher"), EntropyGate("teacher", 3.0)]
    both, _ = gradient(objective(KD(2.0), weights=gates, **pair))
    assert_close(both, (gates[0](z, v, labels) * gates[1](z, v, labels) * kd_B).sum() / B)
    ce = objective(KD(), weights=[Confident()]).loss("student", batch_of(), 0).terms["ce"]
    assert_close(ce.total, nn.functional.cross_entropy(rows(0), labels, reduction="sum"))


def test_thresholds_of_confidence():
    teacher = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]).double().log()
    weigh = lambda threshold: AboveThreshold(threshold)(torch.zeros(3, 2).double(), teacher, None).tolist()
    assert weigh(0.65) == [1, 0, 1]
    assert weigh((0.95, 0.5)) == [0, 0, 1]  # of the likeliest class
    with pytest.raises(RecipeError, match="AboveThreshold has 3 thresholds, but the teacher knows 2 classes"):
        weigh((0.1, 0.1, 0.1))
    with pytest.raises(RecipeError, match="AboveThreshold.threshold must lie in"):
        AboveThreshold(1.0)


def test_class_thresholds_by_hand():
    """Counts 4, 2, 0: r = 1, 1/2, 0 and r / (2 - r) = 1, 1/3, 0."""
    predicted = torch.tensor([0, 0, 0, 0, 1, 1])
    assert_close(class_thresholds(predicted, 3, top=0.9), torch.tensor([0.9, 0.3, 0.0]).double())


def test_the_entropy_gate_compares_strictly():
    z, labels = rows(0), batch_of().labels_B
    for teacher, expected in ((3 * z, (1.0, 2.0)), (z / 3, (2.0, 1.0)), (z, (1.0, 1.0))):
        for of, high in zip(("teacher", "student"), expected):
            assert EntropyGate(of, 2.0)(z, teacher, labels).tolist() == [high] * B


# ---------------------------------------------------------------- networks that learn together


def mutual(losses=None, **networks):
    networks = networks or {"student": Table(rows(0)), "teacher": Table(rows(1))}
    losses = {"student": KD(1.0), "teacher": KD(1.0)} if losses is None else losses
    return MutualDistillation(networks, losses, optimizer=ADAM)


def test_each_network_sees_its_peer_as_a_constant():
    """Gradients are those of two separate losses: CE + KL(p_peer || p_own), (2 q - one-hot - p_peer) / B."""
    it = mutual()
    it.loss("networks", batch_of(), 0).value().backward()
    label = nn.functional.one_hot(batch_of().labels_B, V)
    q, p = rows(0).softmax(-1), rows(1).softmax(-1)
    assert_close(it.networks["student"].z.grad, (2 * q - label - p) / B)
    assert_close(it.networks["teacher"].z.grad, (2 * p - label - q) / B)
    assert len(list(it.players["networks"].parameters())) == 2


def test_the_term_of_several_peers_is_their_mean():
    tables = {name: Table(rows(i)) for i, name in enumerate(("student", "teacher_0", "teacher_1"))}
    terms = mutual({"student": KD(1.0)}, **tables).loss("networks", batch_of(), 0).terms
    kd = [KD(1.0)(rows(0), rows(i), None)["kd"].mean() for i in (1, 2)]
    assert_close(terms["student_kd"].mean(), (kd[0] + kd[1]) / 2)
    assert set(terms) == {"student_ce", "student_kd", "teacher_0_ce", "teacher_1_ce"}


def test_mutual_distillation_refuses_what_it_cannot_do():
    with pytest.raises(ModelError, match="at least two networks, got 1"):
        mutual({}, student=Table(rows(0)))
    with pytest.raises(RecipeError, match="A loss is given for judge, but the networks are student, teacher"):
        mutual({"judge": KD()})
    with pytest.raises(ModelError, match="must know the same classes; their logits are"):
        mutual({}, a=Table(rows(0)), b=Table(rows(1, classes=7))).loss("networks", batch_of(), 0)
    assert mutual({"student": DIST()}).couples == "batch" and mutual().couples == "position"

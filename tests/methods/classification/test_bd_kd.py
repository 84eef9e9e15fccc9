"""BD-KD: the gate's direction, special cases (Jeffreys, mutual learning), gradients of both sides, noise, and runs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.batch import ImageBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import Jeffreys, entropy
from potstill.methods.classification.bd_kd import BDKD, Balanced, noisy
from potstill.models.images import ImageClassifier
from potstill.objectives.logits import MutualDistillation
from potstill.run import Run, open_folder
from potstill.tasks.base import Images

B, V = 6, 5
QUICK = {
    "method": {"name": "bd_kd", "rows": 60},
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "teacher": [{"name": "mlp", "options": {"width": 16, "depth": 1}}],
    "train": {"steps": 3, "batch": 16, "trackers": [], "device": "cpu"},
}


def rows(seed, batch=B):
    return 2 * torch.randn(batch, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kls(z, v, t=1.0):
    """(KL(p || q), KL(q || p)) of the softened rows."""
    log_p, log_q = (v / t).log_softmax(-1), (z / t).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)


def whole(z, v, **options):
    return torch.stack(list(Balanced(**options)(z, v, None).values())).sum(0)


def test_nu_one_is_the_plain_pair():
    z, v = rows(0), rows(1)
    forward, reverse = kls(z, v)
    assert_close(whole(z, v, nu=1.0), forward + reverse)
    pair = dict(teacher_logp=v.log_softmax(-1), student_logp=z.log_softmax(-1))
    assert_close(whole(z, v, nu=1.0), Jeffreys()(**pair))
    assert_close(whole(z, v, mode="sum", nu=3.0), forward + reverse)
    assert_close(whole(z, v, mode="sum", average=True), (forward + reverse) / 2)
    for mode, kl in (("forward", forward), ("reverse", reverse)):
        assert_close(whole(z, v, mode=mode, nu=3.0), kl)


def test_the_gate_stresses_forward_kl_where_the_student_is_surer():
    z = rows(0)
    for teacher, weights in ((3 * z, (1, 2)), (z / 3, (2, 1))):
        parts = Balanced(2.0)(z, teacher, None)
        forward, reverse = kls(z, teacher)
        assert_close(parts, {"forward": weights[0] * forward, "reverse": weights[1] * reverse})
        swapped = Balanced(2.0, mode="swapped")(z, teacher, None)
        assert_close(swapped, {"forward": weights[1] * forward, "reverse": weights[0] * reverse})


def test_exactly_one_weight_is_high_on_random_logits():
    z, v = rows(2, 2000), rows(3, 2000)
    parts, (forward, reverse) = Balanced(2.0)(z, v, None), kls(z, v)
    high = torch.stack([parts["forward"] / forward, parts["reverse"] / reverse]).round()
    assert torch.equal(high.sum(0), torch.full((2000,), 3.0).double())
    surer = entropy(v.log_softmax(-1)) > entropy(z.log_softmax(-1))
    assert torch.equal(high[0] == 2, surer)


def test_equal_networks_have_nothing_to_learn():
    z = rows(0).requires_grad_()
    value = whole(z, rows(0))
    assert_close(value, torch.zeros(B).double(), atol=1e-12, rtol=0)
    assert_close(torch.autograd.grad(value.sum(), z)[0], torch.zeros(B, V).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_gradients_of_both_divergences(t):
    """T^2 times (q - p) / T and q (log q - log p - KL(q || p)) / T; the gate has none."""
    z, v = rows(0).requires_grad_(), rows(1)
    p, q = (v / t).softmax(-1), (z.detach() / t).softmax(-1)
    reverse = kls(z.detach(), v, t)[1][:, None]
    expected = {"forward": t * (q - p), "reverse": t * q * (q.log() - p.log() - reverse)}
    for mode, gradient in expected.items():
        g = torch.autograd.grad(whole(z, v, mode=mode, temperature=t).sum(), z)[0]
        assert_close(g, gradient)
    surer = (entropy(v.log_softmax(-1)) > entropy(z.detach().log_softmax(-1)))[:, None]
    gated = torch.where(surer, 2.0, 1.0) * expected["forward"] + torch.where(surer, 1.0, 2.0) * expected["reverse"]
    assert_close(torch.autograd.grad(whole(z, v, temperature=t).sum(), z)[0], gated)


def test_entropies_are_untempered_unless_asked():
    """A pair whose order of entropies turns round with the temperature."""
    z, v = torch.tensor([[4.0, 0.0, 0.0]]).double(), torch.tensor([[5.0, 5.0, -20.0]]).double()
    at = lambda t: entropy((v / t).log_softmax(-1)) > entropy((z / t).log_softmax(-1))
    assert at(1.0).item() and not at(4.0).item()
    forward, reverse = (16 * kl for kl in kls(z, v, 4.0))
    assert_close(Balanced(temperature=4.0)(z, v, None), {"forward": 2 * forward, "reverse": reverse})
    assert_close(Balanced(temperature=4.0, tempered=True)(z, v, None), {"forward": forward, "reverse": 2 * reverse})


# ---------------------------------------------------------------- both networks


class Table(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.z = nn.Parameter(logits)

    def forward(self, images):
        return self.z[images.flatten().long()]


def objective(config):
    networks = {"student": Table(rows(0)), "teacher": Table(rows(1))}
    return MutualDistillation(networks, config.losses(), optimizer=OptimizerSpec(), cross_entropy=config.cross_entropy)


@pytest.mark.parametrize("regulariser", ["none", "kl_s_t", "kl_t_s", "gated"])
def test_the_teachers_regulariser(regulariser):
    """kl_s_t is KL(p_s || p_t) with the student constant: its gradient in z_t is p_t - p_s."""
    ids = torch.arange(B)
    it = objective(BDKD(regulariser=regulariser, teacher_distillation=0.5))
    loss = it.loss("networks", ImageBatch(ids, ids.double().view(-1, 1, 1, 1), ids % V), 0)
    own = [term.mean() for name, term in loss.terms.items() if name.startswith("teacher") and name != "teacher_ce"]
    t_from_s, s_from_t = kls(rows(1), rows(0))  # KL(p_s || p_t), KL(p_t || p_s)
    surer = entropy(rows(0).log_softmax(-1)) > entropy(rows(1).log_softmax(-1))
    gated = torch.where(surer, 2.0, 1.0) * t_from_s + torch.where(surer, 1.0, 2.0) * s_from_t
    expected = {"none": 0 * t_from_s, "kl_s_t": t_from_s, "kl_t_s": s_from_t, "gated": gated}[regulariser]
    assert_close(torch.stack([*own, torch.zeros(()).double()]).sum(), 0.5 * expected.mean())
    student = sum(term.mean() for name, term in loss.terms.items() if name.startswith("student"))
    gradients = torch.autograd.grad(student, [it.networks["student"].z, it.networks["teacher"].z], allow_unused=True)
    assert gradients[0] is not None and gradients[1] is None
    if own:
        of_teacher = torch.autograd.grad(
            sum(own), [it.networks["student"].z, it.networks["teacher"].z], allow_unused=True
        )
        assert of_teacher[0] is None
        if regulariser == "kl_s_t":
            assert_close(of_teacher[1], 0.5 * (rows(1).softmax(-1) - rows(0).softmax(-1)) / B)


def test_without_divergences_the_networks_are_independent():
    assert BDKD(distillation=0, regulariser="none").losses() == {}
    assert BDKD(mode="forward").losses() == {
        "student": Balanced(mode="forward"), "teacher": Balanced(mode="forward")  # deep mutual learning
    }  # fmt: skip


def test_label_noise_moves_a_share_to_other_classes_evenly():
    rows_ = Images(torch.zeros(20000, 1, 1, 1), torch.arange(20000) % 10)
    moved = noisy(rows_, 0.2, 10, seed=0)
    wrong = moved.labels != rows_.labels
    assert abs(wrong.double().mean().item() - 0.2) < 0.01
    shift = ((moved.labels - rows_.labels) % 10)[wrong].bincount(minlength=10)
    assert shift[0] == 0 and shift[1:].min() > 0.8 * shift[1:].max()
    assert not torch.equal(noisy(rows_, 0.2, 10, seed=1).labels, moved.labels)
    assert torch.equal(noisy(rows_, 0.2, 10, seed=0).labels, moved.labels)


# ---------------------------------------------------------------- runs


def run_of(tmp_path, **changes):
    plan = recipes.resolve(recipes.apply(QUICK, changes))
    open_folder(tmp_path / "run", recipes.write(plan))
    return Run(plan, tmp_path / "run")


@pytest.mark.needs("sklearn")
def test_a_run_trains_both_from_scratch_and_exports_the_student(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    run = run_of(tmp_path, **{"method.control": True, "method.label_noise": 0.1, "train.steps": 40, "train.lr": 0.01})
    metrics = run.execute().metrics
    assert not (tmp_path / "cache" / "models").exists()  # no teacher is trained before
    assert metrics["accuracy"] > 0.3 and metrics["teacher_accuracy"] > 0.3 and "control_ece" in metrics
    saved = ImageClassifier.from_pretrained(run.folder / "student")
    assert run.evaluate(saved)["accuracy"] == metrics["accuracy"]
    assert sum(p.numel() for p in saved.parameters()) == metrics["parameters"] < metrics["teacher_parameters"]


@pytest.mark.needs("sklearn")
def test_several_teachers(tmp_path):
    run = run_of(tmp_path, teacher=["mlp", {"name": "mlp", "options": {"width": 12}}])
    run.execute()
    logged = (run.folder / "metrics.jsonl").read_text()
    assert all(f"networks/{name}" in logged for name in ("student_forward", "teacher_0_forward", "teacher_1_ce"))


@pytest.mark.needs("sklearn")
def test_bad_options_are_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match=r"method.nu: input should be greater than or equal to 1"):
        run_of(tmp_path, **{"method.nu": 0.5})
    with pytest.raises(RecipeError, match=r"Balanced.nu must be at least 1, got 0.5"):
        Balanced(0.5)
    with pytest.raises(RecipeError, match=r"method.regulariser: input should be 'none', 'kl_s_t'"):
        run_of(tmp_path, **{"method.regulariser": "kl"})

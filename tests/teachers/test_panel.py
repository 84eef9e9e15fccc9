"""Panels and trust regions are the distributions that their words say, at every row with its own weights."""

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, HiddenAndHead, TokenLogp
from potstill.divergences import ForwardKL
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import EMATeacher, LiveTeacher, LocalTeacher, Panel, PrivilegedTeacher, TrustRegion

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int, tokenizer=TOKENIZER) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16, heads=2).double()


def rows() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(5, TOKENIZER.vocab_size, (2, 6), generator=generator)
    attention_BT = torch.arange(6)[None] < torch.tensor([6, 4])[:, None]
    return TokenBatch(torch.arange(2), tokens_BT, attention_BT, attention_BT & (torch.arange(6) >= 1))


TEACHERS = [LocalTeacher(model(seed), f"t{seed}") for seed in (1, 2)]
SHARP = [LocalTeacher(model(seed), f"s{seed}") for seed in (3, 4)]
for teacher in (*TEACHERS, *SHARP):  # fresh weights all say nearly the same
    for parameter in teacher.model.parameters():
        parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)


def logits(teacher, batch=None):
    return teacher.score(batch or rows(), FullLogits).logits


def mixed(combine: str, weights_NK: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log of the combined distribution, by hand."""
    logp = torch.stack([(logits(t) / temperature).log_softmax(-1) for t in TEACHERS], 1)
    if combine == "mixture":
        return (weights_NK[..., None] * logp.exp()).sum(1).log()
    return (weights_NK[..., None] * logp).sum(1).log_softmax(-1)


@pytest.mark.parametrize("combine", ["mixture", "product"])
def test_fixed_weights_combine_by_hand_whatever_their_scale(combine):
    expected = mixed(combine, torch.tensor([0.3, 0.7], dtype=torch.float64).expand(8, 2))
    for weights in ([0.3, 0.7], [3, 7]):
        found = logits(Panel(TEACHERS, weights, combine))
        assert_close(found, expected)
        assert_close(found.exp().sum(-1), torch.ones(8, dtype=torch.float64))
    assert_close(logits(Panel(TEACHERS, None, combine)), mixed(combine, torch.full((8, 2), 0.5, dtype=torch.float64)))
    assert_close(logits(Panel(TEACHERS, [0, 1], combine)), logits(TEACHERS[1]).log_softmax(-1))
    assert_close(logits(Panel(TEACHERS[:1], None, combine)), logits(TEACHERS[0]).log_softmax(-1))


@pytest.mark.parametrize("combine", ["mixture", "product"])
def test_rows_may_weigh_their_teachers_differently(combine):
    batch, panel = rows(), Panel(TEACHERS, "trust", combine)
    batch.extra["trust"] = [[1.0, 0.0], [0.25, 0.75]]  # 5 positions of the first row, 3 of the second
    by_position = torch.tensor([[1.0, 0.0]] * 5 + [[0.25, 0.75]] * 3, dtype=torch.float64)
    assert_close(logits(panel, batch), mixed(combine, by_position))
    chosen = mixed(combine, by_position).gather(-1, batch.tokens_counted[:, None])[:, 0]
    assert_close(panel.score(batch, TokenLogp).logp_N, chosen)
    batch.extra["trust"] = torch.tensor(batch.extra["trust"])
    assert_close(logits(panel, batch), mixed(combine, by_position))


@pytest.mark.parametrize("combine", ["mixture", "product"])
def test_a_temperature_is_that_of_the_teachers_and_survives_the_objective(combine):
    """An objective divides the panel's logits by T: what it compares with is the combination of the softened teachers."""
    expected = mixed(combine, torch.full((8, 2), 0.5, dtype=torch.float64), temperature=2.0)
    given = logits(Panel(TEACHERS, None, combine, temperature=2.0))
    assert_close((given / 2.0).log_softmax(-1), expected)
    plain = (logits(Panel(TEACHERS, None, combine)) / 2.0).log_softmax(-1)
    same = (plain - expected).abs().max() < 1e-9
    assert same == (combine == "product"), "a product commutes with the temperature, a mixture does not"


def test_a_product_subtracts_a_teacher_and_a_mixture_refuses_to():
    contrast = logits(Panel(TEACHERS, [1.5, -0.5], "product"))
    assert_close(contrast, (1.5 * logits(TEACHERS[0]) - 0.5 * logits(TEACHERS[1])).log_softmax(-1))
    with pytest.raises(RecipeError, match="at least 0 and a positive sum"):
        Panel(TEACHERS, [1.5, -0.5], "mixture")


def test_the_smallest_vocabulary_is_compared():
    wide = model(5)
    wide.network.resize_token_embeddings(16, mean_resizing=False)
    panel = Panel([LocalTeacher(wide), *TEACHERS])
    assert panel.vocabulary == TOKENIZER.vocab_size == logits(panel).shape[-1]
    TokenDistillation(model(0), panel, ForwardKL(), optimizer=OptimizerSpec(), seed=0).loss("student", rows(), 0)


def test_a_panel_moves_and_is_saved_as_its_teachers_are():
    student = model(0)
    average = EMATeacher(student, 0.5, ramp=False)
    panel = Panel([average, TEACHERS[0], PrivilegedTeacher(average, lambda batch: batch)])
    assert list(panel.state) == [average.state] and Panel(TEACHERS).state is None
    distilled = TokenDistillation(student, panel, ForwardKL(), optimizer=OptimizerSpec(), seed=0)
    before = logits(panel)
    with torch.no_grad():
        student.network.model.layers[0].mlp.up_proj.weight.add_(1.0)
    distilled.after_step("student", 0)
    assert int(average.ema.updates) == 1
    assert (logits(panel) - before).abs().max() > 1e-6


@pytest.mark.parametrize("combine", ["mixture", "product"])
def test_a_trust_region_lies_between_teacher_and_live_student(combine):
    student, teacher = SHARP[0].model, TEACHERS[0]
    region = TrustRegion(teacher, student, student_share=0.3, combine=combine)
    z_T, z_S = logits(teacher), logits(LiveTeacher(student))
    expected = (0.7 * z_T + 0.3 * z_S).log_softmax(-1)
    if combine == "mixture":
        expected = (0.7 * z_T.softmax(-1) + 0.3 * z_S.softmax(-1)).log()
    assert_close(logits(region), expected)
    none = TrustRegion(teacher, student, student_share=0.0, combine=combine)
    assert_close(logits(none), z_T.log_softmax(-1))
    assert "near the student" in region.name and region.state is None


def test_a_trust_region_follows_the_student_and_gets_no_gradient():
    student = model(0)
    region = TrustRegion(TEACHERS[0], student)
    before = logits(region)
    distilled = TokenDistillation(student, region, ForwardKL(), optimizer=OptimizerSpec(), seed=0)
    distilled.loss("student", rows(), 0).value().backward()
    log_p, log_q = before, student.counted_logits(rows()).log_softmax(-1)
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        student.network.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert (logits(region) - before).abs().max() > 1e-9


def test_a_panel_has_no_gradient_even_of_teachers_that_do():
    class Open(LocalTeacher):
        def score(self, batch, need):
            return FullLogits(super().score(batch, need).logits.requires_grad_())

    assert not logits(Panel([Open(TEACHERS[0].model), TEACHERS[1]])).requires_grad


def test_what_is_no_panel_is_refused():
    with pytest.raises(RecipeError, match="at least one teacher"):
        Panel([])
    with pytest.raises(RecipeError, match="must be mixture or product, got 'sum'"):
        Panel(TEACHERS, combine="sum")
    with pytest.raises(RecipeError, match="3 weights for 2 teachers"):
        Panel(TEACHERS, [1, 1, 1])
    with pytest.raises(RecipeError, match="a positive sum"):
        Panel(TEACHERS, [0.0, 0.0], "product")
    with pytest.raises(ModelError, match="different vocabularies"):
        Panel([TEACHERS[0], LocalTeacher(model(1, character_tokenizer(["xyz"])))])
    with pytest.raises(SignalError, match="mixture of t1, t2 gives no HiddenAndHead"):
        Panel(TEACHERS).score(rows(), HiddenAndHead)
    with pytest.raises(DataError, match=r"extra\['trust'\] is missing"):
        logits(Panel(TEACHERS, "trust"))
    batch = rows()
    batch.extra["trust"] = [[1.0], [1.0]]
    with pytest.raises(DataError, match=r"a weight a row and teacher, \[2, 2\], got \[2, 1\]"):
        logits(Panel(TEACHERS, "trust"), batch)
    for share in (-0.1, 1.0):
        with pytest.raises(RecipeError, match=r"student_share must lie in \[0, 1\)"):
            TrustRegion(TEACHERS[0], model(0), student_share=share)

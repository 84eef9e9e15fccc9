"""Teachers that move: the closed form of an average, effective weights under adapters, resuming, and the live self."""

import copy

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, HiddenAndHead, TokenLogp
from potstill.divergences import ReverseKL
from potstill.models.causal import CausalLM
from potstill.models.lora import merged
from potstill.models.spec import LoraSpec
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import (
    EMATeacher,
    LiveTeacher,
    LocalTeacher,
    PrivilegedTeacher,
    ProgressiveTeacher,
    RefreshedTeacher,
    follow,
    moving_state,
)
from potstill.teachers.moving import effective_state

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int, lora: bool = False) -> CausalLM:
    torch.manual_seed(seed)
    made = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, width=16, heads=2).double()
    return made.with_lora(LoraSpec(r=2, alpha=8)).double() if lora else made


def rows() -> TokenBatch:
    tokens_BT = torch.randint(5, TOKENIZER.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    counted_BT = torch.ones(2, 6, dtype=torch.bool)
    counted_BT[:, :2] = False
    return TokenBatch(torch.arange(2), tokens_BT, torch.ones(2, 6, dtype=torch.bool), counted_BT)


def moved(student: CausalLM, step: int) -> CausalLM:
    """What is trainable, changed in place, differently at each step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return student


def whole(student: CausalLM) -> dict[str, torch.Tensor]:
    """The weights that a student computes with, from a merged copy."""
    return {f"network.{name}": value.clone() for name, value in merged(student.network).state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
def test_effective_weights_are_those_of_the_merged_network(lora):
    student = moved(model(0, lora), 1)
    found, expected = effective_state(student), whole(student)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value)
    plain = LocalTeacher(model(0))
    plain.model.load_state_dict(found)
    assert_close(plain.score(rows(), FullLogits).logits, student.counted_logits(rows()).detach())


def test_effective_weights_of_merged_adapters_are_not_added_twice():
    from peft.tuners.tuners_utils import BaseTunerLayer

    student = moved(model(0, lora=True), 1)
    expected = whole(student)
    for layer in student.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    found = effective_state(student)
    for name, value in expected.items():
        assert_close(found[name], value)


@pytest.mark.parametrize("lora", [False, True])
def test_the_average_has_its_closed_form(lora):
    """After n updates: beta^n theta_0 + (1 - beta) sum_i beta^(n - i) theta_i, tied weights too."""
    student, beta, n = model(0, lora), 0.9, 4
    teacher, seen = EMATeacher(student, beta, ramp=False), [whole(student)]
    for step in range(n):
        teacher.after_step(moved(student, step), step)
        seen.append(whole(student))
    names = [name for name, value in seen[0].items() if value.is_floating_point()]
    assert any("embed_tokens" in name for name in names) and any("lm_head" in name for name in names)
    average = teacher.model.state_dict()
    assert average.keys() == seen[0].keys()
    for name in names:
        closed = beta**n * seen[0][name]
        closed = closed + (1 - beta) * sum(beta ** (n - i) * seen[i][name] for i in range(1, n + 1))
        assert_close(average[name], closed, rtol=1e-9, atol=1e-12)
    changed = [name for name in names if (average[name] - seen[0][name]).abs().max() > 1e-3]
    assert changed, "an average of base weights would never move"
    assert all("proj" in name for name in changed) == lora
    assert all(p.requires_grad for p in student.parameters() if p is not None) != lora


def test_the_average_is_not_that_of_the_factors():
    student = model(0, lora=True)
    teacher = EMATeacher(student, 0.5, ramp=False)
    factors = copy.deepcopy(student)
    for step in range(2):
        moved(student, step)
        teacher.after_step(student, step)
        for mine, theirs in zip(factors.parameters(), student.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.5)
    other = whole(factors)
    gap = max((value - other[name]).abs().max() for name, value in teacher.model.state_dict().items())
    assert gap > 1e-3


def test_an_average_moves_every_n_updates_and_a_refreshed_copy_forgets():
    student = model(0)
    slow, copied = EMATeacher(student, 0.5, every=3, ramp=False), RefreshedTeacher(student, every=2)
    seen = [whole(student)]
    name = next(name for name in seen[0] if "q_proj" in name)
    for step in range(6):
        follow(moved(student, step), step, slow, copied)
        seen.append(whole(student))
        assert_close(copied.model.state_dict()[name], seen[(step + 1) // 2 * 2][name])
    closed = 0.25 * seen[0][name] + 0.25 * seen[3][name] + 0.5 * seen[6][name]
    assert_close(slow.model.state_dict()[name], closed)


def test_the_ramp_is_that_of_the_library_average():
    student = model(0)
    teacher = EMATeacher(student, 0.99)
    name, before = next((n, v) for n, v in whole(student).items() if "q_proj" in n)
    teacher.after_step(moved(student, 0), 0)
    assert_close(teacher.model.state_dict()[name], before.lerp(whole(student)[name], 1 - 2 / 11))


def test_a_row_of_teachers_takes_turns():
    teachers = [LocalTeacher(model(seed), f"checkpoint {seed}") for seed in range(3)]
    growing = ProgressiveTeacher(teachers, [0, 2, 5])
    now = []
    for step in range(7):
        now.append(growing.name)
        assert growing.model is teachers[int(now[-1][-1])].model
        growing.after_step(model(0), step)
    assert [int(name[-1]) for name in now] == [0, 0, 1, 1, 1, 2, 2]
    assert_close(growing.score(rows(), FullLogits).logits, teachers[2].score(rows(), FullLogits).logits)
    teachers[1].gives = frozenset({FullLogits})
    assert ProgressiveTeacher(teachers, [0, 2, 5]).gives == {FullLogits}, "what all of them give"


def test_what_moves_is_restored_with_the_objective():
    def fresh():
        student = model(0, lora=True)
        teacher = PrivilegedTeacher(EMATeacher(student, 0.5, ramp=False), lambda batch: batch)
        return TokenDistillation(student, teacher, ReverseKL(), optimizer=OptimizerSpec(), seed=0)

    run, resumed = fresh(), fresh()
    for step in range(2):
        moved(run.student, step)
        run.after_step("student", step)
    resumed.load_state_dict({name: value.clone() for name, value in run.state_dict().items()})
    for distilled in (run, resumed):
        moved(distilled.student, 7)
        distilled.after_step("student", 2)
    assert_close(run.loss("student", rows(), 3).value(), resumed.loss("student", rows(), 3).value())
    clock = ProgressiveTeacher([LocalTeacher(model(0), "a"), LocalTeacher(model(1), "b")], [0, 3])
    other = ProgressiveTeacher(clock.teachers, clock.starts)
    clock.after_step(model(0), 2)
    other.state.load_state_dict(clock.state.state_dict())
    assert (clock.name, other.name) == ("b", "b")


def test_states_are_held_and_moved_once():
    student = model(0)
    average = EMATeacher(student, 0.5, ramp=False)
    pair = [PrivilegedTeacher(average, lambda b: b), PrivilegedTeacher(average, lambda b: b), LocalTeacher(model(1))]
    assert list(moving_state(*pair)) == [average.state]
    name, before = next((n, v) for n, v in whole(student).items() if "q_proj" in n)
    follow(moved(student, 0), 0, *pair)
    assert_close(average.model.state_dict()[name], before.lerp(whole(student)[name], 0.5))


@pytest.mark.parametrize("lora", [False, True])
def test_the_live_self_follows_at_once_and_keeps_its_mode(lora):
    student, batch = model(0, lora), rows()
    live = LiveTeacher(student)
    for step in range(2):
        moved(student, step).train()
        assert_close(live.score(batch, FullLogits).logits, student.counted_logits(batch).detach())
    head = live.score(batch, HiddenAndHead)
    assert not head.head_VD.requires_grad and not head.hidden_ND.requires_grad
    assert_close(head.logits(), student.counted_logits(batch).detach())
    assert not live.score(batch, TokenLogp).logp_N.requires_grad
    assert student.training and any(p.requires_grad for p in student.parameters())


def test_the_live_self_answers_without_dropout():
    dropped = model(0).with_lora(LoraSpec(r=2, alpha=8, dropout=0.9)).double()
    moved(dropped, 0).train()
    live = LiveTeacher(dropped)
    assert_close(live.score(rows(), FullLogits).logits, live.score(rows(), FullLogits).logits)
    assert dropped.training


def test_bad_numbers_are_refused():
    student, local = model(0), LocalTeacher(model(1))
    with pytest.raises(RecipeError, match=r"decay in \[0, 1\] and every of at least 1, got 1.5 and 1"):
        EMATeacher(student, 1.5)
    with pytest.raises(RecipeError, match="got 0.5 and 0"):
        EMATeacher(student, 0.5, every=0)
    for teachers, starts in (([], []), ([local], [0, 1]), ([local], [1]), ([local, local], [0, 0])):
        with pytest.raises(RecipeError, match="the first 0 and each later"):
            ProgressiveTeacher(teachers, starts)
    torch.manual_seed(0)
    other = CausalLM.PACKAGED["llama-tiny"](tokenizer=character_tokenizer(["xyz"]), width=16, heads=2)
    with pytest.raises(ModelError, match="different vocabularies"):
        ProgressiveTeacher([local, LocalTeacher(other)], [0, 1])

"""Local teachers: what each signal is, the frozen start, and the same tokens after another context."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import PointBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import Features, FullLogits, HiddenAndHead, TokenLogp
from potstill.divergences import ReverseKL
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import EMATeacher, FrozenStart, LiveTeacher, LocalTeacher, Panel, PrivilegedTeacher, TrustRegion
from potstill.teachers.local import check_vocabulary

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int, tokenizer=TOKENIZER) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16, heads=2).double()


def rows(seed: int = 0) -> TokenBatch:
    """Three rows of 7, 5 and 3 tokens, the first two of each as context."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(5, TOKENIZER.vocab_size, (3, 7), generator=generator)
    attention_BT = torch.arange(7)[None] < torch.tensor([7, 5, 3])[:, None]
    return TokenBatch(torch.arange(3), tokens_BT, attention_BT, attention_BT & (torch.arange(7) >= 2))


def after(batch: TokenBatch, token: int = 5) -> TokenBatch:
    """The same rows with two more tokens in front."""
    front = lambda x, fill: torch.cat([torch.full((len(batch), 2), fill, dtype=x.dtype), x], 1)
    return TokenBatch(
        batch.ids_B, front(batch.tokens_BT, token), front(batch.attention_BT, True), front(batch.counted_BT, False)
    )


def test_signals_are_those_of_the_model_at_the_counted_tokens():
    net, batch = model(0), rows()
    teacher = LocalTeacher(net, "mine")
    logits_BTV = net(batch.tokens_BT, batch.attention_BT)
    expected = torch.cat([logits_BTV[b, :-1][batch.counted_BT[b, 1:]] for b in range(3)])
    assert_close(teacher.score(batch, FullLogits).logits, expected)
    assert_close(teacher.score(batch, HiddenAndHead).logits(), expected)
    chosen = expected.log_softmax(-1).gather(-1, batch.tokens_counted[:, None])[:, 0]
    assert_close(teacher.score(batch, TokenLogp).logp_N, chosen, check_dtype=False)
    assert teacher.name == "mine" and LocalTeacher(net).name == net.name
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_what_a_teacher_cannot_say_is_refused():
    teacher = LocalTeacher(model(0), "mine")
    with pytest.raises(SignalError, match="teacher mine gives no Features"):
        teacher.score(rows(), Features)
    with pytest.raises(SignalError, match="cannot score a PointBatch"):
        teacher.score(PointBatch(torch.arange(2), torch.zeros(2, 2)), FullLogits)


def test_the_frozen_start_is_another_copy():
    student = model(0)
    start = FrozenStart(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    assert_close(start.score(rows(), FullLogits).logits, LocalTeacher(model(0)).score(rows(), FullLogits).logits)
    assert all(p.requires_grad for p in student.parameters()), "the student is still to be trained"


def test_a_privileged_teacher_scores_the_same_tokens_after_its_own_context():
    teacher, batch = LocalTeacher(model(0)), rows()
    expected = teacher.score(after(batch), FullLogits).logits
    assert_close(PrivilegedTeacher(teacher, after).score(batch, FullLogits).logits, expected)
    batch.privileged = after(batch)
    assert_close(PrivilegedTeacher(teacher).score(batch, FullLogits).logits, expected)
    assert (expected - teacher.score(batch, FullLogits).logits).abs().max() > 1e-4
    assert PrivilegedTeacher(teacher).model is teacher.model
    assert PrivilegedTeacher(teacher).state is None
    with pytest.raises(DataError, match="needs batches with a privileged context"):
        PrivilegedTeacher(teacher).score(rows(), FullLogits)
    other = lambda b: TokenBatch(b.ids_B, b.tokens_BT + 1, b.attention_BT, b.counted_BT)
    with pytest.raises(DataError, match="other counted tokens than the student's"):
        PrivilegedTeacher(teacher, other).score(batch, FullLogits)


def test_vocabularies_are_compared_by_what_their_tokens_mean():
    same = character_tokenizer(["abcdefg "])
    assert check_vocabulary(model(0), LocalTeacher(model(1, same))) == TOKENIZER.vocab_size
    with pytest.raises(ModelError, match=r"different vocabularies \(13 and 8 entries\)"):
        check_vocabulary(model(0), LocalTeacher(model(1, character_tokenizer(["xyz"]))))
    bare = SimpleNamespace(tokenizer=None, vocabulary=13)
    padded = SimpleNamespace(tokenizer=TOKENIZER, vocabulary=16)
    assert check_vocabulary(model(0), bare) == 13 == check_vocabulary(model(0), padded)
    with pytest.raises(ModelError, match="different vocabularies"):
        check_vocabulary(bare, padded)


KINDS = {
    "local": lambda student: LocalTeacher(model(1)),
    "frozen start": FrozenStart,
    "average": EMATeacher,
    "itself, privileged": lambda student: PrivilegedTeacher(LiveTeacher(student), after),
    "average, privileged": lambda student: PrivilegedTeacher(EMATeacher(student), after),
    "panel": lambda student: Panel([LocalTeacher(model(1)), LocalTeacher(model(2))]),
    "trust region": lambda student: TrustRegion(LocalTeacher(model(1)), student),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_teacher_is_trained_or_saved_but_what_moves(kind):
    """The loss's gradient is that of the student alone, as if the teacher's signal were a constant."""
    student, batch = model(0), rows()
    teacher = KINDS[kind](student)
    distilled = TokenDistillation(student, teacher, ReverseKL(), optimizer=OptimizerSpec(), seed=0)
    distilled.loss("student", batch, 0).value().backward()
    said = teacher.score(batch, FullLogits).logits
    assert not said.requires_grad
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    log_p, log_q = said.log_softmax(-1), student.counted_logits(batch).log_softmax(-1)
    (log_q.exp() * (log_q - log_p)).sum(-1).mean().backward()
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)
    trained = {id(p) for p in distilled.players["student"].parameters()}
    assert trained == {id(p) for p in student.parameters()}
    saved = [name for name in distilled.state_dict() if not name.startswith("student.")]
    assert all(name.startswith("teacher_state.") for name in saved)
    assert bool(saved) == ("average" in kind)

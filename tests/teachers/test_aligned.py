"""A teacher with other tokens is compared by spans: what it gives, and the loss and gradient made of it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, SpanLogp
from potstill.divergences import Exact, ForwardKL, JensenShannon, ReverseKL, SampledReverseKL, TopK, event_divergence
from potstill.models.causal import CausalLM
from potstill.objectives.tokens import TokenDistillation, completed
from potstill.run import Run, open_folder
from potstill.tasks.tokens import prompt_batch
from potstill.teachers import LocalTeacher
from potstill.teachers.aligned import AlignedTeacher
from potstill.weighting import Overconfident

TEXT = "the theme of then, newer than the lower thing; the pot still is old."


def pairs_of_letters(size=120):
    """A byte-level tokenizer with some merges, unlike the characters of the student."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(
        {c for c in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT) for c in c[0]}
    )
    trained = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trained)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def student(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(0)).double()


@pytest.fixture
def foreign(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(1, tokenizer=pairs_of_letters())).double()


ROWS = [{"prompt": "the pot", "completion": " is old."}, {"prompt": "newer", "completion": " than the lower"}]


def batch_of(model, rows=ROWS):
    end = model.tokenizer.eos_token_id
    ids = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompts = prompt_batch([model.tokenizer(r["prompt"])["input_ids"] for r in rows], model.tokenizer, torch.arange(2))
    said = [[*ids(row["completion"]), end] for row in rows]
    return completed(
        PromptBatch(prompts.ids_B, prompts.tokens_BT, prompts.attention_BT, said, {"rows": rows}), model.pad_id
    )


def objective(student, teacher, estimator, **options):
    return TokenDistillation(student, teacher, estimator, optimizer=OptimizerSpec(), seed=0, **options)


def loss_and_gradient(made, batch):
    made.student.zero_grad()
    value = made.loss("student", batch, 0).value()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("estimator", [ForwardKL(), JensenShannon(0.3), ReverseKL(), SampledReverseKL()], ids=repr)
def test_with_one_vocabulary_it_is_plain_distillation(tiny_lm, student, estimator):
    teacher = LocalTeacher(CausalLM.from_pretrained(tiny_lm(1)).double())
    batch = batch_of(student)
    plain = loss_and_gradient(objective(student, teacher, estimator), batch)
    batch = batch_of(student)
    spans = loss_and_gradient(objective(student, AlignedTeacher(teacher, student.tokenizer), estimator), batch)
    assert_close(spans[0], plain[0])
    for name, gradient in plain[1].items():
        assert_close(spans[1][name], gradient, rtol=1e-6, atol=1e-10)


def test_spans_add_up_to_the_text(student, foreign):
    batch, seen = batch_of(student), batch_of(foreign)
    signal = AlignedTeacher(LocalTeacher(foreign), student.tokenizer).score(batch, SpanLogp)
    logp = foreign.counted_logits(seen).log_softmax(-1).gather(-1, seen.tokens_counted[:, None])[:, 0]
    row_N = torch.arange(2)[:, None].expand_as(seen.counted_BT)[seen.counted_BT]
    for b in range(2):
        assert_close(signal.logp_S[signal.row_S == b].sum(), logp[row_N == b].sum().detach())
    covered = sum(int(stop - start) for start, stop in signal.ranges_S2)
    assert covered == int(batch.counted_BT.sum()) > len(signal.logp_S)
    assert not signal.logp_S.requires_grad


def test_the_sampled_gradient_is_that_of_spans(student, foreign):
    batch, teacher = batch_of(student), AlignedTeacher(LocalTeacher(foreign), student.tokenizer)
    _, gradients = loss_and_gradient(objective(student, teacher, SampledReverseKL()), batch)
    signal = teacher.score(batch, SpanLogp)
    student.zero_grad()
    logits = student(batch.tokens_BT, batch.attention_BT).log_softmax(-1)
    total = 0.0
    for theirs, (start, stop), b in zip(signal.logp_S, signal.ranges_S2.tolist(), signal.row_S.tolist(), strict=True):
        own = sum(logits[b, t - 1, batch.tokens_BT[b, t]] for t in range(start, stop))
        total = total - (theirs - own).detach() * own
    (total / batch.counted_BT.sum()).backward()
    for name, p in student.named_parameters():
        assert_close(gradients[name], p.grad, rtol=1e-7, atol=1e-12)


def test_exact_divergences_compare_spans_with_the_rest_and_shared_rows_whole(student, foreign):
    batch, teacher = batch_of(student), AlignedTeacher(LocalTeacher(foreign), student.tokenizer)
    signal = teacher.score(batch, SpanLogp)
    single = signal.single_S
    assert single.any() and not single.all()
    logits = student(batch.tokens_BT, batch.attention_BT).log_softmax(-1).detach()
    d, expected = JensenShannon(0.3), 0.0
    m = 0
    for s, (start, stop) in enumerate(signal.ranges_S2.tolist()):
        b = int(signal.row_S[s])
        own = sum(logits[b, t - 1, batch.tokens_BT[b, t]] for t in range(start, stop))
        if single[s]:
            row = logits[b, start - 1]
            kept = row[signal.student_K]
            rest = torch.log1p(-kept.exp().sum())
            expected += d(teacher_logp=signal.rows(slice(m, m + 1))[0], student_logp=torch.cat([kept, rest[None]]))
            m += 1
        else:
            expected += event_divergence(d, teacher_logp=signal.logp_S[s], student_logp=own)
    value, _ = loss_and_gradient(objective(student, teacher, d), batch)
    assert_close(value, expected / batch.counted_BT.sum(), rtol=1e-6, atol=1e-9)


def test_a_weight_is_that_of_the_spans_last_token(student, foreign):
    batch, teacher = batch_of(student), AlignedTeacher(LocalTeacher(foreign), student.tokenizer)
    made = objective(student, teacher, SampledReverseKL())
    states = made._states(batch)
    weights_N = torch.zeros(len(states.tokens_N), dtype=torch.float64)
    signal = teacher.score(batch, SpanLogp)
    s = int((~signal.single_S).nonzero()[0])
    at = int(
        batch.counted_BT.flatten().cumsum(0).view(batch.counted_BT.shape)[signal.row_S[s], signal.ranges_S2[s, 1] - 1]
    )
    weights_N[at - 1] = 3.0
    total, _ = made._compare(teacher, states.hidden_ND, batch, states.tokens_N, weights_N)
    alone, seen = made._compare(teacher, states.hidden_ND, batch, states.tokens_N, torch.ones_like(weights_N))
    own = signal.logp_S[s] - seen["log_ratio"][at - 1]
    assert_close(total.detach(), -3.0 * (signal.logp_S[s] - own) * own)
    assert alone.abs() > 0


def test_what_ends_inside_a_character_has_no_span(tiny_lm, foreign):
    tokenizer = pairs_of_letters(90)
    student = CausalLM.from_pretrained(tiny_lm(0, tokenizer=tokenizer)).double()
    rows = [{"prompt": "the", "completion": "old"}, {"prompt": "the", "completion": "pot"}]
    batch = batch_of(student, rows)
    teacher = AlignedTeacher(LocalTeacher(foreign), tokenizer)
    broken = int(batch.tokens_BT[0, batch.counted_BT[0]][-2])  # the first half of a character
    teacher.pieces = tuple(b"\xc3" if i == broken else piece for i, piece in enumerate(teacher.pieces))
    signal = teacher.score(batch, SpanLogp)
    last = int(batch.counted_BT[0].nonzero()[-2])
    assert all(
        stop <= last for (_, stop), b in zip(signal.ranges_S2.tolist(), signal.row_S.tolist(), strict=True) if b == 0
    )


def test_padding_changes_nothing(student, foreign):
    teacher = AlignedTeacher(LocalTeacher(foreign), student.tokenizer)
    both = teacher.score(batch_of(student), SpanLogp)
    other = teacher.score(batch_of(student, [ROWS[1], ROWS[1]]), SpanLogp)
    assert_close(both.logp_S[both.row_S == 1], other.logp_S[other.row_S == 0])


def test_what_looks_at_single_tokens_is_refused(student, foreign):
    teacher = AlignedTeacher(LocalTeacher(foreign), student.tokenizer)
    for options in (
        {"estimator": SampledReverseKL(baseline="full")},
        {"estimator": ForwardKL(), "weighting": Overconfident()},
    ):
        with pytest.raises(SignalError, match="is compared by spans, not token by token"):
            objective(student, teacher, **options)
    with pytest.raises(SignalError, match="is compared by spans"):
        objective(student, teacher, Exact(ForwardKL(), TopK(3)))
    with pytest.raises(SignalError, match="not FullLogits"):
        teacher.score(batch_of(student), FullLogits)
    plain = batch_of(student)
    plain.extra = {}
    with pytest.raises(DataError, match="writes its own prompts from rows"):
        teacher.score(plain, SpanLogp)
    teacher.length = 4
    with pytest.raises(DataError, match="and 4 are allowed"):
        teacher.score(batch_of(student), SpanLogp)


def plan(tmp_path, tiny_lm, **teacher):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS * 8))
    recipe = {
        "method": {"name": "gkd", "on_policy": 0.5, "rollouts": {"max_new_tokens": 6}},
        "teacher": {"name": str(tiny_lm(1, tokenizer=pairs_of_letters())), "aligned": True} | teacher,
        "student": str(tiny_lm(0)),
        "data": {"jsonl": str(rows), "length": 40, "prompt_length": 16},
        "train": {"steps": 3, "batch": 4, "lr": 1e-3, "trackers": []},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipe)


def test_a_recipe_names_it(tmp_path, tiny_lm):
    made = plan(tmp_path, tiny_lm)
    open_folder(tmp_path / "run", recipes.write(made))
    result = Run(made, tmp_path / "run").execute()
    assert result.metrics["perplexity"] != result.metrics["before_perplexity"]
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["student/divergence"] >= 0 for row in logged if "student/divergence" in row)


def test_what_cannot_be_aligned_is_refused(tmp_path, tiny_lm):
    same = plan(tmp_path, tiny_lm, name=str(tiny_lm(2)))
    open_folder(tmp_path / "run", recipes.write(same))
    with pytest.raises(ModelError, match="have one vocabulary, so nothing is to be aligned"):
        Run(same, tmp_path / "run").execute()
    with pytest.raises(RecipeError, match="aligned is for a model with a tokenizer of its own"):
        recipes.resolve({"method": "gkd", "teacher": {"from": "student", "aligned": True}, "data": "english"})

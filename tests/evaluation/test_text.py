import itertools
import math

import pytest
import torch
from tests.rollouts.test_local import PAD, model_of, prompts_of
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError, NonFiniteError
from potstill.divergences import ReverseKL
from potstill.evaluation import evaluate
from potstill.evaluation.text import (
    compare,
    compare_on_rollouts,
    generation_speed,
    kept,
    perplexity,
    size,
    text_batches,
    token_divergences,
)
from potstill.rollouts.local import joined
from potstill.teachers.local import LocalTeacher

TEXTS = ["w2 w3 w4 w5", "w6", "w7 w8", "w9 w10 w2 w2 w3 w4 w5", "w3 w3 w3"]


def by_hand(model, texts=TEXTS):
    """log-probs of every next-token law, text by text without any padding."""
    rows = [model.tokenizer(text).input_ids for text in texts]
    with torch.no_grad():
        return [(row, model.eval()(torch.tensor([row]))[0, :-1].double().log_softmax(-1)) for row in rows]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_perplexity_weighs_tokens_not_texts(batch):
    model = model_of()
    nll = [-logp[i, row[i + 1]] for row, logp in by_hand(model) for i in range(len(row) - 1)]
    assert len(nll) == 3 + 0 + 1 + 6 + 2
    expected = torch.stack(nll).mean().exp().item()
    assert perplexity(model.train(), text_batches(TEXTS, model, batch=batch)) == pytest.approx(expected, rel=1e-5)
    assert model.network.training


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = model_of()
    model.network.get_output_embeddings().weight.data.zero_()
    assert perplexity(model, text_batches(TEXTS, model)) == pytest.approx(11)


@pytest.mark.parametrize("batch", [1, 3])
def test_compare_by_hand(batch):
    student, teacher, t = model_of(seed=1), model_of(), 0.8
    log_q, log_p = (torch.cat([logp for _, logp in by_hand(m)]) for m in (student, teacher))
    log_qt, log_pt = (log_q / t).log_softmax(-1), (log_p / t).log_softmax(-1)
    found = compare(student, teacher, text_batches(TEXTS, student, batch=batch), temperature=t)
    expected = {
        "forward_kl": (log_pt.exp() * (log_pt - log_qt)).sum(-1).mean().item(),
        "reverse_kl": (log_qt.exp() * (log_qt - log_pt)).sum(-1).mean().item(),
        "total_variation": (log_qt.exp() - log_pt.exp()).abs().sum(-1).mean().item() / 2,
        "agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
        "student_perplexity": perplexity(student, text_batches(TEXTS, student)),
        "teacher_perplexity": perplexity(teacher, text_batches(TEXTS, teacher)),
        "tokens": 12.0,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found["forward_kl"] - found["reverse_kl"]) > 0.01
    same = compare(teacher, teacher, text_batches(TEXTS, teacher))
    assert (same["forward_kl"], same["reverse_kl"], same["agreement"]) == pytest.approx((0, 0, 1), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_kept_by_hand(batch):
    student, start = model_of(seed=1), model_of()
    q, p = (torch.cat([logp for _, logp in by_hand(m)]).exp() for m in (student, start))
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2
    texts = text_batches(TEXTS, start, batch=batch)
    expected = {
        "known_jsd": jsd.item(),
        "known_perplexity": perplexity(student, texts),
        "before_known_perplexity": perplexity(start, texts),
    }
    assert kept(student, start, texts) == pytest.approx(expected, rel=1e-5)
    assert expected["known_perplexity"] != pytest.approx(expected["before_known_perplexity"], rel=1e-2)
    assert kept(start, start, texts)["known_jsd"] == pytest.approx(0, abs=1e-9)


class Rows:
    """A dataset of token rows, one text each."""

    def __init__(self, model):
        self.rows = text_batches(TEXTS, model, batch=len(TEXTS))[0]

    def __len__(self):
        return len(self.rows)

    def batch(self, rows, epoch=0):
        whole = self.rows
        return TokenBatch(rows, whole.tokens_BT[rows], whole.attention_BT[rows], whole.counted_BT[rows])


def test_standard_metrics_of_a_dataset():
    student, teacher = model_of(seed=1), model_of()
    batches = text_batches(TEXTS, student)
    found = evaluate(student, Rows(student), batch=2)
    assert found == pytest.approx({"perplexity": perplexity(student, batches), "tokens": 12.0})
    both = evaluate(student, Rows(student), batch=2, teacher=LocalTeacher(teacher), temperature=0.5)
    expected = compare(student, teacher, batches, temperature=0.5)
    assert both == pytest.approx({"perplexity": expected.pop("student_perplexity")} | expected, rel=1e-5)
    assert evaluate(student, Rows(student), batch=2, limit=2)["tokens"] == 3
    with pytest.raises(DataError, match="test split is empty"):
        evaluate(student, [], batch=2)


def test_left_padding_changes_nothing():
    student, teacher = model_of(seed=1), model_of()
    rows = [student.tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    counted = attention & torch.nn.functional.pad(attention[:, :-1], (1, 0))
    left = TokenBatch(torch.arange(5), tokens, attention, counted)
    expected = compare(student, teacher, text_batches(TEXTS, student))
    assert compare(student, teacher, [left]) == pytest.approx(expected, rel=1e-4)


def test_rollouts_are_the_students_own():
    """Mean KL(q || p) over the states that the student visits in two tokens, by enumeration; the teacher's differ."""
    student, teacher, prompts, n, t = (
        model_of(vocabulary=5, seed=1),
        model_of(vocabulary=5),
        prompts_of([[2, 3]]),
        1500,
        0.7,
    )
    student.network.generation_config.eos_token_id = teacher.network.generation_config.eos_token_id = None

    def mean_kl(sampler) -> float:
        texts = [list(text) for text in itertools.product(range(5), range(5))]
        batch = joined(prompts_of([[2, 3]] * 25), texts, PAD)
        with torch.no_grad():
            log_q, log_p, log_s = (
                (m.eval().counted_logits(batch) / t).log_softmax(-1).view(25, 2, 5) for m in (student, teacher, sampler)
            )
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        weight = log_s.gather(2, torch.tensor(texts)[..., None])[..., 0].sum(1).exp()
        stopped = torch.tensor([text[0] == 1 for text in texts])  # a stop token first: one state, not two
        states = torch.where(stopped, 1, 2)
        return ((weight * (kl[:, 0] + kl[:, 1] * ~stopped)).sum() / (weight * states).sum()).item()

    options = {"max_new_tokens": 2, "temperature": t, "samples_per_prompt": n}
    own = compare_on_rollouts(student, teacher, [prompts], **options)
    assert own["reverse_kl"] == pytest.approx(mean_kl(student), rel=0.04)
    assert abs(mean_kl(student) / mean_kl(teacher) - 1) > 0.1
    theirs = compare_on_rollouts(student, teacher, [prompts], sampler=teacher, **options)
    assert theirs["reverse_kl"] == pytest.approx(mean_kl(teacher), rel=0.04)


def test_token_divergences_stand_at_their_tokens():
    student, teacher = model_of(seed=1), model_of()
    pictures = token_divergences(student, teacher, TEXTS, batch=2, divergence=ReverseKL())
    assert [words for words, _ in pictures] == [text.split()[1:] for text in TEXTS]
    for (_, values), (_, log_q), (_, log_p) in zip(pictures, by_hand(student), by_hand(teacher), strict=True):
        assert_close(values, (log_q.exp() * (log_q - log_p)).sum(-1).float(), rtol=1e-4, atol=1e-5)
    means = compare(student, teacher, text_batches(TEXTS, student))
    forward = torch.cat([values for _, values in token_divergences(student, teacher, TEXTS)])
    assert forward.mean().item() == pytest.approx(means["forward_kl"], rel=1e-5)


def test_logits_of_one_micro_batch_at_a_time():
    student, teacher, seen = model_of(seed=1), model_of(), []
    student.network.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(len(out)))
    compare(student, teacher, text_batches(TEXTS, student, batch=2))
    assert seen == [3, 7, 2]


def test_heads_padded_to_different_widths_are_compared_on_shared_words():
    student, teacher = model_of(seed=1), model_of()
    before = compare(student, teacher, text_batches(TEXTS, student))
    teacher.network.resize_token_embeddings(16)
    assert compare(student, teacher, text_batches(TEXTS, student)) == pytest.approx(before, rel=1e-5)
    with pytest.raises(ModelError, match="different tokenizers"):
        compare(student, model_of(vocabulary=13), text_batches(TEXTS, student))


def test_size_counts_shared_weights_once():
    model = model_of("gpt2")
    network = model.network
    everything = sum(p.numel() for p in network.state_dict().values())
    assert size(model)["parameters"] == everything - network.lm_head.weight.numel()  # tied to the embeddings
    assert size(model)["bytes"] == 4 * size(model)["parameters"]
    assert size(model.to(torch.bfloat16))["bytes"] == 2 * size(model)["parameters"]


def test_generation_speed_counts_every_token():
    speed = generation_speed(model_of(), prompts_of([[2, 3], [4]]), max_new_tokens=3, repeats=1)
    assert math.isfinite(speed)
    assert speed > 0


def test_refuses():
    model = model_of()
    with pytest.raises(DataError, match="no text to evaluate on"):
        text_batches([], model)
    for texts in (["w2", "w3"], [""]):
        with pytest.raises(DataError, match="No token counts"):
            perplexity(model, text_batches(texts, model))
    broken = model_of()
    broken.network.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="weights are broken"):
        perplexity(broken, text_batches(TEXTS, model))
    with pytest.raises(NonFiniteError, match="weights are broken"):
        compare(model, broken, text_batches(TEXTS, model))


def test_long_texts_are_cut():
    assert text_batches(TEXTS, model_of(), max_length=3)[0].tokens_BT.shape == (5, 3)

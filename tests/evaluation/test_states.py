"""What is measured along the student's own samples, against counts by hand."""

import math

import pytest
import torch

from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError
from potstill.divergences import ReverseKL
from potstill.evaluation.states import distinct, own_states
from potstill.evaluation.text import graded
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.rollouts.local import completions_of, sample

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()


def prompts() -> list[PromptBatch]:
    ids = torch.tensor([[4, 5, 6], [5, 5, 4]])
    batch = lambda start: PromptBatch(
        torch.arange(2) + start, ids + start, torch.ones_like(ids, dtype=torch.bool), None, {"rows": ["x", "y"]}
    )
    return [batch(0), batch(2)]


def written(writer: CausalLM, tokens: int) -> list:
    return [sample(writer, batch, max_new_tokens=tokens) for batch in prompts()]


def test_means_and_places_by_hand():
    student, teacher = model(0), model(1)
    found = own_states(student, teacher, written(student, 5), max_new_tokens=5, k=3, lengths=(2, 5))
    kl, nll, overlap = {}, {}, []
    for batch in prompts():
        out = sample(student, batch, max_new_tokens=5)
        for b in range(2):
            places = out.counted_BT[b].nonzero()[:, 0].tolist()
            row = out.tokens_BT[b : b + 1], out.attention_BT[b : b + 1]
            log_q, log_p = (m(*row)[0].detach().log_softmax(-1) for m in (student, teacher))
            for r, t in enumerate(places):
                q, p = log_q[t - 1], log_p[t - 1]
                kl.setdefault(r, []).append(float(ReverseKL()(teacher_logp=p, student_logp=q)))
                nll.setdefault(r, []).append(-float(p[out.tokens_BT[b, t]]))
                overlap.append(len(set(p.topk(3).indices.tolist()) & set(q.topk(3).indices.tolist())) / 3)
    assert found["by_place"][:2] == pytest.approx([sum(kl[r]) / len(kl[r]) for r in (0, 1)], abs=1e-6)
    assert found["top_overlap"] == pytest.approx(sum(overlap) / len(overlap))
    first = nll[0] + nll[1]
    assert found["teacher_nll_2"] == pytest.approx(sum(first) / len(first), abs=1e-6)
    assert found["sample_tokens"] == pytest.approx(len(overlap) / 4)


def test_a_student_that_is_its_teacher_overlaps_wholly():
    found = own_states(model(0), model(0), written(model(0), 4), max_new_tokens=4)
    assert found["top_overlap"] == 1.0
    assert max(x for x in found["by_place"] if x is not None) < 1e-9
    assert found["student_entropy"] == pytest.approx(found["teacher_entropy"])


def test_different_n_grams():
    assert distinct([[1, 2, 1], [2, 1]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [2, 1]], 2) == 2 / 3
    assert math.isnan(distinct([[1]], 2))


def test_lengths_beyond_the_samples_are_refused():
    with pytest.raises(DataError, match="lengths up to 9 are asked"):
        own_states(model(0), model(1), written(model(0), 4), max_new_tokens=4, lengths=(9,))


def test_answers_are_graded_by_row_and_counted():
    seen = []

    def grade(row, text):
        seen.append(row)
        return float(row == "x")

    found = graded(model(0), prompts(), grade, max_new_tokens=3)
    assert found["accuracy"] == 0.5 and seen == ["x", "y", "x", "y"]
    greedy = [sample(model(0), batch, max_new_tokens=3, greedy=True) for batch in prompts()]
    assert found["answer_tokens"] == sum(len(row) for out in greedy for row in completions_of(out)) / 4
    several = graded(model(0), prompts(), grade, max_new_tokens=3, samples=2)
    assert several["accuracy"] == 0.5 and several["pass_rate"] == 0.5

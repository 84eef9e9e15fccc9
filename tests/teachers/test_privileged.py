"""Contexts that only a teacher sees: other prompts before the same tokens."""

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import ForwardKL
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import FrozenStart, PrivilegedTeacher
from potstill.teachers.privileged import PrivilegedContext, Solution

TOKENIZER = character_tokenizer(["abcdefg 0123456789+=."])
ROWS = [{"prompt": "ab=", "completion": "cd"}, {"prompt": "a=", "completion": "efg"}]


def model(seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()


def batch(rows=ROWS) -> TokenBatch:
    """Rows as rollouts have them: prompts padded on the left, completions on the right."""
    ids = lambda text: TOKENIZER(text)["input_ids"]
    prompts, said = [ids(r["prompt"]) for r in rows], [ids(r["completion"]) for r in rows]
    wide, long = max(map(len, prompts)), max(map(len, said))
    tokens, attention, counted = [], [], []
    for p, c in zip(prompts, said, strict=True):
        tokens.append([0] * (wide - len(p)) + p + c + [0] * (long - len(c)))
        attention.append([False] * (wide - len(p)) + [True] * (len(p) + len(c)) + [False] * (long - len(c)))
        counted.append([False] * wide + [True] * len(c) + [False] * (long - len(c)))
    made = (torch.tensor(x) for x in (tokens, attention, counted))
    return TokenBatch(torch.arange(len(rows)), *made, extra={"rows": list(rows)})


def test_the_completions_stay_and_the_prompts_change():
    rows = batch()
    seen = PrivilegedContext(TOKENIZER, lambda row, said: f"{row['prompt']} {said}. {row['prompt']}", 64)(rows)
    assert torch.equal(seen.tokens_counted, rows.tokens_counted)
    assert torch.equal(seen.counted_BT.sum(1), rows.counted_BT.sum(1))
    for b, row in enumerate(ROWS):
        before = seen.tokens_BT[b][seen.attention_BT[b] & ~seen.counted_BT[b]]
        read = TOKENIZER.decode(before, skip_special_tokens=True)
        assert read == f"{row['prompt']} {row['completion']}. {row['prompt']}"


def test_the_same_context_gives_no_loss_and_no_gradient():
    student = model()
    teacher = PrivilegedTeacher(FrozenStart(student), PrivilegedContext(TOKENIZER, lambda row, said: row["prompt"], 64))
    objective = TokenDistillation(student, teacher, ForwardKL(), optimizer=OptimizerSpec(), seed=0)
    value = objective.loss("student", batch(), 0).value()
    assert value.abs() < 1e-12
    value.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-10 for p in student.parameters())


def test_another_context_does_and_it_is_the_teachers_alone():
    student = model()
    context = PrivilegedContext(TOKENIZER, Solution(template="{solution} {prompt}"), 64)
    objective = TokenDistillation(
        student, PrivilegedTeacher(FrozenStart(student), context), ForwardKL(), optimizer=OptimizerSpec(), seed=0
    )
    rows = batch()
    log_p = student.counted_logits(context(rows)).log_softmax(-1)
    log_q = student.counted_logits(rows).log_softmax(-1)
    assert_close(objective.loss("student", rows, 0).value(), (log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("write", "length", "message"),
    [
        (lambda row, said: "a" * 40, 8, "has 4. tokens, and between 1 and 8 are allowed"),
        (Solution(field="proof"), 64, r"rows with a prompt and a proof, and this one is \['completion', 'prompt'\]"),
    ],
)
def test_what_cannot_be_written_is_said_plainly(write, length, message):
    with pytest.raises(DataError, match=message):
        PrivilegedContext(TOKENIZER, write, length)(batch())


def test_rows_without_prompts_are_refused():
    rows = batch()
    rows.extra = {}
    with pytest.raises(DataError, match="written from prompt rows, and this batch has none"):
        PrivilegedContext(TOKENIZER, Solution(), 64)(rows)

"""Provenance's exact statements: sentence probabilities, the order of its tests, and what each selector keeps."""

import math

import pytest
import torch
from torch.testing import assert_close

from potstill import recipe
from potstill.contracts.errors import DataError
from potstill.methods.analysis.provenance import (
    CLASSES,
    choose,
    classify,
    sentence_probabilities,
    sentences,
    teacher_sentences,
)
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.run import Run
from potstill.tasks.arithmetic import arithmetic, grade

TOKENIZER = character_tokenizer(["0123456789+=. abThe answr is"])


def test_sentences_end_at_stops_and_line_ends():
    text = "1+2=3. 3+0.5=3.5. So?\nyes; the end"
    assert [text[a:b] for a, b in sentences(text)] == ["1+2=3.", "3+0.5=3.5.", "So?", "yes;", "the end"]
    assert sentences("") == [] and sentences("  \n ") == []


class Table(torch.nn.Module):
    """A stand-in model whose next-token probability of every character is known."""

    kind, name = "causal_lm", "table"

    def __init__(self, probability) -> None:
        super().__init__()
        self.probability, self.tokenizer, self.device, self.pad_id = probability, TOKENIZER, torch.device("cpu"), 0

    def counted_logits(self, batch):
        tokens = batch.tokens_counted
        letters = TOKENIZER.convert_ids_to_tokens(tokens.tolist())
        p = torch.tensor([self.probability(c) for c in letters], dtype=torch.float64)
        logits = ((1 - p) / (len(TOKENIZER) - 1)).log()[:, None].expand(-1, len(TOKENIZER)).clone()
        logits[torch.arange(len(tokens)), tokens] = p.log()
        return logits


def test_a_sentence_of_equal_tokens_has_their_probability_whatever_its_length():
    found = sentence_probabilities(Table(lambda c: 0.3), [("1=", "ab. abba. a"), ("2=", "b")])
    assert_close(torch.tensor(found[0]), torch.full((3,), 0.3), rtol=1e-5, atol=0)
    assert_close(torch.tensor(found[1]), torch.tensor([0.3]), rtol=1e-5, atol=0)


def test_the_mean_is_geometric_over_tokens_or_characters():
    table = Table(lambda c: {"a": 0.5, "b": 0.125, ".": 0.25}.get(c, 0.9))
    ((p,),) = sentence_probabilities(table, [("1=", "ab.")])
    assert p == pytest.approx((0.5 * 0.125 * 0.25) ** (1 / 3), rel=1e-5)
    ((first, second),) = sentence_probabilities(table, [("1=", "a. b.")])
    assert first == pytest.approx((0.5 * 0.25) ** 0.5, rel=1e-5)
    assert second == pytest.approx((0.9 * 0.125 * 0.25) ** (1 / 3), rel=1e-5), "white space goes with what it leads to"
    ((_, by_character),) = sentence_probabilities(table, [("1=", "a. b.")], "character")
    assert by_character == pytest.approx((0.9 * 0.125 * 0.25) ** (1 / 2), rel=1e-5)


def test_probabilities_are_the_models_own_under_teacher_forcing():
    torch.manual_seed(0)
    model = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).eval()
    rows = [("12+3=", "12+3=15. The answer is 15."), ("1+1=", "The answer is 2.")]
    together = sentence_probabilities(model, rows)
    for (prompt, trace), found in zip(rows, together):
        ids = torch.tensor([TOKENIZER(prompt).input_ids + TOKENIZER(trace, add_special_tokens=False).input_ids])
        logp = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(trace) :, 0]
        (_, stop), *_ = sentences(trace)
        assert found[0] == pytest.approx(logp[:stop].mean().exp().item(), rel=1e-4)
        if len(found) > 1:
            assert found[1] == pytest.approx(logp[stop:].mean().exp().item(), rel=1e-4)


def random_probabilities(n: int = 500) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(n, generator=generator) for _ in range(3))


def test_every_sentence_gets_the_class_of_the_first_test_it_passes():
    s, t, d = (
        torch.tensor(x) for x in ([0.50, 0.2, 0.9, 0.5, 0.5], [0.52, 0.8, 0.1, 0.55, 0.70], [0.51, 0.5, 0.5, 0.9, 0.6])
    )
    assert [CLASSES[k] for k in classify(s, t, d, 0.05, 0.1)] == ["shared", "teacher", "student", "boosted", "teacher"]
    assert set(classify(*random_probabilities(), 0.2, 0.1).tolist()) == {0, 1, 2, 3}
    assert classify(torch.tensor([0.4]), torch.tensor([0.6]), torch.tensor([0.5]), 0.3, 0.1).item() == 0, (
        "shared is tested first"
    )


def test_identities_of_the_classes():
    s, t, d = random_probabilities()
    assert not (classify(s, t, s, 0.2, 0.2) == 3).any(), "with D = S and alpha >= beta nothing is boosted"
    kinds, swapped = classify(s, t, d, 0.05, 0.1), classify(t, s, d, 0.05, 0.1)
    assert torch.equal(swapped, torch.tensor([0, 2, 1, 3])[kinds])
    assert not ((classify(s, t, d, 0.0, 1.0) == 1) | (classify(s, t, d, 0.0, 1.0) == 2)).any()
    assert not any(teacher_sentences(s.tolist(), t.tolist(), 1.0)), "at beta 1 all is common"


def candidate(teacher: list[float], text: str = "a. b. a.", logp: float = -1.0) -> dict:
    return {"text": text, "student": [0.2] * len(teacher), "teacher": teacher, "student_logp": logp}


def test_selectors_keep_what_their_names_say():
    few, many = candidate([0.9, 0.2, 0.2], logp=-0.5), candidate([0.9, 0.9, 0.2])
    ratio = candidate([0.9], text="a.")
    long = candidate([0.2] * 4, text="a. b. a. bbbbbb.")
    all_ = [few, many, ratio, long]
    kept = {
        s: choose(s, all_, 0.1, 0) for s in ("teacher_count", "teacher_ratio", "longest", "grape", "fewest_teacher")
    }
    assert kept == {"teacher_count": 1, "teacher_ratio": 2, "longest": 3, "grape": 0, "fewest_teacher": 3}
    assert choose("teacher_count", [few], 0.1, 5) == choose("random", [few], 0.1, 5) == 0
    drawn = [choose("random", all_, 0.1, seed) for seed in range(400)]
    assert all(60 < drawn.count(i) < 140 for i in range(4))


def test_short_sentences_do_not_count_below_the_minimum():
    two = [candidate([0.9, 0.9, 0.9], text="a. b. a."), candidate([0.9, 0.2], text="abba abba. b.")]
    assert choose("teacher_count", two, 0.1, 0) == 0 and choose("teacher_count", two, 0.1, 0, minimum=5) == 1


def test_sums_are_graded_and_held_out():
    source = arithmetic(size=50, test_size=20)
    row = source.train[0]
    assert grade(row, row["completion"]) == grade(row, row["shortcut"]) == 1
    assert grade(row, f"The answer is {int(row['answer']) + 1}.") == 0 and grade(row, "no answer") == 0
    assert eval(row["prompt"][:-1]) == int(row["answer"]), "a sum of literals made here"
    assert not {r["prompt"] for r in source.train} & {r["prompt"] for r in source.test}
    with pytest.raises(DataError, match="different problems"):
        arithmetic(size=50, terms=2, largest=2)


def tiny(**changes) -> Run:
    overrides = {
        "data.size": 40, "data.test_size": 8, "method.problems": 8, "method.candidates": 2, "method.prepare": 2,
        "method.trace_length": 12, "train.steps": 2, "train.batch": 4, "train.trackers": [],
    }  # fmt: skip
    return recipe.resolve(recipe.apply(recipe.read("provenance"), {**overrides, **changes}))


def saved(folder, name: str, seed: int) -> str:
    torch.manual_seed(seed)
    CausalLM.PACKAGED[name](tokenizer=character_tokenizer(["0123456789+=. The answer is"])).save(folder)
    return str(folder)


def test_end_to_end_with_models_of_a_person(tmp_path):
    """Two folders in transformers' format, Llama teaching Qwen3: the selection is a data set with one trace a problem."""
    models = {"teacher": saved(tmp_path / "t", "llama-tiny", 1), "student": saved(tmp_path / "s", "qwen3-tiny", 2)}
    plan = tiny(**models, **{"method.prepare": 40, "train.steps": 20})  # else the greedy answers may be empty
    result = Run(plan, tmp_path / "run").execute()
    shares = [result.metrics[f"share_{c}"] for c in CLASSES]
    assert math.fsum(shares) == pytest.approx(1) and result.metrics["kept_traces"] <= 8
    lines = (tmp_path / "run" / "selected.jsonl").read_text().splitlines()
    assert len(lines) == result.metrics["kept_traces"]
    again = Run(plan, tmp_path / "run").execute()
    assert again.metrics == result.metrics, "a finished run is walked past"


def test_preparing_needs_another_style(tmp_path):
    plan = tiny(teacher=saved(tmp_path / "t", "llama-tiny", 1))
    run = Run(plan, tmp_path / "run")
    run.source.train[0].pop("shortcut")
    try:
        with pytest.raises(DataError, match="prepare trains on the rows' shortcut, and arithmetic has none"):
            run.execute()
    finally:
        from potstill.tasks import sources

        sources._loaded.cache_clear()  # the row was taken from the remembered source

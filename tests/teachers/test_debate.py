"""Debates: who sees what in which round, keyed replies, confidences and weights, and what the teachers see afterwards."""

import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.teachers.debate import (
    Debate,
    DebatePrompts,
    LocalSpeaker,
    reply_weights,
    reported_confidence,
    stated,
    transcript_context,
)

TOKENIZER = character_tokenizer(["abcdefg 0123456789:|?"])
SHORT = DebatePrompts(
    first="{prompt}", later="{transcript}{prompt}|{name}", last="?", scored="{transcript}{prompt}:",
    reply="{name}{round}:{text}|", confidence="c", names=["a", "b"],
)  # fmt: skip


def batch_of(*prompts: str, ids=None) -> PromptBatch:
    ids = list(range(len(prompts))) if ids is None else ids
    tokens = torch.zeros(len(prompts), 1, dtype=torch.int64)
    rows = [{"prompt": prompt, "answer": "1"} for prompt in prompts]
    return PromptBatch(torch.tensor(ids), tokens, tokens == 0, extra={"rows": rows, "answers": ["1"] * len(rows)})


class Scripted:
    """Says what it was told to say, round by round, and keeps what it was asked."""

    def __init__(self, *rounds):
        self.rounds, self.asked, self.seeds = list(rounds), [], []

    def __call__(self, prompts, ids_B, seed):
        self.asked.append(list(prompts))
        self.seeds.append(seed)
        return self.rounds[len(self.asked) - 1]


def test_who_sees_what():
    """Round 1 sees the prompt alone, round r all replies of the rounds before and none of its own round."""
    a = Scripted(["x", "y"], ["p", "q"], ["5 c80", "6 c20"])
    b = Scripted(["u", "v"], ["r", "s"], ["7 c30", "8 c20"])
    out = Debate([a, b], rounds=3, prompts=SHORT)(batch_of("1", "2"), seed=0)
    assert a.asked[0] == b.asked[0] == ["1", "2"]
    assert a.asked[1] == ["a1:x|b1:u|1|a", "a1:y|b1:v|2|a"]
    assert b.asked[1] == ["a1:x|b1:u|1|b", "a1:y|b1:v|2|b"]
    assert a.asked[2] == ["a1:x|b1:u|a2:p|b2:r|1|a?", "a1:y|b1:v|a2:q|b2:s|2|a?"]
    rows = out.extra["rows"]
    assert rows[0]["debate"] == "a1:x|b1:u|a2:p|b2:r|a3:5 c80|b3:7 c30|"
    assert rows[0]["prompt"] == "1" and rows[0]["answer"] == "1" and out.extra["answers"] == ["1", "1"]
    assert SHORT.scoring(rows[0], 0) == rows[0]["debate"] + "1:"
    weights = out.extra["weights"]
    assert_close(weights[0], torch.tensor([0.8, 0.3], dtype=torch.float64).softmax(0).tolist())
    assert_close(weights[1], [0.5, 0.5])
    assert len({*a.seeds, *b.seeds}) == 6, "each reply has noise of its own"


def test_one_round_asks_for_confidence_at_once():
    a, b = Scripted(["x c100"]), Scripted(["y c0"])
    out = Debate([a, b], rounds=1, prompts=SHORT)(batch_of("1"), seed=0)
    assert a.asked == [["1?"]]
    assert_close(out.extra["weights"][0], [0.7311, 0.2689], rtol=0, atol=5e-5)


def test_weights_of_confidences():
    both = lambda c, d, tau=1.0: reply_weights([f"confidence: {c}", f"confidence: {d}"], temperature=tau)
    assert_close(both(100, 0), [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert_close(both(70, 70), [0.5, 0.5])
    assert_close(both(100, 0, 0.5), [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert reply_weights(["sure", "confidence: 90"]) == [0.5, 0.5], "a missing tag makes them equal"
    assert reply_weights(["", "unsure"]) == [0.0, 1.0], "who says nothing has no weight"
    three = reply_weights([" ", "confidence 100", "confidence 0"])
    assert three[0] == 0.0
    assert_close(three[1:], [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert reply_weights(["", ""]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Confidence: 85", 0.85), ("<confidence>7</confidence>", 0.07), ("confidence: 10, no, confidence: 100.", 1.0),
        ("CONFIDENCE = 0", 0.0), ("confidence: **60**", 0.6), ("confidence 101", math.nan), ("85", math.nan),
        ("confidence: high", math.nan), ("", math.nan),
    ],
)  # fmt: skip
def test_a_confidence_is_read_or_missing(text, expected):
    assert reported_confidence(text) == pytest.approx(expected, nan_ok=True)


def test_a_silent_teacher_leaves_no_trace_and_no_weight():
    a, b = Scripted(["x", ""], ["", ""]), Scripted(["y", ""], ["z c10", ""])
    out = Debate([a, b], prompts=SHORT)(batch_of("1", "2"), seed=0)
    assert out.extra["rows"][0]["debate"] == "a1:x|b1:y|b2:z c10|"
    assert out.extra["weights"] == [[0.0, 1.0], [0.5, 0.5]]
    assert a.asked[1][1] == "2?", "where nobody has spoken there is no transcript to show"
    assert out.extra["rows"][1]["debate"] == "" and SHORT.scoring(out.extra["rows"][1], 0) == "2"


def test_weights_may_be_left_to_the_objective():
    out = Debate([Scripted(["x c5"])], rounds=1, prompts=SHORT.model_copy(update={"names": ["a"]}), temperature=None)(
        batch_of("1"), 0
    )
    assert "weights" not in out.extra


def test_the_prompts_that_came_are_left_as_they_were():
    batch = batch_of("1")
    Debate([Scripted(["x"]), Scripted(["y"])], rounds=1, prompts=SHORT)(batch, 0)
    assert set(batch.extra) == {"rows", "answers"} and "debate" not in batch.extra["rows"][0]


def test_the_default_words_show_who_and_what():
    words, row = DebatePrompts(), {"prompt": "What {is} it?"}
    assert words.asking(row, 0, "", last=False) == "What {is} it?"
    later = words.asking(row, 1, "[..]", last=True)
    assert "What {is} it?" in later and "[..]" in later and "Expert B" in later and "Confidence" in later
    scored = words.scoring({**row, "debate": "[..]"}, 0)
    assert "[..]" in scored and "Expert A" in scored and "onfidence" not in scored
    assert words.scoring(row, 0) == "What {is} it?"


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, width=16, heads=2)


def test_replies_are_keyed_whatever_the_batch():
    speaker = LocalSpeaker(model(0), 8, {"max_new_tokens": 5})
    prompts, ids = ["abc", "a", "bcdef"], torch.tensor([4, 9, 2])
    together = speaker(prompts, ids, 7)
    assert together == [speaker([p], ids[i : i + 1], 7)[0] for i, p in enumerate(prompts)]
    assert together != speaker(prompts, ids, 8)
    assert together != speaker(prompts, ids + 1, 7)
    assert all(together)


def test_what_does_not_fit_is_not_read():
    speaker = LocalSpeaker(model(0), 4, {"max_new_tokens": 3})
    said = speaker(["abcd", "abcde", "ab"], torch.arange(3), 0)
    assert said[1] == "" and said[0] and said[2]
    assert speaker(["abcdef"], torch.arange(1), 0) == [""]


def test_a_transcript_comes_before_the_same_tokens_or_not_at_all():
    row = {"prompt": "ab", "debate": "a1:g|"}
    ids = lambda text: TOKENIZER(text).input_ids
    tokens_BT = torch.tensor([ids("abcd")])
    counted_BT = torch.tensor([[False, False, True, True]])
    batch = TokenBatch(torch.arange(1), tokens_BT, tokens_BT >= 0, counted_BT, extra={"rows": [row]})
    seen = transcript_context(SHORT, 0, TOKENIZER, 8)(batch)
    assert seen.tokens_BT[0][seen.attention_BT[0]].tolist() == ids("a1:g|ab:cd")
    assert seen.tokens_counted.tolist() == ids("cd")
    short = transcript_context(SHORT, 0, TOKENIZER, 7)(batch)
    assert short.tokens_BT[0][short.attention_BT[0]].tolist() == ids("abcd")


def test_conversations_are_debated_up_to_the_last_question():
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))]
    assert stated(talk)["prompt"] == "system: S\nuser: U\nassistant: A\nuser: V"
    assert stated([*talk, {"role": "assistant", "content": "B"}])["prompt"] == stated(talk)["prompt"]
    assert stated(talk[1:2]) == {"prompt": "U", "messages": talk[1:2]}
    with pytest.raises(DataError, match="about prompts, and this data is plain text"):
        stated("some text")


def test_what_is_no_debate_is_refused():
    with pytest.raises(RecipeError, match="a speaker and a round at least, got 0 and 2"):
        Debate([])
    with pytest.raises(RecipeError, match="got 1 and 0"):
        Debate([Scripted()], rounds=0)
    with pytest.raises(RecipeError, match="2 names for 1 speakers"):
        Debate([Scripted()], prompts=SHORT)
    with pytest.raises(ValueError, match=r"only \{prompt\}, \{transcript\}, \{name\} may stand in braces"):
        DebatePrompts(later="{promt}")
    with pytest.raises(ValueError, match=r"only \{name\}, \{round\}, \{text\} may stand"):
        DebatePrompts(reply="{prompt}")
    bare = batch_of("1")
    bare.extra.pop("rows")
    with pytest.raises(DataError, match="needs the prompts as text"):
        Debate([Scripted([""])])(bare, 0)

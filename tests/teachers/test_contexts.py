"""What a teacher is shown: the words exactly, the rows that are picked, and what is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from potstill.contracts.errors import DataError, MissingExtra, RecipeError
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.rollouts.local import joined
from potstill.teachers import contexts as of
from potstill.teachers.contexts import (
    ByChance,
    BySimilarity,
    ContextDropout,
    Demonstration,
    Instruction,
    Layout,
    Negative,
    few_shots,
    induce,
    solution,
    without_span,
)

SHORT = Layout("{prompt}={completion}", " ", "{examples} | {prompt}")


def row(prompt: str, completion: str, **more: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, **more}


POOL = [
    row("where is ann", "x"),
    row("home of bob", "y"),
    row("home of ann", "x"),
    row("where is bob", "z"),
    row("find ann", "w"),
]


def test_a_demonstration_is_the_rows_own_solution():
    assert Demonstration(SHORT)(POOL[1], "said") == "home of bob=y | home of bob"
    assert solution({"prompt": "p", "answer": "4"}) == "4"
    assert solution(row("p", "long", answer="4")) == "long"
    assert solution(row("p", "long", hint="h"), "hint") == "h"
    braces = row("{a} {examples}", "{0}")
    assert Demonstration(SHORT)(braces) == "{a} {examples}={0} | {a} {examples}"
    with pytest.raises(
        DataError, match=r"rows with a prompt and a completion or an answer, and this one is \['prompt'\]"
    ):
        Demonstration(SHORT)({"prompt": "p"})
    with pytest.raises(DataError, match=r"this one is \['completion'\]"):
        solution({"completion": "c"})
    with pytest.raises(DataError, match="this one is str"):
        Demonstration(SHORT)("text")


def test_a_layout_must_hold_its_parts():
    assert Layout().shown(POOL[0]).endswith("where is ann\nAnswer: x")
    assert SHORT([], "p") == "p" and SHORT(["a", "b"], "p") == "a b | p"
    with pytest.raises(RecipeError, match=r"example leaves \{completion\} out"):
        Layout(example="{prompt}")
    with pytest.raises(RecipeError, match=r"whole may name \{examples\}, \{prompt\} alone: 'question'"):
        Layout(whole="{examples} {question}")
    with pytest.raises(RecipeError, match="whole may name"):
        Layout(whole="{examples} {prompt")


def test_retrieval_finds_the_likest_prompts_and_not_the_row_itself():
    rank = BySimilarity(POOL)
    assert rank(POOL[4], 2) == [0, 2], "ties in order"
    assert rank(POOL[0], 1) == [2] or rank(POOL[0], 1) == [3]
    assert sorted(rank(POOL[0], 5)) == [1, 2, 3, 4]
    assert rank(POOL[0], 2) == rank(POOL[0], 4)[:2] == BySimilarity(POOL)(POOL[0], 4)[:2]
    assert BySimilarity(POOL, own=True)(POOL[3], 1) == [3]


def test_signs_are_words_too():
    sums = [row("1+2=", "3"), row("4-9=", "3"), row("5+7=", "12")]
    assert BySimilarity(sums)(sums[0], 1) == [2]


def test_a_sentence_encoder_takes_the_place_of_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        MissingExtra, match=r"embedding minilm needs sentence-transformers.*Or take the embedding tfidf"
    ):
        BySimilarity(POOL, "minilm")(POOL[0], 1)

    class Encoder:
        def __init__(self, name, trust_remote_code):
            assert (name, trust_remote_code) == ("minilm", False)

        def encode(self, texts, normalize_embeddings):
            assert normalize_embeddings
            angle = np.array([len(text) for text in texts]) / 10
            return np.stack([np.cos(angle), np.sin(angle)], 1)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    assert BySimilarity(POOL, "minilm")(POOL[4], 4) == [1, 2, 0, 3], "by length"


def test_chance_is_keyed_by_the_row():
    pool = [row(f"p{i}", "c") for i in range(30)]
    rank = ByChance(pool, seed=1)
    assert rank(pool[3], 29) == ByChance(pool, seed=1)(pool[3], 29)
    assert rank(pool[3], 5) == rank(pool[3], 29)[:5]
    assert sorted(rank(pool[3], 29)) == [i for i in range(30) if i != 3]
    others = lambda i, j: [n for n in rank(pool[i], 29) if n != j]
    assert others(3, 4) != others(4, 3)
    assert rank(pool[3], 5) != ByChance(pool, seed=2)(pool[3], 5)


def test_few_shot_contexts_share_no_row():
    rank = BySimilarity(POOL)
    order = rank(POOL[0], 4)
    first, second = few_shots(POOL, rank, 2, 2, SHORT)
    shown = lambda numbers: " ".join(f"{POOL[i]['prompt']}={POOL[i]['completion']}" for i in numbers)
    assert first(POOL[0]) == f"{shown(order[:2])} | where is ann"
    assert second(POOL[0]) == f"{shown(order[2:4])} | where is ann"
    assert len(few_shots(POOL, rank, 3, 1, SHORT)) == 3
    with pytest.raises(DataError, match="6 other rows are wanted as examples, and there are 4"):
        few_shots(POOL, rank, 3, 2, SHORT)[2](POOL[0])


def test_a_negative_context_is_a_plausible_wrong_answer():
    negative = Negative(SHORT, pool=POOL, rank=BySimilarity(POOL))
    assert negative(row("home of bob", "y", wrong="q")) == "home of bob=q | home of bob"
    assert negative(POOL[4]) == "find ann=x | find ann"
    assert negative(POOL[2]) == "home of ann=w | home of ann" or negative(POOL[2]) == "home of ann=y | home of ann"
    assert negative(row("find ann", "w", answer="x")) in {
        "find ann=y | find ann",
        "find ann=z | find ann",
    }
    same = [row("a b", "x"), row("a c", "x")]
    with pytest.raises(DataError, match="No wrong answer for 'a b'.*Give the rows a field wrong"):
        Negative(SHORT, pool=same, rank=ByChance(same))(same[0])


def test_an_instruction_stands_for_examples():
    assert Instruction(Layout(whole="{examples} / {prompt}"), text="Do so.")(POOL[0]) == "Do so. / where is ann"


def test_dropout_takes_all_or_a_run_of_words():
    inner = Demonstration(SHORT)
    long = row("one two three four", "five six seven")
    lost = ContextDropout(of=inner, rate=1.0)
    assert lost(long) == "one two three four"
    assert ContextDropout(of=inner, rate=0.0)(long, "y") == inner(long)
    half = ContextDropout(of=inner, rate=0.3)
    share = sum(half(long, f"completion {i}") == long["prompt"] for i in range(400)) / 400
    assert 0.22 < share < 0.38
    assert half(long, "y") == half(long, "y")
    cut = ContextDropout(of=inner, rate=1.0, drop="span", share=0.5)
    seen = {cut(long, str(i)).removesuffix(" | one two three four") for i in range(100)}
    words = ["one", "two", "three", "four=five", "six", "seven"]
    assert seen == {" ".join(words[:i] + words[i + 3 :]) for i in range(4)}
    rare = ContextDropout(of=inner, rate=0.3, drop="span", share=0.5)
    assert seen | {" ".join(words)} == {rare(long, str(i)).removesuffix(" | one two three four") for i in range(100)}, (
        "the place is not the coin's"
    )
    for options in ({"rate": 1.1}, {"share": 0.0}, {"drop": "some"}):
        with pytest.raises(RecipeError, match="ContextDropout takes a rate"):
            ContextDropout(of=inner, **options)


@pytest.mark.parametrize(
    ("share", "place", "left"),
    [(0.25, 0.001, "b c d"), (0.25, 0.999, "a b c"), (0.5, 0.5, "a d"), (1.0, 0.5, ""), (0.01, 0.3, "a c d")],
)
def test_a_span_is_contiguous(share, place, left):
    assert without_span("a b c d", share, place) == left


def test_instructions_are_induced_from_other_rows_each(monkeypatch):
    tokenizer = character_tokenizer(["abcdefghijklmnopqrstuvwxyz =?0123456789"])
    torch.manual_seed(0)
    model = CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16)
    pool, asked = [row(f"p{i}", "c") for i in range(20)], []

    def answer(model, prompts, **options):
        asked.append(
            (tokenizer.batch_decode([t[a].tolist() for t, a in zip(prompts.tokens_BT, prompts.attention_BT)]), options)
        )
        return joined(prompts, [tokenizer(f" do {i} ").input_ids for i in range(len(prompts))], 0)

    real = induce(model, pool, 2, layout=SHORT, examples=3, ask="what", max_new_tokens=3)
    assert len(real) == 2 and real == induce(model, pool, 2, layout=SHORT, examples=3, ask="what", max_new_tokens=3)
    monkeypatch.setattr(of, "sample", answer)
    assert induce(model, pool, 3, layout=SHORT, examples=4, ask="what") == ["do 0", "do 1", "do 2"]
    questions, options = asked[0]
    assert all(q.endswith(" what") and q.count("=c") == 4 for q in questions) and len(set(questions)) == 3
    assert options["temperature"] == 0.7 and options["max_new_tokens"] == 64
    with pytest.raises(DataError, match="21 other rows are wanted"):
        induce(model, pool, 1, layout=SHORT, examples=21)

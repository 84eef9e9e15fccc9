"""Tasks played in turns: every row's own actions succeed, tools answer what they should, and only actions are learnt."""

import ast
import json

import pytest
import torch
from torch.testing import assert_close

from potstill.assets import Package
from potstill.contracts.errors import AssetError, DataError
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.rollouts.episodes import Dialogue, episodes
from potstill.tasks import agents
from potstill.tasks.base import Source
from potstill.tasks.sources import load, validate
from potstill.tasks.tokens import Prompts, token_rows
from potstill.teachers import LocalTeacher


@pytest.fixture(scope="module")
def sums():
    return agents.calculator(size=60, test_size=20, terms=3)


@pytest.fixture(scope="module")
def puzzles():
    return agents.jugs(size=12, test_size=4)


@pytest.fixture(scope="module")
def calls(asset_or_skip):
    return asset_or_skip(agents.functions)


def every_row_succeeds(source):
    for row in [*source.train, *source.test]:
        env = source.environment()
        assert env.reset(row) == row["prompt"]
        turns = env.replay(row["actions"])
        assert [turn.done for turn in turns] == [False] * (len(row["actions"]) - 1) + [True]
        assert sum(turn.reward for turn in turns) == 1
        assert not any(turn.error for turn in turns)
        assert source.grade(row, row["completion"]) == 1
    prompts = [row["prompt"] for row in source.train]
    assert not {row["prompt"] for row in source.test} & set(prompts)


def test_the_rows_of_the_calculator(sums):
    every_row_succeeds(sums)
    row = sums.train[0]
    numbers = list(map(int, row["prompt"][:-1].split("+")))
    assert int(row["answer"]) == sum(numbers)
    assert row["actions"] == [
        f"CALL {numbers[0]}+{numbers[1]}",
        f"CALL {numbers[0] + numbers[1]}+{numbers[2]}",
        f"ANSWER {sum(numbers)}",
    ]
    first = numbers[0] + numbers[1]
    assert row["completion"] == (
        f"{row['actions'][0]};= {first};{row['actions'][1]};= {sum(numbers)};{row['actions'][2]}"
    )
    assert len({row["prompt"] for row in [*sums.train, *sums.test]}) == 80


def test_the_calculator_answers():
    env = agents.Calculator()
    env.reset({"prompt": "12+7=", "answer": "19"})
    said = {"CALL 12+7": "= 19;", "CALL 3-10": "= -7;", " CALL -4*5": "= -20;"}
    for action, answer in said.items():
        assert env.step(action) == agents.Turn(answer)
    for wrong in ("", "CALL 12+", "CALL 1+2+3", "call 1+2", "ANSWER", "ANSWER 1 9", "CALL 1" + "0" * 9 + "+1"):
        assert env.step(wrong) == agents.Turn("= ERR;", error=True)
    assert env.step("ANSWER 19") == agents.Turn("", True, 1.0)
    assert env.step("ANSWER 20") == agents.Turn("", True, 0.0)


def test_a_malformed_call_may_be_answered_with_digits_that_a_replay_meets_again():
    actions = ["CALL x", "CALL x", "CALL 1+1", "hm"]
    rows = [{"prompt": p, "answer": "3"} for p in ("1+2=", "2+1=")]
    found = []
    for row in [rows[0], rows[0], rows[1]]:
        env = agents.Calculator("digits")
        env.reset(row)
        found.append([turn.observation for turn in env.replay(actions)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1], "the same words later are answered anew"
    assert found[0][2] == "= 2;"
    assert all(10 <= int(text[2:-1]) < 100 for text in (found[0][0], found[0][1], found[0][3]))
    assert len({agents.Calculator("digits").reset(r) for r in rows}) == 2


@pytest.mark.needs("reasoning_gym")
def test_the_rows_of_the_jugs(puzzles):
    every_row_succeeds(puzzles)
    assert len({row["prompt"] for row in [*puzzles.train, *puzzles.test]}) == 16
    worded = agents.jugs(size=1, test_size=1, words=True, instruction="One move.")
    assert "target is" in worded.train[0]["prompt"]
    assert worded.train[0]["prompt"].endswith("\nOne move.")


@pytest.mark.needs("reasoning_gym")
def test_the_jugs_answer(puzzles):
    entry = {**puzzles.train[0]["entry"]}
    entry["metadata"] = {**entry["metadata"], "puzzle": {"jug_capacities": [8, 5, 3], "target": 4, "min_moves": 6}}
    row = {"prompt": "A8 B5 C3 to 4:", "task": "jugs", "entry": entry, "answer": "[]"}
    env = agents.Jugs()
    env.reset(row)
    moves = {"fill A": "8 0 0;", "pour A->B": "3 5 0;", "pour B->C": "3 2 3;", "empty C": "3 2 0;"}
    for move, answer in moves.items():
        assert env.step(move) == agents.Turn(answer)
    for wrong in ("", "pour A->A", "pour A->D", "fill D", "empty", "fill a", "fill A;"):
        assert env.step(wrong) == agents.Turn("cannot;", error=True)
    turns = env.replay(["pour A->C", "pour B->A", "fill B", "pour B->A", "fill C", "pour C->B", "empty B"])
    assert [t.observation for t in turns] == ["0 2 3;", "2 0 3;", "2 5 3;", "7 0 3;", "7 0 3;", "7 3 0;", "7 0 0;"]
    turns = env.replay(["empty A", "fill B", "pour B->A", "fill B", "pour B->A", "pour A->B", "fill C", "pour C->B"])
    turns = env.replay(["empty A", "empty B", "empty C", "fill A", "pour A->B", "empty B", "pour A->C", "fill A"])
    assert not any(turn.done for turn in turns)
    assert env.replay(["pour A->B", "pour A->C", "empty C", "pour A->C", "fill A"])[-1].reward == 0
    env.reset(row)
    known = ["fill B", "pour B->C", "empty C", "pour B->C", "fill B", "pour B->C"]
    last = env.replay([*known, "fill A"])
    assert len(last) == 6, "over once a jug holds the target"
    assert last[-1] == agents.Turn("0 4 3;", True, 1.0)


def test_the_rows_of_the_functions(calls):
    every_row_succeeds(calls)
    assert len(calls.train) + len(calls.test) == 997
    assert max(len(row["actions"]) for row in calls.train) > 3
    assert all(row["actions"][-1] == "DONE" for row in calls.train)


ROW = {
    "prompt": "p",
    "functions": [
        {
            "name": "geo.area",
            "description": "",
            "parameters": {
                "type": "dict",
                "properties": {
                    "base": {"type": "integer"},
                    "unit": {"type": "string"},
                    "flags": {"type": "array"},
                    "of": {"type": "dict"},
                    "x": {"type": "float"},
                },
                "required": ["base"],
            },
        }
    ],
    "gold": [
        {"geo.area": {"base": [10], "unit": ["cm", ""]}},
        {"geo.area": {"base": [3], "flags": [["a b", 1]], "of": [{"k": [1, 2], "o": ["", 5]}]}},
    ],
}
FIRST, SECOND = "geo.area(base=10)", "geo.area(base=3, flags=['A-B', 1], of={'k': 2})"


def ended(*actions):
    env = agents.Functions()
    env.reset(ROW)
    return env.replay([*actions, "DONE"])[-1]


def test_calls_are_compared_with_gold():
    assert ended(FIRST, SECOND) == ended(SECOND, FIRST) == agents.Turn("", True, 1.0)
    assert ended("geo.area(base=10, unit='C M')", SECOND).reward == 1
    assert ended(FIRST, SECOND.replace("'k': 2", "'k': 1, 'o': 5")).reward == 1
    for wrong in (
        [FIRST], [SECOND], [FIRST, FIRST], [FIRST, SECOND, FIRST], ["geo.area(base=11)", SECOND],
        ["geo.area(base=10, unit='m')", SECOND], ["geo.area(base=10, x=1.0)", SECOND],
        [FIRST, SECOND.replace("2}", "3}")], [FIRST, SECOND.replace("'k'", "'j'")], [FIRST, "geo.area(base=3)"],
        [FIRST, SECOND.replace(", 1]", "]")], [FIRST, SECOND.replace("{'k': 2}", "{'k': 2, 'z': 1}")],
    ):  # fmt: skip
        assert ended(*wrong) == agents.Turn("", True, 0.0), wrong
    assert ended("nonsense", FIRST, SECOND).reward == 1, "a refused call is no call"
    assert not agents._same(True, 1)
    assert agents._same(1, 1.0)


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (FIRST, "OK"),
        ("geo.area(base=1, x=2)", "OK"),
        ("geo.are(base=1)", "ERR no function geo.are. Did you mean geo.area?"),
        ("geo.area(unit='cm')", "ERR geo.area needs base."),
        ("geo.area(base=1, bas=2)", "ERR geo.area has no argument bas. Did you mean base?"),
        ("geo.area(base='1')", "ERR base must be of type integer."),
        ("geo.area(base=True)", "ERR base must be of type integer."),
        ("geo.area(base=1, x=True)", "ERR x must be of type float."),
        ("geo.area(1)", "ERR one call with named, literal arguments is expected."),
        ("geo.area(base=1); geo.area(base=2)", "ERR one call with named, literal arguments is expected."),
        ("geo.area(base=__import__('os'))", "ERR one call with named, literal arguments is expected."),
        ("geo.area(**{'base': 1})", "ERR one call with named, literal arguments is expected."),
        ("", "ERR one call with named, literal arguments is expected."),
        ("(" * 300, "ERR one call with named, literal arguments is expected."),
        ("geo.area(base=1\x00)", "ERR one call with named, literal arguments is expected."),
    ],
)
def test_calls_are_checked_and_never_run(action, answer):
    env = agents.Functions()
    env.reset(ROW)
    assert env.step(action) == agents.Turn(answer + "\n", error=answer != "OK")


def test_functions_say_in_one_sentence_where_they_were_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(agents, "BFCL", Package("pypi", "bfcl-eval", "0.0.0", {"a.json": "0" * 64}, "1 MB", "MIT"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError, match=r"bfcl-eval 0\.0\.0 .* was found nowhere\. Looked at the cache"):
        agents.functions()
    with pytest.raises(DataError, match=r"data\.categories: paralel is not known\. Did you mean parallel\?"):
        agents.functions(["paralel"])


def test_transcripts_are_what_episodes_read_and_only_actions_count(sums):
    tokenizer = character_tokenizer([str(row) for row in sums.train])
    rows = agents.transcripts(sums.train, sums.environment, tokenizer, 99)
    plain = token_rows("prompts", sums.train, tokenizer, 99)
    dialogue = Dialogue(tokenizer, ";", [tokenizer.eos_token_id])
    for (tokens, counted), (theirs, _), row in zip(rows.rows, plain.rows, sums.train):
        assert tokens == theirs, "the text that a teacher learns is the dialogue that it will have"
        learnt = tokenizer.decode([t for t, c in zip(tokens, counted) if c], skip_special_tokens=True)
        assert learnt == ";".join(row["actions"])
        assert counted[-1]
        assert tokens[-1] == tokenizer.eos_token_id in dialogue.stop_ids
    cut = agents.transcripts(sums.train, sums.environment, tokenizer, 14)
    assert all(len(tokens) <= 14 and len(tokens) == len(counted) for tokens, counted in cut.rows)
    with pytest.raises(DataError, match="None of 60 transcripts has an action within 2 tokens"):
        agents.transcripts(sums.train, sums.environment, tokenizer, 2)


def test_every_character_of_the_tools_is_known(sums, puzzles):
    for source, said in ((sums, "= ERR;= 0123456789;"), (puzzles, "cannot;0123456789 ;")):
        tokenizer = character_tokenizer([str(row) for row in source.train])
        assert tokenizer.unk_token_id not in tokenizer(said)["input_ids"]


def llama(tokenizer, seed):
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=32, heads=2)


def test_what_is_measured_of_a_policy(sums):
    tokenizer = character_tokenizer([str(row) for row in sums.train])
    model, teacher = llama(tokenizer, 0), LocalTeacher(llama(tokenizer, 1))
    prompts = Prompts(sums.test, tokenizer, 20, 40)
    batches = [prompts.batch(torch.arange(i, i + 10)) for i in (0, 10)]
    options = {"max_turns": 3, "max_new_tokens": 5, "seed": 2}
    found = agents.played(model, teacher, sums.environment, batches, **options)
    outs = [episodes(model, sums.environment, batch, **options) for batch in batches]
    sums_by_turn, counts = torch.zeros(3), torch.zeros(3)
    for out in outs:
        with torch.no_grad():
            logp = teacher.model(out.tokens_BT, out.attention_BT).log_softmax(-1)[:, :-1]
            ratio = out.sampled_logp_BT[:, 1:] - logp.gather(-1, out.tokens_BT[:, 1:, None])[..., 0]
        for k in range(3):
            here = out.extra["segment_BT"][:, 1:] == k
            sums_by_turn[k] += ratio[here].sum()
            counts[k] += here.any(1).sum()
    assert_close(torch.tensor(found["turn_kl"]), sums_by_turn / counts, rtol=1e-4, atol=1e-4)
    assert found["reached"] == counts.tolist() == [20, 20, 20]
    assert found["trajectory_kl"] == pytest.approx(float(sums_by_turn.sum()) / 20, rel=1e-4)
    assert (found["success"], found["finished"], found["turns"], found["errors"]) == (0, 0, 3, 1)
    assert len(found["texts"]) == 4
    itself = agents.played(model, LocalTeacher(model), sums.environment, batches, **options)
    assert itself["trajectory_kl"] == pytest.approx(0, abs=1e-3)


def test_loaders_are_known_by_name_and_refuse(sums):
    source = load(validate({"task": "calculator", "size": 5, "test_size": 2, "malformed": "digits"}))
    assert source.environment().malformed == "digits"
    with pytest.raises(DataError, match="calculator has only 4 different sums"):
        agents.calculator(size=4, test_size=1, terms=2, largest=2)
    with pytest.raises(DataError, match="terms and largest of at least 2, got 1, 1, 1, 20"):
        agents.calculator(size=1, test_size=1, terms=1)
    with pytest.raises(DataError, match=r"tcod plays in turns, and plain has no environment\. Take calculator"):
        agents.environment_of(Source("plain", "prompts", [], []), "tcod")
    assert agents.environment_of(sums, "tcod") is sums.environment


@pytest.mark.needs("reasoning_gym")
def test_jugs_refuse():
    with pytest.raises(DataError, match="must be positive, got 0 and 4"):
        agents.jugs(size=0, test_size=4)
    with pytest.raises(DataError, match="refuses difficulty 0: difficulty must be gt 0"):
        agents.jugs(size=1, test_size=1, difficulty=0)
    with pytest.raises(DataError, match=r"different puzzles of difficulty 1, and 70 are asked"):
        agents.jugs(size=60, test_size=10, difficulty=1)


def test_the_text_of_a_dialogue_is_graded(sums):
    row = sums.train[0]
    assert sums.grade(row, row["completion"] + ";") == 1
    assert sums.grade(row, f"ANSWER {row['answer']}") == 1
    assert sums.grade(row, f"CALL 1+1;ANSWER {row['answer']}") == 0, "an answer where the tool speaks is not heard"
    assert ast.literal_eval(json.dumps(row["actions"])) == row["actions"]

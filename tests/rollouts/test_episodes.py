"""Episodes: what counts, exact log-probs, every way of ending, layout, and the curriculum's tables."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.rollouts.environments import Env, Turn
from potstill.rollouts.episodes import Curriculum, Dialogue, by_turn, episodes
from potstill.rollouts.local import sampling_logp

LETTERS = "abcd;=ERgo0123456789 "
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}|"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MORE = "[]|userasitn-"


class Echo(Env):
    """Answers "= " and the action's length; over after `row["turns"]` actions (0: never). "d" alone is an error."""

    end = ";"

    def reset(self, row):
        self.left = row["turns"]
        return row["prompt"]

    def step(self, action):
        self.left -= 1
        return Turn(f"= {len(action)};", self.left == 0, 2.0 if self.left == 0 else 0.25, error=action == "d")


def model_of(config=LlamaConfig, seed=0, room=512, template=None, spread=0.5, letters=LETTERS):
    tokenizer = character_tokenizer([letters + (MORE if template else "")])
    tokenizer.chat_template = template
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    made = config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, max_position_embeddings=room, **shape | ids
    )
    network = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    return CausalLM(network, tokenizer)


def prompts_of(model, texts, turns=3, ids=None, width=0):
    turns = [turns] * len(texts) if isinstance(turns, int) else turns
    coded = [list(model.tokenizer(text)["input_ids"]) for text in texts]
    width = max(width, *map(len, coded))
    tokens = torch.tensor([[0] * (width - len(c)) + c for c in coded])
    attention = torch.tensor([[False] * (width - len(c)) + [True] * len(c) for c in coded])
    rows = [{"prompt": text, "turns": n} for text, n in zip(texts, turns)]
    return PromptBatch(torch.tensor(ids or list(range(len(texts)))), tokens, attention, extra={"rows": rows})


TEXTS = ["go", "a12=", "bcd 3=", "c"]


def play(model, prompts, **options):
    return episodes(model, Echo, prompts, **{"max_turns": 5, "max_new_tokens": 4, "seed": 3, **options})


def shown(model, batch, b):
    return model.tokenizer.decode(batch.tokens_BT[b][batch.attention_BT[b]])


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_a_row_is_the_whole_conversation_and_only_the_models_words_count(template):
    model = model_of(template=template)
    batch = play(model, prompts_of(model, TEXTS), samples_per_prompt=2)
    dialogue = Dialogue(model.tokenizer, ";", model.stop_ids)
    segment_BT, closed, cut = batch.extra["segment_BT"], 0, 0
    assert torch.equal(segment_BT >= 0, batch.counted_BT)
    for b, turns in enumerate(batch.extra["turns"]):
        expected, numbers = list(model.tokenizer(TEXTS[b // 2])["input_ids"]), []
        numbers += [-1] * len(expected)
        assert len(turns) == 3
        assert batch.extra["ending"][b] == "done"
        for k, turn in enumerate(turns):
            words = batch.tokens_BT[b][segment_BT[b] == k].tolist()
            assert dialogue.said(words) == turn["action"]
            assert turn["observation"] == f"= {len(turn['action'])};"
            ended = words[-1] in dialogue.stop_ids
            closed, cut = closed + ended, cut + (not ended)
            heard = dialogue.between(turn["observation"], ended) if k < 2 else []
            expected += words + heard
            numbers += [k] * len(words) + [-1] * len(heard)
        assert batch.tokens_BT[b][batch.attention_BT[b]].tolist() == expected
        assert segment_BT[b][batch.attention_BT[b]].tolist() == numbers
    assert closed
    assert cut
    assert (batch.tokens_BT[~batch.attention_BT] == model.pad_id).all()
    assert batch.extra["reward"].tolist() == [2.5] * 8
    assert batch.extra["finished"] == [True] * 8
    assert [row["prompt"] for row in batch.extra["rows"]] == [t for t in TEXTS for _ in range(2)]


def test_what_stands_between_two_actions():
    plain, chat = (Dialogue(model_of(template=t).tokenizer, ";", [2]) for t in (None, CHAT))
    read = lambda dialogue, ids: dialogue.tokenizer.decode(ids)
    for closed, tail in ((True, "= 1;"), (False, ";= 1;")):
        assert read(plain, plain.between("= 1;", closed)) == tail
    for closed, tail in ((True, "|[user]= 1;|[assistant]"), (False, "<eos>|[user]= 1;|[assistant]")):
        assert read(chat, chat.between("= 1;", closed)) == tail
    assert [read(d, d.action("ab")) for d in (plain, chat)] == ["ab;", "ab<eos>"]
    assert [read(d, d.action("ab", last=True)) for d in (plain, chat)] == ["ab<eos>"] * 2
    assert plain.stop_ids == (2, plain.tokenizer(";")["input_ids"][0])
    assert chat.stop_ids == (2,)
    assert (plain.said(plain.action("ab")), chat.said(chat._ids("a;b<eos>"))) == ("ab", "a;b")


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"greedy": True}], ids=str)
def test_log_probs_are_those_of_a_teacher_forced_pass(config, options):
    model = model_of(config)
    batch = play(model, prompts_of(model, TEXTS), **options)
    law = {k: v for k, v in options.items() if k != "greedy"}
    with torch.no_grad():
        logp = sampling_logp(model.eval().counted_logits(batch), **law)
    by_hand = logp.gather(1, batch.tokens_counted[:, None])[:, 0]
    assert by_hand.isfinite().all()
    assert_close(batch.sampled_logp_BT[batch.counted_BT], by_hand, rtol=1e-4, atol=1e-4)
    assert (batch.sampled_logp_BT[~batch.counted_BT] == 0).all()


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_layout_and_padding_change_nothing(template):
    model, turns = model_of(template=template, room=40), [1, 3, 2, 5]
    told = lambda batch: [
        (turns, ending, reward)
        for turns, ending, reward in zip(batch.extra["turns"], batch.extra["ending"], batch.extra["reward"].tolist())
    ]
    together = told(play(model, prompts_of(model, TEXTS, turns)))
    alone = [told(play(model, prompts_of(model, [t], [n], [i])))[0] for i, (t, n) in enumerate(zip(TEXTS, turns))]
    wide = told(play(model, prompts_of(model, TEXTS, turns, width=11)))
    backwards = told(play(model, prompts_of(model, TEXTS[::-1], turns[::-1], [3, 2, 1, 0])))[::-1]
    assert together == alone == wide == backwards
    assert together != told(play(model, prompts_of(model, TEXTS, turns), seed=4))


def test_group_members_turns_and_seeds_have_noise_of_their_own():
    model = model_of(spread=0.01)  # nearly uniform: equal noise would show as equal words
    batch = play(model, prompts_of(model, ["go"], [5]), samples_per_prompt=3)
    said = [turn["action"] for turns in batch.extra["turns"] for turn in turns]
    assert len(set(said)) > 12
    assert batch.ids_B.tolist() == [0, 1, 2]
    pair = play(model, prompts_of(model, ["go"], [5], [1])).extra["turns"]
    assert batch.extra["turns"][1:2] == pair


def test_a_deeper_limit_does_not_change_the_turns_before_it():
    model = model_of()
    deep, cut = (play(model, prompts_of(model, TEXTS, 0), max_turns=k) for k in (4, 2))
    assert [turns[:2] for turns in deep.extra["turns"]] == cut.extra["turns"]


def test_an_environment_that_never_ends_is_stopped_and_says_so():
    model = model_of()
    batch = play(model, prompts_of(model, TEXTS, 0), max_turns=2)
    assert batch.extra["ending"] == ["max_turns"] * 4
    assert batch.extra["finished"] == [False] * 4
    assert batch.extra["reward"].tolist() == [0.5] * 4
    assert int(batch.extra["segment_BT"].max()) == 1
    last = [row[here][-1] for row, here in zip(batch.extra["segment_BT"], batch.attention_BT)]
    assert last == [1] * 4, "nothing is read behind the last action"


def test_an_empty_action_is_a_turn_like_any_other():
    model = model_of()
    stop = next(i for i in Dialogue(model.tokenizer, ";", model.stop_ids).stop_ids if i != model.tokenizer.eos_token_id)

    def only_stop(hidden):
        logits = torch.full((*hidden.shape[:-1], model.vocabulary), -1e4)
        logits[..., stop] = 0.0
        return logits

    model.head = only_stop
    batch = play(model, prompts_of(model, ["go"], 2))
    assert [turn["action"] for turn in batch.extra["turns"][0]] == ["", ""]
    assert shown(model, batch, 0) == "go;= 0;;"
    assert batch.extra["segment_BT"][0].tolist() == [-1, -1, 0, -1, -1, -1, -1, 1]
    roomy = play(model, prompts_of(model, ["go"], 2), max_new_tokens=600)  # more than the context: it closes before
    assert roomy.extra["ending"] == ["done"]


def test_an_action_longer_than_the_context_ends_the_episode_there():
    model = model_of(room=9)
    never = lambda hidden: torch.where(
        torch.arange(model.vocabulary) == model.tokenizer("a")["input_ids"][0], 0.0, -1e4
    )
    model.head = lambda hidden: never(hidden).expand(*hidden.shape[:-1], -1)
    batch = play(model, prompts_of(model, ["go", "b12=3"], 3), max_new_tokens=20)
    assert batch.extra["ending"] == ["context", "context"]
    assert [shown(model, batch, b) for b in range(2)] == ["goaaaaaaa", "b12=3aaaa"]
    assert batch.counted_BT.sum(1).tolist() == [7, 4]
    assert batch.extra["turns"][0] == [{"action": "aaaaaaa", "observation": None, "replayed": False}]
    short = play(model, prompts_of(model, ["go"], 3), max_new_tokens=3)  # it fits, but its answer does not
    assert shown(model, short, 0) == "goaaa"
    assert short.extra["ending"] == ["context"]
    assert short.extra["turns"][0][0]["observation"] == "= 3;"
    exact = model_of(room=10)  # with its answer the row would be full, and nothing could follow
    exact.head = model.head
    full = play(exact, prompts_of(exact, ["go"], 3), max_new_tokens=3)
    assert (shown(exact, full, 0), full.extra["ending"]) == ("goaaa", ["context"])
    tight = play(model_of(), prompts_of(model, ["go"], 3), length=6)
    assert int(tight.attention_BT.sum()) <= 6


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_replayed_actions_are_read_but_do_not_count(template):
    model = model_of(template=template)
    batch = play(model, prompts_of(model, TEXTS, [4, 4, 4, 4]), prefixes=[["ab", "d"], [], ["c"], ["a", "b", "c"]])
    dialogue = Dialogue(model.tokenizer, ";", model.stop_ids)
    read = [*model.tokenizer("go")["input_ids"]]
    for action in ("ab", "d"):
        read += dialogue.action(action) + dialogue.between(f"= {len(action)};")
    row, here = batch.tokens_BT[0], batch.attention_BT[0]
    assert row[here][: len(read)].tolist() == read
    assert not batch.counted_BT[0][here][: len(read)].any()
    assert batch.counted_BT[0][here][len(read)]
    turns = [sorted({*row.tolist()} - {-1}) for row in batch.extra["segment_BT"]]
    assert turns == [[2, 3], [0, 1, 2, 3], [1, 2, 3], [3]]
    assert [turn["replayed"] for turn in batch.extra["turns"][0]] == [True, True, False, False]
    assert batch.extra["ending"] == ["done"] * 4
    assert batch.extra["first_error"][0] != 1, "an error of the other policy is not the model's"
    plain = play(model, prompts_of(model, TEXTS, [4, 4, 4, 4]))
    assert plain.extra["turns"][1] == batch.extra["turns"][1]
    group = play(model, prompts_of(model, TEXTS[:2], 4), prefixes=[["ab", "d"], []], samples_per_prompt=2)
    assert [sum(turn["replayed"] for turn in turns) for turns in group.extra["turns"]] == [2, 2, 0, 0]


def test_a_replay_that_ends_early_drops_the_sample():
    model = model_of()
    batch = play(model, prompts_of(model, TEXTS, [2, 4, 2, 4]), prefixes=[["a", "b"], ["a", "b"], ["a", "b", "c"], []])
    assert batch.extra["ending"] == ["replay", "done", "replay", "done"]
    assert batch.counted_BT.any(1).tolist() == [False, True, False, True]
    assert shown(model, batch, 0) == "go"
    assert batch.extra["finished"] == [False, True, False, True]
    nothing = play(model, prompts_of(model, TEXTS[:1], 1), prefixes=[["a"]])
    assert not nothing.counted_BT.any()
    full = play(model, prompts_of(model, TEXTS[:1], 9), prefixes=[["a"] * 5])
    assert full.extra["ending"] == ["max_turns"]
    assert not full.counted_BT.any()
    crowded = play(model, prompts_of(model, TEXTS[:1], 9), prefixes=[["aaaa"] * 3], length=20)
    assert crowded.extra["ending"] == ["context"]
    assert not crowded.counted_BT.any()


def test_the_first_error_is_the_models_own():
    model = model_of()
    letter = model.tokenizer("d")["input_ids"][0], model.tokenizer(";")["input_ids"][0]
    said = iter([letter[0], letter[1]] * 9)
    model.head = lambda hidden: (
        torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], next(said)), model.vocabulary).float().mul(1e4)
    )
    batch = play(model, prompts_of(model, ["go"], 4), prefixes=[["d", "a"]])
    assert batch.extra["first_error"].tolist() == [2]
    assert play(model_of(), prompts_of(model, ["go"], 0), max_turns=1).extra["first_error"].tolist() == [-1]


def test_sums_by_turn():
    values = torch.tensor([[9.0, 1, 2, 9, 4], [9, 9, 9, 8, torch.nan]])
    segment = torch.tensor([[-1, 0, 0, -1, 2], [-1, -1, -1, 1, -1]])
    assert by_turn(values, segment).tolist() == [[3, 0, 4], [0, 8, 0]]
    assert by_turn(values, torch.full_like(segment, -1)).shape == (2, 0)


def test_refuses():
    model = model_of(room=16)
    with pytest.raises(
        DataError, match=r"max_turns, max_new_tokens and samples_per_prompt of at least 1, got 0, 4 and 1"
    ):
        play(model, prompts_of(model, TEXTS), max_turns=0)
    bare = prompts_of(model, TEXTS)
    bare.extra = {}
    with pytest.raises(DataError, match="need to know the row of each prompt"):
        play(model, bare)
    with pytest.raises(DataError, match="A prompt of 20 tokens leaves no room in a context of 16"):
        play(model, prompts_of(model, ["a" * 20]))
    with pytest.raises(DataError, match="No token of the tokenizer holds ';'"):
        other = model_of(letters="abgo")
        play(other, prompts_of(other, ["go"]))
    with pytest.raises(ModelError, match="hides earlier turns"):
        Dialogue(model_of(template="[user]{{ messages[-1]['content'] }}").tokenizer).between("= 1;")


@pytest.mark.parametrize(
    ("eta", "depths"), [(1, [1, 2, 3, 4, 5, 5, 5, 5]), (2, [1, 1, 2, 2, 3, 3, 4, 4]), (4, [1, 1, 1, 1, 2, 2, 2, 2])]
)
def test_the_tables_of_the_curriculum(eta, depths):
    steps = range(8)
    forward, backward, none = (Curriculum(kind, eta=eta) for kind in ("f2b", "b2f", "none"))
    assert [forward.max_turns(n, 5) for n in steps] == depths
    assert [backward.replayed(n, 5) for n in steps] == [5 - k for k in depths]
    assert [backward.max_turns(n, 5) for n in steps] == [none.max_turns(n, 5) for n in steps] == [5] * 8
    assert [forward.replayed(n, 5) for n in steps] == [none.replayed(n, 5) for n in steps] == [0] * 8
    paper, other = (Curriculum(kind, eta=eta, indices="paper") for kind in ("f2b", "b2f"))
    assert [paper.max_turns(n, 5) for n in steps] == [min(k + 1, 5) for k in depths]
    assert [other.replayed(n, 5) for n in steps] == [min(6 - k, 4) for k in depths]


def test_the_length_of_a_task_and_the_start_bound_the_curriculum():
    backward = Curriculum("b2f", k_start=3, eta=2)
    assert [[backward.replayed(n, length) for n in range(6)] for length in (1, 3, 5)] == [
        [0] * 6, [0] * 6, [2, 2, 1, 1, 0, 0],
    ]  # fmt: skip
    assert Curriculum("f2b", k_start=9).max_turns(0, 7) == 7
    assert Curriculum("b2f", indices="paper").replayed(0, 1) == 0
    assert Curriculum("b2f", indices="paper").replayed(99, 4) == 1
    with pytest.raises(RecipeError, match="k_start and eta of at least 1, got 0 and 2"):
        Curriculum("f2b", k_start=0)
    with pytest.raises(RecipeError, match="k_start and eta of at least 1, got 1 and 0"):
        Curriculum("f2b", eta=0)

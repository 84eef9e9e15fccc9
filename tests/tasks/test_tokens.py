"""Which tokens a row has and which count: by hand on a word tokenizer, and on the real chat template of SmolLM2."""

import logging

import pytest
import torch

from potstill.contracts.errors import DataError, ModelError
from potstill.models.pretrained import smollm2
from potstill.tasks.tokens import ChatTokens, Completions, Prompts, TextTokens, chat_tokens, token_rows

WORDS = ["<pad>", "<end>", "<user>", "<bot>", "a", "b", "c", "d", "e", "f", "g"]
TEMPLATE = (
    "{% for m in messages %}{{ '<bot> ' if m.role == 'assistant' else '<user> ' }}{{ m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<bot> ' }}{% generation %}{{ m.content + ' <end>' }}"
    "{% endgeneration %}{{ ' ' }}{% else %}{{ '<user> ' + m.content + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture
def words():
    """One token a word, so that every expectation can be written down."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def smol(asset_or_skip):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(asset_or_skip(smollm2))


def rows(*numbers):
    return torch.tensor(numbers)


def said(batch, row):
    """The words of a row, the counted ones in brackets, padding as a dot."""
    out = []
    for token, attended, counted in zip(batch.tokens_BT[row], batch.attention_BT[row], batch.counted_BT[row]):
        word = WORDS[token] if attended else "."
        out.append(f"[{word}]" if counted else word)
    return " ".join(out)


def test_packed_blocks_by_hand(words):
    data = TextTokens(["a b c", "d", "e f g a b"], words, length=4)
    batch = data.batch(rows(0, 1, 2))
    assert [said(batch, i) for i in range(3)] == ["a [b] [c] [<end>]", "d [<end>] e [f]", "g [a] [b] [<end>]"]
    assert batch.attention_BT.all()
    assert batch.ids_B.tolist() == [0, 1, 2]
    assert data.batch(rows(2), epoch=2).ids_B.tolist() == [8]
    assert said(TextTokens(["a b c d e f"], words, length=5).batch(rows(0)), 0) == "a [b] [c] [d] [e]"  # rest left out


def test_one_text_a_row_by_hand(words, caplog):
    with caplog.at_level(logging.INFO):
        data = TextTokens(["a b c d e", "f g", "a"], words, length=4, pack=False)
    batch = data.batch(rows(0, 1, 2))
    assert [said(batch, i) for i in range(3)] == ["a [b] [c] [d]", "f [g] [<end>] .", "a [<end>] . ."]
    assert "1 of 3 rows cut to 4 tokens, 0 left out" in caplog.text
    bare = TextTokens(["a b", "c"], words, length=4, pack=False, end=False)
    assert len(bare) == 1  # one token alone predicts nothing
    assert said(bare.batch(rows(0)), 0) == "a [b]"


def test_rows_do_not_depend_on_their_neighbours(words):
    data = TextTokens(["a b c d e", "f g"], words, length=8, pack=False)
    both, alone = data.batch(rows(1, 0)), data.batch(rows(1))
    width = alone.tokens_BT.shape[1]
    assert torch.equal(both.tokens_BT[0, :width], alone.tokens_BT[0])
    assert torch.equal(both.counted_BT[0, :width], alone.counted_BT[0])
    assert not both.attention_BT[0, width:].any()
    assert not both.counted_BT[0, width:].any()


def test_too_little_text_is_refused(words):
    with pytest.raises(DataError, match="1 texts have 3 tokens, too few for one block of 8"):
        TextTokens(["a b"], words, length=8)
    with pytest.raises(DataError, match="none of 0 rows has a token to learn"):
        TextTokens([], words, length=8, pack=False)
    with pytest.raises(DataError, match="length must be at least 2"):
        TextTokens(["a b"], words, length=1, pack=False)


CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f g"},
]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by prefix", "by marks"])
def test_assistant_tokens_by_hand(words, template):
    words.chat_template = template
    batch = ChatTokens([CHAT, CHAT[:2]], words, length=32).batch(rows(0, 1))
    assert said(batch, 0) == "<user> a b <end> <bot> [c] [d] [<end>] <user> e <end> <bot> [f] [g] [<end>]"
    assert said(batch, 1) == "<user> a b <end> <bot> [c] [d] [<end>]" + " ." * 7


def test_turn_that_the_template_rewrites_does_not_count(words):
    """A template that shows only the last answer in full, as reasoning models' do."""
    words.chat_template = (
        "{% for m in messages %}{{ '<bot> ' if m.role == 'assistant' else '<user> ' }}"
        "{{ (m.content if loop.last or m.role == 'user' else 'a') + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
    )
    batch = ChatTokens([CHAT], words, length=32).batch(rows(0))
    assert said(batch, 0) == "<user> a b <end> <bot> a <end> <user> e <end> <bot> [f] [g] [<end>]"


def test_chat_cut_before_its_answer_is_left_out(words, caplog):
    long = [{"role": "user", "content": "a b c d e f g a"}, *CHAT[1:2]]
    with caplog.at_level(logging.INFO):
        data = ChatTokens([CHAT, long], words, length=8)
    assert len(data) == 1
    assert "2 of 2 rows cut to 8 tokens, 1 left out" in caplog.text
    with pytest.raises(DataError, match="none of 1 rows has a token to learn within 8 tokens"):
        ChatTokens([long], words, length=8)


def test_tokenizer_without_template_is_refused(words):
    words.chat_template = None
    with pytest.raises(ModelError, match="has no chat template, which chat data needs"):
        ChatTokens([CHAT], words, length=32)


@pytest.mark.needs("gguf")
def test_smollm2_chat_counts_what_the_assistant_says(smol):
    chat = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4. 🙂 Naïve, but right."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    tokens, counted = chat_tokens(chat, smol)
    assert tokens == smol.apply_chat_template(chat, return_dict=True)["input_ids"]
    spans, text = [], []
    for token, flag in zip(tokens, counted):
        if flag:
            text.append(token)
        elif text:
            spans.append(smol.decode(text))
            text = []
    assert spans == ["It is 4. 🙂 Naïve, but right.<|im_end|>", "6<|im_end|>"]


@pytest.mark.needs("gguf")
def test_smollm2_marks_and_prefixes_agree(smol):
    """The same template written with generation marks: the two ways of counting give one answer."""
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": " Leading space, and more. "}]
    tokens, counted = chat_tokens(chat, smol)
    original = smol.chat_template
    say = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert say in original
    marked = original.replace(
        say,
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}"
        "{{'\n'}}",
    )
    try:
        smol.chat_template = marked
        assert chat_tokens(chat, smol) == (tokens, counted)
    finally:
        smol.chat_template = original


def test_prompts_of_texts_by_hand(words):
    data = Prompts(["a b c d e f g", "a b c", "d"], words, length=3, completion_length=2)
    batch = data.batch(rows(0, 1))
    assert len(data) == 2  # one token alone has no continuation
    assert batch.tokens_BT.tolist() == [[4, 5, 6], [0, 0, 4]]
    assert batch.attention_BT.tolist() == [[True] * 3, [False, False, True]]
    assert batch.completions == [[7, 8], [5, 6]]
    assert data.batch(rows(1), epoch=1).ids_B.tolist() == [3]


def test_prompt_rows_with_and_without_template(words):
    asked = [{"prompt": "a b", "answer": "c", "level": 3}, {"prompt": "d", "completion": "e f", "answer": "g"}]
    chat = Prompts(asked, words, length=8, completion_length=8).batch(rows(0, 1))
    assert [WORDS[t] for t in chat.tokens_BT[0]] == ["<user>", "a", "b", "<end>", "<bot>"]
    assert chat.completions == [[6, 1], [8, 9, 1]]
    assert chat.extra["answers"] == ["c", "g"]
    assert chat.extra["rows"][0]["level"] == 3
    plain = Prompts(asked, words, length=8, completion_length=8, chat=False).batch(rows(0, 1))
    assert plain.tokens_BT.tolist() == [[4, 5], [0, 7]]
    without = Prompts([{"prompt": "a b"}], words, length=8, completion_length=8).batch(rows(0))
    assert without.completions is None


def test_prompts_that_do_not_fit_are_left_out_and_counted(words, caplog):
    asked = [{"prompt": "a b c d"}, {"prompt": "a"}]
    with caplog.at_level(logging.INFO):
        data = Prompts(asked, words, length=3, completion_length=2, chat=False)
    assert data.batch(rows(0)).tokens_BT.tolist() == [[4]]
    assert "1 of 2 rows left out" in caplog.text
    with pytest.raises(DataError, match="none of 1 prompts fits into 3 tokens"):
        Prompts(asked[:1], words, length=3, completion_length=2, chat=False)


def test_prompts_of_conversations_stop_at_the_last_user(words):
    batch = Prompts([CHAT, CHAT[:3]], words, length=16, completion_length=8).batch(rows(0, 1))
    said_words = [[WORDS[t] for t in row[mask]] for row, mask in zip(batch.tokens_BT, batch.attention_BT)]
    assert said_words[0] == ["<user>", "a", "b", "<end>", "<bot>", "c", "d", "<end>", "<user>", "e", "<end>", "<bot>"]
    assert said_words[0] == said_words[1]
    assert batch.completions is None  # the second has none, so the batch has none
    assert Prompts([CHAT], words, 16, 8).batch(rows(0)).completions == [[9, 10, 1]]


def test_completions_count_the_answer_alone(words):
    asked = [{"prompt": "a b", "completion": "c d"}, {"prompt": "e", "answer": "f"}]
    chat = Completions(asked, words, length=16).batch(rows(0, 1))
    assert said(chat, 0) == "<user> a b <end> <bot> [c] [d] [<end>]"
    assert said(chat, 1) == "<user> e <end> <bot> [f] [<end>] . ."
    plain = Completions(asked, words, length=4, chat=False).batch(rows(0, 1))
    assert [said(plain, 0), said(plain, 1)] == ["a b [c] [d]", "e [f] [<end>] ."]
    with pytest.raises(DataError, match="row 0 has neither completion nor answer"):
        Completions([{"prompt": "a"}], words, length=4)


def test_token_rows_follow_the_kind(words):
    assert isinstance(token_rows("text", ["a b c d"], words, 4), TextTokens)
    assert isinstance(token_rows("chat", [CHAT], words, 16), ChatTokens)
    assert isinstance(token_rows("prompts", [{"prompt": "a", "answer": "b"}], words, 16), Completions)
    with pytest.raises(DataError, match="kind images has no tokens"):
        token_rows("images", [], words, 16)

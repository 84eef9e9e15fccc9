import pytest
from transformers import AutoTokenizer

from potstill.contracts.errors import DataError
from potstill.models.tokenizers import character_tokenizer


def test_characters_go_in_and_come_out(tmp_path):
    tokenizer = character_tokenizer(["Hello,\n  world", "café: 1+2=3"])
    text = "care:  1\nHold é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids
    assert again.decode(ids) == text
    assert (again.pad_token_id, again.mask_token_id) == (tokenizer.pad_token_id, tokenizer.mask_token_id)


def test_ids_depend_on_the_alphabet_alone():
    assert character_tokenizer(["ab", "cb"]).get_vocab() == character_tokenizer("cba").get_vocab()


def test_special_tokens():
    tokenizer = character_tokenizer("ab")
    assert len(tokenizer) == 7
    assert tokenizer("aZ<mask>b")["input_ids"][1:3] == [tokenizer.unk_token_id, tokenizer.mask_token_id]
    assert tokenizer.decode(tokenizer("a<eos>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert character_tokenizer("ab", mask=False).mask_token_id is None
    with pytest.raises(DataError, match="needs text"):
        character_tokenizer([])

"""Small tokenizers for packaged language models, as real transformers tokenizers."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill.contracts.errors import DataError

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills padding; masks alone say what counts, so any will do where the tokenizer names none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


def character_tokenizer(texts: str | Iterable[str], mask: bool = True) -> PreTrainedTokenizerFast:
    """One token per character that occurs in `texts` (an alphabet is one text), after the special tokens.

    The order is that of the code points, so equal alphabets give equal ids. An unseen character becomes <unk>; decoding
    joins without spaces. Saves with `save_pretrained`, loads with AutoTokenizer.
    """
    alphabet = sorted(set().union(*([texts] if isinstance(texts, str) else texts)))
    if not alphabet:
        raise DataError("A character tokenizer needs text: no character was found.")
    special = {name: token for name, token in SPECIAL.items() if mask or name != "mask_token"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)

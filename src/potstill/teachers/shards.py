"""How a teacher's answers lie on disk: a record of fixed size a position, shards of whole rows, an index that vouches.

A record holds the k likeliest of V outcomes and the mass of all others, at one temperature:

    ids   the set, sorted, in Elias-Fano code (Vigna, arXiv 1206.4300): with l = floor(log2(V / k)), the l low bits of
          each, then bit (id >> l) + i set for the i-th: about 2 + log2(V / k) bits an id, where a plain one takes log2 V
    gaps  log p_max - log p_i in `bits` bits each, in equal steps up to the row's widest gap (float16, rounded up)
    tail  log(tail / kept), the log-odds of the outcomes left out, float16

Read back, the kept outcomes are renormalised to the mass that the tail leaves, so rounding never makes a mass above 1.
With d half a step (the widest gap / (2^bits - 1) / 2), a kept log-probability is off by at most 2 d and the rounding of
the tail (2^-11 of its log-odds); KL between the kept outcomes as they were and as they are read is at most d^2 / 2
(Hoeffding's lemma). Two limits are deliberate: gaps beyond 64 nats are stored as 64, so that nothing has probability 0,
and the tail is never below 2^-19, so that it stays positive when it is recomputed as 1 - kept in float32.

N positions, V vocabulary, K kept outcomes, C bytes of a record.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from potstill.contracts.errors import DataError, NonFiniteError, RecipeError
from potstill.contracts.files import whole_file
from potstill.divergences.supports import log_mass

FORMAT = "potstill teacher cache"
VERSION = 1
WIDEST = 64.0  # nats under the likeliest, beyond which outcomes count as equally rare
LEAST_TAIL = math.log(2.0**-19)
OPEN = 1024  # shards held open at once


# ---------------------------------------------------------------- bits


def _planes(bits: int) -> list[int]:
    """A width as powers of two, 8 or less each, so that each plane's parts fill bytes evenly: 13 = 8 + 4 + 1."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def pack(values_NK: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits -> bytes: [N, K] -> uint8 [N, packed_size(K, bits)], plane by plane."""
    parts, at = [values_NK.new_zeros(len(values_NK), 0, dtype=torch.uint8)], 0
    for width in _planes(bits):
        share = 8 // width
        part = (values_NK >> at) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % share)).unflatten(1, (-1, share))
        shifts = torch.arange(0, 8, width, device=part.device)
        parts.append((part << shifts).sum(-1).to(torch.uint8))
        at += width
    return torch.cat(parts, 1)


def unpack(packed_NC: Tensor, bits: int, count: int) -> Tensor:
    """The numbers again, int64 [N, count]."""
    out = torch.zeros(len(packed_NC), count, dtype=torch.int64, device=packed_NC.device)
    start = at = 0
    for width in _planes(bits):
        size = -(-count * width // 8)
        part = packed_NC[:, start : start + size, None].int()
        shifts = torch.arange(0, 8, width, device=part.device, dtype=torch.int32)
        part = ((part >> shifts) & (2**width - 1)).flatten(1)[:, :count]
        out += part.long() << at
        start, at = start + size, at + width
    return out


# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class Codec:
    """The records of one cache: the `k` likeliest of `vocabulary` outcomes, gaps in `bits` bits."""

    vocabulary: int
    k: int
    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.vocabulary:
            raise RecipeError(
                f"A cache keeps between 1 and {self.vocabulary - 1} of {self.vocabulary} outcomes (the last one is the "
                f"tail), got k = {self.k}."
            )
        if not 2 <= self.bits <= 16:
            raise RecipeError(f"bits of a cached log-probability must lie between 2 and 16, got {self.bits}.")

    @property
    def low(self) -> int:
        """Low bits of an id that are stored as they are."""
        return (self.vocabulary // self.k).bit_length() - 1

    @property
    def places(self) -> int:
        """Places of the bitmap that holds the high bits."""
        return self.k + ((self.vocabulary - 1) >> self.low)

    @property
    def sizes(self) -> list[int]:
        """Bytes of a record's parts: low bits, bitmap, gaps, widest gap and tail."""
        parts = (self.k, self.low), (self.places, 1), (self.k, self.bits)
        return [*(packed_size(count, bits) for count, bits in parts), 4]

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def step(self, widest: Tensor) -> Tensor:
        return widest / (2**self.bits - 1)

    def encode(self, logp_NV: Tensor) -> Tensor:
        """Normalised log-probabilities of all outcomes, float32 or better -> records, uint8 [N, C]."""
        kept, ids = logp_NV.topk(self.k, dim=-1)
        return self.encode_kept(kept, ids, log_mass(logp_NV.scatter(-1, ids, -math.inf)))

    def encode_kept(self, kept: Tensor, ids: Tensor, tail: Tensor) -> Tensor:
        """The same from the k likeliest, falling, with their ids, [N, K], and the log-mass of all others, [N]."""
        if kept.isnan().any():
            raise NonFiniteError("the teacher's log-probabilities are NaN: its weights or its precision are broken.")
        odds = tail - log_mass(kept)
        ids, order = ids.sort(-1)
        gaps = (kept[:, :1] - kept.gather(-1, order)).clamp_max(WIDEST)
        widest = gaps.amax(-1, keepdim=True)
        rounded = (widest * (1 + 2**-10)).half()  # up, but for gaps so small that nothing can be told apart
        step = self.step(rounded.float())
        codes = (gaps / torch.where(step > 0, step, 1.0)).round().clamp_max(2**self.bits - 1).long()
        bitmap = torch.zeros(len(ids), self.places, dtype=torch.int64, device=ids.device)
        bitmap.scatter_(1, (ids >> self.low) + torch.arange(self.k, device=ids.device), 1)
        ends = torch.cat([rounded, odds.clamp_min(LEAST_TAIL)[:, None].half()], 1).contiguous().view(torch.uint8)
        return torch.cat([pack(ids, self.low), pack(bitmap, 1), pack(codes, self.bits), ends], 1)

    def decode(self, records_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities, float32, and ids, int64, both [N, K] in the order of ids; exp sums to at most 1."""
        low, bitmap, codes, ends = records_NC.split(self.sizes, 1)
        high = unpack(bitmap, 1, self.places).nonzero()[:, 1].view(-1, self.k)
        ids = (high - torch.arange(self.k, device=high.device) << self.low) + unpack(low, self.low, self.k)
        widest, odds = ends.clone(memory_format=torch.contiguous_format).view(torch.float16).double().split(1, 1)
        logp = -unpack(codes, self.bits, self.k) * self.step(widest)
        return (logp.log_softmax(-1) - torch.nn.functional.softplus(odds)).float(), ids


# DistillKit's sizes at the same k, from its `DistributionQuantizationConfig.total_bits` (distillkit/compression/config.py)
# and the two configurations that its README advises (section "Logit Compression"), github.com/arcee-ai/DistillKit at
# a61c2e7, March 2026: `exact` log-probs in bfloat16, `terms` float32 coefficients of a curve through the others (whose
# error is what it is), and ids of ceil(log2 V) bits. At V = 2^16: 312 bytes for k = 128 (it says about 300), 114 for 50.
# Mean KL of the teacher's top k and tail to what is read, 1,473 tokens of English, SmolLM2-135M (V = 49,152), k = 64: ours
# 9e-6 nats in 160 bytes (8 bits), 1.5e-4 in 144 (6 bits); such curves, fitted by least squares, 1.2e-4 in 184 and 6e-2 in 142.
DISTILLKIT = {"recommended": (16, 6), "budget": (1, 3)}


def distillkit_bytes(vocabulary: int, k: int, exact: int, terms: int) -> int:
    ids = -(-k * (vocabulary - 1).bit_length() // 8)
    return 2 * min(exact, k) + (4 * terms if k > exact else 0) + ids


# ---------------------------------------------------------------- files


WAY = "The shards before it are whole; free some space and give the same command again."


def write_index(folder: Path, index: dict[str, Any]) -> None:
    with whole_file(folder / "index.json", WAY, alone=True) as part:
        part.write_text(json.dumps(index, indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache, finished or not."""
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(
            f"{folder} is no teacher cache: it has no index.json. Write one with: potstill cache RECIPE --output {folder}"
        )
    try:
        index: Any = json.loads(path.read_text())
    except ValueError:
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(
            f"{path} is no index of a teacher cache of version {VERSION}, which this potstill reads. Write the cache anew."
        )
    return index


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def shard_count(index: dict[str, Any]) -> int:
    return -(-index["data"]["rows"] // index["rows_per_shard"])


def is_written(folder: Path, index: dict[str, Any], number: int) -> bool:
    """Whether a shard is finished: the index vouches for it, and the file has its size."""
    known, path = index["shards"].get(shard_name(number)), folder / shard_name(number)
    return known is not None and path.is_file() and path.stat().st_size == known["bytes"]


def write_shard(folder: Path, index: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard whole, and then the index that vouches for it."""
    path = folder / shard_name(number)
    with whole_file(path, WAY, alone=True) as part:
        save_file(tensors, part)
        known = {"sha256": sha256(part), "bytes": part.stat().st_size, "positions": len(tensors["records"])}
    index["shards"][path.name] = known
    write_index(folder, index)


class Shards:
    """The shards of a finished cache, mapped into memory when first asked for and hashed once."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.open: dict[int, dict[str, Tensor]] = {}
        self.verified: set[int] = set()

    def __call__(self, number: int) -> dict[str, Tensor]:
        """`records` uint8 [N, C]; `starts` [rows + 1], where each row's records begin; `hashes` [rows]; both int64."""
        if number not in self.open:
            if len(self.open) >= OPEN:
                self.open.pop(next(iter(self.open)))
            self.open[number] = self._load(number)
        return self.open[number]

    def _load(self, number: int) -> dict[str, Tensor]:
        path = self.folder / shard_name(number)
        way = "Give the command that wrote the cache again: it writes what is missing."
        if not path.is_file():
            raise DataError(f"{path} is missing. {way}")
        if number not in self.verified:
            if sha256(path) != self.index["shards"][path.name]["sha256"]:
                raise DataError(f"{path} is damaged: its SHA-256 is not the one in the index. Delete it. {way}")
            self.verified.add(number)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ("records", "starts", "hashes")}

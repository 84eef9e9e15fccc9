"""Cached teachers: what is read is what was written within the stated bounds, whole after any interruption, or refused."""

import json
import math
import multiprocessing
import os
import signal

import pytest
import torch
import yaml
from torch.testing import assert_close
from typer.testing import CliRunner

from potstill import recipe as recipes
from potstill.cli import app
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError, NonFiniteError, RecipeError, RunError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, TopKLogp
from potstill.divergences import Exact, ForwardKL, JensenShannon, ReverseKL, TopK
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Run
from potstill.tasks.tokens import TextTokens
from potstill.teachers import cached, shards
from potstill.teachers.cached import CachedTeacher, described, row_hashes, write_cache
from potstill.teachers.local import LocalTeacher
from potstill.teachers.shards import Codec, distillkit_bytes, pack, packed_size, unpack

TEXTS = [
    f"Row {i}."
    if i % 6 == 1
    else f"Row {i}: what is distilled {i} times was once a wash, {'or beer, ' * (i % 4)}or worse."
    for i in range(24)
]


def random_logp(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@pytest.fixture(scope="module")
def folders(tiny_lm):
    return tiny_lm(1, spread=0.1), tiny_lm(2)


@pytest.fixture(scope="module")
def student(folders):
    return CausalLM.from_pretrained(folders[0])


@pytest.fixture(scope="module")
def teacher(folders):
    return LocalTeacher(CausalLM.from_pretrained(folders[1]), "the tiny one")


@pytest.fixture(scope="module")
def data(teacher):
    return TextTokens(TEXTS, teacher.model.tokenizer, 48, pack=False)


def written(folder, teacher, data, *, k=10, bits=8, **options):
    """A cache of four rows a shard, two a batch."""
    vocabulary = len(teacher.model.tokenizer)
    record, positions = Codec(vocabulary, min(k, vocabulary - 1), bits).bytes, cached.data_hash(data)[1]
    size = 1 + 4 * record * positions // len(data)
    write_cache(folder, teacher, data, k=k, bits=bits, batch=2, shard_bytes=size, source="the texts", **options)
    return folder


@pytest.fixture
def folder(tmp_path, teacher, data):
    return written(tmp_path / "cache", teacher, data)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def edit(folder, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("bits", range(1, 19))
@pytest.mark.parametrize("count", [1, 7, 16])
def test_packing_keeps_every_number_in_the_fewest_bytes_of_each_plane(bits, count):
    values = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(bits))
    values[0] = 2**bits - 1
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, packed_size(count, bits))
    assert packed_size(count, bits) <= math.ceil(count * bits / 8) + 3  # a remainder for each of at most 4 planes
    assert torch.equal(unpack(packed, bits, count), values)


SIZES = [(85, 84, 8), (85, 10, 8), (85, 10, 4), (5000, 64, 8), (5000, 50, 12), (300, 299, 16), (7, 1, 16), (2, 1, 2)]


@pytest.mark.parametrize(("vocabulary", "k", "bits"), SIZES)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 0.01, 3.0, 12.0])
def test_a_record_holds_the_likeliest_within_its_bounds(vocabulary, k, bits, scale):
    codec, logp = Codec(vocabulary, k, bits), random_logp(40, vocabulary, scale=scale)
    records = codec.encode(logp)
    assert records.shape == (40, codec.bytes)
    read, ids = codec.decode(records)
    assert read.dtype == torch.float32 and ids.dtype == torch.int64
    assert (ids.diff(dim=-1) > 0).all()  # a set: none twice
    kept = logp.gather(-1, ids)
    assert_close(kept.sort(-1).values, logp.topk(k).values.flip(-1))
    # 2 d = one step, as the module says, and the rounding of the tail; the floor under the tail takes 2^-19 of the mass
    widest = (kept.amax(-1) - kept.amin(-1)).clamp_max(shards.WIDEST)
    step = 1.002 * widest / (2**bits - 1)
    tail = (1 - kept.double().exp().sum(-1)).clamp_min(2.0**-19)
    odds = (tail.log() - kept.double().logsumexp(-1)).abs()
    near = (kept.amax(-1, keepdim=True) - kept) < shards.WIDEST
    error = (read - kept).abs() * near
    assert (error.amax(-1) <= step + odds * 2**-11 + 4e-6).all()
    assert (error.amax(-1) > 0).any() or scale == 0
    gaps = [x.amax(-1, keepdim=True) - x for x in (read, kept)]
    assert (((gaps[0] - gaps[1]).abs() * near).amax(-1) <= step / 2 + 4e-6).all()
    # Hoeffding's lemma between the kept outcomes
    p, q = kept.double().log_softmax(-1), read.double().log_softmax(-1)
    assert ((p.exp() * (p - q)).sum(-1) <= (step / 2) ** 2 / 2 + 1e-7).all()


@pytest.mark.parametrize(("vocabulary", "k", "bits"), SIZES)
@pytest.mark.parametrize("kind", ["random", "certain", "impossible", "uniform", "two"])
def test_the_kept_mass_never_exceeds_one_and_the_tail_stays_positive(vocabulary, k, bits, kind):
    logp = random_logp(200, vocabulary, scale=8.0)
    if kind == "certain":
        logp = (logp * 1e4).log_softmax(-1)
    if kind == "impossible":  # probability 0 for all but one outcome
        logp = torch.full_like(logp, -math.inf).scatter(1, torch.arange(200)[:, None] % vocabulary, 0.0)
    if kind == "uniform":
        logp = torch.zeros_like(logp).log_softmax(-1)
    if kind == "two":
        logp = torch.full_like(logp, -40.0).index_fill(1, torch.tensor([0, vocabulary - 1]), 0.0).log_softmax(-1)
    read, _ = Codec(vocabulary, k, bits).decode(Codec(vocabulary, k, bits).encode(logp))
    assert read.isfinite().all()
    assert (read.double().exp().sum(-1) < 1).all()
    assert (read.exp().sum(-1) < 1).all()  # nor when float32 adds it up, as the loss does


def test_the_tail_is_stored_and_not_what_rounding_leaves():
    """Half of the mass outside: it comes back to the rounding of its log-odds (0), whatever the bits of the rest."""
    logp = torch.cat([torch.full((1, 10), 0.05), torch.full((1, 90), 0.5 / 90)], 1).log()
    for bits in (2, 16):
        assert_close(
            Codec(100, 10, bits).decode(Codec(100, 10, bits).encode(logp))[0].exp().sum(-1), torch.tensor([0.5])
        )


def test_sizes_by_hand_and_those_of_distillkit():
    """k = 64 of 151,936: l = floor(log2(2374)) = 11, so 88 + ceil((64 + 74) / 8) + 64 + 4 = 174 bytes, as written down."""
    codec = Codec(151_936, 64, 8)
    assert codec.sizes == [88, 18, 64, 4] and codec.bytes == 174
    assert sum(codec.sizes[:2]) < 64 * 18 / 8  # less than plain ids of 18 bits
    assert Codec(65_536, 128).sizes[:2] == [128 * 9 // 8, 32] and Codec(65_536, 128).places == 128 + 127
    # its README: "around 114 bytes", "~300 bytes" (16 bfloat16, 6 float32 terms, 128 ids of 16 bits)
    assert distillkit_bytes(65_536, 50, 1, 3) == 114
    assert distillkit_bytes(65_536, 128, 16, 6) == 32 + 24 + 256
    assert distillkit_bytes(65_537, 8, 16, 6) == 16 + 17  # an id takes one bit more, and no term is needed


@pytest.mark.parametrize(
    ("k", "bits", "text"),
    [(0, 8, "got k = 0"), (9, 8, "between 1 and 8 of 9"), (3, 17, "got 17"), (3, 1, "between 2 and 16")],
)
def test_records_that_make_no_sense_are_refused(k, bits, text):
    with pytest.raises(RecipeError, match=text):
        Codec(9, k, bits)


# ---------------------------------------------------------------- what a student learns


def loss_of(student, teacher, batch, divergence, **options):
    objective = TokenDistillation(student, teacher, divergence, optimizer=OptimizerSpec(lr=1e-3), seed=0, **options)
    student.zero_grad()
    term = objective.loss("student", batch, 0).terms["divergence"]
    (term.total / term.count).backward()
    head = student.network.get_output_embeddings().weight
    return (term.total / term.count).item(), head.grad.clone()


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3), ReverseKL()], ids=repr)
def test_a_cache_of_the_whole_vocabulary_is_the_live_teacher(tmp_path, student, teacher, data, divergence):
    written(tmp_path / "c", teacher, data, k=1000, bits=16)
    whole = CachedTeacher(tmp_path / "c")
    assert whole.k == whole.vocabulary - 1 == CachedTeacher(tmp_path / "c", support=TopK(10**6)).k
    batch = data.batch(torch.tensor([5, 20, 3]), epoch=2)
    (value, gradient), (wanted, its) = (loss_of(student, t, batch, divergence) for t in (whole, teacher))
    assert value == pytest.approx(wanted, rel=2e-3)
    assert (gradient - its).norm() < 2e-3 * its.norm()


@pytest.mark.parametrize(("bits", "tolerance"), [(6, 5e-2), (8, 2e-2), (16, 1e-3)])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_a_cache_of_k_is_the_local_top_k_with_its_tail_bucketed(tmp_path, student, teacher, data, k, bits, tolerance):
    written(tmp_path / "c", teacher, data, bits=bits)
    support = TopK(k, of="teacher", tail="bucket")
    batch = data.batch(torch.arange(6))
    kept = CachedTeacher(tmp_path / "c", support=support)
    assert kept.score(batch, TopKLogp).logp_NK.shape == (len(batch.tokens_counted), k)
    (value, gradient), (wanted, its) = (
        loss_of(student, t, batch, Exact(ForwardKL(), support)) for t in (kept, teacher)
    )
    assert value == pytest.approx(wanted, rel=tolerance)
    assert (gradient - its).norm() < tolerance * its.norm()


def test_answers_are_at_the_cached_temperature(tmp_path, student, teacher, data):
    written(tmp_path / "c", teacher, data, temperature=2.5, bits=16)
    hot, batch = CachedTeacher(tmp_path / "c"), data.batch(torch.arange(3))
    signal = hot.score(batch, TopKLogp)
    live = (teacher.score(batch, FullLogits).logits / 2.5).log_softmax(-1)
    assert_close(signal.logp_NK, live.gather(-1, signal.indices_NK), atol=5e-3, rtol=0)
    with pytest.raises(SignalError, match="at temperature 2.5, and 1.0 is asked"):
        loss_of(student, hot, batch, ForwardKL())
    loss_of(student, hot, batch, ForwardKL(), temperature=2.5)


def test_rows_are_found_by_number_in_any_order_epoch_and_padding(folder, data):
    kept = CachedTeacher(folder)
    assert len(kept.index["shards"]) == 6 and kept.index["rows_per_shard"] == 4
    one = {row: kept.score(data.batch(torch.tensor([row])), TopKLogp).logp_NK for row in (23, 0, 7)}
    batch = data.batch(torch.tensor([23, 0, 7]), epoch=torch.tensor([0, 5, 2]))
    assert torch.equal(kept.score(batch, TopKLogp).logp_NK, torch.cat(list(one.values())))
    left = lambda x: torch.stack([row.roll(int((~seen).sum())) for row, seen in zip(x, batch.attention_BT)])
    moved = TokenBatch(batch.ids_B, left(batch.tokens_BT), left(batch.attention_BT), left(batch.counted_BT))
    assert not torch.equal(moved.tokens_BT, batch.tokens_BT) and row_hashes(moved) == row_hashes(batch)
    assert torch.equal(kept.score(moved, TopKLogp).logp_NK, kept.score(batch, TopKLogp).logp_NK)


def test_rows_differ_in_tokens_and_in_what_counts(data):
    batch = data.batch(torch.arange(2))
    before = row_hashes(batch)
    batch.counted_BT[1, 3] = False
    batch.tokens_BT[0, 5] += 1
    assert [a == b for a, b in zip(before, row_hashes(batch))] == [False, False]


# ---------------------------------------------------------------- interruptions


class Dying(LocalTeacher):
    """Is killed, as by a full machine, when it is asked for the n-th time."""

    def __init__(self, model, calls):
        super().__init__(model, "the tiny one")
        self.calls = calls

    def score(self, batch, need):
        self.calls -= 1
        if self.calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(batch, need)


def killed(function) -> None:
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_killed_cache_goes_on_with_the_finished_shards_and_ends_with_the_same_bytes(
    tmp_path, folder, teacher, data, calls
):
    again = tmp_path / "again"
    killed(lambda: written(again, Dying(teacher.model, calls), data))
    index = json.loads((again / "index.json").read_text())
    done = sorted(index["shards"])
    assert len(done) == calls // 2  # two batches make a shard here
    with pytest.raises(DataError, match=rf"again is an unfinished cache: {len(done)} of 6 shards"):
        CachedTeacher(again)
    times = {name: (again / name).stat().st_mtime_ns for name in done}
    written(again, teacher, data)
    assert times == {name: (again / name).stat().st_mtime_ns for name in done}
    assert files(again) == files(folder)


def test_killed_between_a_shard_and_its_index_or_in_the_middle_of_a_file(tmp_path, folder, teacher, data, monkeypatch):
    again = tmp_path / "again"

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors, part):
        part.write_bytes(b"half")
        die()

    for name, replacement in (("write_index", die), ("save_file", half)):
        with monkeypatch.context() as patch:
            patch.setattr(shards, name, replacement)
            killed(lambda: written(again, teacher, data))
        assert json.loads((again / "index.json").read_text())["shards"] == {}
    written(again, teacher, data)
    assert files(again) == files(folder)


def test_a_finished_cache_is_not_written_again_and_a_deleted_shard_is(folder, teacher, data):
    before = files(folder)
    (folder / "shard-00002.safetensors").unlink()
    asked = []
    watched = LocalTeacher(teacher.model, "the tiny one")
    watched.score = lambda batch, need: asked.extend(batch.ids_B.tolist()) or teacher.score(batch, need)
    written(folder, watched, data)
    assert sorted(asked) == [8, 9, 10, 11] and files(folder) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 9}, r"another k \(10 there, 9 asked\)"),
        ({"bits": 9}, r"another bits \(8 there, 9 asked\)"),
        ({"temperature": 2.0}, r"another temperature \(1.0 there, 2.0 asked\)"),
        ({"data": TEXTS[1:]}, "another data"),
        ({"teacher": None}, "another teacher"),
    ],
)
def test_a_cache_is_completed_only_by_what_began_it(folder, folders, teacher, data, change, text):
    before = files(folder)
    rows = TextTokens(change.pop("data"), teacher.model.tokenizer, 48, pack=False) if "data" in change else data
    if "teacher" in change:
        del change["teacher"]
        teacher = LocalTeacher(CausalLM.from_pretrained(folders[0]), "the tiny one")  # other weights, the same name
    with pytest.raises(RunError, match=f"holds a cache of {text}"):
        written(folder, teacher, rows, **change)
    assert files(folder) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, teacher, data):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is no teacher cache. Choose another folder"):
        written(tmp_path, teacher, data)
    assert list(files(tmp_path)) == ["mine.txt"]


@pytest.mark.parametrize(
    "cause", [OSError(28, "No space left on device"), ValueError("I/O error (os error 28)")], ids=repr
)
def test_a_full_disk_is_one_sentence(tmp_path, teacher, data, monkeypatch, cause):
    def full(tensors, part):
        raise cause

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(RunError, match="The disk is full: .*shard-00000.safetensors could not be written"):
        written(tmp_path / "c", teacher, data)


def test_a_broken_teacher_names_the_rows(tmp_path, folders, data):
    broken = LocalTeacher(CausalLM.from_pretrained(folders[1]), "the broken one")
    with torch.no_grad():
        broken.model.network.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(NonFiniteError, match="the broken one, rows 0 to 1: the teacher's log-probabilities are NaN"):
        written(tmp_path / "c", broken, data)


class TopOnly:
    """The tiny one as a server would give it: its k likeliest outcomes and no weights."""

    name, gives, k, temperature = "the served one", frozenset({TopKLogp}), 12, 1.0

    def __init__(self, teacher):
        self.teacher, self.tokenizer, self.vocabulary = teacher, teacher.model.tokenizer, teacher.model.vocabulary

    def score(self, batch, need):
        logp, ids = self.teacher.score(batch, FullLogits).logits.log_softmax(-1).topk(self.k)
        shuffled = torch.randperm(self.k, generator=torch.Generator().manual_seed(0))
        return TopKLogp(logp[:, shuffled], ids[:, shuffled])


def test_a_teacher_without_weights_is_cached_from_its_likeliest(tmp_path, folder, teacher, data):
    served = TopOnly(teacher)
    write_cache(tmp_path / "c", served, data, k=10, batch=3)
    batch = data.batch(torch.arange(5))
    got, wanted = (CachedTeacher(f).score(batch, TopKLogp) for f in (tmp_path / "c", folder))
    assert torch.equal(got.indices_NK, wanted.indices_NK)
    assert_close(got.logp_NK, wanted.logp_NK, atol=1e-5, rtol=1e-3)
    assert json.loads((tmp_path / "c" / "index.json").read_text())["teacher"]["weights"] is None
    for options in ({"k": 13}, {"k": 10, "temperature": 2.0}):
        with pytest.raises(
            SignalError, match=r"the served one gives its 12 likeliest outcomes at temperature 1.0, and a"
        ):
            write_cache(tmp_path / "d", served, data, **options)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------- what is refused when read


def test_only_a_cache_of_this_version_is_read(tmp_path, folder):
    with pytest.raises(DataError, match="is no teacher cache: it has no index.json. Write one with: potstill cache"):
        CachedTeacher(tmp_path)
    edit(folder, version=2)
    with pytest.raises(DataError, match="is no index of a teacher cache of version 1"):
        CachedTeacher(folder)
    (folder / "index.json").write_text('{"format": ')
    with pytest.raises(DataError, match="is no index of a teacher cache"):
        CachedTeacher(folder)


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(ModelError, match=r"written with another tokenizer than the run's \(8 tokens\)"):
        CachedTeacher(folder, tokenizer=character_tokenizer("abc"))


def test_another_teacher_than_the_one_named_is_refused(tmp_path, teacher, data):
    written(tmp_path / "c", teacher, data, recipe={"name": "a"})
    CachedTeacher(tmp_path / "c", asked={"name": "a"})
    CachedTeacher(tmp_path / "c", asked={})  # none is named
    with pytest.raises(
        ModelError, match=r'holds the answers of {"name": "a"}, and the recipe\'s teacher is {"name": "b"}'
    ):
        CachedTeacher(tmp_path / "c", asked={"name": "b"})


def test_other_data_is_refused_before_work_and_other_rows_when_met(folder, teacher, data):
    kept = CachedTeacher(folder)
    assert kept.check(data) is kept
    tokenize = lambda texts, length=48: TextTokens(texts, teacher.model.tokenizer, length, pack=False)
    with pytest.raises(
        DataError, match=r"written over 24 rows of the texts, and this run's data holds other rows of 23"
    ):
        kept.check(tokenize(TEXTS[1:]))
    for other in (tokenize(TEXTS[::-1]), tokenize(TEXTS, 47)):
        with pytest.raises(
            DataError, match="this run's data holds other rows. Take the same data, length and tokenizer"
        ):
            kept.check(other)
        with pytest.raises(DataError, match="row 2 of the batch holds other tokens than the cached row"):
            kept.score(other.batch(torch.tensor([2])), TopKLogp)


def test_a_damaged_shard_is_found_when_it_is_first_read_and_no_other(folder, data):
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    kept = CachedTeacher(folder)
    kept.score(data.batch(torch.tensor([0, 3, 8])), TopKLogp)  # rows of other shards
    with pytest.raises(DataError, match="shard-00001.safetensors is damaged: its SHA-256 is not the one in the index"):
        kept.score(data.batch(torch.tensor([4])), TopKLogp)


def test_a_missing_or_cut_shard_is_found_before_work(folder, data):
    kept = CachedTeacher(folder)
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="unfinished cache: 5 of 6 shards"):
        CachedTeacher(folder)
    path.unlink()
    with pytest.raises(DataError, match="shard-00001.safetensors is missing. Give the command"):
        kept.score(data.batch(torch.tensor([4])), TopKLogp)


def test_hashing_happens_once_a_shard_though_few_are_held_open(folder, data, monkeypatch):
    hashed = []
    monkeypatch.setattr(shards, "sha256", lambda path, real=shards.sha256: hashed.append(path) or real(path))
    monkeypatch.setattr(shards, "OPEN", 2)
    kept = CachedTeacher(folder)
    for _ in range(2):
        kept.score(data.batch(torch.arange(24)), TopKLogp)
    assert len(kept.shards.open) == 2 and len(hashed) == len(set(hashed)) == 6


def test_more_than_was_kept_cannot_be_asked(folder, data):
    with pytest.raises(
        SignalError, match="holds the 10 likeliest outcomes, and 11 are asked. Set support.k to 10 or less"
    ):
        CachedTeacher(folder, support=TopK(11, of="teacher"))
    for of in ("student", "union"):
        with pytest.raises(SignalError, match="outcomes that the student chooses"):
            CachedTeacher(folder, support=TopK(3, of=of))
    with pytest.raises(SignalError, match=r"the tiny one \(cached in .*\) gives no FullLogits of a TokenBatch"):
        CachedTeacher(folder).score(data.batch(torch.arange(2)), FullLogits)


# ---------------------------------------------------------------- recipes


def potstill(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    raw = {
        "method": {"name": "token_kd", "temperature": 1.5},
        "student": str(folders[0]),
        "teacher": str(folders[1]),
        "data": {"path": str(folder / "lines.jsonl"), "length": 32, "prompt_length": 8, "jsonl": None},
        "train": {"steps": 8, "batch": 4, "lr": 3e-3, "trackers": [], "device": "cpu", "seed": 3},
        "eval": {"limit": 8, "batch": 4},
    }
    raw["data"] = f"jsonl:{folder / 'lines.jsonl'}"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return [str(folder / "recipe.yaml"), "data.length=32", "data.prompt_length=8"]


def test_a_run_from_a_cache_is_the_run_with_the_live_teacher_and_builds_no_teacher(
    tmp_path, recipe, folders, monkeypatch
):
    said = potstill("cache", *recipe, "--output", str(tmp_path / "c"), "--k", "1000", "--bits", "16")
    assert "the whole distribution" in said and "DistillKit" in said
    potstill("run", *recipe, f"output={tmp_path / 'live'}")
    loaded = []
    real = CausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        CausalLM,
        "from_pretrained",
        classmethod(lambda cls, path, **o: loaded.append(str(path)) or real(cls, path, **o)),
    )
    potstill("run", *recipe, f"teacher={{cache: {tmp_path / 'c'}}}", f"output={tmp_path / 'kept'}")
    assert set(loaded) == {str(folders[0])}
    live, kept = (json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("live", "kept"))
    assert kept["perplexity"] == pytest.approx(live["perplexity"], rel=1e-3)
    assert kept["before_perplexity"] == pytest.approx(live["before_perplexity"], rel=1e-6)
    assert abs(live["perplexity"] / live["before_perplexity"] - 1) > 0.05  # something was learnt
    rows = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = lambda name: [row["student/divergence"] for row in rows(name)]
    assert losses("kept") == pytest.approx(losses("live"), rel=5e-3) and losses("live")


def test_recipes_of_caches(tmp_path, recipe, folders):
    plan = lambda *changes: recipes.resolve(recipes.read(recipe[0], [*recipe[1:], *changes]))
    potstill("cache", *recipe, "--output", str(tmp_path / "c"), "--k", "10")
    named = Run(plan(f"teacher.cache={tmp_path / 'c'}"), tmp_path / "run")
    assert named.teacher().name == f"{folders[1]} (cached in {tmp_path / 'c'})" or named.teacher().temperature == 1.5
    assert not named.loads("teacher") and named.loads("student")
    with pytest.raises(
        RecipeError, match="teacher.cache gives a teacher's answers to the training rows, and token_kd needs"
    ):
        named.model("teacher")
    with pytest.raises(ModelError, match="and the recipe's teacher is"):
        Run(plan(f"teacher={{name: {folders[0]}, cache: {tmp_path / 'c'}}}"), tmp_path / "run").teacher()
    with pytest.raises(RecipeError, match="takes cache or from, not both"):
        plan(f"teacher={{from: student, cache: {tmp_path / 'c'}}}")
    with pytest.raises(DataError, match="this run's data holds other rows"):
        Run(plan(f"teacher={{cache: {tmp_path / 'c'}}}", "data.length=31"), tmp_path / "run").teacher()
    with pytest.raises(SignalError, match="11 are asked"):
        Run(
            plan(f"teacher={{cache: {tmp_path / 'c'}}}", "method.support={name: TopK, k: 11}"), tmp_path / "run"
        ).teacher()
    narrow = Run(plan(f"teacher={{cache: {tmp_path / 'c'}}}", "method.support={name: TopK, k: 4}"), tmp_path / "run")
    assert narrow.teacher().k == 4
    assert "cache" in potstill("run", *recipe, f"teacher={{cache: {tmp_path / 'c'}}}", "--dry-run").partition("role")[2]


def test_a_packaged_student_takes_the_tokenizer_from_the_cache(tmp_path, recipe, folders):
    potstill("cache", *recipe, "--output", str(tmp_path / "c"), "--k", "10")
    raw = recipes.read(recipe[0], [*recipe[1:], "student={name: llama-tiny}", f"teacher={{cache: {tmp_path / 'c'}}}"])
    run = Run(recipes.resolve(raw), tmp_path / "run")
    assert run.context["tokenizer"].get_vocab() == CausalLM.from_pretrained(folders[1]).tokenizer.get_vocab()
    assert run.teacher().k == 10


def test_prompts_with_their_own_completions_are_cached_for_off_policy_steps(tmp_path, recipe):
    gkd = [*recipe[:1], "method={name: gkd, on_policy: 0, divergence: ForwardKL}", *recipe[1:], "train.steps=2"]
    potstill("cache", *gkd, "--output", str(tmp_path / "c"), "--rows", "prompts")
    potstill("run", *gkd, f"teacher={{cache: {tmp_path / 'c'}}}", f"output={tmp_path / 'run'}")
    assert (tmp_path / "run" / "result.json").is_file()
    with pytest.raises(DataError, match="holds other tokens than the cached row.* rollouts need a live teacher"):
        potstill("run", *gkd, "method.on_policy=1", f"teacher={{cache: {tmp_path / 'c'}}}", f"output={tmp_path / 'on'}")
    with pytest.raises(RecipeError, match="--rows takes tokens or prompts, got rollouts"):
        potstill("cache", *gkd, "--output", str(tmp_path / "d"), "--rows", "rollouts")


def test_what_is_said_of_a_cache(folder, capsys):
    index = json.loads((folder / "index.json").read_text())
    size = sum(shard["bytes"] for shard in index["shards"].values()) / index["data"]["positions"]
    said = described(folder)
    assert f"{size:.1f} bytes a token for the 10 likeliest of {index['vocabulary']}" in said
    assert f"recommended scheme takes {distillkit_bytes(index['vocabulary'], 10, 16, 6)}" in said


def test_progress_is_said_where_there_is_no_terminal(tmp_path, teacher, data, monkeypatch, capsys):
    monkeypatch.setattr(cached, "SAY_SECONDS", 0.0)
    written(tmp_path / "c", teacher, data)
    lines = capsys.readouterr().err.splitlines()
    total = json.loads((tmp_path / "c" / "index.json").read_text())["data"]["positions"]
    assert f"{total:,} of {total:,} tokens" in " ".join(lines) and "a second" in lines[0] and "minutes left" in lines[0]
    (tmp_path / "c" / "shard-00003.safetensors").unlink()  # what is there already counts as done
    written(tmp_path / "c", teacher, data)
    assert f"{total:,} of {total:,} tokens" in capsys.readouterr().err.splitlines()[-1]

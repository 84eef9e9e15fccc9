import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import DataError
from potstill.evaluation.pictures import grid, save_grid


def test_images_stand_in_reading_order_with_a_white_gap():
    images = torch.stack([torch.full((1, 2, 3), v) for v in (-1.0, 0.0, 1.0, -0.5, 7.0)])
    sheet = grid(images, columns=3)[..., 0]
    assert sheet.shape == (2 + 1 + 2, 3 * 3 + 2)
    assert sheet[0, [0, 4, 8]].tolist() == [0, 128, 255] and sheet[3, [0, 4, 8]].tolist() == [64, 255, 255]
    assert (sheet[2] == 255).all() and (sheet[:, 3] == 255).all()
    assert grid(images.expand(5, 3, 2, 3)).shape == (5, 11, 3), "a square unless told otherwise"


@pytest.mark.needs("PIL")
def test_the_file_holds_the_grid(tmp_path):
    from PIL import Image

    images = torch.linspace(-1, 1, 4 * 3 * 5 * 5).view(4, 3, 5, 5)
    with Image.open(save_grid(images, tmp_path / "deep" / "samples.png", columns=2, scale=3)) as picture:
        read = torch.tensor(list(picture.getdata())).view(picture.height, picture.width, 3)
    assert_close(read[::3, ::3].to(torch.uint8), grid(images, columns=2))


def test_points_are_no_picture():
    with pytest.raises(DataError, match=r"needs images \[N, 1 or 3, H, W\], got \[4, 2\]"):
        grid(torch.zeros(4, 2))

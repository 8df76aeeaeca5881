"""What pictures hold, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image

import core


def test_straight_lines_go_from_the_first_to_the_second_of_each_pair():
    ends = torch.tensor([0.0, 9.0, 100.0, 10.0])[:, None, None, None].expand(-1, 2, 8, 8)
    lines = core.straight_lines(ends, steps=10)
    assert lines.shape == (20, 2, 8, 8) and (lines == lines[:, :1, :1, :1]).all()
    assert lines[:, 0, 0, 0].tolist() == pytest.approx([*range(10), *range(100, 9, -10)])


def test_an_interpolations_row_has_its_true_images_at_its_ends():
    images, decoded = torch.tensor([1, 2, 3, 4]), torch.tensor([10, 11, 12, 20, 21, 22])
    assert core.between_ends(images, decoded).tolist() == [1, 10, 11, 12, 2, 3, 20, 21, 22, 4]


def test_shown_examples_are_evenly_spaced_and_come_in_pairs():
    assert core.evenly_spaced(torch.arange(91), 10).tolist() == list(range(0, 91, 10))
    assert core.evenly_spaced(torch.arange(7), 10).tolist() == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_grid_shows_every_image_of_every_panel_two_dots_a_pixel_in_rows(stacked, tmp_path):
    panels = torch.randint(0, 250, (2, 5, 3, 32, 32), dtype=torch.uint8)
    core.save_grid(panels, 3, tmp_path / "grid.png", stacked)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    height, width = (
        size // (2 if here else 1) for size, here in zip(picture.shape, (stacked, not stacked), strict=False)
    )
    for p, panel in enumerate(panels):
        for k, image in enumerate(panel):
            y = 2 * (8 + 1 + 33 * (k // 3)) + p * height * stacked  # 8 of margin, then images with lines of 1 between
            x = 2 * (8 + 1 + 33 * (k % 3)) + p * width * (not stacked)
            shown = picture[y : y + 64, x : x + 64]
            assert np.array_equal(shown[::2, ::2], image.permute(1, 2, 0)) and np.array_equal(shown[::2], shown[1::2])
    assert (picture == 255).all(2).sum() == picture[..., 0].size - 10 * 64 * 64  # and nothing else


def test_single_images_are_written_in_their_order_from_a_number_on(tmp_path):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    core.write_images(images, tmp_path / "samples", 99)
    for path, image in zip(("0099.png", "0100.png", "0101.png"), images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / path)), image.permute(1, 2, 0))

"""What pictures hold, image by image, and which of them may be published."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import core
from test_scripts import FIGURES
from tools import publish

# Figures that show no image of a user's data: numbers, samples of a model, or question 1's points, which are ours.
SAFE = {"curves", "samples", "evidence", "latents", "iwae", "experiments", "samples_2a_2b", "receptive_fields"}


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
    assert core.evenly_spaced(torch.arange(2), 10).tolist() == [0, 1]


def test_tiled_images_are_in_rows_with_white_lines_around_them():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None] + torch.tensor([0, 50, 100])[:, None, None]
    images = images.to(torch.uint8).repeat(1, 1, 2, 3)
    images[:, :, 0, 0] += 20  # the corner at the top left
    x = core.tiled(images, 3)
    assert x.shape == (2 * 3 + 1, 3 * 4 + 1, 3) and x.dtype == np.uint8
    for k in range(5):
        row, column = 1 + 3 * (k // 3), 1 + 4 * (k % 3)
        assert np.array_equal(x[row : row + 2, column : column + 3], images[k].permute(1, 2, 0))
    assert (x[::3] == 255).all() and (x[:, ::4] == 255).all() and (x[4:, 9:] == 255).all()  # no sixth image


def test_single_images_are_written_in_their_order_from_a_number_on(tmp_path):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    core.write_images(images, tmp_path / "samples", 99)
    paths = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in paths] == ["0099.png", "0100.png", "0101.png"]
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0))


def test_every_figure_is_known_to_show_data_or_to_show_none():
    """A new figure has to be entered here or in publish.py. That FIGURES are all is in test_scripts.py."""
    of_scripts = {f"{name}.png" for names in FIGURES.values() for name in names}
    safe = {f"{name}.png" for name in SAFE}
    assert not safe & set(publish.SHOW_DATA)
    assert of_scripts == safe | {name for name in publish.SHOW_DATA if name.endswith(".png")}


def test_without_images_nothing_that_shows_the_data_is_published(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "PUBLISHED", tmp_path)
    published = {}
    for more in ([], ["--no-images"]):
        monkeypatch.setattr("sys.argv", ["publish.py", str(smoke[0] / "bonus"), *more])
        publish.main()
        (folder,) = tmp_path.iterdir()
        published[bool(more)] = {path.name for path in folder.iterdir()}
    assert published[True] == {"metrics.json", "curves.png", "samples.png", "receptive_fields.png"}
    assert published[False] == {"metrics.json", "report.md", *(f"{name}.png" for name in FIGURES["bonus"])}
    args = json.loads((folder / "metrics.json").read_text("utf-8"))["args"]
    assert args["out"] == "results" and args["data"] == "synthetic"

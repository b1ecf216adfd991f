"""Grids: every input pixel is there, enlarged by whole numbers, in its place, and nothing runs out of the picture."""

import numpy as np
import pytest

from jaxdiff.io.grids import GridStyle, labelled_grid


def noise_images(number, height, width, channels=3):
    # 16..239 keeps clear of the white ground, so that a picture's corner cannot be mistaken for it.
    return np.random.default_rng(0).integers(16, 240, (number, height, width, channels), dtype=np.uint8)


def enlarge(picture, factor):
    """Enlarge by Kronecker product, another way than the grid's own."""
    return np.stack([np.kron(picture[..., c], np.ones((factor, factor), np.uint8)) for c in range(3)], axis=-1)


def places(canvas, block):
    """Return every (top, left) at which `block` stands in `canvas`."""
    height, width = block.shape[:2]
    rows, columns = np.nonzero((canvas == block[0, 0]).all(axis=-1))
    found = ((y, x) for y, x in zip(rows, columns) if np.array_equal(canvas[y : y + height, x : x + width], block))
    return list(found)


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(16, 16, 4), (28, 28, 2), (8, 20, 3), (256, 256, 1), (64, 64, 1)]
)
def test_cells_hold_exactly_the_enlarged_pixels_in_order(height, width, factor):
    images = noise_images(6, height, width)
    canvas = labelled_grid(images, ["cat", "dog"], ["1", "2", "3"], "Title", "class", "noise")
    corners = [places(canvas, enlarge(image, factor)) for image in images]
    assert all(len(corner) == 1 for corner in corners)
    tops, lefts = np.array(corners).reshape(2, 3, 2).transpose(2, 0, 1)
    assert (tops == tops[:, :1]).all()
    assert (lefts == lefts[:1]).all()
    gaps_down, gaps_across = np.diff(tops[:, 0]) - height * factor, np.diff(lefts[0]) - width * factor
    assert (gaps_down == gaps_across[0]).all()
    assert (gaps_across == gaps_across[0]).all()
    assert 0 < gaps_across[0] < 12


def test_one_channel_is_drawn_grey():
    images = noise_images(1, 32, 32, channels=1)
    canvas = labelled_grid(images, ["a"], ["1"], "t")
    assert len(places(canvas, enlarge(np.repeat(images[0], 3, axis=-1), 2))) == 1


def test_ground_is_white_and_gaps_hold_nothing_else():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    canvas = labelled_grid(images, ["a", "b"], ["1", "2"], "")
    black = (canvas == 0).all(axis=-1)
    rows, columns = np.flatnonzero(black.sum(axis=1) >= 64), np.flatnonzero(black.sum(axis=0) >= 64)
    assert len(rows) == len(columns) == 128
    inside = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (inside[64:68] == 255).all()
    assert (inside[:, 64:68] == 255).all()


@pytest.mark.parametrize("side", [16, 256])
def test_text_keeps_clear_of_the_edges_whatever_its_length(side):
    long = "a name that goes on and on and on, " * 4
    canvas = labelled_grid(noise_images(1, side, side), [long], [long], long[:60], long[:40], long[:40])
    border = np.concatenate([canvas[:8].ravel(), canvas[-8:].ravel(), canvas[:, :8].ravel(), canvas[:, -8:].ravel()])
    assert (border == 255).all()


def test_long_names_are_cut_not_squeezed_into_the_pictures():
    images = noise_images(2, 16, 16)
    canvas = labelled_grid(images, ["x" * 300], ["y" * 300, "y" * 300], "t")
    assert canvas.shape[1] < 600
    assert all(len(places(canvas, enlarge(image, 4))) == 1 for image in images)


def test_names_without_and_with_descenders_share_a_baseline():
    def first_ink_row(name):
        canvas = labelled_grid(np.full((1, 16, 16, 3), 255, np.uint8), [""], [name], "")
        return np.flatnonzero((canvas < 128).any(axis=(1, 2)))[0]

    # Both start at the height of an ascender; a bottom-aligned "bp" would sit a descender higher than "b".
    assert first_ink_row("b") == first_ink_row("bp")


def test_large_pictures_get_larger_text():
    def ink_height(side):
        canvas = labelled_grid(np.full((1, side, side, 3), 255, np.uint8), [""], ["I"], "")
        return len(np.flatnonzero((canvas < 128).any(axis=(1, 2))))

    assert ink_height(256) > 1.3 * ink_height(16)


@pytest.mark.parametrize(("number", "rows"), [(3, ["a", "b"]), (0, [])])
def test_a_wrong_number_of_images_is_refused(number, rows):
    with pytest.raises(ValueError, match=f"got {number}"):
        labelled_grid(noise_images(number, 8, 8), rows, ["1", "2"], "t")


def test_style_sets_the_cell():
    canvas = labelled_grid(noise_images(1, 16, 16), ["a"], ["1"], "t", style=GridStyle(cell=112))
    assert len(places(canvas, enlarge(noise_images(1, 16, 16)[0], 7))) == 1

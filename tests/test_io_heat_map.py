import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from jaxdiff.io.heat_map import LEFT, MOST_CELLS, SIDE, TOP, block_shares, block_size, heat_map


def draw_counts(num_classes):
    rng = np.random.default_rng(num_classes)
    truth = rng.integers(0, num_classes, 4000)
    found = np.where(rng.random(4000) < 0.6, truth, rng.integers(0, num_classes, 4000))
    return truth, found, confusion_matrix(truth, found, labels=np.arange(num_classes))


@pytest.mark.parametrize("num_classes", [61, 125, 126, 1000])
def test_neighbours_are_counted_together(num_classes):
    truth, found, counts = draw_counts(num_classes)
    block = block_size(num_classes)
    # The confusion matrix of coarser classes.
    wanted = confusion_matrix(truth // block, found // block, normalize="true")
    np.testing.assert_allclose(block_shares(counts), wanted, atol=1e-12)
    assert len(wanted) <= MOST_CELLS


@pytest.mark.parametrize("num_classes", [61, 1000])
def test_every_cell_is_large_enough_to_be_seen_and_coloured_by_kind(num_classes):
    _, _, counts = draw_counts(num_classes)
    picture = heat_map(counts, "true", "recognised").astype(int)
    shares = block_shares(counts)
    cell = SIDE // len(shares)
    assert cell >= 7
    middles = picture[TOP + cell // 2 :: cell, LEFT + cell // 2 :: cell][: len(shares), : len(shares)]
    blue, orange = middles[..., 2] > middles[..., 0], middles[..., 0] > middles[..., 2]
    assert (blue == (np.eye(len(shares), dtype=bool) & (shares > 0))).all()
    assert (orange == (~np.eye(len(shares), dtype=bool) & (shares > 0))).all()
    # Darker for more of the row.
    order = np.argsort(shares[~np.eye(len(shares), dtype=bool)])
    greens = middles[~np.eye(len(shares), dtype=bool)][order, 1]
    assert (np.diff(greens) <= 0).all()


def test_a_class_without_pictures_leaves_its_row_white():
    counts = np.zeros((70, 70), np.int64)
    counts[3, 3] = 5
    shares = block_shares(counts)
    assert shares.sum() == 1
    assert np.isfinite(shares).all()

"""The score of pictures along the way, against transformers, and when it has stopped rising."""

import numpy as np
import pytest
from PIL import Image
from test_cli_clip_scores import embed, world  # noqa: F401 (a fixture)

from jaxdiff.errors import InputError
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes import clip_features, zeroshot
from jaxdiff.recipes.image_score import has_stopped_rising, make_image_score, scoring_program
from jaxdiff.recipes.zeroshot import place_of

pytestmark = pytest.mark.usefixtures("quick_commands")


def test_the_score_is_that_of_the_grader_for_each_word(world, tmp_path, monkeypatch):  # noqa: F811
    folder, twin = world
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(11)]
    files = [tmp_path / f"{number:02d}.png" for number in range(11)]
    for picture, file in zip(pictures, files):
        Image.fromarray(picture).save(file)
    prompts = ["a photo of <one>", "<one> next to <two>", "a photo of <two>"]
    originals = [np.stack(pictures[6:9]), np.stack(pictures[9:])]
    learned = {word: np.ones((1, 8), np.float32) for word in ("<one>", "<two>", "<two>s")}
    score = make_image_score(str(folder / "clip"), ["<one>", "<two>"], originals, prompts, learned, make_mesh(1)).of
    found = embed(folder, twin, files)
    cosines = 100 * found @ found.T
    # Pictures 0 to 3 are drawn with <one>, 2 to 5 with <two>.
    expected = (cosines[:4, 6:9].mean() + cosines[2:6, 9:].mean()) / 2
    np.testing.assert_allclose(score(pictures[:6]), float(expected), atol=1e-3)

    # Everything was traced before the first score.
    def retrace(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(clip_features, "normalize_pixels", retrace)
    np.testing.assert_allclose(score(pictures[:6]), float(expected), atol=1e-3)
    for others in ([], ["a photo of <two>s"]):  # which is another word
        with pytest.raises(InputError, match="none of --sample-prompts has the word <two>"):
            make_image_score("", ["<one>", "<two>"], originals, [prompts[0], *others], learned, make_mesh(1))


def test_tiny_digits_is_trained_here_and_its_size_known_before(monkeypatch, tmp_path):
    monkeypatch.setattr(zeroshot, "tiny_digits_folder", lambda cache, steps, mesh: tmp_path / f"tiny-{steps}")
    assert place_of("tiny-digits", None, make_mesh(1)) == str(tmp_path / "tiny-900")
    assert place_of("owner/name", None, make_mesh(1)) == "owner/name"
    shapes, number, program = scoring_program("tiny-digits", make_mesh(1))
    assert (number, shapes["visual_projection"]["kernel"].shape) == (8, (96, 64))
    assert program.out_info.shape == (8, 64)
    with pytest.raises(InputError, match=r"--score-model .*: has no config\.json"):
        scoring_program(str(tmp_path), make_mesh(1))


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 2.0], 1, False),
        ([2.0, 2.0], 1, True),
        ([1.0, 3.0, 2.0, 2.5], 2, True),
        ([1.0, 3.0, 2.0, 2.5], 3, False),
        ([1.0, 3.0, 2.0, 4.0], 2, False),
    ],
)
def test_a_plateau_is_so_many_scores_that_do_not_rise(scores, patience, expected):
    assert has_stopped_rising(scores, patience) == expected

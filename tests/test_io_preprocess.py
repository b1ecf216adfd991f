import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from jaxdiff.errors import InputError
from jaxdiff.io.hub import open_model
from jaxdiff.io.preprocess import parse, read_preprocessor

SIZES = [(300, 200), (200, 301), (224, 224), (50, 333), (97, 91), (31, 33)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 33, "width": 40}},
        {"do_resize": False, "crop_size": 100},
        {"size": {"height": 50, "width": 40}, "do_center_crop": False},
        {"resample": 2, "do_normalize": False},
        {"do_rescale": False, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]},
        {"rescale_factor": 1 / 128},
    ],
)
def test_equal_to_transformers_to_the_last_bit(settings):
    theirs = CLIPImageProcessorPil(**settings)
    ours = parse("settings", theirs.to_dict())
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        wanted = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        found = ours(pixels)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_files_of_old_and_new_versions(tmp_path, name):
    old = {
        "size": 30,
        "crop_size": 20,
        "resample": 3,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    values = (
        old if name.startswith("pre") else {"image_processor": CLIPImageProcessorPil(size=30, crop_size=20).to_dict()}
    )
    (tmp_path / name).write_text(json.dumps(values))
    found = read_preprocessor("model", open_model(tmp_path), 20)
    assert (found.resize, found.crop) == (30, (20, 20))
    with pytest.raises(InputError, match=f"{name}: gives pictures of 20x20 pixels, but the network takes 224"):
        read_preprocessor("model", open_model(tmp_path), 224)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"do_center_crop": False}, r"cannot be followed \(it leaves pictures of different sizes\)"),
        ({"size": {"longest_edge": 3}}, "cannot be followed"),
        ({"crop_size": 0}, "size 0 is not in 1..4096 pixels"),
        ({"crop_size": 10**9}, "size 1000000000 is not in 1..4096 pixels"),
        ({"resample": 9}, "9 is not a valid Resampling"),
        ({"image_mean": [1, 2]}, "not enough values to unpack"),
    ],
)
def test_what_cannot_be_followed_is_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        parse("preprocessor_config.json", values)


def test_a_model_without_preprocessing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model: has no preprocessor_config.json, so nothing says"):
        read_preprocessor("model", open_model(tmp_path), 224)

import jax
import numpy as np
import pytest
from clip_twins import TEXT, VISION
from clip_vocabulary import vocabulary, write_vocabulary
from conftest import FLOAT32_ATOL

from jaxdiff import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, FlaxCLIPModel
from jaxdiff.errors import InputError
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.io.preprocess import FILE, Preprocessor
from jaxdiff.io.runs import write_json
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes import clip_features
from jaxdiff.recipes.clip_features import encode_images, encode_prompts, load_encoder, normalize_pixels

pytestmark = pytest.mark.usefixtures("quick_commands")

PREPROCESSOR = Preprocessor(20, (20, 20))
PROMPTS = ["a cat", "a photo of it", "a cat", "it's a digit!!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    ids = vocabulary()
    one = {"num_hidden_layers": 1}
    text = CLIPTextConfig(**{**TEXT, **one, "vocab_size": len(ids), "eos_token_id": ids["<|endoftext|>"]})
    FlaxCLIPModel(CLIPConfig(text, CLIPVisionConfig(**{**VISION, **one}), 20)).save_pretrained(place)
    write_json(place / FILE, PREPROCESSOR.to_dict())
    return write_vocabulary(place)


def pictures(number):
    rng = np.random.default_rng(number)
    pixels = [rng.integers(0, 256, (*rng.integers(15, 40, 2), 3), dtype=np.uint8) for _ in range(number)]
    return LabelledImages([str(n) for n in range(number)], np.zeros(number, np.int32), ("a",), pixels)


def unit(embeds):
    return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def test_pixels_become_the_floats_of_the_preprocessor_bit_for_bit():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    found = np.asarray(jax.jit(lambda pixels: normalize_pixels(pixels, PREPROCESSOR.table))(pixels))
    wanted = Preprocessor(None, (16, 16))(pixels[0])
    np.testing.assert_array_equal(found[0].transpose(2, 0, 1), wanted)


@pytest.mark.parametrize(("number", "batch_size", "devices"), [(13, 4, 1), (13, 8, 8), (3, 64, 1)])
def test_batches_and_devices_change_nothing(folder, number, batch_size, devices):
    encoder = load_encoder(str(folder), None, "float32", make_mesh(devices))
    images = pictures(number)
    found = encode_images(encoder, images, batch_size)
    alone = FlaxCLIPModel.from_pretrained(folder)
    wanted = unit(alone.get_image_features(np.stack([PREPROCESSOR(pixels) for pixels in images.sources])))
    np.testing.assert_allclose(found.embeds, wanted, atol=FLOAT32_ATOL)
    assert found.kept.tolist() == list(range(number))


def test_pictures_that_cannot_be_read_are_left_out(folder, tmp_path):
    encoder = load_encoder(str(folder), None, "float32", make_mesh(1))
    images = pictures(6)
    (tmp_path / "broken.png").write_bytes(b"no")
    images.sources[2] = images.sources[5] = tmp_path / "broken.png"
    found = encode_images(encoder, images, 4)
    assert found.kept.tolist() == [0, 1, 3, 4]
    assert [fault.split(":")[0] for fault in found.skipped] == ["2", "5"]
    whole = encode_images(encoder, pictures(6), 4).embeds
    np.testing.assert_allclose(found.embeds, whole[[0, 1, 3, 4]], atol=FLOAT32_ATOL)
    images.sources[:] = [tmp_path / "broken.png"] * 6
    with pytest.raises(InputError, match="none of 6 pictures can be read; the first is 0: "):
        encode_images(encoder, images, 4)


def test_prompts_are_encoded_once_and_kept(folder, tmp_path, monkeypatch):
    encoder = load_encoder(str(folder), None, "float32", make_mesh(1))
    found = encode_prompts(encoder, PROMPTS, False, tmp_path)
    wanted = unit(FlaxCLIPModel.from_pretrained(folder).get_text_features(*encoder.tokenizer(PROMPTS)))
    np.testing.assert_allclose(found, wanted, atol=FLOAT32_ATOL)
    monkeypatch.setattr(clip_features, "encode_tokens", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(encode_prompts(encoder, PROMPTS, False, tmp_path), found)
    monkeypatch.undo()
    # Other parameters or other texts are other files.
    encoder.model.params = jax.tree.map(lambda leaf: leaf * 1.1, encoder.model.params)
    assert (encode_prompts(encoder, PROMPTS, False, tmp_path) != found).any()
    encode_prompts(encoder, PROMPTS[:1], False, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3

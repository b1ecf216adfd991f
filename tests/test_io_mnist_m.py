"""MNIST-M: the recipe equals a pixel-by-pixel one, and script, folder and TFDS builder give the same pictures."""

import gzip
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import load_data
from jaxdiff.io.mnist_m import blend, make_mnist_m, make_split, random_crops, read_idx, read_mnist, read_photos
from jaxdiff.io.tfds_source import load_tfds

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_mnist_m.py"
COUNTS = {"train": 60, "t10k": 20}


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return folders of tiny MNIST files (training gzipped, test not) and photographs."""
    root = tmp_path_factory.mktemp("sources")
    mnist, photos = root / "mnist", root / "photos" / "below"
    mnist.mkdir()
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        ending = ".gz" if name == "train" else ""
        digits = rng.integers(0, 256, (count, 28, 28)) * rng.integers(0, 2, (count, 28, 28))
        write_idx(mnist / f"{name}-images-idx3-ubyte{ending}", digits.astype(np.uint8))
        write_idx(mnist / f"{name}-labels-idx1-ubyte{ending}", (np.arange(count) % 10).astype(np.uint8))
    for number, size in enumerate([(40, 60, 3), (60, 40, 3), (28, 28, 3)]):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(photos / f"{number}.png")
    return mnist, root / "photos"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_mnist_m", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- the recipe


def test_blend_equals_the_recipe_pixel_by_pixel():
    rng = np.random.default_rng(0)
    crops, digits = rng.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8), rng.integers(0, 2, (3, 5, 4)).astype(bool)
    crops[0, 0, 0], crops[0, 0, 1] = 0, 255
    blended = blend(crops, digits)
    for index in np.ndindex(3, 5, 4, 3):
        assert blended[index] == abs(int(crops[index]) - 255 * int(digits[index[:3]]))


def test_any_ink_counts_as_ink():
    digits = np.zeros((1, 28, 28), np.uint8)
    digits[0, 3, 4], digits[0, 5, 6] = 1, 255
    photo = np.full((28, 28, 3), 50, np.uint8)
    picture = make_mnist_m(digits, [photo], seed=0)[0]
    assert picture[3, 4].tolist() == picture[5, 6].tolist() == [205, 205, 205]
    assert (picture == 50).sum() == (28 * 28 - 2) * 3


def test_crops_are_patches_of_every_photo_and_reach_every_edge():
    # Channels hold the photograph, the row and the column.
    photos = [np.stack([np.full((9, 12), n), *np.indices((9, 12))], -1).astype(np.uint8) for n in range(3)]
    crops = random_crops(photos, 2000, 4, np.random.default_rng(0))
    rows, columns = np.indices((4, 4))
    assert (crops[..., 0] == crops[:, :1, :1, 0]).all()
    assert (crops[..., 1] == crops[:, :1, :1, 1] + rows).all()
    assert (crops[..., 2] == crops[:, :1, :1, 2] + columns).all()
    assert {tuple(corner) for corner in crops[:, 0, 0]} == {tuple(c) for c in np.argwhere(np.ones((3, 6, 9)))}


def test_crop_may_be_the_whole_photo():
    photo = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    assert (random_crops([photo], 3, 7, np.random.default_rng(0)) == photo).all()


def test_splits_and_seeds_have_crops_of_their_own(sources):
    first, again, other = (make_split(*sources, "train", seed)[0] for seed in (0, 0, 5))
    assert (first == again).all()
    assert (first != other).any()
    digits, labels = read_mnist(sources[0], "test")
    images, made_labels = make_split(*sources, "test", 4)
    assert (images == make_mnist_m(digits, read_photos(sources[1], 28), seed=5)).all()
    assert (made_labels == labels).all()


# --- the files it is made from


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_idx_round_trip(tmp_path, name, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / name, array)
    assert (read_idx(tmp_path / name) == array).all()


def test_damaged_idx_files(tmp_path):
    write_idx(tmp_path / "whole.gz", np.zeros((9, 28, 28), np.uint8))
    write_idx(tmp_path / "whole", np.zeros((9, 28, 28), np.uint8))
    packed, plain = (tmp_path / "whole.gz").read_bytes(), (tmp_path / "whole").read_bytes()
    damaged = {
        "cut.gz": packed[:-9],
        "changed.gz": packed[:15] + bytes([packed[15] ^ 255]) + packed[16:],
        "not.gz": b"not gzip",
        "cut": plain[:-1],
        "long": plain + b"\0",
        "floats": plain[:2] + b"\x0d" + plain[3:],
        "empty": b"",
        "header": plain[:6],
        "huge": plain[:4] + b"\xff" * 12 + plain[16:],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: not a"):
            read_idx(tmp_path / name)


def test_missing_and_unfitting_mnist_files(tmp_path):
    with pytest.raises(InputError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz there"):
        read_mnist(tmp_path, "train")
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(InputError, match=r"\(3, 28, 28\) do not fit labels of shape \(2,\)"):
        read_mnist(tmp_path, "train")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([1, 10, 2], np.uint8))
    with pytest.raises(InputError, match=r"label 10 is not a digit 0..9"):
        read_mnist(tmp_path, "train")


def test_photographs_that_cannot_serve(tmp_path):
    with pytest.raises(InputError, match=r"no .jpg or .png photographs there"):
        read_photos(tmp_path, 28)
    Image.new("RGB", (27, 100)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"small.png: 27x100 pixels, smaller than a 28 pixel crop"):
        read_photos(tmp_path, 28)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a.jpg: this photograph cannot be read"):
        read_photos(tmp_path, 28)


# --- script and builder


def pairs(dataset):
    return {(image.tobytes(), int(label)) for image, label in zip(dataset.images, dataset.labels)}


def made(sources, split, seed=0):
    return {(image.tobytes(), int(label)) for image, label in zip(*make_split(*sources, split, seed))}


def test_script_writes_the_course_layout(sources, script, tmp_path, capsys):
    mnist, photos = map(str, sources)
    assert script.main(["--mnist", mnist, "--photos", photos, "--out", str(tmp_path), "--seed", "3"]) == 0
    written = capsys.readouterr().out.split("Written:")[1].split()
    assert written == [str(tmp_path / "mnistm" / name) for name in ("data", "train.csv", "test.csv")]
    assert (tmp_path / "mnistm" / "train.csv").read_text().splitlines()[:2] == ["image_name,label", "00000.png,0"]
    train, held_out, skipped = load_data(str(tmp_path))
    assert pairs(train) == made(sources, "train", 3)
    assert pairs(held_out) == made(sources, "test", 3)
    assert (train.domain_names, skipped) == (("mnistm",), ())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", "1", "--format", "tfds"], "--seed has no effect with --format tfds"),
        (["--photos", "nowhere"], "nowhere: no .jpg or .png photographs there"),
    ],
)
def test_script_refuses_in_one_sentence(sources, tmp_path, flags, message):
    mnist, photos = map(str, sources)
    command = [sys.executable, str(SCRIPT), "--mnist", mnist, "--photos", photos, "--out", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.fixture
def no_tensorflow():
    """Run only where TensorFlow is not installed, as after the README's test command."""
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("TensorFlow is installed")


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    """The folder where tensorflow_datasets looks for prepared data; it reads TFDS_DATA_DIR once, on import."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def prepared(sources, script, tfds_folder, no_tensorflow):
    """Prepare the builder where TensorFlow cannot be imported; return the folder of its files."""
    mnist, photos = map(str, sources)
    assert script.main(["--mnist", mnist, "--photos", photos, "--format", "tfds", "--out", str(tfds_folder)]) == 0
    return tfds_folder / "mnist_m" / "1.0.0"


def test_tfds_round_trip_without_tensorflow(sources, prepared):
    train, held_out, skipped = load_data("tfds:mnist_m")
    assert pairs(train) == made(sources, "train")
    assert pairs(held_out) == made(sources, "test")
    assert (train.domain_names, train.class_names, skipped) == (("mnist_m",), tuple("0123456789"), ())
    assert load_data("tfds:mnist_m", 16).train.images.shape == (60, 16, 16, 3)


def test_tfds_prepares_from_a_manual_folder(sources, tmp_path, tfds_folder, no_tensorflow):
    import tensorflow_datasets as tfds

    from jaxdiff.io.mnist_m_builder import MnistM

    for name, source in zip(("mnist", "photos"), sources):
        (tmp_path / "manual").mkdir(exist_ok=True)
        (tmp_path / "manual" / name).symlink_to(source)
    config = tfds.download.DownloadConfig(manual_dir=str(tmp_path / "manual"))
    MnistM(data_dir=str(tmp_path)).download_and_prepare(download_config=config)
    assert pairs(load_tfds(["mnist_m:1.0.0"]).held_out) == made(sources, "test")


def refused(source, message):
    with pytest.raises(InputError, match=message) as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


def test_tfds_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused("tfds:mnist_m", r"needs tensorflow-datasets .*: pip install -e '\.\[tfds\]'")


def test_tfds_says_how_to_prepare(tfds_folder):
    refused(
        "tfds:mnist_m", r"not prepared in .*: run `python scripts/make_mnist_m.py --mnist DIR --photos DIR --format"
    )
    refused("tfds:svhn_cropped", r"run `tfds build svhn_cropped --file_format=array_record`, which needs TensorFlow")


@pytest.mark.parametrize("names", ["", "mnist_m,", "mnist_m,mnist_m", "mnist_m:1.0.0,mnist_m"])
def test_tfds_names_that_are_empty_or_twice(names):
    refused(f"tfds:{names}", "give each builder's name once")


@pytest.mark.parametrize("name", ["no_such_data", "mnist:9.9.9", "mnist/nothing", "a b"])
def test_tfds_names_that_do_not_exist(name):
    refused(f"tfds:{name}", r"tensorflow-datasets cannot open it \(.+\)")


def test_tfds_damaged_files(prepared):
    shard = next(prepared.glob("*test*"))
    shard.write_bytes(shard.read_bytes()[:5000])
    refused("tfds:mnist_m", r"damaged files in .*: prepare it again")
    shard.unlink()
    refused("tfds:mnist_m", r"damaged files in .*: prepare it again")
    (prepared / "dataset_info.json").write_text("{")
    refused("tfds:mnist_m", r"cannot open it")

"""Folders: both layouts read what Pillow wrote, and each way to get one wrong is told in one sentence."""

import csv

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.datasets import load_data
from jaxdiff.io.folders import load_folder


def picture(number, size=(6, 5)):
    """Return a picture that is unlike any other number's."""
    height, width = size
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_pictures(folder, numbers, size=(6, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(picture(number, size)).save(folder / f"{number:05d}.png")


def write_table(path, rows, header=("image_name", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def course_layout(domain, numbers, classes=3, table="train.csv"):
    write_pictures(domain / "data", numbers)
    write_table(domain / table, [(f"{n:05d}.png", n % classes) for n in numbers])


def class_folders(domain, numbers, classes=3, names=str):
    for number in numbers:
        write_pictures(domain / names(number % classes), [number])


def contents(dataset):
    """Return the set of (picture, class name, domain name)."""
    return {
        (image.tobytes(), dataset.class_names[label], dataset.domain_names[domain])
        for image, label, domain in zip(dataset.images, dataset.labels, dataset.domains)
    }


def expected(numbers, domain, classes=3, names=str):
    return {(picture(n).tobytes(), names(n % classes), domain) for n in numbers}


# --- what is read


@pytest.mark.parametrize("write", [course_layout, class_folders])
def test_each_layout_holds_out_a_tenth_of_each_class(tmp_path, write):
    write(tmp_path / "one", range(60))
    write(tmp_path / "two", range(100, 130))
    train, held_out, skipped = load_folder(tmp_path)
    assert contents(train) | contents(held_out) == expected(range(60), "one") | expected(range(100, 130), "two")
    assert not contents(train) & contents(held_out)
    assert held_out.counts().tolist() == [[2, 2, 2], [1, 1, 1]]
    assert (train.class_names, train.domain_names, skipped) == (("0", "1", "2"), ("one", "two"), ())
    assert train.images.shape[1:] == (6, 5, 3)


def test_layouts_may_differ_between_domains(tmp_path):
    course_layout(tmp_path / "a", range(30))
    class_folders(tmp_path / "b", range(30, 60))
    train, held_out, _ = load_folder(tmp_path)
    assert contents(train) | contents(held_out) == expected(range(30), "a") | expected(range(30, 60), "b")


def test_reading_is_the_same_each_time_and_for_any_number_of_threads(tmp_path):
    class_folders(tmp_path / "a", range(600))
    first, second = load_folder(tmp_path, workers=1), load_folder(tmp_path, workers=4)
    for one, other in zip(first[:2], second[:2]):
        assert (one.images == other.images).all()
        assert (one.labels == other.labels).all()


@pytest.mark.parametrize("table", ["test.csv", "val.csv"])
def test_a_table_of_its_own_is_held_out(tmp_path, table):
    course_layout(tmp_path / "a", range(30))
    course_layout(tmp_path / "a", range(30, 36), table=table)
    course_layout(tmp_path / "b", range(60, 90))
    train, held_out, _ = load_folder(tmp_path)
    assert contents(train) >= expected(range(30), "a")
    assert contents(held_out) >= expected(range(30, 36), "a")
    assert held_out.counts().tolist() == [[2, 2, 2], [1, 1, 1]]


@pytest.mark.parametrize("training", ["", "train"])
@pytest.mark.parametrize("name", ["test", "val"])
def test_a_folder_of_its_own_is_held_out(tmp_path, training, name):
    class_folders(tmp_path / "a" / training, range(30))
    class_folders(tmp_path / "a" / name, range(30, 36))
    train, held_out, _ = load_folder(tmp_path)
    assert contents(train) == expected(range(30), "a")
    assert contents(held_out) == expected(range(30, 36), "a")


def test_class_folders_with_numbers_are_ordered_by_value(tmp_path):
    class_folders(tmp_path / "a", range(36), classes=12)
    assert load_folder(tmp_path).train.class_names == tuple(map(str, range(12)))


def test_class_folders_with_leading_zeros_are_the_same_classes(tmp_path):
    class_folders(tmp_path / "a", range(30))
    class_folders(tmp_path / "b", range(30, 60), names=lambda label: f"{label:03d}")
    train, held_out, _ = load_folder(tmp_path)
    assert contents(train) | contents(held_out) == expected(range(30), "a") | expected(range(30, 60), "b")


def test_class_folders_with_names_are_ordered_by_name(tmp_path):
    names = ["cat", "Bird", "dog"].__getitem__
    class_folders(tmp_path / "a", range(30), names=names)
    train, held_out, _ = load_folder(tmp_path)
    assert train.class_names == ("Bird", "cat", "dog")
    assert contents(train) | contents(held_out) == expected(range(30), "a", names=names)


def test_hidden_folders_other_files_and_a_byte_order_mark_are_passed_over(tmp_path):
    course_layout(tmp_path / "a", range(30))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "data" / "notes.txt").write_text("no picture")
    table = tmp_path / "a" / "train.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert load_folder(tmp_path).train.domain_names == ("a",)


def test_image_size_makes_mixed_sizes_equal(tmp_path):
    for number in range(30):
        write_pictures(tmp_path / "a" / str(number % 3), [number], size=(4 + number, 9))
    assert load_folder(tmp_path, image_size=8).train.images.shape[1:] == (8, 8, 3)


# --- what is refused


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        load_data(str(folder))
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", r"nothing: no such folder; give `digits`, a folder of domains, or tfds:NAME")


def test_empty_folder(tmp_path):
    refused(tmp_path, r"no folders there; it should hold DOMAIN/train.csv")


def test_empty_domain(tmp_path):
    class_folders(tmp_path / "a", range(30))
    (tmp_path / "b").mkdir()
    refused(tmp_path, r"no pictures for domain 'b'")


def test_folder_of_one_domain(tmp_path):
    course_layout(tmp_path, range(30))
    refused(tmp_path, r"this is one domain's folder; give the folder that holds it")


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_split_in_the_place_of_a_domain(tmp_path, name):
    class_folders(tmp_path / name, range(30))
    refused(tmp_path, rf"a folder named '{name}' belongs inside a domain")


def test_data_folder_without_table(tmp_path):
    write_pictures(tmp_path / "a" / "data", range(3))
    refused(tmp_path, r"a: no train.csv beside its data folder")


def test_table_without_rows(tmp_path):
    write_table(tmp_path / "a" / "train.csv", [])
    refused(tmp_path, r"no pictures for domain 'a'")


@pytest.mark.parametrize(("header", "column"), [(("name", "label"), "image_name"), (("image_name", "class"), "label")])
def test_missing_column(tmp_path, header, column):
    write_table(tmp_path / "a" / "train.csv", [("00000.png", 0)], header)
    refused(tmp_path, rf"train.csv: no column '{column}'; its first line must be image_name,label")


@pytest.mark.parametrize("name", ["99999.png", "../data/00000.png", ""])
def test_row_without_its_file(tmp_path, name):
    course_layout(tmp_path / "a", range(30))
    with (tmp_path / "a" / "train.csv").open("a") as file:
        file.write(f"{name},1\n")
    refused(tmp_path, r"train.csv, line 32: '.*' is not in .*data")


@pytest.mark.parametrize("label", ["cat", "1.5", "-1", "", "10000", "9" * 5000, "²"])
def test_label_that_is_no_class_number(tmp_path, label):
    write_pictures(tmp_path / "a" / "data", [0])
    write_table(tmp_path / "a" / "train.csv", [("00000.png", label)])
    refused(tmp_path, r"train.csv, line 2: label '.*' is not an integer in 0..9999")


def test_label_beyond_the_classes(tmp_path):
    course_layout(tmp_path / "a", range(30))
    write_pictures(tmp_path / "a" / "data", [77])
    with (tmp_path / "a" / "train.csv").open("a") as file:
        file.write("00077.png,57\n")
    refused(tmp_path, r"label 57 of .*00077.png is out of range, as no picture has label 3")


def test_numbered_and_named_classes_do_not_mix(tmp_path):
    course_layout(tmp_path / "a", range(30))
    class_folders(tmp_path / "b", range(30, 60), names=["cat", "dog", "owl"].__getitem__)
    refused(tmp_path, r"one domain's csv numbers its classes, another has a class 'cat'")


def test_picture_in_both_splits(tmp_path):
    course_layout(tmp_path / "a", range(30))
    course_layout(tmp_path / "a", [5], table="test.csv")
    refused(tmp_path, r"00005.png: listed both in train.csv and as held out")


def test_table_that_is_no_text(tmp_path):
    course_layout(tmp_path / "a", range(30))
    (tmp_path / "a" / "train.csv").write_bytes("image_name,label\n".encode("utf-16"))
    refused(tmp_path, r"train.csv: not a readable csv in UTF-8")


@pytest.mark.parametrize("odd", [0, 29])
def test_mixed_sizes(tmp_path, odd):
    course_layout(tmp_path / "a", range(30))
    write_pictures(tmp_path / "a" / "data", [odd], size=(6, 7))
    refused(tmp_path, r"(5x6 pixels but .* is 7x6|7x6 pixels but .* is 5x6): give --image-size to resize all")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_one_truncated_picture_of_many_is_skipped_and_named(tmp_path):
    course_layout(tmp_path / "a", range(150))
    cut_short(tmp_path / "a" / "data" / "00007.png")
    splits = load_data(str(tmp_path))
    assert len(splits.train.images) + len(splits.held_out.images) == 149
    assert contents(splits.train) | contents(splits.held_out) == expected(set(range(150)) - {7}, "a")
    assert len(splits.skipped) == 1
    assert "00007.png" in splits.skipped[0]
    assert "truncated" in splits.skipped[0]


def test_many_truncated_pictures(tmp_path):
    course_layout(tmp_path / "a", range(60))
    cut_short(tmp_path / "a" / "data" / "00007.png")
    refused(tmp_path, r"1 of 60 pictures cannot be read, more than 1%; the first is .*00007.png")


def test_nothing_but_unreadable_pictures(tmp_path):
    course_layout(tmp_path / "a", range(3))
    for path in (tmp_path / "a" / "data").iterdir():
        path.write_bytes(b"")
    refused(tmp_path, r"none of 3 pictures can be read; the first is .*00000.png")


def test_bomb_is_skipped_like_a_damaged_picture(tmp_path):
    course_layout(tmp_path / "a", range(3))
    Image.new("1", (5000, 5000)).save(tmp_path / "a" / "data" / "00001.png")
    refused(tmp_path, r"1 of 3 pictures cannot be read.*00001.png: 5000x5000 pixels, more than the 16,000,000 allowed")

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.io.labelled_images import load_labelled
from jaxdiff.io.prompts import (
    TEMPLATE_SETS,
    clean_name,
    expand_templates,
    fill,
    read_descriptions,
)


def draw(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


def labels_of(tmp_path, values):
    (tmp_path / "labels.json").write_text(json.dumps(values))
    return tmp_path / "labels.json"


def test_the_flat_layout_of_the_course(tmp_path):
    for number, name in enumerate(("1_450.png", "0_2.png", "1_451.png", "10_1.png")):
        draw(tmp_path / "val" / name, number)
    labels = labels_of(tmp_path, {str(n): f"thing_{n}" for n in range(11)})
    with pytest.raises(InputError, match="no picture of class 'thing_2' and 7 more classes"):
        load_labelled(str(tmp_path / "val"), labels, False)
    for number in range(2, 10):
        draw(tmp_path / "val" / f"{number}_1.png")
    found = load_labelled(str(tmp_path / "val"), labels, True)
    assert found.class_names[10] == "thing 10"
    numbers = dict(zip(found.names, found.labels.tolist()))
    assert (numbers["1_450.png"], numbers["0_2.png"], numbers["10_1.png"]) == (1, 0, 10)
    assert found.load(found.names.index("1_451.png")).max() == 2


def test_folders_named_by_class_or_by_number(tmp_path):
    draw(tmp_path / "a" / "red_cat" / "x.png")
    draw(tmp_path / "a" / "dog" / "y.jpg")
    found = load_labelled(str(tmp_path / "a"), None, False)
    assert found.class_names == ("dog", "red_cat")
    assert dict(zip(found.names, found.labels.tolist())) == {"dog/y.jpg": 0, "red_cat/x.png": 1}
    draw(tmp_path / "b" / "0" / "x.png")
    draw(tmp_path / "b" / "1" / "y.png")
    found = load_labelled(str(tmp_path / "b"), labels_of(tmp_path, {"0": "cat", "1": "dog"}), False)
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize("column", ["filename", "image_name"])
def test_a_csv(tmp_path, column):
    for name in ("data/x.png", "y.png"):
        draw(tmp_path / name)
    (tmp_path / "val.csv").write_text(f"{column},label\ndata/x.png,1\ny.png,0\n")
    labels = labels_of(tmp_path, {"0": "cat", "1": "dog"})
    found = load_labelled(str(tmp_path / "val.csv"), labels, False)
    assert (found.names, found.labels.tolist()) == (["data/x.png", "y.png"], [1, 0])


def test_a_picture_that_cannot_be_read_says_why(tmp_path):
    draw(tmp_path / "a" / "cat" / "x.png")
    (tmp_path / "a" / "cat" / "y.png").write_bytes(b"no")
    found = load_labelled(str(tmp_path / "a"), None, False)
    assert found.load(1).startswith("cat/y.png: ")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"0": "cat", "2": "dog"}, r"the keys of 2 classes must be 0..1, but one is '2'"),
        ({"0": "cat", "1": "cat"}, "2 classes have the name 'cat'"),
        ({"0": "cat", "1": " "}, "the name of class 1 is ' ', but must be a text"),
        ({"0": "cat", "1": 3}, "the name of class 1 is 3, but must be a text"),
        ({}, "the keys of 0 classes"),
        ({"0": "cat"}, r"1_0.png: its class '1' is not in the labels"),
        ({"0": "cat", "1": "dog", "2": "elk"}, "no picture of class 'elk'"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, values, sentence):
    draw(tmp_path / "flat" / "0_0.png")
    draw(tmp_path / "flat" / "1_0.png")
    with pytest.raises(InputError, match=sentence):
        load_labelled(str(tmp_path / "flat"), labels_of(tmp_path, values), False)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures there"):
        load_labelled(str(tmp_path / "empty"), None, False)
    draw(tmp_path / "flat" / "0_0.png")
    with pytest.raises(InputError, match="the files are named by class numbers: say what they mean by --labels"):
        load_labelled(str(tmp_path / "flat"), None, False)
    draw(tmp_path / "flat" / "cat.png")
    with pytest.raises(InputError, match=r"cat\.png: must be called CLASS_IMAGE.png"):
        load_labelled(str(tmp_path / "flat"), None, False)
    draw(tmp_path / "two" / "a_b" / "x.png")
    draw(tmp_path / "two" / "a b" / "x.png")
    with pytest.raises(InputError, match="2 classes have the name 'a b'"):
        load_labelled(str(tmp_path / "two"), None, True)
    (tmp_path / "x.csv").write_text("file,label\n")
    with pytest.raises(InputError, match="its first line must be filename,label"):
        load_labelled(str(tmp_path / "x.csv"), None, False)
    (tmp_path / "x.csv").write_text("filename,label\nnope.png,0\n")
    with pytest.raises(InputError, match=r"line 2: 'nope.png' is not in"):
        load_labelled(str(tmp_path / "x.csv"), None, False)


def test_templates():
    assert [len(TEMPLATE_SETS[name]) for name in ("imagenet-80", "imagenet-7")] == [80, 7]
    assert len(set(TEMPLATE_SETS["imagenet-80"])) == 80
    assert set(TEMPLATE_SETS["imagenet-7"]) < set(TEMPLATE_SETS["imagenet-80"])
    expanded = expand_templates(["a {}", "imagenet-7", "art of the {}."])
    assert (expanded[0], len(expanded)) == ("a {}", 8)
    assert fill(["a {}", "{}!"], ["cat", "{}"]) == [["a cat", "cat!"], ["a {}", "{}!"]]
    assert clean_name("red__cat_ ") == "red cat"
    for wrong in ("", "cat", "{} and {}", "{name}", "{} {0}"):
        with pytest.raises(InputError, match=r"must hold {} once"):
            expand_templates([wrong])


def test_descriptions(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"dog": ["it barks"], "cat": ["it purrs", "it naps"]}))
    assert read_descriptions(path, ["cat", "dog"]) == [["it purrs", "it naps"], ["it barks"]]
    with pytest.raises(InputError, match="no descriptions of 'elk'"):
        read_descriptions(path, ["cat", "dog", "elk"])
    with pytest.raises(InputError, match="'dog' is no class of the images"):
        read_descriptions(path, ["cat"])
    path.write_text(json.dumps({"cat": []}))
    with pytest.raises(InputError, match="'cat' must have a list of texts"):
        read_descriptions(path, ["cat"])

"""Names of files made from labels: harmless ones stay, and no other leads out of the folder or onto another's file."""

import dataclasses

import numpy as np
import pytest
from tiny_model import TinyNetwork, tiny_model

from jaxdiff.io.file_names import as_file_name
from jaxdiff.recipes.evaluation import deliver

PATHS = ["..", ".", "", "../../x", "/etc/x", "a/b", "a\\b", "~/x", ".hidden"]
HOSTILE = [*PATHS, "a\0b", "x" * 5000, "桜" * 90, "\udc80", "a\nb", "<b>"]


@pytest.mark.parametrize("text", ["0", "mnist", "tabby cat", "C++", "ü", "v1.5", "a_b-c"])
def test_a_harmless_name_stays(text):
    assert as_file_name(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_one_is_a_single_new_name_in_the_same_folder(tmp_path, text):
    path = tmp_path / f"{as_file_name(text)}_001.png"
    path.write_text("")
    assert list(tmp_path.iterdir()) == [path]
    assert not path.name.startswith(".")


def test_two_texts_never_share_a_file():
    texts = [*HOSTILE, "a-b", "x" * 5001, "..-x", "-..-x"]
    # What was made from one may be another's own name.
    texts += [as_file_name(text) for text in HOSTILE]
    assert len({as_file_name(text) for text in texts}) == len(set(texts)) == len(texts)


def test_pictures_of_classes_and_domains_with_hostile_names_stay_in_their_folder(tmp_path):
    model = tiny_model(TinyNetwork())
    names = {"class_names": ("../../ant", "/bee", "c/ow"), "domain_names": ("../ink", "..")}
    model = dataclasses.replace(model, **names)
    folder = tmp_path / "a" / "b" / "samples"
    written = deliver(folder, model, np.zeros((2, 3, 1, 4, 4, 3), np.uint8), 1)
    assert [path.parent for path in written] == [folder, folder]
    pictures = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(pictures) == 6
    assert {path.parent.parent for path in pictures} == {folder}

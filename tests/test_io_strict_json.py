"""JSON that is read strictly: what Python's own reader lets through, and no file or page could hold."""

import pytest

from jaxdiff.errors import InputError
from jaxdiff.io.strict_json import read_strict_json


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udfff": 1}', r'{"a": [{"b": ["x\ud83dx"]}]}'])
def test_half_a_character_is_refused_wherever_it_stands(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        InputError, match=r"a\.json: cannot be read \(it holds '\\ud[0-9a-f]{3}', half of a character\)"
    ):
        read_strict_json(tmp_path / "a.json")


def test_a_whole_character_in_two_halves_is_read(tmp_path):
    (tmp_path / "a.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_strict_json(tmp_path / "a.json") == {"a": "\U0001f600"}

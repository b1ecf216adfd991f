"""The cache folder: where it is, and that compiled programs are kept where nobody else can write."""

import os
import subprocess
import sys

import pytest

ASK = """
import os
from jaxdiff.io.cache import keep_compiled
keep_compiled()
print(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
"""


def ask(cache, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    variables |= {"JAXDIFF_CACHE": str(cache), **environment}
    answer = subprocess.run([sys.executable, "-c", ASK], env=variables, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def test_compiled_programs_are_kept_in_a_folder_of_mode_0700(tmp_path):
    folder = ask(tmp_path / "cache")
    assert folder.startswith(f"{tmp_path}/cache/compiled/")
    assert oct(os.stat(folder).st_mode & 0o777) == "0o700"
    assert oct(os.stat(tmp_path / "cache" / "compiled").st_mode & 0o777) == "0o700"
    assert ask(tmp_path / "cache") == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_not_used(tmp_path, mode):
    ask(tmp_path)
    (tmp_path / "compiled").chmod(mode)
    assert ask(tmp_path) == "None"


def test_a_link_is_not_used(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "compiled").symlink_to(tmp_path / "elsewhere")
    assert ask(tmp_path) == "None"


@pytest.mark.parametrize("given", ["", "/somewhere"])
def test_another_folder_or_none_may_be_named(tmp_path, given):
    assert ask(tmp_path, JAX_COMPILATION_CACHE_DIR=given) == given
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert ask(tmp_path / "file") == "None"

"""Run folders: a config reads back equal, another is refused by name, starting over deletes the run and no more."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest

import jaxdiff
from jaxdiff.errors import InputError
from jaxdiff.io import runs
from jaxdiff.io.shards import Shards


@dataclass(frozen=True)
class Inner:
    steps: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)


@dataclass(frozen=True)
class Outer:
    out: Path = Path("runs/x")
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


# Config


@pytest.mark.parametrize("config", [Outer(), Outer(Path("a b/ü"), 4, Inner(7, (1e-30,)))])
def test_config_survives_the_file(tmp_path, config):
    runs.write_json(tmp_path / "config.json", runs.as_json(config))
    assert runs.read_run(tmp_path, Outer)[1] == config


def test_config_is_flat_like_the_flags():
    assert set(runs.as_json(Outer())) == {"out", "limit", "steps", "rates"}


def test_fields_of_a_later_version_keep_their_defaults():
    assert runs.from_json(Outer, {"steps": 9, "gone": 1}) == Outer(inner=Inner(steps=9))


def test_another_config_names_each_differing_field_and_changes_nothing(tmp_path):
    runs.open_run(tmp_path, {"steps": 3, "rate": 0.1, "out": "a"})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError) as caught:
        runs.open_run(tmp_path, {"steps": 4, "rate": 0.1, "out": "b"}, free={"out"})
    assert "steps was 3, is 4" in str(caught.value)
    assert "rate" not in str(caught.value)
    assert "out was" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_free_fields_may_change(tmp_path):
    runs.open_run(tmp_path, {"steps": 3, "out": "a"})
    runs.open_run(tmp_path, {"steps": 3, "out": "b"}, free={"out"})
    assert runs.read_json(tmp_path / "config.json") == {"steps": 3, "out": "b"}


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"a": \x00'])
def test_a_damaged_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        runs.open_run(tmp_path, {"a": 1})


@dataclass(frozen=True)
class Choosy:
    name: Literal["one", "two"] = "one"
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0, got {self.seed}")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"name": "three", "seed": 1}, "name is 'three', not one of 'one', 'two'"),
        ({"name": "one", "seed": "x"}, "'<' not supported"),
        ({"name": "two", "seed": -1}, "--seed must be at least 0, got -1"),
        ({"name": ["one"], "seed": 1}, "name is"),
        ({"seed": 1}, "most fields are missing"),
    ],
)
def test_an_edited_config_is_one_sentence(tmp_path, config, fault):
    runs.write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="not the config of a train_cfg run") as caught:
        runs.read_run(tmp_path, Choosy)
    assert fault in str(caught.value)


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        runs.read_run(tmp_path, Outer)


# Folders


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for check in (runs.check_writable, runs.make_folder):
            with pytest.raises(InputError, match="cannot be written"):
                check(path)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written_is_one_sentence():
    with pytest.raises(InputError, match="cannot be written"):
        runs.make_folder(Path("/proc/self"))


def test_a_folder_that_can_be_made_is_only_looked_for(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b"):
        runs.check_writable(path)
    assert list(tmp_path.iterdir()) == []


def test_make_folder_leaves_its_lock_alone_in_it(tmp_path):
    assert [path.name for path in runs.make_folder(tmp_path / "a" / "b").iterdir()] == [".lock"]


def test_starting_over_deletes_the_run_and_nothing_else(tmp_path):
    runs.open_run(tmp_path, {"a": 1})
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_run(tmp_path, {"a": 2}, start_over=True)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["config.json", "notes.txt"]
    assert runs.read_json(tmp_path / "config.json") == {"a": 2}


def test_starting_over_never_deletes_what_no_run_made(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis").write_text("mine")
    with pytest.raises(InputError, match=r"checkpoints.*choose another folder"):
        runs.open_run(tmp_path, {"a": 1}, start_over=True)
    assert (tmp_path / "checkpoints" / "thesis").read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


def test_another_programs_config_is_neither_taken_for_a_run_nor_deleted(tmp_path):
    text = json.dumps({"architectures": ["GPT2"], "seed": 0})
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    config = {"seed": 0, "out": "a", "steps": 3}
    with pytest.raises(InputError, match=r"not the config of a run; choose another"):
        runs.open_run(tmp_path, config)
    with pytest.raises(InputError, match=r"checkpoints, config.json there may not be jaxdiff's to delete"):
        runs.open_run(tmp_path, config, start_over=True)
    assert (tmp_path / "config.json").read_text() == text
    assert (tmp_path / "checkpoints").exists()


def test_starting_over_deletes_the_pictures_of_the_old_model(tmp_path):
    runs.open_run(tmp_path, {"a": 1})
    for name in ("grid_m.png", "reverse_m.png", "samples/m/0_001.png", "results.json", "grid_of_mine.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    runs.open_run(tmp_path, {"a": 1}, start_over=True)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["config.json", "grid_of_mine.jpg"]


def test_checking_a_config_writes_nothing(tmp_path):
    runs.check_config(tmp_path / "new", {"a": 1}, ())
    assert list(tmp_path.iterdir()) == []


def test_starting_over_does_not_follow_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("mine")
    folder = runs.open_run(tmp_path / "run", {"a": 1})
    os.symlink(elsewhere, folder / "checkpoints")
    runs.open_run(folder, {"a": 1}, start_over=True)
    assert (elsewhere / "kept").exists()
    assert not (folder / "checkpoints").exists()


# Results


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    runs.write_json(path, {"a": 1})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            runs.write_json(path, {"a": bad})

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_results_hold_figures_under_plain_names_and_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxdiff", "train_cfg", "--out", "my runs"])
    path = runs.write_results(tmp_path, {"judge.real_accuracy.m": 0.5}, {"seed": 0}, {"params": "ab"}, "2 x cpu")
    record = json.loads(path.read_text())
    assert record["judge.real_accuracy.m"] == 0.5
    assert record["config"] == {"seed": 0}
    assert record["hashes"] == {"params": "ab"}
    assert record["versions"]["jaxdiff"] == jaxdiff.__version__
    assert record["versions"]["jax"] == metadata.version("jax")
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["device"] == "2 x cpu"
    assert shlex.split(record["command"]) == ["jaxdiff", "train_cfg", "--out", "my runs"]


# One writer

HOLDER = """
import sys, time
from pathlib import Path
from jaxdiff.io.run_lock import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ended(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        runs.write_json(tmp_path / "config.json", {"steps": 3})
        for start_over in (False, True):
            sentence = rf"another run is writing there \(process {process.pid} on .*\); wait for its end"
            with pytest.raises(InputError, match=sentence):
                runs.open_run(tmp_path, {"steps": 4}, start_over=start_over)
            with pytest.raises(InputError, match=sentence):
                runs.make_folder(tmp_path)
            with pytest.raises(InputError, match=sentence):
                Shards(tmp_path / "shards", dict, 1)
        assert runs.read_json(tmp_path / "config.json") == {"steps": 3}
    finally:
        process.kill()
        process.communicate()
    runs.open_run(tmp_path, {"steps": 3})
    # The same process may go on in its own folder, as a notebook does.
    runs.open_run(tmp_path, {"steps": 3})

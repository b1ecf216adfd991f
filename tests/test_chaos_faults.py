"""A small part of scripts/chaos.py's faults, each kind at least once, injected in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import xla_flags

ROOT = Path(__file__).parent.parent
SHARE = {"killed": 0.01, "damaged": 0.05, "disk": 0.06, "stopped": 0.02, "not_finite": 0.05, "two_runs": 0.03}
HOSTILE = {"hostile": 0.05}
ROWS = {"killed": 1, "damaged": 3, "disk": 1, "stopped": 1, "not_finite": 1, "two_runs": 1, "hostile": 5}
"""Rows of the table that each gives."""

MINUTES = {"killed", "not_finite"}
"""Quicker, test_processes.py kills a process, and test_recipes_training.py has losses that are not finite."""


@pytest.mark.parametrize(
    ("fault", "share"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in MINUTES else ()) for row in (SHARE | HOSTILE).items()],
)
def test_promises_hold(tmp_path, fault, share):
    command = [sys.executable, ROOT / "scripts" / "chaos.py", f"--out={tmp_path}", "--only", fault, f"--share={share}"]
    # One device, as the commands have by default, not the eight of the test run.
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    rows = json.loads((tmp_path / "chaos.json").read_text())
    assert len(rows) == ROWS[fault]
    assert all(row["injections"] > 0 for row in rows)
    assert [text for row in rows for text in row["broken"]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chaos.json", "chaos.md"]


def test_a_broken_promise_is_counted_and_fails(tmp_path):
    program = """
import sys
sys.path.insert(0, {scripts!r})
import chaos
from chaos_table import Outcome, Row

def break_promise(effort):
    row = Row("a fault", "a promise")
    row.add([Outcome("kept"), Outcome("silent", "how it was broken")])
    yield row

chaos.FAULTS = {{"one": break_promise}}
sys.argv = ["chaos.py", "--out", {out!r}]
sys.exit(chaos.main())
""".format(scripts=str(ROOT / "scripts"), out=str(tmp_path))
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 1, answer.stderr
    assert "| a fault | 2 | a promise | 1 kept; 1 silent | 1 |" in (tmp_path / "chaos.md").read_text()
    assert json.loads((tmp_path / "chaos.json").read_text())[0]["broken"] == ["how it was broken"]

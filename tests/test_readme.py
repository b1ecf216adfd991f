"""What the README shows works: its Python runs, its flags exist, its test command is the one that CI takes."""

import re
from pathlib import Path

import jax
import pytest

from jaxdiff import sample_cfg, train_cfg, zeroshot
from jaxdiff.settings import as_flag

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.usefixtures("quick_commands")
def test_the_python_example_samples_pictures():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    with jax.numpy_rank_promotion("raise"):
        exec(code, names)
    assert names["images"].shape == (4, 32, 32, 3)


def test_every_flag_of_the_readme_exists():
    def flags(config):
        for name, value in vars(config).items():
            yield from flags(value) if hasattr(value, "__dataclass_fields__") else (as_flag(name),)

    modules = {"train_cfg": train_cfg, "sample_cfg": sample_cfg, "zeroshot": zeroshot}
    commands = {name: set(flags(module.Config())) for name, module in modules.items()}
    shown = re.findall(rf"jaxdiff\.({'|'.join(commands)})([^\n#`]*)", README)
    assert {command for command, _ in shown} == set(commands)
    for command, line in shown:
        assert set(re.findall(r"--[a-z-]+", line)) <= commands[command] | {"--help"}


def test_ci_finds_the_test_command():
    block = README.split("<!-- test command -->\n```\n")[1].split("\n```")[0]
    assert block == "python -m pip install -e '.[test]' && python -m pytest -n auto"

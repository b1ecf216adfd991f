"""Imports go only downward, sisters never import each other, and importing jaxdiff costs no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxdiff"
CONVERTERS = sorted((PACKAGE.parent / "weights_convert").rglob("*.py"))
FOLDERS = {"diffusion": 1, "models": 1, "io": 1, "recipes": 2}
FLOOR_0 = {
    "__init__",
    "shapes",
    "errors",
    "mesh",
    "processes",
    "device_settings",
    "settings",
    "freed_memory",
    "ddim_settings",
    "text2image_settings",
    "textual_inversion_settings",
}
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def place_of(parts: tuple[str, ...]) -> tuple[int, str]:
    """Return (floor, sister) of a module given as its path below the package."""
    if parts and parts[0] in FOLDERS:
        return FOLDERS[parts[0]], parts[0]
    return (0, "") if not parts or parts[0] in FLOOR_0 else (3, "")


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "jaxdiff"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    floor, sister = place_of(path.relative_to(PACKAGE).with_suffix("").parts)
    for target in imported_modules(path):
        target_floor, target_sister = place_of(target)
        assert target_floor <= floor, f"{path} imports {'.'.join(target)} from a higher floor"
        assert target_floor != 1 or floor != 1 or target_sister == sister, f"{path} imports its sister {target}"


def test_no_dumping_grounds():
    assert not [path for path in (*MODULES, *CONVERTERS) if path.name in FORBIDDEN_NAMES]


def test_importing_jaxdiff_imports_no_jax():
    heavy = "[m for m in ('jax', 'torch', 'transformers', 'diffusers') if m in sys.modules]"
    code = f"import sys, jaxdiff, jaxdiff.settings, jaxdiff.command; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_that_is_imported_brings_torch():
    code = (
        "import sys, jaxdiff; [getattr(jaxdiff, name) for name in jaxdiff.__all__]; import jaxdiff.recipes.tiny_world"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_public_names_are_where_they_are_said_to_be():
    import jaxdiff

    assert all(getattr(jaxdiff, name) is not None for name in jaxdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        jaxdiff.nope  # noqa: B018


def test_run_time_needs_no_torch():
    for path in (*MODULES, *CONVERTERS):
        assert not roots_of(path) & {"torch", "diffusers", "transformers", "tensorflow"}, path


def test_nothing_imports_the_converters():
    assert CONVERTERS
    for path in MODULES:
        assert "weights_convert" not in roots_of(path), path


def roots_of(path: Path) -> set[str]:
    """Return the packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return roots | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}

"""The layout of the package: the folders and packages that each folder may import.

A test compares the rules with the table in docs/architecture.md.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"

# Each folder, the folders that it may import, and the packages that it may import besides torch
# and the standard library. A folder may import only folders of rows above its own.
ALLOWED = {
    "_utils": ("", "numpy pyro rich"),
    "distributions": ("_utils", "pyro"),
    "datasets": ("_utils", "anndata numpy pandas pooch scipy"),
    "nets": ("_utils", ""),
    "_capture": ("_utils", "numpy pyro"),
    "_programs": ("_utils datasets distributions", "pyro"),
    "flows": ("_utils nets", "pyro"),
    "likelihoods": ("_utils distributions", "pyro"),
    "priors": ("_programs _utils datasets distributions", "pyro"),
    "objectives": ("_programs _utils", "pyro"),
    "evaluation": ("_capture _programs _utils datasets distributions flows priors",
                   "numpy pandas pyro rich"),
    "surjections": ("_programs _utils flows", "pyro"),
    "models": ("_programs _utils priors", "pyro"),
    "guides": ("_programs _utils distributions flows models nets", "pyro"),
    "serialization": ("_programs _utils datasets distributions flows guides likelihoods models "
                      "nets priors surjections",
                      "numpy onnx onnxscript pandas pyro safetensors"),
    "training": ("_capture _programs _utils datasets objectives serialization",
                 "cloudpickle joblib pandas pyro rich"),
    "plots": ("_programs _utils datasets distributions evaluation",
              "IPython matplotlib numpy pandas"),
    "report": ("_capture _programs _utils datasets evaluation guides objectives plots training",
               "arviz jinja2 matplotlib numpy pandas pyro rich scipy"),
    # It also uses the public names of pyro_vae.
    "cli": ("_utils", "cloudpickle jinja2 joblib matplotlib numpy pyro rich typer"),
    "__main__": ("cli", ""),
}  # fmt: skip
MOST_FOLDERS, MOST_LEVELS, MOST_NAMES = 24, 11, 42


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def folder_of(path):
    """Return the name of the folder, or file, directly below pyro_vae."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path):
    """Yield the full names of all modules that a file imports, at any place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write relative imports as absolute ones"
            if node.module == "pyro_vae":
                yield from (f"pyro_vae.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require":
            yield node.args[0].value  # the package of an extra


def folders_imported(path):
    modules = [module.split(".") for module in imported_modules(path)]
    return {parts[1] for parts in modules if parts[0] == "pyro_vae" and parts[1:]} - {
        folder_of(path)
    }


def packages_imported(path):
    roots = {module.split(".")[0] for module in imported_modules(path)}
    return roots - set(sys.stdlib_module_names) - {"pyro_vae", "torch"}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_import_only_allowed_modules(path):
    folder = folder_of(path)
    assert folder in ALLOWED, f"{folder} is new: add it to ALLOWED and to docs/architecture.md"
    folders, packages = (set(names.split()) for names in ALLOWED[folder])
    assert folders_imported(path) <= folders
    assert packages_imported(path) <= packages


def test_every_allowed_folder_is_imported():
    for folder, (folders, _) in ALLOWED.items():
        used = set()
        for path in files():
            if folder_of(path) == folder:
                used |= folders_imported(path)
        assert used == set(folders.split()), folder


def test_imports_have_no_cycles_and_few_levels():
    levels = {}
    for folder, (folders, _) in ALLOWED.items():
        assert set(folders.split()) <= levels.keys(), f"{folder} may import what comes after it"
        levels[folder] = 1 + max((levels[each] for each in folders.split()), default=0)
    assert max(levels.values()) <= MOST_LEVELS
    folders = [
        path for path in ROOT.rglob("*") if path.is_dir() and (path / "__init__.py").exists()
    ]
    assert len(folders) <= MOST_FOLDERS


def test_imports_inside_functions_are_found(tmp_path, monkeypatch):
    (tmp_path / "_programs").mkdir()
    path = tmp_path / "_programs" / "terms.py"
    path.write_text(
        "def late():\n    from pyro_vae import guides\n    import pandas as pd\n"
        "    require('pooch', 'data', 'A test')\n"
    )
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    assert folders_imported(path) == {"guides"}
    assert packages_imported(path) == {"pandas", "pooch"}


def test_top_level_has_only_folders_and_the_command_line():
    entries = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    folders = {folder for folder in ALLOWED if folder not in ("cli", "__main__")}
    assert entries == folders | {"__init__.py", "__main__.py", "cli", "py.typed"}


def test_files_of_public_folders_are_private():
    for path in files():
        folder = folder_of(path)
        if path.parent != ROOT and path.name != "__init__.py" and not folder.startswith("_"):
            parts = path.relative_to(ROOT).parts[1:]
            assert any(part.startswith("_") for part in parts), path


def test_architecture_table_agrees_with_the_rules():
    rows = re.findall(r"^\| `([\w/]+)` \|.*\|(.*)\|$", ARCHITECTURE.read_text("utf-8"), re.M)
    table = {name.strip("/"): set(re.findall(r"`(\w+)`", imports)) for name, imports in rows}
    assert table == {folder: set(folders.split()) for folder, (folders, _) in ALLOWED.items()}


def test_all_lists_every_public_name():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(pyro_vae.__all__)
    assert sorted(pyro_vae.__all__) == pyro_vae.__all__
    assert len(pyro_vae.__all__) <= MOST_NAMES

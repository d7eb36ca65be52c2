"""The packages of extras: the library works without them and imports them when needed."""

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from without_extras import EXTRAS, HIDDEN

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent
TESTS = Path(__file__).parent


def run_fresh(arguments, folder):
    """Run Python in a new process that has imported nothing."""
    return subprocess.run(  # noqa: S603 - no input of a user
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def packages(requirements):
    return {re.match(r"[\w-]+", line)[0] for line in requirements.split("\n") if line}


@pytest.fixture
def extras():
    """Return the packages of each extra in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(TESTS.parent / "setup.cfg", encoding="utf-8")
    return {name: packages(text) for name, text in config["options.extras_require"].items()}


def test_fit_evidence_and_surgery_work_without_extras(tmp_path):
    result = run_fresh([str(TESTS / "without_extras.py")], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for extra in EXTRAS:
        assert f"pip install 'pyro_vae[{extra}]'" in result.stdout


def test_import_loads_no_extra_and_no_pandas(tmp_path):
    program = (
        "import sys, pyro\n"
        "before = set(sys.modules)\n"
        "import pyro_vae\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    result = run_fresh(["-c", program], tmp_path)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert "pyro_vae" in imported
    assert not imported & (HIDDEN | {"pandas"})


def test_extras_agree_with_setup_cfg(extras):
    for name, hidden in EXTRAS.items():
        assert extras[name] == set(hidden)
    assert extras["all"] == HIDDEN
    assert extras["test"] >= HIDDEN


def test_messages_name_the_extra_that_installs_the_package(extras):
    calls = [
        [each.value for each in node.args[:2]]
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
    ]
    assert {module.split(".")[0] for module, _ in calls} == HIDDEN
    for module, extra in calls:
        assert module.split(".")[0] in extras[extra]

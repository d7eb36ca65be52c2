"""Files outside of the package: they are valid, and agree with setup.cfg and constraints.txt."""

import configparser
import re
from pathlib import Path

import pytest

import pyro_vae as pv

yaml = pytest.importorskip("yaml", reason="needs the extra `docs`")
ROOT = Path(__file__).parent.parent


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def test_the_workflow_runs_ci_on_every_supported_python(setup):
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    versions = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == versions
    assert setup["options"]["python_requires"] == f">={versions[0]}"
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_the_linter_before_commits_is_that_of_the_tests():
    (ruff,) = [repo for repo in read(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]
    assert ruff["rev"] == f"v{pinned}"


def test_the_citation_has_the_version_and_license_of_the_package(setup):
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == pv.__version__
    assert citation["license"] == setup["metadata"]["license"]
    assert setup["metadata"]["version"] == "attr: pyro_vae.__version__"


def test_package_data_exist(setup):
    found = {
        f"{package}: {pattern}": [*(ROOT / package.replace(".", "/")).glob(pattern)]
        for package, pattern in setup["options.package_data"].items()
    }
    assert len(found) == 3
    assert all(found.values()), found


def test_constraints_pin_every_requirement_within_its_range(setup):
    """A lower bound above the pin would make the tests' environment impossible."""
    pins = dict(
        re.findall(r"^(\S+)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    )
    sections = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    bounds = re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(sections), re.M)
    assert {"torch", "pyro-ppl", "onnx", "mypy"} <= dict(bounds).keys()
    for name, lowest in bounds:
        numbers = [tuple(map(int, text.split("."))) for text in (pins[name], lowest)]
        assert numbers[0] >= numbers[1], name

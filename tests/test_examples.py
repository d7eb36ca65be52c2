import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Every example, with the arguments that shorten it. One that is not here fails.
ARGUMENTS = {
    "mnist.py": ["--data", "digits", "--epochs", "2", "--particles", "50"],
    "own_pair.py": ["--epochs", "2"],
}


def test_every_example_is_run():
    assert {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]]
    result = subprocess.run(  # noqa: S603
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "log p(x)" in result.stdout

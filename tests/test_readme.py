import re
from pathlib import Path

import pytest
from new_processes import run_python

ROOT = Path(__file__).parent.parent
NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def printed_and_shown(tmp_path_factory):
    """Return the output without the progress bar, and the output that the page shows."""
    code, shown = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    ).groups()
    folder = tmp_path_factory.mktemp("readme")
    (folder / "first.py").write_text(code)
    result = run_python(folder / "first.py", [], folder)
    assert result.returncode == 0, result.stderr
    printed = "".join(
        line for line in result.stdout.splitlines(keepends=True) if not line.startswith("fit")
    )
    return printed, shown


def test_the_readme_shows_the_output_of_its_first_example(printed_and_shown):
    printed, shown = (
        [re.sub(NUMBER, "#", line).split() for line in text.splitlines()]
        for text in printed_and_shown
    )
    assert printed == shown


def test_the_readme_shows_the_numbers_of_its_first_example(printed_and_shown):
    """Within 1 nat: other versions of torch round differently, and a fit adds that up."""
    printed, shown = ([float(x) for x in re.findall(NUMBER, text)] for text in printed_and_shown)
    assert printed == pytest.approx(shown, abs=1)

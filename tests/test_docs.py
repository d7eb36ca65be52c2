from pathlib import Path

import pytest
from new_processes import run_python

ROOT = Path(__file__).parent.parent


def test_the_pages_build_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    result = run_python("sphinx", ["-W", "-q", str(ROOT / "docs"), str(tmp_path)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "reference.html").stat().st_size > 10_000

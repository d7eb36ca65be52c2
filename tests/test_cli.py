import pytest
from new_processes import run_python
from typer.testing import CliRunner

from pyro_vae.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *arguments])


def test_compare_trains_prints_a_table_and_writes_a_page(tmp_path):
    page = tmp_path / "page.html"
    result = run(
        *("--epochs", "2", "--hidden", "8", "--particles", "3", "--evidence-particles", "30"),
        *("--latents", "2", "--latents", "3", "--report", str(page)),
    )
    assert result.exit_code == 0, result.output
    for size in (2, 3):
        for name in ("ELBO", "MeanFieldELBO", "IWAE-3"):
            assert f"{name}, z={size}" in result.output
    assert "300 held-out data" in result.output
    assert page.read_text(encoding="utf-8").count("<img") == 5


def test_dynamic_option_runs(tmp_path):
    result = run(
        *("--dynamic", "--epochs", "1", "--hidden", "8", "--latents", "2"),
        *("--evidence-particles", "10", "--report", str(tmp_path / "page.html")),
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnits"], "expected one of digits, mnist"),
        (["--report", "/nowhere/page.html"], "cannot write --report"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--latents", "0"], "a size of event_shape must be at least 1"),
    ],
)
def test_wrong_options_fail_without_a_traceback(arguments, message, tmp_path):
    result = run_python("pyro_vae", ["compare", *arguments], tmp_path)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr

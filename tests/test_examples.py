import json
from pathlib import Path

import numpy as np
import pytest
from new_processes import run_python

from pyro_vae.datasets._idx import idx_header

EXAMPLES = Path(__file__).parent.parent / "examples"

# Every example, with arguments that shorten it. A test fails if one is missing.
ARGUMENTS = {
    "benchmarks/checkpoints.py": ["kill", "--runs", "1", "--epochs", "2"],
    "benchmarks/coverage.py": ["--repeats", "2", "--seeds", "2", "--steps", "6"],
    "benchmarks/evidence.py": ["--data", "100", "--particles", "20", "--rounds", "1"],
    "benchmarks/gpu.py": ["--device", "cpu", "--small", "--minutes", "4"],
    "benchmarks/import_time.py": ["--rounds", "1"],
    "benchmarks/objectives.py": ["--seeds", "2", "--epochs", "2", "--workers", "1"],
    "benchmarks/programs.py": [
        *("--programs", "64-32-2 (digits)", "sequences of 10 steps", "--rounds", "1"),
        *("--steps", "5"),
    ],
    "benchmarks/short_runs.py": [
        *("--peers", "pyro_vae", "pyro", "--sizes", "digits", "--rounds", "1", "--epochs", "2"),
    ],
    "benchmarks/many_fits.py": ["--fits", "2", "--rounds", "2", "--steps", "5"],
    "benchmarks/seeds.py": ["--seeds", "2", "--epochs", "2", "--rounds", "2"],
    "benchmarks/step.py": [
        *("--peers", "captured", "hand", "--networks", "784-200-200-50/20"),
        *("--objectives", "iaf", "--rounds", "1", "--steps", "5"),
    ],
    "benchmarks/scaling.py": ["--share", "0.01"],
    "benchmarks/sparse_counts.py": ["--rows", "1000", "--epochs", "2", "--steps", "5"],
    "benchmarks/surgery.py": ["--data", "2000", "--rounds", "1"],
    "data_parallel.py": ["--epochs", "2"],
    "energies.py": ["--energies", "U1", "--families", "Gaussian", "planar-2", "--steps", "50"],
    "frey_faces.py": [
        *("--data", "digits", "--levels", "17", "--epochs", "1", "--particles", "20"),
        *("--pairs", "DiscretizedLogistic", "dequantized Normal", "--figure", "faces.png"),
    ],
    "gallery.py": [
        *("--epochs", "2", "--width", "20", "--particles", "30", "--repeats", "5"),
        *("--rows", "40", "--seeds", "1"),
    ],
    "gaps.py": [
        *("--data", "digits", "--epochs", "1", "--test", "20", "--particles", "100"),
        *("--steps", "100", "--latents", "4"),
    ],
    "mnist.py": ["--data", "digits", "--epochs", "1", "--particles", "50"],
    "objectives.py": [
        *("--data", "digits", "--epochs", "1", "--particles", "20", "--test", "50"),
        *("--train", "500", "--objectives", "ELBO", "PIWAE(8, 8)"),
    ],
    "own_pair.py": ["--epochs", "1", "--test", "50"],
    "priors.py": [
        *("--data", "digits", "--epochs", "1", "--particles", "20", "--test", "50"),
        *("--surgery", "200", "--pairs", "VAE, N(0, I)", "two layers, Vamp of 500"),
    ],
    "published/page.py": ["--out", "page.md"],
    "published/run.py": [
        *("A", "vampprior", "--data", "digits", "--epochs", "2", "--particles", "30"),
        *("--ais", "0", "--results", "results"),
    ],
    "semi_supervised.py": [
        *("--data", "digits", "--epochs", "1", "--train", "300", "--labels", "50"),
        *("--batch-size", "50", "--width", "50"),
    ],
    "signal_to_noise.py": ["--particles", "1", "10", "--repeats", "20"],
    "posteriors.py": [
        *("--data", "digits", "--epochs", "1", "--particles", "20", "--test", "50"),
        *("--families", "mean-field", "IAF-4"),
    ],
}


PARTS = {
    *("benchmarks/case.py", "benchmarks/torch_peers.py"),
    *("benchmarks/gpu_part.py", "benchmarks/gpu_checks.py", "benchmarks/gpu_times.py"),
    *("published/pairs.py", "published/protocols.py"),
}
NEED_EXTRAS = {"benchmarks/numpyro_peer.py"}  # an extra that the tests do not install


def test_every_example_has_arguments():
    found = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")}
    assert found - PARTS - NEED_EXTRAS == set(ARGUMENTS)


def trials():
    """Yield all examples, with the benchmarks as slow tests."""
    for name in ARGUMENTS:
        yield pytest.param(name, marks=[pytest.mark.slow] * name.startswith("benchmarks/"))


@pytest.mark.parametrize("name", list(trials()))
def test_example(name, tmp_path):
    result = run_python(EXAMPLES / name, ARGUMENTS[name], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    shown = {
        "benchmarks": "ratio",
        "energies.py": "KL, nats",
        "semi_supervised.py": "test accuracy",
        "signal_to_noise.py": "signal-to-noise ratio",
    }
    shown |= {
        "benchmarks/checkpoints.py": "1 of 1 bit-identical",
        "benchmarks/coverage.py": "the set of the best holds",
        "benchmarks/gpu.py": ", 0 failed",
        "benchmarks/objectives.py": "95% interval",
        "benchmarks/scaling.py": "growth",
    }
    word = shown.get(name) or shown.get(name.split("/")[0], "log p(x)")
    assert word in result.stdout


def test_a_published_row_runs_on_a_folder_of_images(tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    for part, count in (("train", 300), ("t10k", 20)):
        images = np.random.default_rng(0).integers(0, 256, (count, 6, 6), dtype=np.uint8)
        path = folder / f"{part}-images-idx3-ubyte"
        path.write_bytes(idx_header(images.shape) + images.tobytes())
    arguments = ["A", "vae", "--data", str(folder), "--epochs", "1", "--particles", "5"]
    arguments += ["--ais", "0", "--results", str(tmp_path / "results")]
    result = run_python(EXAMPLES / "published" / "run.py", arguments, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    name = "A-vae-letters-0-1-epochs-5-particles.json"  # a part never replaces the whole row
    found = json.loads((tmp_path / "results" / name).read_text())
    assert (found["data"], found["test_images"], found["epochs"]) == ("letters", 20, 1)


def test_page_of_published_numbers_shows_the_results(tmp_path):
    run_python(EXAMPLES / "published" / "page.py", ["--out", "page.md"], tmp_path)
    page = EXAMPLES.parent / "docs" / "published.md"
    assert (tmp_path / "page.md").read_text() == page.read_text()

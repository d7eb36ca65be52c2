import pytest
from new_processes import run_python

IN_A_NOTEBOOK = """
import base64

from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()

import pyro_vae as pv

model = pv.LatentVariableModel(
    pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 4))
)
figure = pv.plots.samples(model, 4, image_shape=(2, 2))
shown, _ = shell.display_formatter.format(figure)
assert base64.b64decode(shown["image/png"])[:4] == b"\\x89PNG", shown
"""


def test_a_notebook_displays_figures_without_a_magic_command(tmp_path):
    pytest.importorskip("IPython", reason="needs IPython, of the extra `docs`")
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    (tmp_path / "cell.py").write_text(IN_A_NOTEBOOK)
    result = run_python(tmp_path / "cell.py", [], tmp_path)
    assert result.returncode == 0, result.stderr

"""Use the library without the packages of its extras, even where they are installed.

python tests/without_extras.py
"""

import os
import sys
import tempfile
import warnings

EXTRAS = {
    "report": ("jinja2", "matplotlib"),
    "arviz": ("arviz",),
    "data": ("pooch",),
    "cli": ("typer",),
    "anndata": ("anndata",),
    "onnx": ("onnx", "onnxscript"),
}
HIDDEN = {package for packages in EXTRAS.values() for package in packages}


class Hiding:
    """A module finder that hides the packages of the extras from another finder."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)


def refused(extra, kind, call):
    """Check that a call fails and names the extra and its package; print the message."""
    try:
        call()
    except kind as error:
        message = str(error)
    else:
        raise SystemExit(f"works without the extra {extra!r}: {call}")
    named = f"pip install 'pyro_vae[{extra}]'" in message
    if not named or not any(package in message for package in EXTRAS[extra]):
        raise SystemExit(f"does not name the extra {extra!r}: {message}")
    print(f"{extra}: {message}")


def main():
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
    os.environ.pop("PYRO_VAE_DATA", None)
    import torch

    import pyro_vae as pv

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = pv.datasets.load("digits")
    x, test = data.train[:200], data.test[:50]
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 64)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [8]))
    fit = pv.fit(model, guide, x, validation=test, epochs=2, seed=0, progress=False)
    print(fit.history)
    print(pv.evidence(model, guide, test, num_particles=50, seed=0))
    print(pv.elbo_surgery(model, guide, x, seed=0))
    comparison = pv.compare({"digits": fit}, test, train=x, num_particles=50)
    print(comparison)
    print(comparison.to_dataframe().T)
    noise = pv.gradient_noise(model, guide, x[:20], [pv.objectives.ELBO()], repeats=3, seed=0)
    print(noise)
    curve = pv.rate_distortion(model, guide, x, [1.0], epochs=1, seed=0)
    print(curve)
    with tempfile.TemporaryDirectory() as folder:
        pv.save(f"{folder}/pair", model, guide, history=fit.history)
        print(len(pv.load(f"{folder}/pair").history), "epochs were saved")
        refused("report", ImportError, lambda: comparison.to_html(f"{folder}/page.html"))
        file = f"{folder}/encoder.onnx"
        export = pv.serialization.export_encoder
        refused("onnx", ImportError, lambda: export(file, model, guide, test))
        refused("report", ImportError, lambda: pv.plots.gradient_noise(noise))
        refused("report", ImportError, lambda: pv.plots.rate_distortion(curve))
        refused("report", ImportError, lambda: pv.plots.codes(test))
        refused("arviz", ImportError, lambda: pv.to_arviz(model, guide, test))
        refused("anndata", ImportError, lambda: pv.datasets.from_anndata(None))
        refused("data", ImportError, lambda: pv.datasets.load("mnist"))
        refused("data", ImportError, lambda: pv.datasets.load("mnist", folder=folder))
        refused("data", ImportError, lambda: pv.datasets.load_labels("fashion-mnist"))

    def command_line():
        from pyro_vae import cli  # noqa: F401 - it cannot be imported

    def program():
        from pyro_vae.__main__ import main

        main()

    refused("cli", ImportError, command_line)
    refused("cli", SystemExit, program)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # such as few particles
    main()

"""The command line: ``pyro-vae compare`` trains several pairs and compares them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

import pyro_vae as pv
from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.distributed import group_of_torchrun, rank
from pyro_vae._utils.extras import require
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.random import seeded

typer = require("typer", "cli", "The command line")
app = typer.Typer(no_args_is_help=True)


@app.callback()
def pyro_vae() -> None:
    """Variational autoencoders as pairs of Pyro programs."""


@app.command()
def compare(
    data: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(pv.datasets.names())}.")
    ] = "digits",
    latents: Annotated[
        list[int], typer.Option(help="Latent size. Repeat the option for several sizes.")
    ] = (2, 10),
    hidden: Annotated[int, typer.Option(help="Width of the two hidden layers.")] = 200,
    particles: Annotated[int, typer.Option(help="Number of particles of IWAE.")] = 10,
    epochs: Annotated[int, typer.Option(help="Maximum number of passes over the data.")] = 200,
    patience: Annotated[
        int, typer.Option(help="Epochs without a lower validation loss before stopping.")
    ] = 20,
    batch_size: Annotated[int, typer.Option(help="Minibatch size.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 2e-3,
    evidence_particles: Annotated[
        int, typer.Option(help="Importance samples per held-out data point.")
    ] = 1000,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Binarize each training minibatch at random.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, data order and noise.")] = 0,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    folder: Annotated[
        Path | None,
        typer.Option(help="Data folder. The default is the environment variable PYRO_VAE_DATA."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Path of the HTML report.")] = Path(
        "pyro-vae-report.html"
    ),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints. The same command resumes from them."),
    ] = None,
) -> None:
    """Train with ELBO, MeanFieldELBO and IWAE at each latent size, and compare on the test data.

    Under torchrun, the processes share the work.
    """
    started = time.perf_counter()
    console = Console(quiet=rank() > 0)
    # Check the requirements of the report before the training.
    positive_integer("--evidence-particles", evidence_particles)
    if report.is_dir() or not os.access(report.parent, os.W_OK):
        raise ValueError(
            f"cannot write --report {report}. Pass the path of a file in a writable folder"
        )
    require("jinja2", "report", "The HTML report")
    require("matplotlib", "report", "The HTML report")
    images = pv.datasets.load(
        data, binarize="dynamic" if dynamic else "fixed", seed=seed, folder=folder
    )
    objectives = {
        "ELBO": pv.objectives.ELBO(),
        "MeanFieldELBO": pv.objectives.MeanFieldELBO(),
        f"IWAE-{particles}": pv.objectives.IWAE(num_particles=particles),
    }
    pairs = {
        (name, size): _make_pair(images.train.shape[1], size, hidden, seed)
        for size in latents
        for name in objectives
    }
    with progress_bar(console=console) as bar:
        fits = {}
        for (name, size), (model, guide) in pairs.items():
            label = f"{name}, z={size}"
            fits[label] = pv.fit(
                model,
                guide,
                images.train,
                objective=objectives[name],
                validation=images.validation,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                patience=patience,
                transform=images.transform,
                device=device,
                seed=seed,
                checkpoint=None
                if checkpoint is None
                else pv.training.Checkpoint(checkpoint / f"{name}-{size}", resume=True),
                progress=bar,
                description=label,
            )
        with seeded(seed):  # the aggregated posterior needs the data as in training
            train = images.train if images.transform is None else images.transform(images.train)
        comparison = pv.compare(
            fits,
            images.test,
            train=train,
            num_particles=evidence_particles,
            image_shape=images.image_shape,
            seed=seed,
            progress=bar,
        )
    console.print(comparison)
    if rank() == 0:
        comparison.to_html(report)
    seconds = time.perf_counter() - started
    console.print(Text(f"Report: {report.resolve()} ({seconds:.0f} s in total)"))


def _make_pair(data_size: int, latent_size: int, hidden: int, seed: int):
    with seeded(seed):  # pairs of one size start from the same weights
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(latent_size),
            likelihood=pv.likelihoods.Bernoulli(
                pv.nets.MLP(latent_size, [hidden, hidden], data_size)
            ),
        )
        guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(data_size, [hidden, hidden]))
    return model, guide


def main() -> None:
    """Run the command line; print errors that a user can fix in one line."""
    try:
        with group_of_torchrun():
            app()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        Console(stderr=True).print("[red]Error:[/red]", Text(str(error)), highlight=False)
        sys.exit(1)

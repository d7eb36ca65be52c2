"""The commands of ``pyro-vae``, with their options."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pyro
import torch
from rich.console import Console
from rich.text import Text

import pyro_vae as pv
from pyro_vae._utils.checks import positive_integer, positive_number
from pyro_vae._utils.devices import torch_device
from pyro_vae._utils.distributed import group_of_torchrun, rank
from pyro_vae._utils.extras import require
from pyro_vae._utils.precision import shared_precision
from pyro_vae._utils.progress import progress_bar, task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.versions import versions
from pyro_vae.cli._arms import arms
from pyro_vae.cli._compare import compare_arms
from pyro_vae.cli._data import FORMATS, Splits, load_splits
from pyro_vae.cli._fits import Plan
from pyro_vae.cli._own_pairs import arms_of, call
from pyro_vae.cli._results import ResultFolder, diagnosis_of

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "cli", "The command line")
app = typer.Typer(no_args_is_help=True)

_OF_BUILT_IN_PAIRS = ("latents", "hidden", "particles")
_DATA_HELP = f"Data set ({', '.join(pv.datasets.names())}), or a file of type {', '.join(FORMATS)}."
_TEST_HELP = "File of the test data, if --data is a file without them."
_FOLDER_HELP = "Data folder. The default is the environment variable PYRO_VAE_DATA."
_DEVICE_HELP = "Device: auto, cpu or cuda."


@app.callback()
def pyro_vae() -> None:
    """Variational autoencoders as pairs of Pyro programs."""


@app.command()
def compare(
    context: typer.Context,
    pairs: Annotated[
        str | None,
        typer.Argument(
            help="Your own pairs: FILE.py:FUNCTION or package.module:FUNCTION. The function "
            "returns a dictionary from names to (model, guide).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[str, typer.Option(help=_DATA_HELP)] = "digits",
    test: Annotated[Path | None, typer.Option(help=_TEST_HELP)] = None,
    latents: Annotated[int, typer.Option(help="Dimension of z.")] = 10,
    hidden: Annotated[int, typer.Option(help="Width of the two hidden layers.")] = 100,
    particles: Annotated[int, typer.Option(help="Number of particles of IWAE.")] = 10,
    epochs: Annotated[int, typer.Option(help="Maximum number of passes over the data.")] = 150,
    patience: Annotated[
        int, typer.Option(help="Epochs without a lower validation loss before stopping.")
    ] = 15,
    batch_size: Annotated[int, typer.Option(help="Minibatch size.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 4e-3,
    evidence_particles: Annotated[
        int, typer.Option(help="Importance samples per test data point.")
    ] = 300,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Binarize each training minibatch at random.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Number of fits of each method.")] = 3,
    seed: Annotated[
        int,
        typer.Option(
            help="First seed of initial weights, data order and noise. The test data do not depend "
            "on it."
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help=_DEVICE_HELP)] = "auto",
    folder: Annotated[Path | None, typer.Option(help=_FOLDER_HELP)] = None,
    output: Annotated[
        Path,
        typer.Option(help="Folder for report.html, table.csv, results.json and the saved pairs."),
    ] = Path("pyro-vae-report"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints. The same command resumes from them."),
    ] = None,
) -> None:
    """Compare a baseline with changes of its objective, guide and prior, or compare your own pairs.

    The baseline has the ELBO, a Gaussian guide and a standard normal prior. It is diagnosed first.
    Then one part at a time is changed: IWAE, a flow, a learned mixture. MeanFieldELBO is a control,
    which must tie with the baseline. Each method is fitted with several seeds.

    Your function returns a dictionary from names to pairs (model, guide). A pair may have a third
    part, a dictionary of arguments of pv.fit such as the objective. The function is called with
    torch seeded, for each seed and name. It may take the training data as its argument. The first
    pair is the baseline.

    Files hold rows of numbers. An .npz or .pt file may have arrays named train, validation and
    test. Missing parts are split from the training data, with a fixed seed.

    Under torchrun, the processes share the work of each fit.
    """
    started = time.perf_counter()
    console = Console(quiet=rank() > 0)
    # Check all arguments before the training.
    for option, value in (
        ("--evidence-particles", evidence_particles),
        ("--seeds", seeds),
        ("--latents", latents),
        ("--hidden", hidden),
        ("--particles", particles),
        ("--epochs", epochs),
        ("--patience", patience),
        ("--batch-size", batch_size),
    ):
        positive_integer(option, value)
    positive_number("--learning-rate", learning_rate)
    torch_device(device)
    require("jinja2", "report", "The HTML report")
    require("matplotlib", "report", "The HTML report")
    splits = load_splits(data, dynamic=dynamic, folder=folder, test=test)
    if pairs is None:
        splits = _binary_rows(splits)
        methods = arms(splits.train.shape[1], latents, hidden, particles)
    else:
        for name in _OF_BUILT_IN_PAIRS:
            if _is_given(context, name):
                raise ValueError(
                    f"--{name} is for the pairs of this command. Your own function {pairs} makes "
                    "its pairs"
                )
        methods = arms_of(pairs, splits.train, seed)
    plan = Plan(
        arms=methods,
        data=splits,
        seeds=range(seed, seed + seeds),
        options={
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "patience": patience,
            "device": device,
            "precision": shared_precision(None),  # your own pairs may set it
        },
        checkpoint=None if checkpoint is None else checkpoint.resolve(),
    )
    facts = _facts(context, splits, device)
    facts["seeds"] = ", ".join(map(str, plan.seeds))
    compare_arms(plan, evidence_particles, output, facts, console)
    seconds = time.perf_counter() - started
    console.print(Text(f"Results: {output.resolve()}"))
    console.print(Text(f"Time: {seconds:.0f} s"))


@app.command()
def diagnose(
    context: typer.Context,
    pair: Annotated[Path, typer.Argument(help="Folder of a pair that pv.save has saved.")],
    data: Annotated[str, typer.Option(help=_DATA_HELP)] = "digits",
    test: Annotated[Path | None, typer.Option(help=_TEST_HELP)] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="The function of your own pairs, if the pair consists of your own programs, as in "
            "pyro-vae compare."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the pair in the dictionary that your function returns."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all samples.")] = 0,
    device: Annotated[str, typer.Option(help=_DEVICE_HELP)] = "auto",
    folder: Annotated[Path | None, typer.Option(help=_FOLDER_HELP)] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for diagnosis.csv and results.json.")
    ] = None,
) -> None:
    """Diagnose a saved pair: how many nats each part loses, and the change to try.

    The data must be those of the fit. They are split as in pyro-vae compare.
    """
    console = Console(quiet=rank() > 0)
    splits = load_splits(data, folder=folder, test=test)
    if not (pair / "record.json").is_file():
        raise ValueError(f"{pair} is not the folder of a saved pair, which has a record.json")
    results = None if output is None or rank() > 0 else ResultFolder(output)
    programs = () if pairs is None else _own_programs(pairs, name, splits, seed)
    saved = pv.load(pair, *programs, device=torch_device(device))
    with progress_bar(console=console) as bar, task(bar, "diagnose", 1) as advance:
        diagnosis = pv.diagnose(saved.model, saved.guide, splits.train, splits.test, seed=seed)
        advance(1)
    console.print(diagnosis)
    if results is not None:
        diagnosis.to_dataframe().to_csv(results.path / "diagnosis.csv")
        results.write_json(
            {
                "facts": _facts(context, splits, device),
                "diagnosis": diagnosis_of(diagnosis),
            }
        )


def _own_programs(reference: str, name: str | None, splits: Splits, seed: int) -> tuple:
    """Return a model and guide of a user's function, for the parameters of a saved pair."""
    with seeded(seed):
        found = call(reference, splits.train, str(Path.cwd()))
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        raise ValueError(f"--name must be one of {', '.join(found)}, got {name}")
    model, guide, _ = found[name]
    with warnings.catch_warnings():  # some guides create their parameters in their first call
        warnings.simplefilter("ignore")
        pv.terms(model, guide, splits.train[:20])
    return model, guide


def _binary_rows(splits: Splits) -> Splits:
    """Return the data as rows of zeros and ones.

    Raises:
        ValueError: There are other or missing values, or the data have one dimension.
    """
    parts = {}
    expected = f"the pairs of this command model rows of zeros and ones, but {splits.description}"
    own = "or compare your own pairs (see pyro-vae compare --help)"
    if splits.train.dim() < 2:
        raise ValueError(
            f"{expected} has one dimension. Save an array of shape (rows, numbers), {own}"
        )
    for name in ("train", "validation", "test"):
        part = getattr(splits, name).flatten(1)
        if missing := int(part.isnan().sum()):
            raise ValueError(
                f"{expected} has {missing:,} missing numbers among its {name} data. "
                f"Fill them, {own}"
            )
        is_intensity = splits.transform is not None and name == "train"
        if not (is_intensity or bool(((part == 0) | (part == 1)).all())):
            raise ValueError(f"{expected} has other values. Binarize the data, {own}")
        parts[name] = part.to(torch.get_default_dtype())
    return dataclasses.replace(splits, **parts)


def _facts(context: typer.Context, splits: Splits, device: str) -> dict[str, str]:
    """Return the facts of a command: its data, the command, versions, date and device."""
    found = versions()
    return {
        "data set": splits.description,
        "sizes": splits.sizes,
        "command": _command(context),
        "device": _device(device),
        "versions": f"pyro_vae {found['pyro_vae']}, torch {found['torch']}, pyro "
        f"{pyro.__version__}, Python {found['python']}",
        "date": found["date"],
    }


def _device(name: str) -> str:
    device = torch_device(name)
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {os.cpu_count()} cores, {platform.machine()}"


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _command(context: typer.Context) -> str:
    """Return the command line of a call."""
    words = ["pyro-vae", context.info_name]
    for parameter in context.command.params:
        if not _is_given(context, parameter.name):
            continue
        value = context.params[parameter.name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def main() -> None:
    """Run the command line; print errors that a user can fix in one line."""
    try:
        with group_of_torchrun():
            app()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print("[red]Error:[/red]", Text(line), highlight=False)
        sys.exit(1)

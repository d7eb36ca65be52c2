"""Export the encoder and the decoder of a pair, for programs without Pyro or without Python."""

from __future__ import annotations

import contextlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.torch_version import TorchVersion

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.enumeration import sampled_guides
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call
from pyro_vae._utils.extras import require
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import as_tensor
from pyro_vae.datasets._unused_columns import columns_taken
from pyro_vae.priors._posteriors import without_guides
from pyro_vae.serialization._tensor_functions import Decoder, Encoder, TensorFunction

FORMATS = (".pt2", ".onnx")
TESTED_TORCH = "2.13"  # torch 2.4.1 cannot export decoders, nor anything to ONNX


def export_encoder(
    file: str | Path,
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    plate: str | None = None,
    overwrite: bool = False,
) -> ExportedProgram:
    r"""Export the map from x to the parameters of q(z|x), with the encoder's head.

    The exported program takes x and the covariates, with any number of rows. It returns tensors by
    name:

    - ``"<site>.mean"`` and ``"<site>.stddev"`` for each latent site, if the distributions of all
      sites have both in closed form. For :class:`~pyro_vae.guides.AmortizedNormal`, they are
      :math:`\mu(x)` and :math:`\sigma(x)`, and all of q(z|x). Angles have a mean direction and a
      circular standard deviation;
    - otherwise ``"parameters"``, the result of the guide's ``parameters_of``, ``(B, P)``. With
      ``guide.sample(parameters, x)``, they give samples of a flow, for example.

    Args:
        file: file to write: ``.pt2`` for ``torch.export.load``, ``.onnx`` for ONNX.
        model: program of p(x, z).
        guide: program of q(z|x). Modules and plain functions can be exported if they are functions
            of tensors alone. They must take the number of rows from ``x.shape[0]``.
        x: some data ``(B, *event)``. Their shapes and dtypes are exported.
        *covariates: further arguments of the programs.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        overwrite: whether to replace an existing file.

    Returns:
        The exported program. It runs as ``program.module()(x, *covariates)``.

    Raises:
        FileExistsError: The file exists, and ``overwrite`` is False.
        ImportError: The format is ONNX, and the packages of the extra ``onnx`` are not installed.
        OSError: Writing failed.
        ValueError: The name of the file has another ending. x or a covariate is not a dense tensor
            or array of numbers. The pair breaks a rule (docs/contract.md). q(z|x) depends on
            samples, as in a hierarchy of latents. Or the program cannot be traced for any number
            of rows.

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.ones(5, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pv.serialization.export_encoder(f"{folder}/encoder.pt2", model, guide, x)
        ...     encoder = torch.export.load(f"{folder}/encoder.pt2").module()
        >>> q = encoder(torch.ones(7, 16))
        >>> {name: tuple(value.shape) for name, value in q.items()}
        {'z.mean': (7, 2), 'z.stddev': (7, 2)}
    """
    check_call(export_encoder, locals())
    return _export(file, lambda *args: Encoder(guide, args), model, guide, (x, *covariates),
                   plate, overwrite)  # fmt: skip


def export_decoder(
    file: str | Path,
    model: Program,
    guide: Program,
    x: Tensor,
    *covariates: Tensor,
    plate: str | None = None,
    overwrite: bool = False,
) -> ExportedProgram:
    r"""Export the map from z to :math:`E[x|z]`, the mean of the likelihood.

    The exported program takes the latents of the data points in the order of the model, with any
    number of rows, and then the covariates. It returns the mean of each observed site by name, in
    the units of the observation.

    Args:
        file: see :func:`export_encoder`.
        model: program of p(x, z). It may use x only for the number of rows, and as observations.
            Discrete latents are arguments too, also if they are summed out in other calls.
        guide: program of q(z|x). Its parameters are not exported, unless the prior holds the guide,
            as a VampPrior does.
        x: see :func:`export_encoder`.
        *covariates: further arguments of the programs.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        overwrite: whether to replace an existing file.

    Returns:
        The exported program. It runs as ``program.module()(z, *covariates)``.

    Raises:
        FileExistsError: The file exists, and ``overwrite`` is False.
        ImportError: The format is ONNX, and the packages of the extra ``onnx`` are not installed.
        OSError: Writing failed.
        ValueError: The name of the file has another ending. x or a covariate is not a dense tensor
            or array of numbers. The pair breaks a rule (docs/contract.md). p(x|z) has no
            closed-form mean. The mean depends on x, as in an autoregressive decoder, or on global
            latents. Or the program cannot be traced for any number of rows.

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     decoder = pv.serialization.export_decoder(
        ...         f"{folder}/decoder.pt2", model, guide, torch.ones(5, 16)
        ...     ).module()
        >>> z = torch.randn(7, 2)
        >>> torch.allclose(decoder(z)["x"], model.likelihood(z).mean)
        True
    """
    check_call(export_decoder, locals())
    return _export(file, lambda *args: Decoder(model, args), model, guide, (x, *covariates),
                   plate, overwrite)  # fmt: skip


def _export(
    file: str | Path,
    make: Callable[..., TensorFunction],
    model: Program,
    guide: Program,
    args: tuple[Tensor, ...],
    plate: str | None,
    overwrite: bool,
) -> ExportedProgram:
    path = _checked_path(file, overwrite)
    onnx = path.suffix == ".onnx"
    if onnx:
        require("onnx", "onnx", "Exporting to ONNX")
        require("onnxscript", "onnx", "Exporting to ONNX")
    name_data_plate(plate, model, guide)
    device = device_of(model, guide)
    names = ["x"] + ["each of covariates"] * (len(args) - 1)
    args = tuple(
        as_tensor(each, name, finite=False).to(device).contiguous()
        for each, name in zip(args, names, strict=True)
    )
    args = tuple(columns_taken((model, guide), args))
    if len(args[0]) == 1:  # torch.export takes a size of one for a fixed number
        args = tuple(each.repeat_interleave(2, 0) for each in args)
    with (
        parameter_store(model, guide),
        evaluation_mode(model, guide),
        sampled_guides(),
        torch.no_grad(),
    ):
        check_pair(model, guide, args, weighs=True, name="x")
        with values_checked(False):
            function = make(*args)
            with without_guides(function):  # torch.export cannot trace a guide inside of a prior
                exported = _traced(function)
            calls = [(rows, function(*rows)) for rows in (function.example, _first_row(function))]
    _require_same_values(exported, calls)  # after the block, whose hooks exported modules refuse
    with _temporary(path) as temporary:
        if onnx:
            _write_onnx(exported, function, temporary)
        else:
            torch.export.save(exported, temporary)
    return exported


def _traced(function: TensorFunction) -> ExportedProgram:
    batch = Dim("batch")
    shapes = (tuple({dim: batch} for dim in function.row_dims),)
    try:
        return torch.export.export(function, function.example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export has no common error class
        raise ValueError(
            f"torch.export cannot trace the program for any number of rows: {first_line(error)}. "
            "Take the number of rows from x.shape[0], because len(x) is a fixed number, and do not "
            f"let Python code depend on values of tensors{_old_torch()}"
        ) from error


def _old_torch() -> str:
    """Return a sentence that names torch as a possible cause of an error, if it is old."""
    if TorchVersion(torch.__version__) >= TESTED_TORCH:
        return ""
    return (
        f". Or update torch: exports are tested with torch {TESTED_TORCH} and newer, and "
        f"{torch.__version__} is installed"
    )


def _first_row(function: TensorFunction) -> tuple[Tensor, ...]:
    pairs = zip(function.example, function.row_dims, strict=True)
    return tuple(each.narrow(dim, 0, 1) for each, dim in pairs)


def _require_same_values(exported: ExportedProgram, calls: Sequence[tuple[Any, Any]]) -> None:
    """Compare the exported program with results of the pair."""
    module = exported.module()
    for args, expected in calls:
        found = module(*args)
        for name, value in expected.items():
            if not torch.allclose(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise ValueError(
                    f"the exported program returns other values of {name!r} than the pair: a part "
                    f"of the program is not a function of tensors alone{_old_torch()}"
                )


def _write_onnx(exported: ExportedProgram, function: TensorFunction, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about packages that it does not need here
        try:
            program = torch.onnx.export(
                exported,
                input_names=function.inputs,
                output_names=function.outputs,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # an old torch.onnx.export raises errors of many types
            if not (hint := _old_torch()):
                raise
            raise ValueError(
                f"torch.onnx.export failed: {type(error).__name__}: {first_line(error)}{hint}"
            ) from error
    program.save(path)


def _checked_path(file: str | Path, overwrite: bool) -> Path:
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"file must be a string or path, got {file!r}")
    path = Path(file)
    if path.suffix not in FORMATS:
        raise ValueError(f"file must end with {' or '.join(FORMATS)}, got {str(file)!r}")
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} exists: pass overwrite=True, or another name")
    return path


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which is renamed at the end, so that a file is always complete."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

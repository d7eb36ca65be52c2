"""Find the plate of the data points in a program, and give it the name ``"data"`` in traces.

The rest of the library reads the plate ``"data"``. A program may use any other name, or a plate
without a size. Then its data plate is the one whose size follows the number of rows of x in two
runs. The name is kept for as long as the program exists, so programs are examined once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._programs.sites import DATA_PLATE, PARTICLE_PLATE, Site, random_sites
from pyro_vae._utils.checks import shown
from pyro_vae._utils.identity import ProgramMap
from pyro_vae._utils.random import restored_generators

Program = Callable[..., Any]
_OTHER_PLATE = "_data_of_program"  # a plate called "data" that does not hold the data points

_names = ProgramMap()  # of data plates, for examined programs; None for a plate "data" with a size
_renamed = ProgramMap()  # the programs with other names, usually none


def set_data_plate(program: Program, names: Iterable[str] | None) -> None:
    """Keep the names of a program's data plates for as long as the program exists."""
    _names[program] = None if names is None else frozenset(names)
    if names is not None:
        _renamed[program] = True


def name_data_plate(plate: str | None, *programs: Program | None) -> None:
    """Keep the name that a caller gave to the data plate of programs.

    Args:
        plate: the name, or None to have it found.
        *programs: the programs; those that are None are left out.

    Raises:
        TypeError: The name is not a string.
    """
    if plate is None:
        return
    if not isinstance(plate, str):
        raise TypeError(f"plate must be the name of a pyro.plate, got {shown(plate)}")
    for program in programs:
        if program is not None:
            set_data_plate(program, [plate])


def data_plates_named(program: Program, args: tuple) -> AbstractContextManager:
    """Return a context in which sites of a program have their data plate as ``"data"``.

    Args:
        program: a program, inside any handlers.
        args: its arguments; the first one is x.
    """
    names = _names.get(program) if len(_renamed) else None
    return contextlib.nullcontext() if names is None else _DataPlates(names, _rows_of(args))


def is_examined(program: Program) -> bool:
    """Return whether the data plate of a program is known from an earlier run."""
    return program in _names


def find_data_plate(
    role: str,
    program: Program,
    args: tuple,
    kwargs: dict[str, Any],
    run: Callable[..., poutine.Trace],
    trace: poutine.Trace,
) -> bool:
    """Find the data plates of a program, and keep their names.

    If the plate ``"data"`` does not have one row per row of x, the program runs again, on another
    number of rows. Random numbers are left unchanged.

    Args:
        role: ``"model"`` or ``"guide"``, for messages.
        program: the program.
        args: its arguments. Those with as many rows as x, the first one, get the other number.
        kwargs: its keyword arguments, which are treated in the same way.
        run: returns a trace of the program for given arguments.
        trace: a trace of the program for these arguments.

    Returns:
        Whether plates were found under other names than ``"data"``, or without a size.

    Raises:
        ValueError: A site is inside two plates whose sizes follow the rows of x, or in a plate
            without a size and without a value for each row.
    """
    if is_examined(program):
        return False
    sites, rows = [*random_sites(trace)], _rows_of(args)
    frames = [frame for site in sites for frame in _plates(site)]
    if any(f.name == DATA_PLATE and f.size >= 0 and rows in (0, f.size) for f in frames):
        set_data_plate(program, None)
        return False
    if not rows or not frames:
        return False
    other = rows - 1 if rows > 2 else rows + 1  # a single row would broadcast
    try:
        with restored_generators(), torch.no_grad(), poutine.block():
            again = run(*_resized(args, rows, other), **_resized(kwargs, rows, other))
    except Exception:  # a program for one number of rows may raise any error
        again = None
    for site in sites:
        for frame in _plates(site):
            _require_rows(frame, site, rows)
    names = _names_of_size(sites, rows)
    if again is not None:
        names &= _names_of_size(random_sites(again), other)
    inside = [[f.name for f in _plates(site) if f.name in names] for site in sites]
    if both := next((found for found in inside if len(found) > 1), None):
        raise ValueError(
            f"the {role} has a site inside the plates {both}, and each of them has one row per "
            f"data point of x ({rows} rows). Name the plate of the data points: plate={both[0]!r}."
        )
    if again is None and len(names) > 1:
        raise ValueError(
            f"the {role} has the plates {sorted(names)} of {rows} rows, as many as x, and does not "
            f"run on {other} rows. Name the plate of the data points: plate={min(names)!r}."
        )
    if names:
        set_data_plate(program, names)
    return bool(names)


def _names_of_size(sites: Iterable[Site], rows: int) -> set[str]:
    """Return the names of plates that have a number of rows at every site."""
    sizes: dict[str, set[int]] = {}
    for site in sites:
        for frame in _plates(site):
            sizes.setdefault(frame.name, set()).add(_size_of(frame, site))
    return {name for name, found in sizes.items() if found == {rows}}


def _plates(site: Site) -> list[CondIndepStackFrame]:
    stack = site["cond_indep_stack"]
    return [frame for frame in stack if frame.vectorized and frame.name != PARTICLE_PLATE]


def _size_of(frame: CondIndepStackFrame, site: Site) -> int:
    """Return the size of a plate at a site; a plate without a size has that of the site."""
    shape = site["fn"].batch_shape
    if frame.size >= 0:
        return frame.size
    return shape[frame.dim] if len(shape) >= -frame.dim else 1


def _require_rows(frame: CondIndepStackFrame, site: Site, rows: int) -> None:
    """Raise ValueError if a site in a plate without a size does not have a value for each row."""
    if frame.size < 0 and _size_of(frame, site) != rows:
        raise ValueError(
            f"site {site['name']!r} has batch shape {tuple(site['fn'].batch_shape)} inside the "
            f"plate {frame.name!r}, which has no size, and x has {rows} rows. Give the plate the "
            f"size of the minibatch: pyro.plate({frame.name!r}, x.shape[0])."
        )


def _resized(arguments: Any, rows: int, other: int) -> Any:
    """Return arguments with another number of rows, where they have as many as x."""
    if isinstance(arguments, dict):
        return {name: _resized(value, rows, other) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(_resized(value, rows, other) for value in arguments)
    if isinstance(arguments, Tensor) and arguments.dim() and len(arguments) == rows:
        return arguments[torch.arange(other, device=arguments.device) % rows]
    return arguments


def repeated_rows(arguments: Any, rows: int, copies: int) -> Any:
    """Return arguments with several copies of their rows, one copy of all rows after the other."""
    return _resized(arguments, rows, copies * rows)


def _rows_of(args: tuple) -> int:
    x = args[0] if args else None
    return len(x) if isinstance(x, Tensor) and x.dim() else 0


class _DataPlates(Messenger):
    """Give the frames of data plates the name ``"data"``, and the number of rows as their size.

    Args:
        names: the names of the data plates in the program.
        rows: the number of rows of x.
    """

    def __init__(self, names: frozenset[str], rows: int):
        super().__init__()
        self._names, self._rows = names, rows

    def _pyro_sample(self, msg: Site) -> None:
        stack = msg["cond_indep_stack"]
        if any(frame.name in self._names or frame.name == DATA_PLATE for frame in stack):
            msg["cond_indep_stack"] = tuple(self._renamed(frame, msg) for frame in stack)

    def _renamed(self, frame: CondIndepStackFrame, msg: Site) -> CondIndepStackFrame:
        if frame.name not in self._names:
            other = frame.name == DATA_PLATE
            return frame._replace(name=_OTHER_PLATE) if other else frame
        if not frame.vectorized or frame.size >= 0:
            return frame._replace(name=DATA_PLATE)
        _require_rows(frame, msg, self._rows)
        return frame._replace(name=DATA_PLATE, size=self._rows, full_size=self._rows)

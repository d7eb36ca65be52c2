"""Find the plate of the data points in a program, and give it the name ``"data"`` in traces.

The rest of the library reads the plate ``"data"``. A program may use any other name, or a plate
without a size. Then its data plate is the one whose size follows the number of rows of x in
further runs. The names are kept by the plates of a run. So a program is examined again if it opens
other plates, for example in another branch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._programs.flags import flags_of, key_of
from pyro_vae._programs.sites import DATA_PLATE, PARTICLE_PLATE, Site, data_frame, random_sites
from pyro_vae._programs.trial_runs import OUT_OF_MEMORY, trial_run
from pyro_vae._utils.checks import shown
from pyro_vae._utils.identity import ProgramMap, without_handlers

Program = Callable[..., Any]
# The plates of a run: name, dimension, whether it has a size, whether it has the rows of x.
Plates = frozenset[tuple[str, int, bool, bool]]
_OTHER_PLATE = "_data_of_program"  # a plate called "data" that does not hold the data points

_given = ProgramMap()  # by program: the name that a caller gave, and whether it must be there
# By program, then by the plates of a run: the names of data plates, and the flags of the program
# if another plate had the rows of x by chance.
_found = ProgramMap()
_reader: ContextVar[DataScale | None] = ContextVar("reader", default=None)


def name_data_plate(plate: str | None, model: Program, guide: Program | None = None) -> None:
    """Keep the name that a caller gave to the data plate of a pair.

    A guide that does not open a plate of this name, such as a guide of the library, is examined.

    Args:
        plate: the name, or None to have it found.
        model: program of p(x, z).
        guide: program of q(z|x), or None.

    Raises:
        TypeError: The name is not a string.
    """
    if plate is None:
        return
    if not isinstance(plate, str):
        raise TypeError(f"plate must be the name of a pyro.plate, got {shown(plate)}")
    if guide is not None:
        _given[guide] = (plate, False)
    _given[model] = (plate, True)


def given_name(program: Program) -> str | None:
    """Return the name that a caller gave to the data plate of a program, or None."""
    return _given.get(program, (None, False))[0]


def name_plates_in(
    trace: poutine.Trace,
    program: Program,
    args: tuple,
    kwargs: dict[str, Any],
    again: Callable[..., poutine.Trace],
    names_in_model: frozenset[str] | None = None,
) -> frozenset[str]:
    """Give the data plate the name ``"data"`` in a trace, and its number of rows as its size.

    A plate ``"data"`` with one row per row of x is the data plate. In all other cases, the program
    runs again on other numbers of rows, once for the same plates. A guide does not run again if it
    opens the data plate of the model, or the plate ``"data"`` of the library's guides.

    Args:
        trace: a trace of the program.
        program: the program, inside any handlers.
        args: its arguments; the first one is x.
        kwargs: its keyword arguments.
        again: returns a trace of the program for given arguments.
        names_in_model: for a guide, the names that were found in the model. None for a model.

    Returns:
        The names of the data plates in the program, empty if no plate is found.

    Raises:
        ValueError: A site is inside two plates whose sizes follow the rows of x, or in a plate
            without a size and without a value for each row. The program does not have the given
            plate, or the plate has another size.
    """
    rows = _rows_of(args)
    plates = frozenset(
        (frame.name, frame.dim, frame.size >= 0, _size_of(frame, site) == rows)
        for site in random_sites(trace)
        for frame in _plates(site)
    )
    if not plates:
        return frozenset()
    role = "model" if names_in_model is None else "guide"
    candidates = {name for name, *_ in plates} - {p[0] for p in plates if not p[3]}
    names, is_certain = None, True
    if names_in_model is not None:
        names = frozenset(names_in_model & candidates) or None
        if names is not None and names == candidates != {DATA_PLATE}:
            # For runs of the guide alone. An AutoGuide keeps its rows, so it cannot be examined.
            by_plates = _found.get(program, {})
            if (plates, None) not in by_plates:
                _found[program] = by_plates | {(plates, None): (names, None)}
    if names is None:
        names = _given_in(trace, program, plates, rows)
    if names is None:
        if rows == 0 or candidates == {DATA_PLATE}:
            names = frozenset([DATA_PLATE])
        elif not candidates:
            _require_rows_of_unsized(trace, plates, rows)
            return frozenset()
        else:
            names, is_certain = _kept(program, plates)
    if names is None or not is_certain:
        try:
            names = _examined(role, program, args, kwargs, again, trace, candidates, names)
        except ValueError as error:
            if (given := given_name(program)) is None:
                raise
            raise _no_such_plate(role, given, trace) from error
        by_plates = _found.get(program, {})
        if names == candidates:
            by_plates[plates, None] = names, None
        else:
            by_plates[plates, key_of(program)] = names, flags_of(without_handlers(program))[0]
        _found[program] = by_plates
    if names != {DATA_PLATE} or any(p[0] == DATA_PLATE and not p[2] for p in plates):
        _rename(trace, names, rows)
    if (reader := _reader.get()) is not None:
        reader.read(trace)
    return names


def names_for_guide(model_trace: poutine.Trace, names: frozenset[str]) -> frozenset[str]:
    """Return the names that the data plate may have in a guide, given those in the model.

    The library's guides call it ``"data"``, so a guide may do so unless the model has another
    plate of this name.
    """
    frames = (frame for site in random_sites(model_trace) for frame in _plates(site))
    has_other = any(frame.name == _OTHER_PLATE for frame in frames)
    return names if has_other else names | {DATA_PLATE}


class DataScale(Messenger):
    """Read the scale N/B of the plate of the data points in the runs of a block.

    Every objective multiplies its loss by it. Each run reads the scale, because it may differ
    between runs. N may depend on the minibatch or on the mode of a module. If the first minibatch
    has all N rows, N and B are equal. A process with a share of the rows has a smaller B, and so
    has a later minibatch of a stream.

    Args:
        *programs: the programs that run. Pyro's objectives trace them without a name for the
            plate; then the names that earlier runs found are used.
    """

    def __init__(self, *programs: Program):
        super().__init__()
        self.scale = 1.0
        self._programs = programs
        self._was_read = False

    def __enter__(self) -> DataScale:
        self._names = known_names(*self._programs)
        self._token = _reader.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _reader.reset(self._token)
        super().__exit__(*error)

    def read(self, trace: poutine.Trace) -> None:
        """Read the scale from a trace whose plates are named."""
        frames = (data_frame(site) for site in random_sites(trace))
        if (frame := next((f for f in frames if f is not None), None)) is not None:
            self.scale = (frame.full_size or frame.size) / frame.size
            self._was_read = True

    def _pyro_post_sample(self, msg: Site) -> None:
        if not self._was_read and (frame := known_frame(msg, self._names)) is not None:
            self.scale = (frame.full_size or frame.size) / frame.size


def known_names(*programs: Program) -> frozenset[str]:
    """Return the names of data plates that earlier runs of programs found, or ``"data"``."""
    names: set[str] = set()
    for program in programs:
        given = given_name(program) if len(_given) else None
        found = _found.get(program, {}).values() if len(_found) and given is None else ()
        names.update([given] if given is not None else itertools.chain(*(n for n, _ in found)))
    return frozenset(names or [DATA_PLATE])


def known_frame(site: Site, names: frozenset[str]) -> CondIndepStackFrame | None:
    """Return the frame of a site's plate that has one of the names and a size, or None."""
    stack = site["cond_indep_stack"]
    return next((f for f in stack if f.name in names and f.vectorized and f.size > 0), None)


def _given_in(
    trace: poutine.Trace, program: Program, plates: Plates, rows: int
) -> frozenset[str] | None:
    """Return the given name of the data plate as a set, or None if the plate must be found."""
    if not len(_given) or (given := _given.get(program)) is None:
        return None
    name, required = given
    sizes = _sizes_of(trace)
    if name not in sizes:
        if not required:
            return None
        raise _no_such_plate("model", name, trace)
    if rows and not all(p[3] for p in plates if p[0] == name) and not _draws(trace, name, rows):
        raise ValueError(
            f"plate={name!r} was given as the plate of the data points, but it has size "
            f"{sizes[name]} and x has {rows} rows. The plates are, by size, {sizes}."
        )
    return frozenset([name])


def _no_such_plate(role: str, name: str, trace: poutine.Trace) -> ValueError:
    return ValueError(
        f"the {role} has no vectorized plate {name!r}, which was given as plate={name!r}. The "
        f"plates are, by size, {_sizes_of(trace)}. Pass the name of one of them."
    )


def _sizes_of(trace: poutine.Trace) -> dict[str, int]:
    return {f.name: _size_of(f, site) for site in random_sites(trace) for f in _plates(site)}


def _kept(program: Program, plates: Plates) -> tuple[frozenset[str] | None, bool]:
    """Return the names found in an earlier run with these plates, and whether they are certain.

    If another plate has the rows of x by chance, the names are kept only if the flags of the
    program are the same. They are certain only if runs with other sizes had the same names.
    """
    by_plates: dict[tuple[Plates, int | None], tuple[frozenset[str], Any]] = _found.get(program, {})
    if (found := by_plates.get((plates, None))) is not None:
        return found[0], True
    names, flags = by_plates.get((plates, key_of(program)), (None, None))
    if names is None or flags != flags_of(without_handlers(program))[0]:
        return None, False
    same = {p[:3] for p in plates}
    others = [f for (other, _), (f, _) in by_plates.items() if {p[:3] for p in other} == same]
    return names, all(found == names for found in others)


def _examined(
    role: str,
    program: Program,
    args: tuple,
    kwargs: dict[str, Any],
    again: Callable[..., poutine.Trace],
    trace: poutine.Trace,
    candidates: set[str],
    kept: frozenset[str] | None,
) -> frozenset[str]:
    """Run a program on other numbers of rows; return the names of plates that follow them.

    If it does not run on them, the kept names are returned.
    """
    rows, names = _rows_of(args), set(candidates)

    def sizes_at(other: int, *, covariates: bool) -> set[str] | None:
        x, *rest = args
        inputs = (rest, kwargs)
        try:
            with trial_run(program):
                x = resized(x, rows, other)
                rest, named = resized(inputs, rows, other) if covariates else inputs
                return _names_of_size(random_sites(again(x, *rest, **named)), other)
        except OUT_OF_MEMORY:
            raise
        except Exception:  # a program for one number of rows may raise any error
            return None

    # A single row would broadcast. One row more and one less show a limit of a size.
    others = (rows - 1, rows + 1) if rows > 2 else (rows + 1, rows + 2)
    runs = [found for other in others if (found := sizes_at(other, covariates=True)) is not None]
    if not runs and kept is not None:
        return kept
    for found in runs:
        names &= found
    if len(names) > 1 and runs and _has_rows((args[1:], kwargs), rows):
        of_x = sizes_at(others[0], covariates=False)
        if of_x is not None and not names <= of_x:
            raise ValueError(
                f"the {role} has the plates {sorted(names)} of {rows} rows, as many as x and one "
                "of the other arguments, and they do not all follow the rows of x. Name the plate "
                f"of the data points: plate={min(names)!r}."
            )
    inside = [{f.name for f in _plates(s)} & names for s in random_sites(trace)]
    if DATA_PLATE in names:
        names -= {n for found in inside if DATA_PLATE in found for n in found - {DATA_PLATE}}
        inside = [found & names for found in inside]
    if both := next((sorted(found) for found in inside if len(found) > 1), None):
        raise ValueError(
            f"the {role} has a site inside the plates {both}, and each of them has one row per "
            f"data point of x ({rows} rows). Name the plate of the data points: plate={both[0]!r}."
        )
    if not runs and len(names) > 1:
        if DATA_PLATE in names:
            return frozenset([DATA_PLATE])
        raise ValueError(
            f"the {role} has the plates {sorted(names)} of {rows} rows, as many as x, and does not "
            f"run on {others[0]} rows. Name the plate of the data points: plate={min(names)!r}."
        )
    return frozenset(names or candidates & {DATA_PLATE})


def _names_of_size(sites: Iterable[Site], rows: int) -> set[str]:
    """Return the names of plates that have a number of rows at every site."""
    sizes: dict[str, set[int]] = {}
    for site in sites:
        for frame in _plates(site):
            sizes.setdefault(frame.name, set()).add(_size_of(frame, site))
    return {name for name, found in sizes.items() if found == {rows}}


def _rename(trace: poutine.Trace, names: frozenset[str], rows: int) -> None:
    """Call plates ``"data"`` in a trace, and any other plate of that name differently."""
    if not names:
        return
    for site in trace.nodes.values():
        stack = site.get("cond_indep_stack") if site["type"] == "sample" else None
        if stack and any(frame.name in names or frame.name == DATA_PLATE for frame in stack):
            site["cond_indep_stack"] = tuple(_renamed(frame, site, names, rows) for frame in stack)


def _renamed(
    frame: CondIndepStackFrame, site: Site, names: frozenset[str], rows: int
) -> CondIndepStackFrame:
    if frame.name not in names:
        other = frame.name == DATA_PLATE
        return frame._replace(name=_OTHER_PLATE) if other else frame
    if not frame.vectorized or frame.size >= 0 or not rows:
        return frame._replace(name=DATA_PLATE)
    return frame._replace(name=DATA_PLATE, size=rows, full_size=rows)


def _draws(trace: poutine.Trace, name: str, rows: int) -> bool:
    """Return whether a plate is a sample of all rows of x, as with ``subsample_size``."""
    frames = [f for site in random_sites(trace) for f in _plates(site) if f.name == name]
    return all(frame.full_size == rows for frame in frames)


def _require_rows_of_unsized(trace: poutine.Trace, plates: Plates, rows: int) -> None:
    """Raise ValueError if the only plates that could hold the data points have too few values."""
    for site in random_sites(trace):
        for frame in _plates(site):
            if frame.name != DATA_PLATE and frame.full_size == rows > frame.size > 0:
                raise ValueError(
                    f"the plate {frame.name!r} draws {frame.size} of the {rows} rows of x at each "
                    "run. Programs are called with minibatches and must use all of their rows: "
                    f"write pyro.plate({frame.name!r}, x.shape[0]), and pass batch_size to pv.fit."
                )
            if frame.size < 0 and _size_of(frame, site) != rows:
                raise ValueError(
                    f"site {site['name']!r} has batch shape {tuple(site['fn'].batch_shape)} inside "
                    f"the plate {frame.name!r}, which has no size, and x has {rows} rows. Give the "
                    f"plate the size of the minibatch: pyro.plate({frame.name!r}, x.shape[0])."
                )
    if any(p[0] == DATA_PLATE for p in plates) and not _draws(trace, DATA_PLATE, rows):
        raise ValueError(
            f'the plate "data" has size {_sizes_of(trace)[DATA_PLATE]} for a minibatch of {rows} '
            'rows. Programs are called with minibatches: use `pyro.plate("data", x.shape[0])`. '
            'If the minibatch represents N rows, use `pyro.plate("data", N, subsample=x)`.'
        )


def _plates(site: Site) -> list[CondIndepStackFrame]:
    stack = site["cond_indep_stack"]
    return [frame for frame in stack if frame.vectorized and frame.name != PARTICLE_PLATE]


def _size_of(frame: CondIndepStackFrame, site: Site) -> int:
    """Return the size of a plate at a site; a plate without a size has that of the site."""
    shape = site["fn"].batch_shape
    if frame.size >= 0:
        return frame.size
    return shape[frame.dim] if len(shape) >= -frame.dim else 1


def resized(arguments: Any, rows: int, other: int) -> Any:
    """Return arguments with another number of rows, where they have as many as x."""
    if isinstance(arguments, dict):
        return {name: resized(value, rows, other) for name, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        values = [resized(value, rows, other) for value in arguments]
        kind = type(arguments)
        return kind(*values) if hasattr(arguments, "_fields") else kind(values)
    if isinstance(arguments, Tensor) and arguments.dim() and len(arguments) == rows:
        return arguments[torch.arange(other, device=arguments.device) % rows]
    if getattr(arguments, "ndim", 0) and len(arguments) == rows:  # an array
        return arguments[torch.arange(other).remainder(rows).numpy()]
    return arguments


def _has_rows(arguments: Any, rows: int) -> bool:
    """Return whether one of the arguments has as many rows as x."""
    if isinstance(arguments, dict):
        return any(_has_rows(value, rows) for value in arguments.values())
    if isinstance(arguments, tuple | list):
        return any(_has_rows(value, rows) for value in arguments)
    return bool(getattr(arguments, "ndim", 0)) and len(arguments) == rows


def repeated_rows(arguments: Any, rows: int, copies: int) -> Any:
    """Return arguments with several copies of their rows, one copy of all rows after the other."""
    return resized(arguments, rows, copies * rows)


def _rows_of(args: tuple) -> int:
    x = args[0] if args else None
    return len(x) if isinstance(x, Tensor) and x.dim() and not x.is_nested else 0

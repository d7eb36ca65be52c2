"""Progress bars, drawn by rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pyro_vae._utils.distributed import rank


def progress_bar(**options) -> Progress:
    """Make the bar that the library shows: description, bar, count, time left, a status."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[status]}"),
        **options,
    )


@contextlib.contextmanager
def task(
    progress: bool | Progress, description: str, total: int | None, *, transient: bool = False
) -> Iterator[Callable[..., None]]:
    """Show one task; yield ``advance(count, status="")``. In a group, the first process shows it.

    Args:
        progress: True draws a bar of its own, False nothing; a Progress gets one more task.
        description: text before the bar.
        total: how many advances finish it, None if that is not known.
        transient: take the row out of a shared Progress when the task is done.
    """
    if progress is False or progress is None or rank() > 0:
        yield lambda count=1, status="": None
        return
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar()) if progress is True else progress
        row = bar.add_task(description, total=total, status="")

        def advance(count: int = 1, status: str = "") -> None:
            bar.update(row, advance=count, status=status)

        yield advance
        if transient and progress is not True:
            bar.remove_task(row)
        else:  # done, though perhaps before its time
            bar.update(row, total=bar.tasks[bar.task_ids.index(row)].completed)

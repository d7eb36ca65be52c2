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
    """Return the library's progress bar, with description, bar, count, time left and status."""
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
    """Show one task, and yield ``advance(count, status="")``. Only the first process shows it.

    Args:
        progress: True shows a new bar, and False shows nothing. A Progress gets one more task.
        description: text before the bar.
        total: count at which the task is finished, or None if unknown.
        transient: whether to remove the row from a shared Progress when the task is done.
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
        else:  # the task may end early
            bar.update(row, total=bar.tasks[bar.task_ids.index(row)].completed)

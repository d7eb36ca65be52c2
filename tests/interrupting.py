"""Raise KeyboardInterrupt, or another error, at a chosen call."""

from rich.progress import Progress


class Interrupting(Progress):
    """A hidden progress bar that raises KeyboardInterrupt at its n-th advance."""

    def __init__(self, at):
        super().__init__(disable=True)
        self.left = at

    def update(self, task, *, advance=0, **fields):
        super().update(task, advance=advance, **fields)
        self.left -= bool(advance)
        if self.left == 0 and advance:
            raise KeyboardInterrupt


class Calls:
    """A program that raises an error at its n-th call only."""

    def __init__(self, program, at, error):
        self.program, self.left, self.error = program, at, error

    def __call__(self, *batch):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.program(*batch)

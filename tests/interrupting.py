"""Ctrl-C at a moment of one's choice."""

from rich.progress import Progress


class Interrupting(Progress):
    """A progress object, not drawn, in which Ctrl-C comes at the n-th report of something done."""

    def __init__(self, at):
        super().__init__(disable=True)
        self.left = at

    def update(self, task, *, advance=0, **fields):
        super().update(task, advance=advance, **fields)
        self.left -= bool(advance)
        if self.left == 0 and advance:
            raise KeyboardInterrupt


class Calls:
    """A program in which something happens at the n-th call, and never again."""

    def __init__(self, program, at, error):
        self.program, self.left, self.error = program, at, error

    def __call__(self, *batch):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.program(*batch)

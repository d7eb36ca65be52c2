"""New processes, forked from a process that has imported only the library."""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from pyro_vae._capture import captured

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pyro_vae", "pyro_vae.cli"])  # imports take seconds


def join_two(rank, folder):
    """Join the process group of the two processes of :func:`start_two`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )


def start_two(work, folder):
    """Run work(rank, folder) in two processes, until both have ended."""
    torch.multiprocessing.start_processes(
        work, (str(folder),), nprocs=2, start_method=CONTEXT.get_start_method()
    )


@dataclass(frozen=True)
class Finished:
    """The exit status and the output of a program."""

    returncode: int
    stdout: str
    stderr: str


def run_python(program, arguments, folder):
    """Run a file or a module in a folder, as ``python`` would.

    Short runs are not compiled, even on a busy machine.

    Args:
        program: a path, or the name of a module.
        arguments: strings.
        folder: where to run it, a path.
    """
    process = CONTEXT.Process(target=_run, args=(program, arguments, str(folder)))
    process.start()
    process.join()
    return Finished(process.exitcode, *(_stream(folder, n).read_text() for n in (1, 2)))


def _stream(folder, number):
    return Path(folder) / f"stream-{number}"


def _run(program, arguments, folder):
    for number in (1, 2):
        os.dup2(os.open(_stream(folder, number), os.O_CREAT | os.O_WRONLY), number)
    os.chdir(folder)
    captured.SECONDS_THAT_REPAY_COMPILING = float("inf")  # as in the tests (conftest.py)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)

"""New processes, forked from one that has imported the library and nothing else."""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pyro_vae", "pyro_vae.cli"])  # seconds, once and not for each


def join_two(rank, folder):
    """Join the group of the two that :func:`start_two` has started."""
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
    """What a program left: its status, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_python(program, arguments, folder):
    """Run a file, or a module by its name, as ``python`` would, in a folder.

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
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)

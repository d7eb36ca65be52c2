"""Compare the time of `import pyro_vae` with that of `import pyro`, in new processes.

python examples/benchmarks/import_time.py               # under a minute
python examples/benchmarks/import_time.py --rounds 1

The time is the CPU time, user and system, of a process with one thread. The two imports alternate,
and the results are medians over rounds. Before the first round, one process each compiles all
modules to bytecode, as an installation does.
"""

import argparse
import os
import subprocess
import sys
from statistics import median

MODULES = ("pyro", "pyro_vae")
PROGRAM = """
import resource

def seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

before = seconds()
import {module}
print(seconds() - before)
"""


def seconds(module):
    """Return the CPU time that a new process needs to import a module."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    result = subprocess.run(  # noqa: S603 - no user input
        [sys.executable, "-c", PROGRAM.format(module=module)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    for module in MODULES:
        seconds(module)
    taken = {module: [] for module in MODULES}
    for _ in range(arguments.rounds):
        for module in MODULES:
            taken[module].append(seconds(module))
    taken = {module: median(values) for module, values in taken.items()}
    print("| import | seconds | ratio to pyro |\n|---|---|---|")
    for module, value in taken.items():
        print(f"| {module} | {value:.2f} | {value / taken['pyro']:.2f} |")


if __name__ == "__main__":
    main()

"""Check the library on a GPU and measure it there, in one command.

python examples/benchmarks/gpu.py                                  # CUDA, at most eight minutes
python examples/benchmarks/gpu.py --sections captured resumed      # some of the sections
python examples/benchmarks/gpu.py --device cpu --small             # the same code on a CPU
python examples/benchmarks/gpu.py --show results.json              # print the tables again

The sections, in this order:

captured   captured steps equal eager ones at the same noise, for each objective and some guides
resumed    a killed and resumed fit has the same parameters as a fit without interruption
noise      equal seeds have equal noise; other seeds, steps and processes do not
evaluated  evidence, AIS and ELBO surgery equal those of the CPU within Monte Carlo error
surgery    the time of an ELBO surgery of 60,000 data points with 50 latent dimensions
evidence   the time of the evidence of 10,000 data points with 5000 particles
steps      the time of a step relative to Pyro, to plain PyTorch loops and to NumPyro

Each section runs in its own process, because an error of a GPU ends a process. A section that takes
too long is ended, and the next one begins. All results so far are in the file of ``--out`` after
each check. The tables are in Markdown, for docs/performance.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
SECTIONS = {  # the script and the share of the time; unused time is left to the next sections
    "captured": ("gpu_checks.py", 110),
    "resumed": ("gpu_checks.py", 50),
    "noise": ("gpu_checks.py", 35),
    "evaluated": ("gpu_checks.py", 35),
    "surgery": ("gpu_times.py", 25),
    "evidence": ("gpu_times.py", 45),
    "steps": ("gpu_times.py", 180),
}
MARK = "RESULT "  # at the start of a line with a result
PEERS = {
    "captured": "pyro_vae, captured",
    "parts": "Adam called from Python",
    "eager": "pyro_vae, eager",
    "pyro": "Pyro SVI",
    "plain": "plain PyTorch loop",
    "graph": "plain loop, CUDA graph",
    "numpyro": "NumPyro",
}


class Results:
    """The results of a run, in a file after each of them.

    Args:
        file: The JSON file.
        settings: The settings of the run.
    """

    def __init__(self, file: Path, settings: dict):
        self._file = file
        self.content = {"settings": settings, "environment": {}, "results": []}

    def add(self, section: str, result: dict) -> None:
        """Print a result and write all results so far."""
        if "environment" in result:
            self.content["environment"] |= result["environment"]
        else:
            self.content["results"].append({"section": section, **result})
            print(f"{section}: {line_of(result)}", flush=True)
        self._file.write_text(json.dumps(self.content, indent=1))


def run_section(name: str, seconds: float, arguments, results: Results) -> None:
    """Run a section in a new process, and end it if it takes longer than ``seconds``."""
    began = time.monotonic()
    command = [sys.executable, str(HERE / SECTIONS[name][0]), name]
    command += ["--device", arguments.device, "--seconds", str(0.85 * seconds)]
    command += ["--small"] * arguments.small
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603 - no user input
            command, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        ends = threading.Timer(seconds, process.kill)
        ends.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    results.add(name, json.loads(line.removeprefix(MARK)))
            status = process.wait()
        finally:
            ends.cancel()
            process.kill()
        errors.seek(0)
        last = errors.read()[-3000:]
    took = time.monotonic() - began
    end = {"check": "the section ran to its end", "passed": status == 0, "seconds": took}
    if status != 0:
        end |= {"status": status, "last_line": (last.splitlines() or [""])[-1], "stderr": last}
    results.add(name, end)


def line_of(result: dict) -> str:
    """Return a result as a line of text."""
    shown = {True: "passed", False: "FAILED", None: "measured"}[result["passed"]]
    return f"{result['check']}: {shown} {figures_of(result)}"


def figures_of(result: dict) -> str:
    """Return the figures of a result as text."""
    hidden = ("section", "check", "passed", "stderr", "traceback")
    figures = {name: value for name, value in result.items() if name not in hidden}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


def tables(content: dict) -> str:
    """Return the results as Markdown tables."""
    results = content["results"]
    failed = [r for r in results if r["passed"] is False]
    passed = [r for r in results if r["passed"] is True]
    settings = {**content["environment"], **content["settings"]}
    lines = ["", ", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += [f"{len(passed)} checks passed, {len(failed)} failed", ""]
    lines += ["| section | check | result | figures |", "|---|---|---|---|"]
    for result in results:
        if "peer" in result:
            continue
        shown = {True: "passed", False: "FAILED", None: ""}[result["passed"]]
        figures = figures_of(result).replace("|", "/").replace("\n", " ")
        lines.append(f"| {result['section']} | {result['check']} | {shown} | {figures} |")
    return "\n".join([*lines, "", *table_of_steps(results)])


def table_of_steps(results: list[dict]) -> list[str]:
    """Return the table of the times of steps."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for result in results:
        if "ms" in result:
            case = cases.setdefault((result["objective"], result["network"]), {})
            case[result["peer"]] = result
    if not cases:
        return []
    lines = [
        "Milliseconds per step, in brackets the ratio to the captured step of pyro_vae.",
        "",
        f"| objective | network/batch | {' | '.join(PEERS.values())} | start of captured, s |",
        "|---" * (len(PEERS) + 3) + "|",
    ]
    for (objective, network), case in cases.items():
        base = case.get("captured", {}).get("ms")
        cells = []
        for peer in PEERS:
            ms = case.get(peer, {}).get("ms")
            ratio = f" ({ms / base:.2f})" if ms and base and peer != "captured" else ""
            cells.append("not measured" if ms is None else f"{ms:.3f}{ratio}")
        start = case.get("captured", {}).get("start")
        cells.append("" if start is None else f"{start:.0f}")
        lines.append(f"| {objective} | {network} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the results")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and stop")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(tables(json.loads(arguments.show.read_text())))
        return
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device. Pass --device cpu --small to try the script")
    settings = {"device": arguments.device, "small": arguments.small}
    results = Results(arguments.out, settings | {"minutes": arguments.minutes})
    end = time.monotonic() + 60 * arguments.minutes
    for number, name in enumerate(arguments.sections):
        shares = [SECTIONS[each][1] for each in arguments.sections[number:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        run_section(name, max(seconds, 1.0), arguments, results)
    print(tables(results.content))
    sys.exit(any(result["passed"] is False for result in results.content["results"]))


if __name__ == "__main__":
    main()

"""Measure one training step of the same VAE in Pyro, plain torch, NumPyro and pyro_vae.

python examples/benchmarks/step.py                 # all cases, about twenty minutes
python examples/benchmarks/step.py --networks 784-200-200-50/20 --objectives elbo
python examples/benchmarks/step.py --peers eager captured --precisions highest medium

Each library runs in its own process. In every round, each process runs one epoch, in random order,
so that other work on the machine affects all alike. A step gathers a minibatch, binarizes it,
computes the gradient and makes an Adam update. The program prints the median over the rounds, as a
ratio to pyro_vae's captured step. All libraries start from the same weights. Their losses at the
end must agree. With several precisions of float32 matrix products, each library on torch has a
process for each of them.

Install the extra dependencies with `pip install -c constraints.txt -e ".[benchmark]"`.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

HERE = Path(__file__).parent

NETWORKS = {  # hidden widths, latents, whether gated, batch size
    "784-200-200-50/20": ([200, 200], 50, False, 20),
    "784-200-200-50/100": ([200, 200], 50, False, 100),
    "784-400-20/128": ([400], 20, False, 128),
    "784-400-20/256": ([400], 20, False, 256),
    "gated 2x300-40/100": ([300, 300], 40, True, 100),
}
OBJECTIVES = ["elbo", "iaf", "iwae50"]
PEERS = {
    "captured": "pyro_vae, captured",
    "eager": "pyro_vae, eager",
    "pyro": "Pyro, SVI",
    "hand": "plain PyTorch loop, eager",
    "compile": "plain PyTorch loop, torch.compile",
    "hand-captured": "plain PyTorch loop, captured the same way",
    "numpyro": "NumPyro, jitted loop",
}
LOSS_TOLERANCE = 0.03  # relative; the order of the data alone moves the early losses by 2%


class Worker:
    """The process of one library.

    Args:
        peer: A key of ``PEERS``.
        network: Hidden widths, latents, whether gated, and the batch size.
        objective: One of ``OBJECTIVES``; for NumPyro also "iwae" with any number of particles.
        steps: The number of steps of an epoch.
    """

    def __init__(
        self, peer: str, network: tuple[list[int], int, bool, int], objective: str, steps: int
    ):
        started = time.perf_counter()
        script = "numpyro_peer.py" if peer.startswith("numpyro") else "torch_peers.py"
        settings = json.dumps([peer, *network, objective, steps])
        self._process = subprocess.Popen(  # noqa: S603 - no user input
            [sys.executable, str(HERE / script), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.epoch()
        self.setup_seconds = time.perf_counter() - started
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def epoch(self) -> tuple[float, float]:
        """Run an epoch; return seconds per step and mean loss, in nats per data point."""
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended: see its error message above")
        return tuple(json.loads(line))

    def run(self) -> None:
        """Run one epoch and record its time."""
        seconds, loss = self.epoch()
        self.seconds.append(seconds)
        self.losses.append(loss)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def measure(network: str, objective: str, peers: list[str], rounds: int, steps: int) -> list[str]:
    """Run one case, and return its lines of the table."""
    workers = {peer: Worker(peer, NETWORKS[network], objective, steps) for peer in peers}
    for _ in range(rounds):
        for worker in random.sample(list(workers.values()), len(workers)):
            worker.run()
    for worker in workers.values():
        worker.close()
    ours = median(workers[peers[0]].seconds)
    reached = {p: mean(w.losses[-max(1, rounds // 3) :]) for p, w in workers.items()}
    lines = []
    for peer, worker in workers.items():
        step, loss = median(worker.seconds), reached[peer]
        agrees = abs(loss / reached[peers[0]] - 1) < LOSS_TOLERANCE
        name, _, precision = peer.partition("/")
        lines.append(
            f"| {network} | {objective} | {PEERS[name]} | {precision} | {1e3 * step:.2f} | "
            f"{step / ours:.2f} | {loss:.2f}{'' if agrees else ' (differs)'} | "
            f"{worker.setup_seconds:.0f} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--precisions", nargs="+", default=["highest"], choices=["highest", "high", "medium"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50, help="per epoch; an eighth for IWAE")
    arguments = parser.parse_args()
    names = ["captured", *(peer for peer in arguments.peers if peer != "captured")]
    peers = [
        f"{name}/{precision}"
        for name in names
        for precision in (arguments.precisions[:1] if name == "numpyro" else arguments.precisions)
    ]
    print(
        "| network/batch | objective | library | precision | step, ms | ratio | loss | start, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for objective in arguments.objectives:
        steps = max(1, arguments.steps // (8 if objective == "iwae50" else 1))
        for network in arguments.networks:
            for line in measure(network, objective, peers, arguments.rounds, steps):
                print(line, flush=True)


if __name__ == "__main__":
    main()

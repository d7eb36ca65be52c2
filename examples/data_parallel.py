"""Data-parallel training that resumes from a checkpoint when a process is killed.

torchrun --nproc-per-node=2 --max-restarts=3 examples/data_parallel.py --checkpoint run
torchrun --nproc-per-node=2 --max-restarts=3 examples/data_parallel.py --checkpoint run2 --die-at 3

The second command kills a process once, at the end of an epoch. Then torchrun restarts the group,
which resumes from the last checkpoint. The results are the same as those of the first command.
"""

import argparse
import hashlib
import os
import signal

import torch
import torch.distributed as dist

import pyro_vae as pv


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=None, help="folder shared by all processes")
    parser.add_argument("--data", default="digits", choices=pv.datasets.names())
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--die-at", type=int, default=None, help="epoch of the kill")
    arguments = parser.parse_args()

    with pv.training.group_of_torchrun():
        run(arguments)


def run(arguments):
    first = not dist.is_initialized() or dist.get_rank() == 0
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def die(epoch, row):
        if epoch == arguments.die_at and starts == 0 and not first:
            os.kill(os.getpid(), signal.SIGKILL)

    data = pv.datasets.load(arguments.data)
    size = data.train.shape[1]
    torch.manual_seed(0)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(10, [200], size)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(size, [200]))
    checkpoint = None
    if arguments.checkpoint is not None:
        checkpoint = pv.training.Checkpoint(arguments.checkpoint, seconds=0.2, resume=True)
    pv.fit(
        model,
        guide,
        data.train,
        epochs=arguments.epochs,
        checkpoint=checkpoint,
        after_epoch=die,
        capture=False,
        seed=0,
    )
    evidence = pv.evidence(model, guide, data.test[:200], num_particles=100, seed=0)
    surgery = pv.elbo_surgery(model, guide, data.train, seed=0)
    if first:
        parameters = [p.detach().cpu().numpy().tobytes() for p in model.parameters()]
        print(f"{evidence}\nmutual information {surgery.mutual_information:.6f} nats")
        print(
            f"parameters {hashlib.sha256(b''.join(parameters)).hexdigest()[:16]}, {starts} restarts"
        )


if __name__ == "__main__":
    main()

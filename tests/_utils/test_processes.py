"""An evaluation that two processes share has the results of one process."""

import functools
import itertools

import pytest
import torch
import torch.distributed
from interrupting import Calls, Interrupting
from new_processes import join_two, start_two
from torch.utils.data import IterableDataset

import pyro_vae as pv
from pyro_vae._utils import distributed as processes
from pyro_vae.evaluation._surgery import information

AIS = pv.evaluation.AIS(3, 3, leapfrog_steps=1, pilot=2)
ASCENT = pv.evaluation.Ascent(
    learning_rate=0.02, num_particles=2, window=5, patience=1, max_steps=10
)


NAMES = [
    *("importance", "naive", "stream", "shuffled", "one minibatch", "ais", "sandwich", "gaps"),
    *("surgery, gaussian", "surgery, particles", "surgery, one minibatch", "surgery, flow"),
    *("surgery, flow, one minibatch", "surgery, gaussian, part", "surgery, flow, part"),
    *("surgery, mixture", "surgery, stratified"),
]


class Rows(IterableDataset):
    """A stream of rows without a length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def pairs():
    """Return pairs with a Gaussian guide, a flow, and a mixture prior, by name; and data."""
    torch.manual_seed(0)
    nets, found = pv.nets, {}
    priors = {"gaussian": pv.priors.StandardNormal(2), "flow": pv.priors.StandardNormal(2)}
    priors["mixture"] = pv.priors.MixtureOfNormals(2, 3)
    x = torch.bernoulli(torch.full((130, 6), 0.4)).double()
    for name, prior in priors.items():
        likelihood = pv.likelihoods.Bernoulli(nets.MLP(2, [5], 6))
        model = pv.LatentVariableModel(prior, likelihood).double()
        guide = pv.guides.AmortizedNormal(model, nets.MLP(6, [5]))
        if name == "flow":
            flow = functools.partial(pv.flows.InverseAutoregressive, hidden=[4])
            guide = pv.guides.AmortizedFlow(model, nets.MLP(6, [5]), flow=flow)
        guide.double()(x)
        found[name] = (model, guide)
    return found, x


def estimates():
    """Return functions without arguments that evaluate the pairs, by name."""
    found, x = pairs()
    pair, flow = found["gaussian"], found["flow"]
    small = {"batch_size": 20, "capture": False, "seed": 3}
    quick = {**small, "num_particles": 30}
    loader = torch.utils.data.DataLoader(Rows(x), batch_size=30)
    shuffled = torch.utils.data.DataLoader(x, batch_size=30, shuffle=True)

    def surgery(name, **options):
        return lambda: pv.elbo_surgery(*found[name], x, **{"batch_size": 20, "seed": 3, **options})

    return {
        "importance": lambda: pv.evidence(*pair, x, **quick),
        "naive": lambda: pv.evidence(*pair, x, method="naive", **quick),
        "stream": lambda: pv.evidence(*flow, loader, **quick),
        "shuffled": lambda: pv.evidence(*flow, shuffled, **quick),
        "one minibatch": lambda: pv.evidence(*pair, x[:20], **quick),
        "ais": lambda: pv.evidence(*pair, x[:30], method=AIS, pairs_per_pass=30, **small),
        "sandwich": lambda: pv.sandwich(*pair, like=x[:30], ais=AIS, pairs_per_pass=30, **small),
        "gaps": lambda: pv.inference_gaps(*flow, x[:70], ascent=ASCENT, **quick),
        "surgery, gaussian": surgery("gaussian"),
        "surgery, particles": surgery("gaussian", num_particles=3),
        "surgery, one minibatch": surgery("gaussian", batch_size=200),
        "surgery, flow": surgery("flow", num_particles=2),
        "surgery, flow, one minibatch": surgery("flow", batch_size=200),
        "surgery, gaussian, part": surgery("gaussian", num_scored=30),
        "surgery, flow, part": surgery("flow", num_scored=30, num_particles=2),
        "surgery, mixture": surgery("mixture"),
        "surgery, stratified": surgery("mixture", estimator="stratified"),
    }


def numbers(result):
    """Return all numbers of a result, by name."""
    if isinstance(result, torch.Tensor):
        return {"": result}
    if isinstance(result, dict):
        items = result.items()
    elif isinstance(result, tuple | list):
        items = enumerate(result)
    elif hasattr(result, "__dataclass_fields__"):
        items = vars(result).items()
    elif isinstance(result, int | float):
        return {"": torch.tensor(result, dtype=torch.float64)}
    else:
        return {}
    return {f"{k}.{name}": n for k, value in items for name, n in numbers(value).items()}


def stopped(estimate):
    """Return the Interrupted error that an estimate raises."""
    with pytest.raises(pv.evaluation.Interrupted) as raised:
        estimate()
    return raised.value


def check_collectives():
    """Check each function of pyro_vae._utils.distributed in a group of two."""
    rank = processes.rank()
    assert processes.num_processes() == 2
    some = [torch.full((3, 2), float(rank)), torch.arange(4), torch.ones(2).double()]
    some.append(torch.zeros(2, 3).t())
    processes.sum_over_processes(some)
    assert some[0].eq(1).all()
    assert torch.equal(some[1], 2 * torch.arange(4))
    assert some[2].eq(2).all()
    assert processes.broadcast_from_first(torch.full((2, 3), rank).t()).eq(0).all()
    assert [list(t.shape) for t in processes.gather(torch.ones(rank, 2))] == [[0, 2], [1, 2]]
    mine = [torch.tensor(True), torch.ones(3, dtype=torch.bfloat16), torch.zeros(2, 0)]
    first, second = processes.gather(mine if rank else "none")
    assert first == "none"
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(second, mine, strict=True))
    received = processes.broadcast(torch.eye(2) if rank else torch.zeros(2, 2), 1)
    assert torch.equal(received, torch.eye(2))


def interrupts(rank):
    """Interrupt one process of two: both stop, and both resume."""
    found, x = pairs()
    model, guide = found["gaussian"]
    options = {"num_particles": 30, "batch_size": 20, "capture": False, "seed": 3}
    # The checks before the first minibatch run the model about 13 times.
    calls = Calls(model, 16 if rank else 0, KeyboardInterrupt())
    stop = stopped(lambda: pv.evidence(calls, guide, x, **options))
    resumed = pv.evidence(model, guide, x, resume=stop, **options)
    left = {"evidence": stop, "resumed": numbers(resumed)}
    information._CODES = 16
    bar = Interrupting(10) if rank == 0 else False
    stop = stopped(lambda: pv.elbo_surgery(model, guide, x, batch_size=20, seed=3, progress=bar))
    assert 0 < stop.partial.num_scored < len(x)
    resumed = pv.elbo_surgery(model, guide, x, batch_size=20, resume=stop)
    return left | {"surgery": stop, "resumed surgery": numbers(resumed)}


def failures(rank):
    """Check that both processes raise an error if one fails or has other data."""
    found, x = pairs()
    model, guide = found["gaussian"]
    options = {"batch_size": 20, "seed": 3}
    estimators = (
        functools.partial(pv.evidence, num_particles=2),
        pv.elbo_surgery,
        functools.partial(pv.inference_gaps, num_particles=2, ascent=ASCENT, capture=False),
    )
    for at, estimate in itertools.product((1, 6), estimators):
        broken = Calls(model, at if rank else 0, MemoryError("full"))
        error, match = (MemoryError, "full") if rank else (RuntimeError, "failed in process 1")
        with pytest.raises(error, match=match):
            estimate(broken, guide, x, **options)
    with pytest.raises(
        ValueError, match=r"the same data, got 130 data points in 7 parts, 100 data points in 5"
    ):
        pv.evidence(model, guide, x[: 100 if rank else None], num_particles=2, **options)
    with pytest.raises(KeyboardInterrupt):  # before the first result
        pv.evidence(Calls(model, 1 if rank else 0, KeyboardInterrupt()), guide, x, **options)


def work(rank, folder):
    join_two(rank, folder)
    check_collectives()
    assert list(estimates()) == NAMES
    found = {name: numbers(estimate()) for name, estimate in estimates().items()}
    pair, x = pairs()
    torch.manual_seed(rank)
    found["no seed"] = numbers(pv.evidence(*pair["flow"], x, num_particles=5, batch_size=20))
    # Only the first process shows progress: this bar would interrupt the second.
    bar = Interrupting(1) if rank else False
    pv.evidence(*pair["flow"], x, num_particles=5, progress=bar)
    failures(rank)
    left = interrupts(rank)
    torch.save((found, left), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return the results of each of two processes, and those of ``interrupts``."""
    folder = tmp_path_factory.mktemp("processes")
    start_two(work, folder)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


def require_close(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@pytest.mark.filterwarnings("ignore:inference_gaps:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_match_one(name, two):
    expected = numbers(estimates()[name]())
    assert len(expected) > 4
    for found, _ in two:
        require_close(found[name], expected, 1e-9 if name.startswith("surgery") else 0.0)


def test_processes_share_a_random_seed(two):
    (first, _), (second, _) = two
    require_close(first["no seed"], second["no seed"])


def test_interrupt_in_one_process_stops_all_and_resumes(two):
    found, x = pairs()
    model, guide = found["gaussian"]
    options = {"num_particles": 30, "batch_size": 20, "capture": False, "seed": 3}
    whole = pv.evidence(model, guide, x, **options)
    surgery = pv.elbo_surgery(model, guide, x, batch_size=20, seed=3)
    for _, left in two:
        so_far = left["evidence"].partial.values
        assert 0 < len(so_far) < len(x)
        assert torch.equal(so_far, whole.values[: len(so_far)])
        require_close(left["resumed"], numbers(whole))
        # One process can resume an evaluation of two.
        alone = pv.evidence(model, guide, x, resume=left["evidence"], **options)
        require_close(numbers(alone), numbers(whole))
        require_close(left["resumed surgery"], numbers(surgery), 1e-9)
        alone = pv.elbo_surgery(model, guide, x, batch_size=20, resume=left["surgery"])
        require_close(numbers(alone), numbers(surgery), 1e-9)
    require_close(numbers(two[0][1]["surgery"].partial), numbers(two[1][1]["surgery"].partial))


def test_collectives_in_one_process_return_their_input():
    given = torch.arange(3.0)
    processes.sum_over_processes([given])
    assert torch.equal(given, torch.arange(3.0))
    assert processes.broadcast_from_first(given) is given
    assert processes.gather(given)[0] is given
    assert processes.broadcast(given, 0) is given
    assert (processes.rank(), processes.num_processes()) == (0, 1)

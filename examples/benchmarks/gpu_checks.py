"""The sections of gpu.py that check numbers. Run gpu.py."""

import contextlib
import copy
import functools
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from gpu_part import attempt, binary, make_pair, report, run

import pyro_vae as pv
from pyro_vae._capture import Captured
from pyro_vae._programs.pair_state import state
from pyro_vae.training import _checkpoints as checkpoints

objectives, guides = pv.objectives, pv.guides
OBJECTIVES = {
    "ELBO": objectives.ELBO,
    "IWAE": lambda: objectives.IWAE(4),
    "BetaELBO, Linear": lambda: objectives.BetaELBO(objectives.Linear(10)),
    "BetaELBO, Cyclical": lambda: objectives.BetaELBO(objectives.Cyclical(5)),
    "BetaTCVAE": lambda: objectives.BetaTCVAE(num_data=64),
    "CapacityELBO": lambda: objectives.CapacityELBO(objectives.Linear(10), 5.0),
    "CIWAE": lambda: objectives.CIWAE(0.5, 2),
    "CUBO": lambda: objectives.CUBO(2, 2),
    "DReG": lambda: objectives.DReG(3),
    "FreeBits": lambda: objectives.FreeBits(0.1, per="dimension"),
    "InfoVAE": lambda: objectives.InfoVAE(0.5),
    "MeanFieldELBO": objectives.MeanFieldELBO,
    "MIWAE": lambda: objectives.MIWAE(2, 2),
    "PIWAE": lambda: objectives.PIWAE(2, 2),
    "Renyi": lambda: objectives.Renyi(0.5, 2),
    "ReweightedWakeSleep": lambda: objectives.ReweightedWakeSleep(2, wake=1.0, sleep=1.0),
    "ScoreFunction": lambda: objectives.ScoreFunction(2, "others"),
    "StickingTheLanding": lambda: objectives.StickingTheLanding(2),
    "TVO": lambda: objectives.TVO(2),
    "VIMCO": lambda: objectives.VIMCO(3),
}


def _flow(layer, **options):
    return functools.partial(guides.AmortizedFlow, flow=layer, length=2, **options)


GUIDES = {
    "normal": guides.AmortizedNormal,
    "multivariate normal": guides.AmortizedMultivariateNormal,
    "mixture": functools.partial(guides.AmortizedMixture, components=2),
    "inverse autoregressive": _flow(pv.flows.InverseAutoregressive),
    "planar": _flow(pv.flows.Planar),
    "spline coupling": _flow(pv.flows.NeuralSpline),
    "semi-amortized": lambda model, encoder: guides.SemiAmortized(
        guides.AmortizedNormal(model, encoder), steps=2
    ),
}
# Relative distances of all parameters after training, which amplifies rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
LARGEST_Z = 4.5  # two-sided, false alarms: 7e-6 per check
LARGEST_T = 6.0  # 14 degrees of freedom, false alarms: 3e-5 per check


def fitted(settings, *, guide=None, objective=None, dtype=torch.float32, seed=3, **options):
    """Fit a pair from fixed initial values. Return the fit and all parameters, on the CPU."""
    torch.manual_seed(7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        pair = make_pair(guide=guide)
        fixed = {"epochs": 4, "batch_size": 16, "device": settings.device, "progress": False}
        fixed |= {"objective": None if objective is None else objective(), "seed": seed}
        data = options.pop("data", binary(64).to(dtype))
        fit = pv.fit(*pair, data, **{**fixed, **options})
    finally:
        torch.set_default_dtype(before)
    return fit, numbers_of(pair)


def numbers_of(pair):
    """Return all tensors of a pair as one vector."""
    found = sorted(state(*pair).items())
    return torch.cat([tensor.detach().flatten().double().cpu() for _, tensor in found])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def captured(settings):
    """Compare captured and eager fits at the same noise."""
    double, single = torch.float64, torch.float32
    cases = [(objective, "normal", double, False) for objective in OBJECTIVES]
    cases += [("ELBO", guide, double, True) for guide in GUIDES]
    cases += [("ELBO", "normal", single, True), ("IWAE", "normal", single, True)]
    cases += [(o, "normal", double, True) for o in OBJECTIVES if o != "ELBO"]
    cases += [(o, g, double, False) for o in OBJECTIVES for g in GUIDES if g != "normal"]
    if settings.small:
        cases = [*cases[:3], ("DReG", "inverse autoregressive", double, False)]
    done = refused = 0
    slowest, began = 0.0, time.monotonic()
    for objective, guide, dtype, compiled in cases:
        if settings.left < slowest:
            break
        name = f"{objective}, {guide}, {str(dtype)[6:]}, {'compiled' if compiled else 'recorded'}"
        with attempt(name):
            options = {"guide": GUIDES[guide], "objective": OBJECTIVES[objective], "dtype": dtype}
            refused += not compare(settings, name, compiled, options)
        done += 1
        slowest, began = max(slowest, time.monotonic() - began), time.monotonic()
    report("fits compared", None, count=done - refused, refused=refused, not_run=len(cases) - done)


def compare(settings, name, compiled, options):
    """Compare a captured fit with an eager one. Return False if the pair has no such objective."""
    options = options | {"clip_norm": 5.0, "transform": lambda x: torch.bernoulli(0.9 * x)}
    try:
        eager, expected = fitted(settings, capture=False, **options)
    except (ValueError, NotImplementedError) as error:  # some objectives refuse some guides
        print(f"refused: {name}: {str(error).splitlines()[0]}", flush=True)
        return False
    with mock.patch.object(Captured, "compiles", compiled), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        fit, found = fitted(settings, capture=True, **options)
    losses = (fit.history.loss / eager.history.loss - 1).abs().max()
    off, most = distance(found, expected), TOLERANCE[options["dtype"]]
    whole = settings.device.type != "cuda" or fit.execution.endswith("with the optimizer")
    captured = fit.execution.startswith("captured") and whole
    same = off < most and losses < max(most, 1e-6) and captured
    report(
        name,
        bool(same),
        distance=off,
        losses=float(losses),
        execution=fit.execution,
        capture_s=fit.seconds - eager.seconds,
    )
    return True


class Killed(pv.training.Callback):
    """End the process at a checkpoint inside of the third epoch, without any cleanup."""

    def after_checkpoint(self, path):
        """End the process."""
        step = int(path.name.removeprefix("step-"))
        if step > 2 * 16 and step % 16:
            os._exit(9)


def long_fit(settings, capture, **options):
    return fitted(
        settings,
        data=binary(256),
        epochs=6,
        capture=capture,
        objective=lambda: objectives.BetaELBO(objectives.Linear(60)),
        transform=torch.bernoulli,
        clip_norm=5.0,
        **options,
    )


def killed(settings):
    """Run the fit that is killed; a process of the section ``resumed``."""
    deterministic()
    checkpoints._SHARE_OF_TIME = 0.9  # so that checkpoints are frequent
    folder, capture = os.environ["GPU_FOLDER"], os.environ["GPU_CAPTURE"] == "1"
    checkpoint = pv.training.Checkpoint(folder, seconds=0.0)
    with mock.patch.object(Captured, "compiles", not settings.small):
        long_fit(settings, capture, checkpoint=checkpoint, callbacks=[Killed()])


def deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def resumed(settings):
    """Kill fits inside of an epoch, and resume them in this process."""
    deterministic()
    for capture in (False, True):
        name = f"killed and resumed, capture={capture}"
        with (
            attempt(name),
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(Captured, "compiles", not settings.small),
        ):
            straight, expected = long_fit(settings, capture)
            status = process_of("killed", settings, folder, capture=str(int(capture)))
            steps = sorted(int(path.name[5:]) for path in Path(folder).glob("step-*[0-9]"))
            checkpoint = pv.training.Checkpoint(folder, resume=True)
            fit, found = long_fit(settings, capture, checkpoint=checkpoint)
            report(
                name,
                status == 9 and torch.equal(found, expected),
                distance=distance(found, expected),
                resumed_at=steps[-1] if steps else -1,
                status=status,
                execution=fit.execution,
                losses_equal=bool(fit.history.loss.equals(straight.history.loss)),
            )


def process_of(section, settings, folder, **variables):
    """Run a section in a new process. Return its exit status."""
    command = [sys.executable, __file__, section, "--device", str(settings.device)]
    names = {f"GPU_{name.upper()}": value for name, value in variables.items()}
    return subprocess.run(  # noqa: S603 - no user input
        [*command, *["--small"] * settings.small],
        env={**os.environ, "GPU_FOLDER": str(folder), **names},
        stdout=subprocess.DEVNULL,
        timeout=max(settings.left, 1.0) + 60,
        check=False,
    ).returncode


def digest_of_fit(settings):
    """Write a digest of the parameters; a process of the section ``noise``."""
    _, found = fitted(settings, capture=False)
    (Path(os.environ["GPU_FOLDER"]) / "digest").write_text(digest(found))


def digest(numbers):
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def noise(settings):
    """Check the random numbers of replays, streams and processes, and the reactions to NaN."""
    with attempt("replays continue the random sequence"):
        sequence_of_replays(settings)
    with attempt("seeds"):
        for capture in (False, True):
            with mock.patch.object(Captured, "compiles", False):
                runs = [fitted(settings, capture=capture, seed=s)[1] for s in (0, 0, 1)]
            name = f"equal seeds give equal fits, others do not, capture={capture}"
            same = torch.equal(runs[0], runs[1])
            report(name, same and not torch.equal(runs[0], runs[2]), equal=same)
    with attempt("another process"), tempfile.TemporaryDirectory() as folder:
        status = process_of("digest", settings, folder)
        mine = digest(fitted(settings, capture=False)[1])
        its = (Path(folder) / "digest").read_text() if status == 0 else None
        report("another process with the same seed gives the same fit", mine == its)
    with attempt("another stream"):
        first = fitted(settings, capture=False)[1]
        stream = contextlib.nullcontext()
        if settings.device.type == "cuda":
            stream = torch.cuda.stream(torch.cuda.Stream(settings.device))
        with stream:
            second = fitted(settings, capture=False)[1]
        settings.synchronize()
        off = distance(second, first)
        report("another stream with the same seed gives the same fit", off < 1e-5, distance=off)
    with attempt("NaN in a stream of data"):
        nan_in_stream(settings)
    with attempt("NaN is skipped"):
        nan_is_skipped(settings)
    with attempt("values that are read"):
        values_that_are_read(settings)


def sequence_of_replays(settings):
    x = torch.zeros(5, device=settings.device)

    def draw(x):
        return [torch.rand_like(x), torch.randn_like(x), torch.bernoulli(x + 0.5)]

    def sequence(capture):
        torch.manual_seed(11)
        run = Captured(draw, watch={}, name="a draw", capture=capture)
        with mock.patch.object(Captured, "compiles", False):
            found = [torch.cat([part.clone() for part in run(x)]) for _ in range(10)]
        return torch.stack(found).cpu(), run.execution

    (eager, _), (replayed, execution) = sequence(False), sequence(True)
    fresh = len({tuple(row.tolist()) for row in replayed}) == len(replayed)
    same = torch.equal(eager, replayed) and execution.startswith("captured")
    report(
        "replays continue the random sequence",
        fresh and same,
        all_new=fresh,
        execution=execution,
        difference=(eager - replayed).abs().max().item(),
    )


def nan_in_stream(settings):
    x = binary(64)
    x[40, 3] = math.nan
    loader = torch.utils.data.DataLoader(x, batch_size=16)
    try:
        fitted(settings, data=loader, capture=False)
        error = None
    except (FloatingPointError, ValueError) as caught:
        error = caught
    shown = "no error" if error is None else f"{type(error).__name__}: {error}"[:100]
    report("NaN in a stream is an error that says so", error is not None, error=shown)


def nan_is_skipped(settings):
    def spoil(x):  # about one row in a hundred
        return x.masked_fill(torch.rand_like(x[:, :1]) < 0.01, math.nan)

    for capture in (False, True):
        with mock.patch.object(Captured, "compiles", False):
            fit, found = fitted(
                settings, transform=spoil, on_nonfinite="skip", capture=capture, epochs=6
            )
        skipped = int(fit.history.skipped.sum())
        report(
            f"NaN is skipped, capture={capture}",
            bool(found.isfinite().all()) and skipped > 0,
            skipped=skipped,
            execution=fit.execution,
        )


def values_that_are_read(settings):
    def transform(x):
        return x if x.sum().item() >= 0 else 1 - x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit, found = fitted(settings, transform=transform, capture=True)
    _, expected = fitted(settings, transform=transform, capture=False)
    warned = any("not captured" in str(each.message) for each in caught)
    same = torch.equal(found, expected)
    report(
        "a program that reads values runs eagerly, with a warning",
        warned and same and fit.execution.startswith("eager"),
        execution=fit.execution,
    )


def evaluated(settings):
    """Compare evaluations on the device with those on the CPU."""
    with attempt("evidence of a Gaussian"):
        evidence_of_gaussian(settings)
    data = pv.datasets.load("digits")
    torch.manual_seed(0)
    pair = make_pair(64, [50], 5)
    fit_options = {"epochs": 2 if settings.small else 10, "capture": False, "progress": False}
    pv.fit(*pair, data.train, device="cpu", seed=0, **fit_options)
    moved = [module.to(settings.device) for module in copy.deepcopy(pair)]
    rows, particles = (20, 100) if settings.small else (200, 2000)
    x = data.test[:rows]
    with attempt("evidence"):
        options = {"num_particles": particles, "seed": 0, "pairs_per_pass": 20_000}
        on_cpu = pv.evidence(*pair, x, capture=False, **options)
        eager = pv.evidence(*moved, x, capture=False, **options)
        compare_evidence("evidence equals that of the CPU", on_cpu, eager)
        with mock.patch.object(Captured, "compiles", not settings.small):
            options["batch_size"] = rows // 10  # so that most passes are replayed
            replayed = pv.evidence(*moved, x, capture=True, **options)
            eager = pv.evidence(*moved, x, capture=False, **options)
        off = (replayed.values - eager.values).abs().max().item()
        report("captured evidence equals eager evidence", off < 1e-3, largest_difference=off)
    with attempt("AIS"):
        chains, temperatures = (4, 5) if settings.small else (20, 30)
        ais = pv.evaluation.AIS(
            num_chains=chains, num_temperatures=temperatures, pilot=4, leapfrog_steps=5
        )
        results = [
            pv.evidence(*programs, x[:20], method=ais, capture=False, seed=0)
            for programs in (pair, moved)
        ]
        compare_evidence("AIS equals that of the CPU", *results)
    with attempt("surgery"):
        compare_surgery(pair, moved, data.train[: 100 if settings.small else 1000])


def evidence_of_gaussian(settings):
    """Compare with log p(x) of x = z + e, where z and e are standard normal."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(pyro.nn.PyroModule):
        """A guide that is wider than the posterior, with a parameter that has a device."""

        def __init__(self):
            super().__init__()
            self.share = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            """Run the program."""
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.share * x, 1.0))

    x = torch.linspace(-2, 2, 50)
    guide = Guide().to(settings.device)
    for capture in (False, True):
        with mock.patch.object(Captured, "compiles", False):
            found = pv.evidence(
                model, guide, x, num_particles=2000, batch_size=10, capture=capture, seed=0
            )
        z = (found.values - dist.Normal(0.0, 2**0.5).log_prob(x).double()) / (
            found.monte_carlo_errors
        )
        sum_of_squares = z.square().sum().item()  # chi-squared with 50 degrees of freedom
        report(
            f"evidence of a Gaussian equals its closed form, capture={capture}",
            sum_of_squares < 50 + 5.5 * 10,  # false alarms: about 1e-5
            chi_squared=sum_of_squares,
            of=50,
        )


def compare_evidence(name, one, other):
    variance = one.monte_carlo_errors.square().sum() + other.monte_carlo_errors.square().sum()
    z = ((one.values - other.values).sum() / variance.sqrt()).item()
    report(name, abs(z) < LARGEST_Z, z=z, mean=other.mean, mean_of_cpu=one.mean)


def compare_surgery(pair, moved, x):
    terms = ("elbo", "distortion", "rate", "mutual_information", "marginal_kl")
    runs = [
        torch.tensor([[getattr(pv.elbo_surgery(*p, x, seed=s), t) for t in terms] for s in seeds])
        for p, seeds in ((pair, range(8)), (moved, range(8, 16)))
    ]
    means = [run.double().mean(0) for run in runs]
    errors = [run.double().var(0) / len(run) for run in runs]
    for number, term in enumerate(terms):
        error = (errors[0][number] + errors[1][number]).sqrt().clamp(min=1e-6)
        t = ((means[0][number] - means[1][number]) / error).item()
        found = means[1][number].item()
        report(f"surgery, {term}, equals that of the CPU", abs(t) < LARGEST_T, t=t, mean=found)


if __name__ == "__main__":
    run(
        {
            "captured": captured,
            "resumed": resumed,
            "noise": noise,
            "evaluated": evaluated,
            "killed": killed,
            "digest": digest_of_fit,
        }
    )

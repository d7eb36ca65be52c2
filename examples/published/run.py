"""Train one row of a published table by its protocol, and compare the result with the paper.

python examples/published/run.py A vae                       # an hour; resumes where it stopped
python examples/published/run.py A vae --data fashion-mnist  # the same protocol on other data
python examples/published/run.py A vae --data FOLDER         # with files in the format of MNIST
python examples/published/run.py B iwae-5 --epochs 364       # six of eight stages
python examples/published/run.py A exemplar --images 1000 --ais 0
python examples/published/run.py A vae --data digits --epochs 3 --particles 10

The result is written to examples/published/results, from which page.py makes docs/published.md. A
part of a row, of fewer epochs, images or particles, has a file of its own.
"""

import argparse
import functools
import hashlib
import json
import pickle
import platform
import resource
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pairs
import protocols
import pyro
import torch

import pyro_vae as pv

RESULTS = Path(__file__).parent / "results"
PARTICLES = 5000
AIS = pv.evaluation.AIS(num_chains=16, num_temperatures=500)
ASCENT = pv.evaluation.Ascent(learning_rate=1e-3, window=100, patience=10)
DESCRIPTIONS = {
    "A": "priors (Norouzi et al. 2020, table 1), dynamic MNIST",
    "B": "one stochastic layer (Burda et al. 2016, table 1), dynamic MNIST",
    "C": "objectives (Rainforth et al. 2018, table 1; DReG: Tucker et al. 2019), dynamic MNIST",
    "D": "inference gaps (Cremer, Li & Duvenaud 2018), MNIST binarized once",
    "E": "ELBO surgery (Hoffman & Johnson 2016), MNIST",
}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        make: function from the training images to a model and a guide.
        train: function that trains them by the protocol.
        published: the paper's numbers in nats by their names in a result: the mean, and the
            standard deviation over runs if the paper has it.
        objective: the objective, if the protocol does not determine it.
        binarize: see :func:`pyro_vae.datasets.load`. The default is a new sample in each step.
        measures_gaps: measure inference gaps instead of log p(x) of all test images.
    """

    make: object
    train: object
    published: dict[str, tuple[float, float | None]]
    objective: object = None
    binarize: str = "none"
    measures_gaps: bool = False


def log_p(value, deviation=None):
    return {"log_p": (value, deviation)}


def means(**values):
    return {name: (value, None) for name, value in values.items()}


NORMAL, VAMP, A = pairs.standard_normal, pairs.vamp, protocols.early_stopping
B, E, IWAE = protocols.stages, protocols.constant_rate, pv.objectives.IWAE
D = {"train": B, "objective": IWAE(1), "binarize": "fixed", "measures_gaps": True}


def tanh(train, published, objective=None, **options):
    """Return a row with the networks of table B."""
    return Row(functools.partial(pairs.tanh_pair, **options), train, published, objective)


ROWS = {
    ("A", "vae"): Row(pairs.one_level(NORMAL), A, log_p(-84.45, 0.12)),
    ("A", "vampprior"): Row(pairs.one_level(VAMP), A, log_p(-82.43, 0.06)),
    ("A", "exemplar"): Row(
        pairs.exemplars, functools.partial(A, positions=True), log_p(-82.09, 0.18)
    ),
    ("A", "hvae"): Row(pairs.two_levels(NORMAL), A, log_p(-82.39, 0.11)),
    ("A", "hvae-vampprior"): Row(pairs.two_levels(VAMP), A, log_p(-81.56, 0.09)),
    ("B", "vae-1"): tanh(B, log_p(-86.76), IWAE(1)),
    ("B", "iwae-5"): tanh(B, log_p(-85.54), IWAE(5)),
    ("B", "iwae-50"): tanh(B, log_p(-84.78), IWAE(50)),
    ("C", "miwae-8-8"): tanh(B, log_p(-84.97, 0.10), pv.objectives.MIWAE(8, 8)),
    ("C", "piwae-8-8"): tanh(B, log_p(-84.46, 0.06), pv.objectives.PIWAE(8, 8)),
    ("C", "ciwae-0.05"): tanh(B, log_p(-84.57, 0.09), pv.objectives.CIWAE(0.05, 64)),
    ("C", "dreg-5"): tanh(B, log_p(-84.90), pv.objectives.DReG(5)),
    ("C", "dreg-50"): tanh(B, log_p(-84.32), pv.objectives.DReG(50)),
    ("D", "gaussian"): Row(
        pairs.tanh_pair,
        published=means(log_p=-89.80, approximation_gap=1.43, amortization_gap=1.34),
        **D,
    ),
    ("D", "flow"): Row(
        pairs.flow_pair,
        published=means(log_p=-89.52, approximation_gap=0.86, amortization_gap=1.41),
        **D,
    ),
    ("E", "z-2"): tanh(
        E, means(train_rate=7.41, mutual_information=7.20, marginal_kl=0.21), latents=2
    ),
    ("E", "z-10"): tanh(
        E, means(train_rate=19.17, mutual_information=10.82, marginal_kl=8.35), latents=10
    ),
}


def train(row, data, args, folder):
    """Return the fit, of a pair whose initial values depend on the seed alone."""
    pyro.set_rng_seed(args.seed)
    model, guide = row.make(data.train)
    options = {} if row.objective is None else {"objective": row.objective}
    return row.train(
        model,
        guide,
        data,
        epochs=args.epochs,
        seed=args.seed,
        checkpoint=pv.training.Checkpoint(folder, resume=True),
        **options,
    )


def evidence_in_parts(folder, model, guide, images, *, images_at_a_time, **options):
    """Return log p(x) of the images and the seconds that it took, also those of earlier runs.

    After each part, the estimates so far are written to a file. The next run resumes from them if
    parameters, images and options are the same.
    """
    checksum = hashlib.sha256(repr(sorted(options.items())).encode())
    for tensor in (*model.state_dict().values(), *guide.state_dict().values(), images):
        checksum.update(tensor.cpu().numpy().tobytes())
    path = folder / f"evidence-{checksum.hexdigest()[:16]}.pickle"
    estimate, seconds, done = None, 0.0, 0
    if path.exists():
        estimate, seconds = pickle.loads(path.read_bytes())  # noqa: S301 - written below
        done = len(estimate.values)
    while done < len(images):
        start = time.perf_counter()
        estimate = pv.evidence(
            model,
            guide,
            images[: done + images_at_a_time],
            seed=done,
            resume=estimate,
            progress=True,
            **options,
        )
        seconds += time.perf_counter() - start
        done = len(estimate.values)
        written = path.with_suffix(".new")
        written.write_bytes(pickle.dumps((estimate, seconds)))
        written.replace(path)
    return estimate, seconds


def evaluate(fit, data, args, folder):
    """Yield parts of what tables A, B, C and E show of a fit, in nats. The last may take hours."""
    _, test = protocols.binary(data)
    model, guide = fit.model, fit.guide
    test = test[: args.images]
    options = {"images_at_a_time": 1000, "num_particles": args.particles}
    estimate, seconds = evidence_in_parts(folder, model, guide, test, **options)
    yield {
        "log_p": estimate.mean,
        "monte_carlo_error": error_of_mean(estimate.monte_carlo_errors),
        "test_elbo": estimate.elbo,
        "unreliable_share": estimate.unreliable_share,
        "particles": args.particles,
        "test_images": len(test),
        "seconds_of_log_p": seconds,
    }
    report = pv.evaluation.collapse_report(model, guide, torch.bernoulli(data.train), seed=0)
    result = {"active_units": report.num_active, "train_rate": report.rate}
    if report.surgery is not None:
        result["marginal_kl"] = report.surgery.marginal_kl
        result["mutual_information"] = report.surgery.mutual_information
        result["mutual_information_error"] = report.surgery.standard_errors["mutual_information"]
        result["mutual_information_saturated"] = report.surgery.saturated
        result["scored_images"] = report.surgery.num_scored or len(data.train)
    yield result
    if args.ais:
        few = test[: args.ais]
        options = {"images_at_a_time": 100, "method": AIS}
        annealed, _ = evidence_in_parts(folder, model, guide, few, **options)
        errors = annealed.monte_carlo_errors.hypot(estimate.monte_carlo_errors[: len(few)])
        yield {
            "ais_images": len(few),
            "ais_minus_importance": (annealed.values - estimate.values[: len(few)]).mean().item(),
            "ais_minus_importance_error": error_of_mean(errors),
            "ais_chains": AIS.num_chains,
            "ais_temperatures": AIS.num_temperatures,
        }


def error_of_mean(errors):
    """Return the standard error of the mean of estimates that are independent given the data."""
    return errors.square().sum().sqrt().item() / len(errors)


def gaps(fit, data, args, folder):
    """Yield what table D shows of a fit, in nats, for the first images."""
    pair, few = (fit.model, fit.guide), data.test[: args.ais or 100]
    annealed, seconds = None, 0.0
    if args.ais:
        options = {"images_at_a_time": 100, "method": AIS}
        annealed, seconds = evidence_in_parts(folder, *pair, few, **options)
    start = time.perf_counter()
    found = pv.inference_gaps(
        *pair,
        few,
        num_particles=args.particles,
        ascent=ASCENT,
        evidence=annealed,
        seed=0,
        progress=True,
    )
    result = {"particles": args.particles, "test_images": len(few)}
    for name, estimate in (
        ("log_p", found.log_evidence),
        ("approximation_gap", found.approximation_gap),
        ("amortization_gap", found.amortization_gap),
    ):
        result |= {name: estimate.mean, f"{name}_error": estimate.standard_error}
    yield result | {"seconds_of_log_p": seconds + time.perf_counter() - start}
    yield gaps_of_training_images(fit, data, args)


def gaps_of_training_images(fit, data, args):
    """Return the mean gaps of the first 100 training images, which the encoder was trained on."""
    found = pv.inference_gaps(
        fit.model,
        fit.guide,
        data.train[:100],
        num_particles=args.particles,
        ascent=ASCENT,
        seed=0,
        progress=True,
    )
    result = {}
    for name in ("approximation_gap", "amortization_gap"):
        estimate = getattr(found, name)
        result |= {f"train_{name}": estimate.mean, f"train_{name}_error": estimate.standard_error}
    return result


def cost(fit):
    """Return the time, the memory and the versions of a run."""
    validated = "validation_loss" in fit.history and fit.history["validation_loss"].notna().all()
    return {
        "epochs": len(fit.history),
        "best_epoch": int(fit.history["validation_loss"].idxmin()) if validated else None,
        "stop_reason": fit.stop_reason,
        "execution": fit.execution,
        "seconds_per_epoch": float(fit.history["seconds"].median()),
        "threads": torch.get_num_threads(),
        "device": str(next(fit.guide.parameters()).device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "pyro_vae")},
    }


def peak_memory():
    """Return the largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def file_name(args, data_name, epochs):
    """Return the name of the result of a run. A part of a row never replaces the whole."""
    words = [args.table, args.row, data_name, args.seed]
    if args.epochs is not None:
        words += [epochs, "epochs"]  # more than asked for, if a checkpoint had more
    if args.images is not None:
        words += [args.images, "images"]
    if args.particles != PARTICLES:
        words += [args.particles, "particles"]
    return "-".join(map(str, words)) + ".json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=sorted({table for table, _ in ROWS}))
    parser.add_argument("row", choices=[row for _, row in ROWS])
    parser.add_argument(
        "--data", default="mnist", help="a data set of pv.datasets.load, or a folder of IDX files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="at most; the default is the protocol's")
    parser.add_argument("--particles", type=int, default=PARTICLES)
    parser.add_argument("--images", type=int, help="test images of log p(x); the default is all")
    parser.add_argument("--ais", type=int, default=500, help="images for the check by AIS; or 0")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if (args.table, args.row) not in ROWS:
        parser.error(f"table {args.table} has the rows {[r for t, r in ROWS if t == args.table]}")
    row = ROWS[args.table, args.row]
    is_folder = args.data not in pv.datasets.names() and Path(args.data).is_dir()
    read = pv.datasets.from_idx if is_folder else pv.datasets.load
    data = read(args.data, binarize=row.binarize)
    name = f"{args.table}-{args.row}-{data.name}-{args.seed}"
    folder = args.folder / name
    fit = train(row, data, args, folder)
    print(fit)
    result = {"table": args.table, "row": args.row, "data": data.name, "seed": args.seed}
    result |= {"epochs_of_protocol": args.epochs is None} | cost(fit)
    args.results.mkdir(parents=True, exist_ok=True)
    measure = gaps if row.measures_gaps else evaluate
    for found in measure(fit, data, args, folder):
        result |= found | {"peak_memory_mb": peak_memory()}
        finite = {key: None if value != value else value for key, value in result.items()}
        path = args.results / file_name(args, data.name, result["epochs"])
        path.write_text(json.dumps(finite, indent=2) + "\n")  # JSON has no NaN
    for name in {"log_p": None} | row.published:
        value, deviation = row.published.get(name, ("nothing", None))
        over_runs = "" if deviation is None else f" ± {deviation}"
        shown = name.replace("_", " ").replace("log p", "log p(x)")
        print(f"{shown}: {result[name]:.2f} here, {value}{over_runs} published for MNIST")


if __name__ == "__main__":
    main()

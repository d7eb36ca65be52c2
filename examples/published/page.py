"""Write docs/published.md from the results of run.py.

python examples/published/page.py
"""

import argparse
import functools
import json
from pathlib import Path
from statistics import mean, stdev

from run import DESCRIPTIONS, RESULTS, ROWS

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
TEST_IMAGES = 10_000

START = """# Published numbers

Each row is one command, which trains a model by the protocol of a paper and estimates log p(x) of
the test data:

```bash
python examples/published/run.py A vae
```

A run writes checkpoints, and the same command resumes it. `--data fashion-mnist` applies the
protocol to other data, and `--seed 1` starts another run. `examples/published/protocols.py` has
the protocols, `pairs.py` the models and guides. `python examples/published/page.py` makes this
page from the results.

log p(x) is in nats per image, for all 10,000 test images of MNIST, by importance sampling with
5000 samples. The test images are binarized once, with the random seed of the code of Norouzi et
al. (2020). The combined error has the Monte Carlo error and the published standard deviation over
runs. A single run has no standard deviation of its own, so the published one stands in for it.

Annealed importance sampling (AIS: 16 chains, 500 temperatures) on the first 500 test images shows
by how much importance sampling is too low. The papers use importance sampling too, so their numbers
are comparable. A row that names its number of epochs ended before its protocol did. It is not
compared, and neither is a row that names its number of test images.

Frey faces and M2 with 100 labels are in [models](models.md).
"""

COLUMNS = [
    "row",
    "here",
    "published",
    "difference",
    "in combined errors",
    "test ELBO",
    "AIS minus importance sampling",
    "active units",
]

TEXTS = {
    "A": """\
The row exemplar encodes the ten nearest of 25,000 exemplars for each image of a minibatch, by the
retrieval of the paper. The published run encoded all 25,000. In evaluation, the prior has 50,000
components, so log p(x) of all test images takes hours on a CPU.

""",
    "B": """\
The schedule has 3280 epochs. A row with 4 epochs is only its start: two of eight stages, with a
learning rate of at least 0.0007.

""",
    "C": """\
The protocol of table B. All rows of 4 epochs are comparable with each other.

""",
    "D": """\
The first 500 test images. Adam finds the best posterior of the family for each image. log p(x) is
by importance sampling from the better of both posteriors, or by AIS where it is clearly higher. The
published numbers are for another binarization of the images, with 10,000 temperatures and HMC. The
last column has the first 100 training images. The images are binarized once, so the encoder can fit
them better than test images.

""",
    "E": """\
The KL is that of the ELBO on the training data. It is the sum of the mutual information and the
marginal KL. The mutual information of N images is at most log N, which is 10.82 for 50,000. The
networks and the optimizer of the paper are not known, so only the pattern is comparable.

""",
}

# The numbers of tables that do not compare log p(x) alone.
NUMBERS = {
    "D": {
        "log_p": "log p(x)",
        "approximation_gap": "approximation gap",
        "amortization_gap": "amortization gap",
        "train_amortization_gap": "amortization gap of training images",
    },
    "E": {
        "train_rate": "KL",
        "mutual_information": "mutual information",
        "marginal_kl": "marginal KL",
    },
}

PARTS = """
Rows that were run in part, with all their numbers of epochs and test images:

"""

CONTROL = """
The row exemplar ended early. The row vampprior is a control, of one run, for what that costs. On
the same {images} images after the same number of epochs, exemplar is {above:.2f} nats above
vampprior; the published difference is {published:.2f} ± {error:.2f}. From there to the end of its
protocol, vampprior gains {gain:.2f} nats. The gain of exemplar was not measured. The first
{images} test images have a higher log p(x) than all test images, by {easier:.2f} nats for
vampprior. So their mean is comparable with that of the same images only.
"""

COSTS = """
## Time and memory

The seconds are medians over epochs on one core of an AMD EPYC (Zen 5), beside other work, and the
hours are the median times the epochs, because some runs were paused. The best epoch has the lowest
validation loss, and its parameters are evaluated. The peak memory has training and evaluation. That
of A vae has no surgery, and that of E was measured again after the runs, for log p(x) of 1000
images and the surgery. The row D flow shared its core with three other programs; alone, an epoch
takes 4 seconds. The row exemplar ran on two cores of an Intel Xeon, and rows with 4 epochs on two
cores of an AMD EPYC (Zen 4).

"""

COST_COLUMNS = [
    "table",
    "row",
    "runs",
    "epochs",
    "best epoch",
    "seconds per epoch",
    "hours of training",
    "minutes of log p(x)",
    "peak memory, MB",
]


def results_of(table, row):
    """Return the results of a row on MNIST, for each seed and each part of the row that was run."""
    paths = sorted(RESULTS.glob(f"{table}-{row}-mnist-*.json"))
    return sorted((json.loads(path.read_text()) for path in paths), key=part_of)


def part_of(result):
    """Return which part of a row a result has. The whole is larger than all parts."""
    whole = result["epochs_of_protocol"]
    epochs = 0 if whole else result["epochs"]
    return whole, epochs, result["test_images"], result["particles"]


def largest_part(results):
    """Return the results of the largest part, one for each seed."""
    return [each for each in results if part_of(each) == part_of(results[-1])]


def head(columns):
    """Return the first two lines of a table."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def columns_of(names, published):
    """Return the columns of a table of several numbers, of which some are published."""
    columns = ["row"]
    for name, shown in names.items():
        columns += [f"{shown}, here", f"{shown}, published"] if name in published else [shown]
    return columns


def numbers_line(names, row, published, results):
    """Return the line of a row in a table of several numbers, of the first seed."""
    runs = name_of(row, results) if results else f"{row}, not run"
    cells = [runs]
    for name in names:
        ours, error = "", ""
        if results and name in results[0]:
            ours = f"{results[0][name]:.2f}"
            error = f" ± {results[0][f'{name}_error']:.2f}" if f"{name}_error" in results[0] else ""
        cells += [ours + error, *([f"{published[name][0]:.2f}"] if name in published else [])]
    return f"| {' | '.join(cells)} |\n"


def name_of(row, results):
    """Return the name of a row, its number of runs, and its epochs if it ended early."""
    count = len(results)
    name = f"{row}, one run" if count == 1 else f"{row}, {count} runs"
    return name if results[0]["epochs_of_protocol"] else f"{name}, {results[0]['epochs']} epochs"


def line(row, published, results):
    """Return the line of a row in a table of log p(x)."""
    value, deviation = published["log_p"]
    theirs = f"{value:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
    if not results:
        return f"| {row} | not run | {theirs} | | | | | |\n"
    images, count = results[0]["test_images"], len(results)
    whole = results[0]["epochs_of_protocol"] and images == TEST_IMAGES
    ours = mean(result["log_p"] for result in results)
    spread = f" ± {stdev(result['log_p'] for result in results):.2f}" if count > 1 else ""
    difference = f"{ours - value:+.2f}" if whole else ""
    in_errors = ""
    if whole and deviation is not None:
        variance = mean(result["monte_carlo_error"] ** 2 for result in results) + deviation**2
        in_errors = f"{(ours - value) / (variance / count) ** 0.5:+.1f}"
    elbo = mean(result["test_elbo"] for result in results)
    checks = [
        f"{result['ais_minus_importance']:+.2f} ± {result['ais_minus_importance_error']:.2f}"
        for result in results
        if "ais_images" in result
    ]
    units = ", ".join(str(result.get("active_units", "")) for result in results)
    name = name_of(row, results)
    cells = [
        name if images == TEST_IMAGES else f"{name}, {images} test images",
        f"{ours:.2f}{spread}",
        theirs,
        difference,
        in_errors,
        f"{elbo:.2f}",
    ]
    return f"| {' | '.join([*cells, ', '.join(checks), units])} |\n"


def parts_table(results):
    """Return a table of all results of the rows that were run in part, if a row has several."""
    parts = {row: {part_of(each) for each in found} for row, found in results.items()}
    if all(len(each) < 2 for each in parts.values()):
        return ""
    lines = "".join(
        f"| {row} | {each['epochs']} | {each['test_images']} | {each['log_p']:.2f} | "
        f"{each['test_elbo']:.2f} |\n"
        for row, found in results.items()
        for each in found
        if any(part[:3] != (True, 0, TEST_IMAGES) for part in parts[row])
    )
    return PARTS + head(["row", "epochs", "test images", "log p(x)", "test ELBO"]) + lines


def control(exemplar, vampprior):
    """Return what the row vampprior gains after the epoch at which the row exemplar ended early."""
    parts = {part_of(each): each["log_p"] for each in vampprior}
    early = exemplar[-1] if exemplar else None
    if early is None or early["epochs_of_protocol"] or part_of(early) not in parts:
        return ""
    whole, epochs, images, particles = part_of(early)
    of_all = parts[whole, epochs, TEST_IMAGES, particles]
    (ours, our_error), (theirs, their_error) = (
        ROWS["A", row].published["log_p"] for row in ("exemplar", "vampprior")
    )
    return CONTROL.format(
        images=images,
        above=early["log_p"] - parts[part_of(early)],
        published=ours - theirs,
        error=(our_error**2 + their_error**2) ** 0.5,
        gain=parts[True, 0, TEST_IMAGES, particles] - of_all,
        easier=parts[part_of(early)] - of_all,
    )


def cost_line(table, row, results):
    """Return the line of a row in the table of time and memory."""
    cells = [
        table,
        row,
        str(len(results)),
        ", ".join(str(result["epochs"]) for result in results),
        ", ".join(str(result["best_epoch"] or "last") for result in results),
        f"{mean(result['seconds_per_epoch'] for result in results):.1f}",
        f"{mean(r['epochs'] * r['seconds_per_epoch'] for r in results) / 3600:.1f}",
        f"{mean(result['seconds_of_log_p'] for result in results) / 60:.0f}",
        f"{max(result['peak_memory_mb'] for result in results):.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def page():
    """Return the text of the page."""
    text, costs = START, ""
    for table, description in DESCRIPTIONS.items():
        text += f"\n## Table {table}: {description}\n\n"
        rows = {row: each for (of_table, row), each in ROWS.items() if of_table == table}
        found = {row: results_of(table, row) for row in rows}
        results = {row: largest_part(each) for row, each in found.items()}
        of_row, columns = line, COLUMNS
        if table in NUMBERS:
            of_row = functools.partial(numbers_line, NUMBERS[table])
            columns = columns_of(NUMBERS[table], next(iter(rows.values())).published)
        text += TEXTS.get(table, "") + head(columns)
        text += "".join(of_row(row, rows[row].published, results[row]) for row in rows)
        text += parts_table(found)
        text += control(found["exemplar"], found["vampprior"]) if table == "A" else ""
        costs += "".join(cost_line(table, row, results[row]) for row in rows if results[row])
    return text + (COSTS + head(COST_COLUMNS) + costs if costs else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    out = parser.parse_args().out
    out.write_text(page())
    print(f"{out}: log p(x) of {len(list(RESULTS.glob('*.json')))} runs")


if __name__ == "__main__":
    main()

"""Check the errors of comparisons on equal methods and on a planted difference.

python examples/benchmarks/coverage.py                            # about fifteen minutes
python examples/benchmarks/coverage.py --repeats 20

Each repeat samples new training and test data from a linear-Gaussian model, and fits VAEs of the
same form for a few steps, with new seeds. Three arms are the same method, the ELBO. Arms a and b
have the same seeds, so their runs are paired: they share initial weights and the order of the
data. The noise of b is the mirror image of the noise of a, which has the same distribution. Arm c
has other seeds. Log p(x) of the test data is in closed form. Ctrl-C ends the repeats.

Columns of the table:

- deviation: the standard deviation of the difference of two arms over the repeats;
- error: the root mean square of the standard error that ``Comparison.difference`` returns;
- freedom: the median of its degrees of freedom;
- cover: the share of its 95% intervals that cover zero;
- found: the share of planted differences that are significant at 95%. For them, log p(x) of one
  arm is lowered by three times the deviation;
- t test: the same share for an exact t test with the median degrees of freedom.

The last lines are for all three arms. They have the share of arms that ``Comparison.best`` holds,
if all arms are equal and if one of them is lowered.
"""

import argparse
import contextlib
import itertools
from statistics import mean, median

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.evaluation import Evidence
from pyro_vae.report import Comparison, Entry, Run

DATA, LATENTS, NOISE = 4, 2, 0.7
BATCH_SIZE = 20
PAIRS = {"paired": [("a", "b")], "unpaired": [("a", "c"), ("b", "c")]}


class MirroredNormal(dist.Normal):
    """A Gaussian whose samples use minus the usual noise."""

    def rsample(self, sample_shape=()):
        """Return a reparameterized sample."""
        return 2 * self.loc - super().rsample(sample_shape)


ARMS = {"a": (0, dist.Normal), "b": (0, MirroredNormal), "c": (1, dist.Normal)}


class Model(PyroModule):
    """z ~ N(0, I), x ~ N(W z + b, 0.49 I)."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(LATENTS, DATA)

    def forward(self, x):
        """Run the program."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x)

    def log_evidence(self, x):
        """Return log p(x) of each data point."""
        weight, mean = self.decoder.weight.double(), self.decoder.bias.double()
        covariance = weight @ weight.T + NOISE**2 * torch.eye(DATA, dtype=torch.float64)
        return dist.MultivariateNormal(mean, covariance).log_prob(x.double())


class Guide(PyroModule):
    """q(z|x) = N(V x + c, s^2), with the usual or the mirrored noise."""

    def __init__(self, normal):
        super().__init__()
        self.encoder, self.normal = nn.Linear(DATA, LATENTS), normal
        self.raw = nn.Parameter(torch.zeros(LATENTS))

    def forward(self, x):
        """Run the program."""
        with pyro.plate("data", len(x)):
            q = self.normal(self.encoder(x), nn.functional.softplus(self.raw))
            pyro.sample("z", q.to_event(1))


def fitted(seed, normal, x, steps):
    """Make and fit a pair with the random numbers of one seed."""
    torch.manual_seed(seed)
    return pv.fit(
        Model(),
        Guide(normal),
        x,
        epochs=steps * BATCH_SIZE // len(x),
        batch_size=BATCH_SIZE,
        learning_rate=0.05,
        capture=False,
        seed=seed,
        progress=False,
    )


def repeat(number, num_seeds, num_train=60, num_test=200, steps=40):
    """Return each arm's fits on new data, with their log p(x) of the test data, and these data."""
    torch.manual_seed(number)
    true = Model()
    with torch.no_grad():
        true.decoder.weight.normal_()
        z = torch.randn(num_train + num_test, LATENTS)
        x = true.decoder(z) + NOISE * torch.randn(num_train + num_test, DATA)
    train, test = x.split([num_train, num_test])
    found = {}
    for name, (block, normal) in ARMS.items():
        first = (2 * number + block) * num_seeds
        fits = [fitted(first + s, normal, train, steps) for s in range(num_seeds)]
        with torch.no_grad():
            found[name] = [(fit, fit.model.log_evidence(test)) for fit in fits]
    return found, test


def comparison_of(arms, num_seeds, num_test, lowered=None, by=0.0):
    """Compare the first runs of each arm on the first data. Log p(x) of one arm may be lowered."""
    entries = []
    for name, runs in arms.items():
        found = []
        for fit, values in runs[:num_seeds]:
            values = values[:num_test] - (by if name == lowered else 0.0)
            exact = torch.zeros_like(values)
            evidence = Evidence(values, exact, exact, 1, DATA, exact + 1, values)
            found.append(Run(evidence, None, "", None, fit))
        entries.append(Entry(name, tuple(found), 0, None))
    entries.sort(key=lambda entry: -entry.mean.mean)
    return Comparison(tuple(entries), 0)


def summarize(repeats, *sizes):
    """Print the rows of the table for a number of runs and of test data. Return a sentence."""
    compared = [comparison_of(arms, *sizes) for arms in repeats]
    for kind, pairs in PAIRS.items():
        found = [c.difference(*pair) for c in compared for pair in pairs]
        deviation = mean(each.mean**2 for each in found) ** 0.5
        error = mean(each.standard_error**2 for each in found) ** 0.5
        freedom = median(each.degrees_of_freedom for each in found)
        cover = mean(each.interval[0] <= 0 <= each.interval[1] for each in found)
        significant = mean(
            comparison_of(arms, *sizes, one, 3 * deviation).difference(one, other).p_value < 0.05
            for arms in repeats
            for one, other in pairs
        )
        power = 1 - stats.nct.cdf(stats.t.ppf(0.975, freedom), freedom, 3)
        print(
            f"| {sizes[0]} | {sizes[1]} | {kind} | {deviation:.4f} | {error:.4f} | {freedom:.1f} "
            f"| {cover:.1%} | {significant:.1%} | {power:.1%} |"
        )
    held = mean(name in c.best for c in compared for name in ARMS)
    all_held = mean(len(c.best) == len(ARMS) for c in compared)
    lowered = [comparison_of(arms, *sizes, "a", 3 * deviation) for arms in repeats]
    best_held = mean(name in c.best for c in lowered for name in ("b", "c"))
    return (
        f"{sizes[0]} runs, {sizes[1]} test data: the set of the best holds {held:.1%} of three "
        f"equal arms (all three in {all_held:.1%}), and {best_held:.1%} of the two best arms if "
        "one is lowered"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--test", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = []
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(arguments.repeats):
            sizes = {"num_test": max(arguments.test), "steps": arguments.steps}
            repeats.append(repeat(number, max(arguments.seeds), **sizes)[0])
    print(f"{len(repeats)} repeats\n")
    print("| runs | test data | arms | deviation | error | freedom | cover | found | t test |")
    print("|---|---|---|---|---|---|---|---|---|")
    sets = [
        summarize(repeats, *each) for each in itertools.product(arguments.seeds, arguments.test)
    ]
    print("\n" + "\n".join(sets))


if __name__ == "__main__":
    main()

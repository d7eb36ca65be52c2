"""Tables, sparse matrices and labels give the results of the same dense tensor."""

import inspect
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from conftest import Rows, Stream, make_pair
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_vae as pv
from pyro_vae import objectives as o
from pyro_vae._programs.validation import check_pair
from pyro_vae.datasets import UnusedColumnsWarning
from pyro_vae.datasets._columns import as_column
from pyro_vae.datasets._minibatches import Minibatches, default_batch_size
from pyro_vae.datasets._sparse_rows import SparseRows


@pytest.fixture
def counts():
    """Random counts with empty rows and columns."""
    x = torch.poisson(torch.full((30, 16), 0.3))
    x[3], x[:, 5], x[-1] = 0, 0, 0
    return x


def poisson_pair():
    torch.manual_seed(0)
    decoder = pv.nets.MLP(2, [8], 16)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Poisson(decoder))
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))


def unordered(x):
    """Return a CSR matrix with unordered and repeated indices."""
    halves = sp.coo_array(np.concatenate([x, x]) / 2)
    rows = halves.row % len(x)
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(len(x) + 1))
    return sp.csr_array((halves.data[order], halves.col[order][:], starts), shape=x.shape)


SPARSE = {
    "scipy CSR matrix": lambda x: sp.csr_matrix(x.numpy()),
    "scipy CSC array of float64": lambda x: sp.csc_array(x.numpy().astype("float64")),
    "scipy COO array of int64": lambda x: sp.coo_array(x.numpy().astype("int64")),
    "scipy CSR of uint16": lambda x: sp.csr_array(x.numpy().astype("uint16")),
    "scipy CSR of int64 indices": lambda x: _with_int64(sp.csr_array(x.numpy())),
    "repeated indices": lambda x: unordered(x.numpy()),
    "torch CSR": lambda x: x.to_sparse_csr(),
    "torch CSC": lambda x: x.to_sparse_csc(),
    "torch COO": lambda x: x.to_sparse(),
}
FRAMES = {
    "DataFrame": lambda x: pd.DataFrame(x.numpy()),
    "DataFrame of many dtypes": lambda x: pd.DataFrame(x.numpy()).astype(
        {0: "int64", 1: "float64", 2: "uint8", 3: "Int64", 4: "Float32"}
    ),
}


def _with_int64(matrix):
    matrix.indices, matrix.indptr = (a.astype("int64") for a in (matrix.indices, matrix.indptr))
    return matrix


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_rows_are_the_rows_of_the_dense_matrix(kind, counts):
    rows = as_column(SPARSE[kind](counts), "data")
    assert isinstance(rows, SparseRows)
    assert rows.shape == counts.shape
    assert len(rows) == 30
    for index in (
        torch.tensor([3, 29, 0, 0]),
        slice(2, 9),
        [4],
        torch.tensor([], dtype=torch.long),
    ):
        assert torch.equal(rows[index], counts[index])
    assert torch.equal(rows[:], counts)
    assert torch.equal(rows[7], counts[7])
    assert rows[:].dtype == torch.float32


@pytest.mark.parametrize("kind", [*SPARSE, *FRAMES])
def test_all_kinds_give_the_results_of_a_dense_tensor(kind, counts):
    value = (SPARSE | FRAMES)[kind](counts)
    losses, digests, values = [], [], []
    for data in (counts, value):
        pair = poisson_pair()
        options = {"epochs": 2, "batch_size": 8, "seed": 0, "progress": False, "capture": False}
        fit = pv.fit(*pair, data, validation=data, **options)
        losses.append(fit.history[["loss", "validation_loss"]].to_numpy())
        digests.append(Minibatches(data, 8).digest())
        values.append(pv.evidence(*pair, data, num_particles=3, seed=0).values)
    assert np.array_equal(*losses)
    assert digests[0] == digests[1]
    assert torch.equal(*values)


FEW = pv.evaluation.Ascent(window=2, max_steps=2, patience=1, num_particles=2)
ANNEALED = pv.evaluation.AIS(num_chains=2, num_temperatures=3, leapfrog_steps=1, pilot=2)
CALLS = {
    "surgery": lambda pair, x: pv.elbo_surgery(*pair, x, seed=0).marginal_kl,
    "subsets": lambda pair, x: (
        pv.elbo_surgery(*pair, x, estimator="stratified", batch_size=10, seed=0).mutual_information
    ),
    "collapse": lambda pair, x: pv.collapse_report(*pair, x, num_particles=5, seed=0).rate,
    "noise": lambda pair, x: pv.gradient_noise(
        *pair, x, [o.ELBO()], repeats=2, seed=0
    ).table.signal_to_noise.iloc[0],
    "arviz": lambda pair, x: float(
        pv.to_arviz(*pair, x, num_draws=2, seed=0)["sample_stats"]["log_weight"].sum()
    ),
    "sandwich": lambda pair, x: pv.sandwich(*pair, like=x, ais=ANNEALED, seed=0).lower.sum().item(),
    "curve": lambda pair, x: pv.rate_distortion(
        *pair, x, [0.5, 1.0], test=x, epochs=1, seed=0
    ).table.elbo.sum(),
    "holes": lambda pair, x: pv.prior_holes(*pair, x, num_samples=50, quantile=0.1, seed=0).share,
    "gaps": lambda pair, x: (
        pv.inference_gaps(*pair, x, num_particles=2, ascent=FEW, seed=0).best_elbo.mean
    ),
    "compare": lambda pair, x: (
        pv.compare({"a": pair}, x, train=x, num_particles=2, seed=0).entries[0].mean.mean
    ),
    "diagnose": lambda pair, x: (
        pv.diagnose(
            *pair,
            x,
            x,
            num_data=5,
            num_particles=2,
            ascent=FEW,
            refit=False,
            annealing=None,
            seed=0,
        )["log p(x), test"].value
    ),
}
LONG = {"curve", "holes", "gaps", "compare", "diagnose", "sandwich"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CALLS]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.filterwarnings("ignore")  # few particles
def test_estimates_of_sparse_data_are_those_of_a_dense_tensor(name, counts):
    pair = poisson_pair()
    assert CALLS[name](pair, sp.csr_array(counts.numpy())) == CALLS[name](pair, counts)


def test_captured_steps_of_sparse_data_equal_those_of_a_tensor(counts, without_compiler):
    losses = []
    for data in (counts, sp.csr_array(counts.numpy())):
        options = {"epochs": 5, "batch_size": 10, "capture": True, "seed": 0, "progress": False}
        fit = pv.fit(*poisson_pair(), data, **options)
        assert fit.execution == "captured, not compiled"
        losses.append(fit.history.loss.to_numpy())
    assert np.allclose(*losses, rtol=1e-6)


def test_sparse_data_with_covariates_and_a_fit_that_resumes(counts, tmp_path):
    def make():
        torch.manual_seed(0)
        likelihood = pv.likelihoods.Poisson(pv.nets.Joined(pv.nets.MLP(4, [8], 16)))
        model = pv.models.ConditionalModel(pv.priors.StandardNormal(2), likelihood)
        return model, pv.guides.AmortizedNormal(model, pv.nets.Joined(pv.nets.MLP(18, [8])))

    y = torch.eye(2)[torch.arange(30) % 2]
    options = {"batch_size": 8, "seed": 0, "progress": False, "capture": False}
    whole = pv.fit(*make(), (counts, y), epochs=3, **options)
    sparse = sp.csr_array(counts.numpy())
    folder = tmp_path / "run"
    pv.fit(*make(), (sparse, y), epochs=2, checkpoint=folder, **options)
    again = pv.training.Checkpoint(folder, resume=True)
    resumed = pv.fit(*make(), (sparse, y), epochs=3, checkpoint=again, **options)
    assert resumed.history.loss.tolist() == whole.history.loss.tolist()


def test_values_of_sparse_data_are_checked_without_dense_rows(counts, monkeypatch):
    """The first minibatch is dense, and later rows only to name a bad one."""
    read = []
    original = SparseRows.__getitem__

    def note(self, rows):
        found = original(self, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(SparseRows, "__getitem__", note)
    pair = poisson_pair()
    batches = Minibatches(sp.csr_array(counts.numpy()), 8)
    check_pair(*pair, batches.first(), batches)
    assert batches.values_checked
    assert sum(read) == 8
    bad = counts.clone()
    bad[20, 3] = -1.0
    with pytest.raises(ValueError, match=r"support of site 'x'.* first in row 20. Row 20"):
        pv.evidence(*pair, sp.csr_array(bad.numpy()), num_particles=2)
    bad[20, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite values, first in row 20"):
        pv.fit(*pair, sp.csr_array(bad.numpy()), progress=False)


def test_bounds_of_the_program_are_checked_on_sparse_data(counts):
    """The support depends on the data, so the pair runs on copies of extreme rows."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            low = torch.full((16,), -1.0)
            pyro.sample("x", dist.Uniform(low + 0 * z[..., None], 20.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    bad = counts.clone()
    bad[25, 3] = 21.0
    for data in (bad, sp.csr_array(bad.numpy())):
        with pytest.raises(ValueError, match=r"whose bounds the program computes, first in row 25"):
            pv.evidence(model, guide, data, num_particles=2, batch_size=8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (sp.csr_array((0, 4)), r"data is empty: .* got \(0, 4\)"),
        (torch.tensor(1.0), r"data is one number: expected shape \(N, \*event\) .* got \(\)"),
        (sp.csr_array(np.ones((5, 4), "complex64")), "data must hold numbers, got dtype complex64"),
        (torch.ones(5, 4).to(torch.complex64).to_sparse(), "data must hold real numbers"),
        (torch.ones(5, 2, 2).to_sparse(), r"data must be a matrix \(N, D\) if it is sparse"),
        (
            pd.DataFrame({"age": [1.0, 2.0], "city": ["Bonn", "Ulm"]}),
            "data must hold real numbers, but its column 'city' has dtype .*get_dummies",
        ),
        (pd.DataFrame({"a": [1j, 2]}), "its column 'a' has dtype complex128"),
        (pd.DataFrame({"a": pd.Categorical(["u", "v"])}), "its column 'a' has dtype category"),
        (pd.DataFrame(index=range(3)), r"data is empty: .* got \(3, 0\)"),
        (pd.Series(["a", "b"]), "data must hold numbers"),
        ([np.ones(4), np.ones(4)], r"got a list of ndarray. .*numpy.stack\(rows\) .*arrays"),
        ([[1.0, 2.0]], r"got a list of list. Pass torch.tensor\(rows\) for rows of numbers"),
        ({"x": torch.ones(3, 4)}, r"got dict: pass a tuple \(x, \*covariates\)"),
    ],
)
def test_other_values_are_refused_with_a_remedy(value, message):
    with pytest.raises(ValueError, match=message):
        pv.fit(*make_pair(), value, progress=False)


def test_missing_values_of_a_table_are_nan():
    frame = pd.DataFrame({"a": pd.array([1, None], "Int64"), "b": [True, False]})
    column = as_column(frame, "data")
    assert torch.equal(column.nan_to_num(7.0), torch.tensor([[1.0, 1.0], [7.0, 0.0]]))
    assert column.dtype == torch.float32
    assert as_column(pd.Series([1, 2]), "data").dtype == torch.int64


class Pairs(Dataset):
    """Rows with a label that is a string."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], "a label"


LABELED = {
    "tuple": lambda x: (x, torch.arange(len(x))),
    "TensorDataset": lambda x: TensorDataset(x, torch.arange(len(x))),
    "Dataset": Pairs,
    "DataLoader": lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=20),
    "strings": lambda x: (x, ["a label"] * len(x)),
    "sparse": lambda x: (sp.csr_array(x.numpy()), torch.arange(len(x))),
}


def warned(call):
    """Return the result of a call, and its warnings of unused columns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    found = [each for each in caught if issubclass(each.category, UnusedColumnsWarning)]
    assert all(each.filename == __file__ for each in found)
    return result, found


@pytest.mark.parametrize("kind", LABELED)
def test_labels_that_the_programs_do_not_take_are_left_out_with_one_warning(kind, binary):
    data, alone = LABELED[kind](binary), binary
    options = {"epochs": 1, "batch_size": 20, "seed": 0, "progress": False, "capture": False}
    if kind in ("Dataset", "DataLoader"):
        alone = Rows(binary) if kind == "Dataset" else DataLoader(TensorDataset(binary), 20)
    results = []
    for each in (alone, data):
        torch.manual_seed(0)
        pair = make_pair()
        fit, of_fit = warned(lambda pair=pair, x=each: pv.fit(*pair, x, validation=x, **options))
        estimate, of_evidence = warned(
            lambda pair=pair, x=each: pv.evidence(*pair, x, num_particles=2, seed=0)
        )
        results.append([fit.history.loss.item(), *estimate.values.tolist()])
        assert len(of_fit) == len(of_evidence) == (each is data)
    assert results[0] == results[1]
    assert "the data have 2 columns, but model and guide take x alone" in str(of_fit[0].message)
    assert "\n" not in str(of_fit[0].message)


@pytest.mark.parametrize("name", EACH)
def test_every_function_leaves_labels_out_with_one_warning(name, binary):
    pair, data = make_pair(), (binary[:10], torch.arange(10))
    assert len(warned(lambda: CALLS[name](pair, data))[1]) == 1


OF_TENSORS = {
    "encode": lambda pair, *x: pv.encode(*pair, *x).mean,
    "reconstruct": lambda pair, *x: pv.reconstruct(*pair, *x, seed=0),
    "interpolate": lambda pair, *x: pv.interpolate(*pair, x[0], x[0].flip(0), *x[1:]),
    "impute": lambda pair, *x: (
        pv.impute(*pair, *x, observed=torch.eye(10, 16) == 0, num_samples=30, seed=0).mean
    ),
    "generate": lambda pair, *x: pv.generate(pair[0], *x, seed=0),
    "generate a number": lambda pair, *x: pv.generate(pair[0], 10, *x[1:], seed=0),
    "decode": lambda pair, *x: pv.decode(pair[0], torch.ones(10, 2), *x[1:]),
    "prior": lambda pair, *x: (
        pv.evaluation.refit_prior(*pair, x if x[1:] else x[0], components=1, seed=0).prior().loc
    ),
    "traversals": lambda pair, *x: shown(pv.plots.traversals(*pair, *x, image_shape=(4, 4))),
    "manifold": lambda pair, *x: shown(
        pv.plots.manifold(pair[0], *(each[:1] for each in x[1:]), num=2, image_shape=(4, 4))
    ),
    "aggregated": lambda pair, *x: torch.tensor(
        pv.plots.aggregated_posterior(*pair, *x).axes[1].lines[0].get_ydata()
    ),
}


KINDS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "DataFrame": FRAMES["DataFrame"],
    "CSR": SPARSE["scipy CSR matrix"],
    "torch CSR": SPARSE["torch CSR"],
    "tuple of CSR": lambda x: (sp.csr_array(x.numpy()),),
    "TensorDataset": TensorDataset,
    "Dataset": Rows,
    "DataLoader": lambda x: DataLoader(TensorDataset(x), batch_size=7),
    "stream": Stream,
    "labeled tuple": lambda x: (sp.csr_array(x.numpy()), torch.arange(len(x))),
    "labeled TensorDataset": lambda x: TensorDataset(x, torch.arange(len(x))),
}
# Functions of training data. The results of the first three have no random numbers.
OF_DATA = {
    "encode": lambda pair, x: pv.encode(*pair, x, batch_size=7).mean,
    "AggregatedPosterior": lambda pair, x: pv.priors.AggregatedPosterior(pair[1], x)().loc,
    "refit_prior": lambda pair, x: (
        pv.evaluation.refit_prior(*pair, x, kind="aggregated", batch_size=7).prior().loc
    ),
    "aggregated_posterior": lambda pair, x: OF_TENSORS["aggregated"](pair, x),
    "evidence": lambda pair, x: pv.evidence(*pair, x, batch_size=7, num_particles=50).mean,
    "collapse_report": lambda pair, x: pv.collapse_report(*pair, x, batch_size=7).rate,
    "elbo_surgery": lambda pair, x: pv.elbo_surgery(*pair, x, batch_size=7).distortion,
    "fit": lambda pair, x: pv.fit(
        *pair, x, epochs=1, batch_size=7, progress=False, capture=False, learning_rate=1e-9
    ).history.loss.item(),
}
SOME = ["array", "tuple of CSR", "DataLoader", "labeled TensorDataset"]
CASES = [(name, kind) for i, name in enumerate(OF_DATA) for kind in (KINDS if i < 3 else SOME)]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.filterwarnings("ignore")  # few particles
def test_functions_of_training_data_take_all_kinds(name, kind, counts):
    """Random results may be off by 5%, which is above seven standard errors of their difference."""
    data, pair = KINDS[kind](counts), poisson_pair()
    pair[1](counts)
    if (name, kind) == ("refit_prior", "stream"):
        with pytest.raises(ValueError, match="needs data in memory, got a stream"):
            OF_DATA[name](pair, data)
        return
    found, expected = (torch.as_tensor(OF_DATA[name](pair, each)) for each in (data, counts))
    tolerance = 1e-5 if name in [*OF_DATA][:3] else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_table_has_each_function_of_data():
    """Functions are found by their annotations. The others are in the tests of sparse data."""
    found = set()
    for module in (pv, pv.evaluation, pv.plots, pv.priors, pv.report, pv.training):
        for name in module.__all__:
            function = getattr(module, name)
            if callable(function) and not (
                isinstance(function, type) and issubclass(function, BaseException)
            ):
                parameters = inspect.signature(function).parameters.values()
                if any(str(each.annotation).split(" |")[0] == "Data" for each in parameters):
                    found.add(name)
    of_sparse = {
        *{"compare", "diagnose", "fit_seeds", "inference_gaps", "prior_holes"},
        *{"rate_distortion", "sandwich", "to_arviz"},
    }
    assert found == set(OF_DATA) | of_sparse


def shown(figure):
    return torch.tensor(figure.axes[0].images[0].get_array().filled(0.0))


@pytest.mark.parametrize("name", OF_TENSORS)
@pytest.mark.filterwarnings("ignore:the new prior")
def test_labels_after_x_are_left_out_with_one_warning(name, binary):
    pair, x = make_pair(), binary[:10]
    pv.reconstruct(*pair, x)
    alone, none = warned(lambda: OF_TENSORS[name](pair, x))
    labeled, caught = warned(lambda: OF_TENSORS[name](pair, x, torch.arange(10)))
    torch.testing.assert_close(labeled, alone)
    assert (len(none), len(caught)) == (0, 1)


def test_fits_of_several_seeds_leave_labels_out_with_one_warning(binary):
    options = {"seeds": 2, "num_workers": 1, "epochs": 1, "progress": False, "capture": False}
    data = TensorDataset(binary, torch.arange(50))
    assert len(warned(lambda: pv.fit_seeds(make_pair, data, **options))[1]) == 1


@pytest.mark.slow
def test_worker_processes_do_not_repeat_the_warning(binary, capfd):
    def make():
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 16))
        )
        return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [4]))

    options = {"seeds": 2, "num_workers": 2, "epochs": 1, "progress": False, "capture": False}
    data = TensorDataset(binary, torch.arange(50))
    assert len(warned(lambda: pv.fit_seeds(make, data, **options))[1]) == 1
    assert "UnusedColumnsWarning" not in capfd.readouterr().err


def test_columns_that_both_programs_take_are_kept(binary):
    y = torch.arange(50.0)
    seen = []

    def model(x, shift=None):
        seen.append(shift)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x), 16]).to_event(1), obs=x)

    def guide(x, *covariates):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    _, caught = warned(lambda: pv.evidence(model, guide, (binary, y), num_particles=2))
    assert not caught
    assert all(isinstance(shift, torch.Tensor) for shift in seen)
    _, caught = warned(lambda: pv.evidence(model, guide, (binary, y, y), num_particles=2))
    assert "take the first 2" in str(caught[0].message)
    scaled = pyro.poutine.scale(model, scale=1.0)
    bare = pv.unscaled(guide)
    _, caught = warned(lambda: pv.evidence(scaled, bare, (binary, y, y), num_particles=2))
    assert len(caught) == 1

    def conditional(x, y):
        return model(x)

    def alone(x):
        return guide(x)

    with pytest.raises(ValueError, match=r"the guide does not take 2\. Add or remove arguments"):
        pv.evidence(conditional, alone, (binary, y), num_particles=2)


def test_missing_labels_are_missed_in_the_data(binary):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z + 0 * x + y[:, None]).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))

    def lenient(x, y=None):
        guide(x, y)

    message = r"data have 1 column, but the model needs more, and both programs take 2\. Pass all"
    for each in (guide, lenient):
        with pytest.raises(ValueError, match=message):
            pv.evidence(model, each, binary, num_particles=2)
        with pytest.raises(ValueError, match=message):
            pv.fit(model, each, binary, epochs=1, progress=False)


def test_labels_of_an_iterable_dataset_are_left_out(binary):
    data = Stream([(row, i) for i, row in enumerate(binary)])
    fit = {"epochs": 2, "batch_size": 20, "progress": False, "capture": False}
    _, caught = warned(lambda: pv.fit(*make_pair(), data, **fit))
    assert len(caught) == 1


def test_default_batch_size_gives_ten_steps_an_epoch_to_small_data():
    sizes = {None: 100, 1: 100, 100: 100, 101: 10, 150: 15, 999: 99, 1000: 100, 60_000: 100}
    assert {count: default_batch_size(count) for count in sizes} == sizes
    for data in (torch.ones(150, 2), Rows(torch.ones(150, 2)), sp.csr_array(np.ones((150, 2)))):
        assert Minibatches(data, None).batch_size == 15
    assert Minibatches(Stream(torch.ones(150, 2)), None).batch_size == 100


@pytest.mark.parametrize("kind", ["tensor", "sparse", "Dataset"])
def test_rows_in_memory_are_transformed(kind, counts):
    data = {"tensor": counts, "sparse": sp.csr_array(counts.numpy()), "Dataset": Rows(counts)}
    (found,) = Minibatches(data[kind], 4, transform=lambda x: 2 * x).in_memory()
    assert torch.equal(found, 2 * counts)

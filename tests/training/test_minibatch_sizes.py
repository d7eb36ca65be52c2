"""Every minibatch size of a run is tried before its first step."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from conftest import Rows, Stream, make_pair
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import objectives as o
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training import _fit as fitting


def normalized():
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh())


def fit(data, encoder=None, **changes):
    model, _ = make_pair()
    guide = pv.guides.AmortizedNormal(model, encoder or pv.nets.MLP(16, [8]))
    steps = []
    nn.Module.register_forward_pre_hook(
        model.likelihood,
        lambda module, x: steps.append(torch.is_grad_enabled() and module.training),
    )
    options = {"epochs": 1, "batch_size": 20, "seed": 0, "progress": False} | changes
    try:
        return pv.fit(model, guide, data, **options)
    finally:
        fit.steps = sum(steps)


ROWS = torch.bernoulli(torch.full((42, 16), 0.5))
EVEN, ONE_MORE, TWO_MORE = ROWS[:40], ROWS[:41], ROWS
LEFT = (
    r"a minibatch of 2 rows in training mode: .*42 rows of data are split into minibatches of 20, "
)
LEFT += (
    r"the last of 2\. Choose another batch_size: 16 leaves 10 rows "
    r".* a torch DataLoader with drop_last=True"
)


class NeedsThree(nn.Module):
    """An encoder that cannot process two rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        if x.shape[-2] < 3:
            raise ValueError("expected three rows")
        return self.linear(x)


WRAPPERS = [
    lambda x: x,
    lambda x: x.numpy(),
    lambda x: (x,),
    TensorDataset,
    Rows,
    lambda x: DataLoader(TensorDataset(x), batch_size=20, shuffle=True),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_last_minibatch_too_small_for_the_encoder_is_refused(wrap):
    with pytest.raises(ValueError, match=LEFT) as caught:
        fit(wrap(TWO_MORE), NeedsThree())
    assert "expected three rows" in str(caught.value)
    assert "Trace Shapes" not in str(caught.value)
    assert fit.steps == 0
    fit(wrap(TWO_MORE))


def test_last_minibatch_of_a_memory_mapped_file_is_checked(tmp_path):
    np.save(tmp_path / "x.npy", TWO_MORE.numpy())
    with pytest.raises(ValueError, match=LEFT):
        fit(np.load(tmp_path / "x.npy", mmap_mode="r"), NeedsThree())


def sizes_of(data, encoder=None, **changes):
    """Return the sizes of the minibatches of one epoch in training."""
    encoder = encoder or pv.nets.MLP(16, [8])
    sizes = []

    def note(module, x):
        if module.training and torch.is_grad_enabled():
            sizes.append(len(x[0]))

    encoder.register_forward_pre_hook(note)
    fit(data, encoder, **changes)
    return sizes


@pytest.mark.parametrize("wrap", [*WRAPPERS, Stream, sp.csr_array])
def test_last_row_joins_the_minibatch_before_it(wrap):
    """Batch norm in training mode, InfoVAE and BetaTCVAE are undefined for one row."""
    assert sizes_of(wrap(ONE_MORE), normalized()) == [20, 21]
    assert sizes_of(wrap(ROWS[:21]), normalized())[-1] == 21
    for objective in (o.InfoVAE(), o.BetaTCVAE(num_data=41)):
        fit(wrap(ONE_MORE), objective=objective, validation=wrap(ONE_MORE))
        assert fit.steps >= 2


def test_last_row_of_a_memory_mapped_file_joins_the_minibatch_before_it(tmp_path):
    np.save(tmp_path / "x.npy", ONE_MORE.numpy())
    assert sizes_of(np.load(tmp_path / "x.npy", mmap_mode="r"), normalized()) == [20, 21]


def test_joined_rows_are_all_rows_once():
    numbers = torch.arange(41.0)
    for data in (numbers, Rows(numbers), Stream(numbers)):
        generator = torch.Generator().manual_seed(0)
        batches = Minibatches(data, 20, shuffle=True, generator=generator, joins_last=True)
        first, second = ([x for (x,) in batches] for _ in range(2))
        assert [len(x) for x in first] == [20, 21]
        assert torch.cat(first).sort().values.equal(numbers)
        if not isinstance(data, Stream):
            assert not torch.cat(first).equal(torch.cat(second))
        assert [len(s[0]) for s in batches.selections(1)] == [21]
        assert [*batches.selections(2)] == []
    assert batches.first()[0].equal(numbers[:20])
    assert [len(x) for (x,) in Minibatches(numbers[:2], 1, joins_last=True)] == [1, 1]


def test_last_row_of_captured_steps_joins_the_minibatch_before_it(without_compiler):
    model, _ = make_pair()
    encoder = normalized()
    guide = pv.guides.AmortizedNormal(model, encoder)
    options = {"epochs": 6, "batch_size": 20, "capture": True, "progress": False}
    result = pv.fit(model, guide, ONE_MORE, **options)
    assert result.execution == "captured, not compiled"
    assert encoder[1].num_batches_tracked == 12


def test_suggested_remedies_work():
    fit(TWO_MORE, NeedsThree(), batch_size=16)
    fit(DataLoader(TensorDataset(TWO_MORE), batch_size=20, drop_last=True), NeedsThree())
    fit(EVEN, normalized(), validation=TWO_MORE)
    with pytest.raises(ValueError, match=r"in evaluation mode: .* validation"):
        fit(EVEN, NeedsThree(), validation=TWO_MORE)
    with pytest.raises(ValueError, match="Choose a larger batch_size"):
        fit(EVEN, normalized(), batch_size=1)


class NaNForTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        count = torch.tensor(len(x) - 2.0)
        return self.linear(x) * count / count


def test_loss_that_is_nan_for_one_minibatch_size_is_refused():
    with pytest.raises(ValueError, match="of 2 rows in training mode: the loss is nan"):
        fit(TWO_MORE, NaNForTwo())
    result = fit(TWO_MORE, NaNForTwo(), on_nonfinite="skip")
    assert result.history.skipped.tolist() == [1]


class OfTwenty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(16, 8), nn.Parameter(torch.zeros(20, 8))

    def forward(self, x):
        return self.linear(x) + self.shift


@pytest.mark.parametrize("encoder", [NeedsThree, OfTwenty])
def test_too_small_last_minibatch_of_a_stream_is_refused(encoder):
    """The length of a stream is known only at its end."""
    told = r"a minibatch of 2 rows, but can process 20 rows: .* DataLoader with drop_last=True"
    with pytest.raises(ValueError, match=told) as caught:
        fit(Stream(TWO_MORE), encoder())
    assert "Trace Shapes" not in str(caught.value)
    assert fit.steps >= 2


def test_bad_value_in_the_last_minibatch_is_not_reported_as_its_size():
    x = ONE_MORE.clone()
    x[40, 3] = 0.5
    for options in ({"data": Stream(x)}, {"data": EVEN, "validation": Stream(x)}):
        with pytest.raises(ValueError, match="outside the support of site 'x'") as caught:
            fit(**options)
        assert "others have" not in str(caught.value)


def test_too_small_last_minibatch_of_a_validation_stream_is_refused():
    told = r"a minibatch of 2 rows, but can process 20 rows: .* expected three rows"
    with pytest.raises(ValueError, match=told):
        fit(EVEN, NeedsThree(), validation=Stream(TWO_MORE))


@pytest.mark.parametrize("rest", [0, 5])
def test_size_trials_do_not_change_the_run(rest, monkeypatch):
    """Running averages, random numbers and the objective's state are restored bitwise."""
    data, found = ONE_MORE[: 20 + rest], []
    for trials in (True, False):
        if not trials:
            monkeypatch.setattr(fitting, "try_sizes", lambda *args, **options: None)
        torch.manual_seed(5)
        encoder, objective = normalized(), o.ScoreFunction(2, "average")
        result = fit(data, encoder, objective=objective, validation=data, epochs=2)
        losses = result.history[["loss", "validation_loss"]].to_numpy()
        state = [*result.guide.state_dict().values(), objective.average, objective.step]
        found.append([torch.tensor(losses), *map(torch.clone, state)])
    assert objective.step == 2 * (1 + (rest > 0))
    for with_trials, without in zip(*found, strict=True):
        assert torch.equal(with_trials, without)


def test_parameter_dependency_check_does_not_change_running_averages():
    """Model and guide are methods of one module, so both hold all parameters."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 1)

        def model(self, x):
            pyro.module("pair", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample(
                    "x", dist.Normal(z[..., None], 1.0).expand([len(x), 16]).to_event(1), obs=x
                )

        def guide(self, x):
            pyro.module("pair", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.linear(self.norm(x)).squeeze(-1), 1.0))

    pair = Pair()
    pv.fit(pair.model, pair.guide, EVEN, epochs=3, batch_size=20, progress=False)
    assert pair.norm.num_batches_tracked == 6

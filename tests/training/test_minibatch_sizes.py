"""Every minibatch size of a run is tried before its first step."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Rows, Stream, make_pair
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import objectives as o
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


ONE_MORE = torch.bernoulli(torch.full((41, 16), 0.5))
EVEN = ONE_MORE[:40]
LEFT = (
    r"a minibatch of 1 row in training mode: .*41 rows of data are split into minibatches of 20, "
)
LEFT += (
    r"the last of 1\. Choose another batch_size: 16 leaves 9 rows "
    r".* a torch DataLoader with drop_last=True"
)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: (x,),
        TensorDataset,
        Rows,
        lambda x: DataLoader(TensorDataset(x), batch_size=20, shuffle=True),
    ],
)
def test_last_minibatch_too_small_for_batch_norm_is_refused(wrap):
    with pytest.raises(ValueError, match=LEFT) as caught:
        fit(wrap(ONE_MORE), normalized())
    assert "Expected more than 1 value per channel" in str(caught.value)
    assert "Trace Shapes" not in str(caught.value)
    assert fit.steps == 0
    fit(wrap(ONE_MORE))


def test_last_minibatch_of_a_memory_mapped_file_is_checked(tmp_path):
    np.save(tmp_path / "x.npy", ONE_MORE.numpy())
    with pytest.raises(ValueError, match=LEFT):
        fit(np.load(tmp_path / "x.npy", mmap_mode="r"), normalized())


@pytest.mark.parametrize("objective", [o.InfoVAE(), o.BetaTCVAE(num_data=41)])
def test_last_minibatch_too_small_for_the_objective_is_refused(objective):
    with pytest.raises(ValueError, match=LEFT):
        fit(ONE_MORE, objective=objective)
    assert fit.steps == 0
    with pytest.raises(ValueError, match=r"a minibatch of 1 row in evaluation mode: .* validation"):
        fit(EVEN, objective=objective, validation=ONE_MORE)
    assert fit.steps == 0


def test_suggested_remedies_work():
    fit(ONE_MORE, normalized(), batch_size=16)
    fit(DataLoader(TensorDataset(ONE_MORE), batch_size=20, drop_last=True), normalized())
    fit(EVEN, normalized(), validation=ONE_MORE)  # evaluation mode accepts one row
    with pytest.raises(ValueError, match="Choose a larger batch_size"):
        fit(EVEN, normalized(), batch_size=1)


class Deviation(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        variance = ((x - x.mean(0)) ** 2).sum() / (len(x) - 1)  # NaN for one row
        return self.linear(x) / (1 + variance)


def test_loss_that_is_nan_for_one_minibatch_size_is_refused():
    with pytest.raises(ValueError, match="a minibatch of 1 row in training mode: the loss is nan"):
        fit(ONE_MORE, Deviation())
    result = fit(ONE_MORE, Deviation(), on_nonfinite="skip")
    assert result.history.skipped.tolist() == [1]


class OfTwenty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(16, 8), nn.Parameter(torch.zeros(20, 8))

    def forward(self, x):
        return self.linear(x) + self.shift


@pytest.mark.parametrize("encoder", [normalized, OfTwenty])
def test_too_small_last_minibatch_of_a_stream_is_refused(encoder):
    """The length of a stream is known only at its end."""
    told = r"a minibatch of 1 row, but can process 20 rows: .* DataLoader with drop_last=True"
    with pytest.raises(ValueError, match=told) as caught:
        fit(Stream(ONE_MORE), encoder())
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
    told = r"a minibatch of 1 row, but can process 20 rows: .* 2 data points in a minibatch"
    with pytest.raises(ValueError, match=told):
        fit(EVEN, objective=o.InfoVAE(), validation=Stream(ONE_MORE))


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

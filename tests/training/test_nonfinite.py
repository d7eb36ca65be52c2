"""The first NaN or infinity of a run is located, reported and undone, or skipped."""

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae._programs.pair_state import state
from pyro_vae.training import _gradients as gradients
from pyro_vae.training import _loop as run
from pyro_vae.training._adam import Adam

BAD = 37  # a row of the data


class Logarithm(nn.Module):
    """NaN where a pixel is zero; accumulates a buffer like a running average."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count.add_((x * x.log()).sum())
        return self.inner(x * x.log())


def pair():
    torch.manual_seed(1)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, [8], 5), scale=1.0),
    )
    encoder = Logarithm(pv.nets.MLP(5, [8]))
    return model, pv.guides.AmortizedNormal(model, encoder=encoder)


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.rand(60, 5) + 0.1
    x[BAD, 2] = 0.0
    return x


def tensors(model, guide):
    with pv.parameter_store(model, guide):
        return {name: tensor.detach().clone() for name, tensor in state(model, guide).items()}


def fit(programs, data, **changes):
    defaults = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False, "capture": False}
    return pv.fit(*programs, data, **(defaults | changes))


@pytest.mark.parametrize("capture", [False, True])
def test_error_names_site_and_rows_and_restores_the_previous_state(
    capture, data, tmp_path, without_compiler, monkeypatch
):
    programs = pair()
    with pytest.raises(
        pv.training.NonFiniteError, match=r"parameter 'loc' of site 'z' is nan.*\[37\] of the"
    ) as error:
        fit(programs, data, capture=capture, checkpoint=tmp_path / "run")
    found = error.value
    assert (found.epoch, found.site) == (1, "z")
    assert found.rows[found.bad].tolist() == [BAD]
    # The state is that of a run that ends before the step.
    steps = 0

    def count(x):
        nonlocal steps
        steps += 1
        if steps > found.step:  # the fit's first check adds one call
            raise KeyboardInterrupt
        return x

    monkeypatch.setattr(run, "STEPS_OF_A_CHUNK", 1)  # an interrupt goes back to the last chunk
    expected = pair()
    with pytest.raises(pv.training.Interrupted):
        fit(expected, data, transform=count)
    left, right = tensors(*programs), tensors(*expected)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]) or capture, name
        torch.testing.assert_close(tensor, right[name])
    # Resuming from the folder raises the same error.
    checkpoint = pv.training.Checkpoint(found.folder, resume=True)
    assert repr(str(found.folder)) in str(found)
    with pytest.raises(pv.training.NonFiniteError) as again:
        fit(pair(), data, capture=capture, checkpoint=checkpoint)
    assert (again.value.step, again.value.site) == (found.step, "z")
    assert torch.equal(again.value.rows, found.rows)


class Offset(nn.Module):
    """A decoder that adds a function of a parameter equal to zero."""

    def __init__(self, function):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.inner = pv.nets.MLP(2, [8], 5)
        self.function = function

    def forward(self, z):
        return self.inner(z) + self.function(self.offset)


@pytest.mark.parametrize(
    "function",
    [lambda t: t.square().sqrt(), lambda t: t.sqrt()],
    ids=["nan gradient", "inf gradient"],
)
@pytest.mark.parametrize("optimizer", [None, torch.optim.Rprop])  # Rprop uses the gradient's sign
@pytest.mark.parametrize("capture", [False, True])
def test_non_finite_gradient_names_its_parameter(
    function, optimizer, capture, data, without_compiler
):
    torch.manual_seed(1)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(Offset(function), scale=1.0),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(5, [8]))
    with pytest.raises(
        pv.training.NonFiniteError, match=r"gradient of parameter '.*offset'.*step 1"
    ) as error:
        fit((model, guide), data, optimizer=optimizer, capture=capture)
    assert error.value.parameter.endswith("offset")
    assert error.value.site is None
    assert all(tensor.isfinite().all() for tensor in tensors(model, guide).values())


def test_step_with_non_finite_parameters_is_undone(binary):
    programs = make_pair()
    optimizer = functools.partial(torch.optim.SGD, lr=3e38)
    with pytest.raises(pv.training.NonFiniteError, match=r"made parameter|gradient|loss") as error:
        fit(programs, binary, optimizer=optimizer)
    assert error.value.step <= 2
    assert all(tensor.isfinite().all() for tensor in tensors(*programs).values())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: DataLoader(TensorDataset(x), 10)])
@pytest.mark.parametrize("capture", [False, True])
def test_skipped_steps_leave_no_trace(capture, wrap, data, without_compiler):
    programs = pair()
    options = {"on_nonfinite": "skip", "epochs": 3, "learning_rate": 0.02}
    result = fit(programs, wrap(data), capture=capture, transform=identity, **options)
    assert result.history.skipped.tolist() == [1, 1, 1]
    assert result.history.loss.notna().all()
    assert programs[1].encoder.count.isfinite()
    assert all(tensor.isfinite().all() for tensor in tensors(*programs).values())
    assert result.history.loss[3] < result.history.loss[1]


class Counting(nn.Module):
    """Counts its training steps in attributes of each kind; NaN where a pixel is zero."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 8)
        self.number, self.tensor, self.in_place = 0, torch.zeros(()), torch.zeros(())
        self.list, self.dictionary = [torch.zeros(())], {"count": torch.zeros(()), "number": 0}
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.number += 1
            self.tensor = self.tensor + 1
            self.in_place += 1
            self.list[0] = self.list[0] + 1
            self.dictionary["count"] += 1
            self.dictionary["number"] += 1
            self.replaced = self.replaced + 1
        return self.inner(x * x.log())

    def counts(self):
        found = [self.number, self.tensor, self.in_place, *self.list, *self.dictionary.values()]
        return {int(each) for each in (*found, self.replaced)}


@pytest.mark.parametrize("rows", [60, 55])  # with one and with two sizes of minibatches
def test_modules_count_each_step_once(rows, data):
    model, _ = pair()
    guide = pv.guides.AmortizedNormal(model, encoder=Counting())
    fit((model, guide), data[:rows].clamp(min=0.1))
    assert guide.encoder.counts() == {12}
    guide = pv.guides.AmortizedNormal(model, encoder=Counting())
    result = fit((model, guide), data[:rows], on_nonfinite="skip")
    assert result.history.skipped.sum() == 2
    assert guide.encoder.counts() == {10}
    guide = pv.guides.AmortizedNormal(model, encoder=Counting())
    with pytest.raises(pv.training.NonFiniteError) as error:
        fit((model, guide), data[:rows])
    assert guide.encoder.counts() == {error.value.step - 1}


def identity(x):
    return x


def test_skip_limit_raises(data):
    with pytest.raises(
        pv.training.NonFiniteError, match=r"2 steps were skipped, which is the limit\. Now "
    ) as error:
        fit(pair(), data, on_nonfinite=pv.training.Skip(2), epochs=5)
    assert error.value.epoch == 3


def test_resumed_run_counts_skipped_steps(data, tmp_path):
    straight = pair()
    expected = fit(straight, data, on_nonfinite="skip", epochs=4)
    folder = tmp_path / "run"
    fit(pair(), data, on_nonfinite="skip", epochs=2, checkpoint=folder)
    resumed = pair()
    checkpoint = pv.training.Checkpoint(folder, resume=True)
    result = fit(resumed, data, on_nonfinite="skip", epochs=4, checkpoint=checkpoint)
    assert result.history.skipped.tolist() == expected.history.skipped.tolist()
    expected, found = tensors(*straight), tensors(*resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_global_site_has_no_rows(binary):
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("scale", dist.LogNormal(1e5 * loc, 0.1))  # infinite after the first step
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = 50 * binary[:, 0]
    with pytest.raises(pv.training.NonFiniteError, match="value of site 'scale' is inf") as error:
        fit((model, guide), x, learning_rate=0.01, batch_size=len(x))
    assert (error.value.epoch, error.value.bad) == (2, None)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: DataLoader(TensorDataset(x), 10)])
def test_non_finite_validation_loss_names_the_site(wrap, data):
    train = data[data.prod(1) > 0][:50]
    message = r"in epoch 1: .*'loc' of site 'z' is nan at rows \[37\] of the validation"
    with pytest.raises(FloatingPointError, match=message):
        fit(pair(), train, validation=wrap(data))


def test_validation_data_outside_the_support_are_refused(binary):
    odd = binary.clone()
    odd[33, 0] = 0.5
    with pytest.raises(ValueError, match="support") as error:
        fit(make_pair(), binary, validation=DataLoader(TensorDataset(odd), 10))
    assert not isinstance(error.value, FloatingPointError)


def test_masked_non_finite_values_are_ignored():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            slope = pyro.param("slope", torch.tensor(0.0))
            pyro.sample("y", dist.Normal(slope.abs().sqrt() * z, 1.0), obs=1.0 * seen)

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * seen, 1.0))

    x = torch.tensor([1.0, 3e38, 2.0])
    with pytest.raises(pv.training.NonFiniteError, match=r"parameter 'param[.]slope'") as error:
        fit((model, guide), (x, x < 1e9), batch_size=3)
    assert error.value.site is None


def test_skipped_step_keeps_the_turn_order(data):
    """The second step, the model's, is skipped; the third is still the guide's."""
    model, guide = programs = pair()
    guide(data[:10])
    of_model, of_guide = (
        [parameter.detach().clone() for parameter in module.parameters()] for module in programs
    )
    rows = DataLoader(TensorDataset(data[20:50]), 10)  # the second minibatch contains the zero
    result = fit(programs, rows, epochs=1, on_nonfinite="skip", guide_steps=1, model_steps=1)
    assert result.history.skipped.tolist() == [1]
    assert all(map(torch.equal, model.parameters(), of_model))
    assert not any(map(torch.equal, guide.parameters(), of_guide))


@pytest.mark.parametrize("kind", [*sorted(gradients._CARRYING), "Rprop"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_hides_gradients_matches_each_optimizer(kind, bad):
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this torch has no {kind}")
    for steps in (1, 4):
        parameter = nn.Parameter(torch.randn(5, 4))
        optimizer = getattr(torch.optim, kind)([parameter], lr=1e-3)
        for step in range(steps):
            gradient = torch.randn(5, 4)
            gradient[2, 1] = gradient[2, 1] if step < steps - 1 else bad
            parameter.grad = gradient
            optimizer.step(lambda: torch.tensor(0.0))
        assert parameter.isfinite().all() == gradients.hides_gradients(optimizer)
    assert not gradients.hides_gradients(Adam([parameter]))


@pytest.mark.parametrize("optimizer", [None, torch.optim.Rprop])
def test_gradients_too_large_to_square_are_accepted(optimizer, binary):
    torch.manual_seed(1)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, [8], 16), scale=1e-11),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    guide(binary)
    before = tensors(model, guide)
    options = {} if optimizer is None else {"optimizer": optimizer}
    result = fit((model, guide), binary, clip_norm=1.0 if optimizer is None else None, **options)
    assert result.history.loss.gt(1e19).all()
    assert result.history.skipped.sum() == 0
    after = tensors(model, guide)
    trained = {**dict(model.named_parameters()), **dict(guide.encoder.named_parameters())}
    assert trained
    moved = [name for name, tensor in after.items() if not torch.equal(before[name], tensor)]
    assert len(moved) >= len(trained)


def test_error_is_raised_if_the_run_cannot_be_saved(data):
    extra = nn.Parameter(torch.zeros(()))
    with pytest.raises(pv.training.NonFiniteError) as error:
        fit(pair(), data, optimizer=lambda parameters: torch.optim.Adam([*parameters, extra]))
    assert error.value.folder is None


def test_optimizer_without_a_returned_loss_is_refused(binary):
    class Silent(torch.optim.SGD):
        def step(self, closure):
            super().step(closure)

    with pytest.raises(TypeError, match=r"Silent\.step must return"):
        fit(make_pair(), binary, optimizer=functools.partial(Silent, lr=0.1))


def test_sparse_gradients_are_clipped():
    torch.manual_seed(0)
    x = torch.randint(7, (30,))
    table = nn.Embedding(7, 2, sparse=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.float())

    def guide(x):
        loc, scale = pyro.module("table", table)(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    before = table.weight.detach().clone()
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    fit((model, guide), x, optimizer=optimizer, clip_norm=0.5, epochs=1, batch_size=30)
    assert (table.weight - before).norm() <= 0.05001
    assert not torch.equal(table.weight, before)


def exponential(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def on_the_real_line(x):
    loc = pyro.param("loc", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0 * x, 0.25))


def test_fit_warns_of_a_guide_that_samples_outside_the_support():
    pyro.clear_param_store()
    x = torch.zeros(4)
    options = {"epochs": 1, "progress": False, "seed": 0, "capture": False}
    with pytest.warns(UserWarning, match="latent 'z' from all real numbers") as found:
        pv.fit(exponential, on_the_real_line, x, **options)
    assert [w.filename for w in found] == [__file__]
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(exponential, pyro.infer.autoguide.AutoNormal(exponential), x, **options)


def test_a_sample_without_a_density_is_named_in_the_error():
    pyro.clear_param_store()
    x = torch.zeros(20)
    with (
        pytest.warns(UserWarning, match="all real numbers"),
        pytest.raises(pv.training.NonFiniteError, match="density of zero under the model") as error,
    ):  # the mean falls from 1 to the negative numbers
        pv.fit(exponential, on_the_real_line, x, epochs=500, progress=False, learning_rate=0.1)
    assert error.value.site == "z"
    assert copy.copy(error.value).args == error.value.args


@pytest.mark.parametrize(
    ("of_guide", "number", "excludes"),
    [(True, -torch.inf, False), (False, torch.inf, False), (False, -torch.inf, True)],
)
def test_only_a_factor_of_the_model_excludes_samples(of_guide, number, excludes):
    """The first steps are finite. Then a factor becomes infinite."""
    pyro.clear_param_store()

    def factor(own, z):
        level = pyro.param("level", torch.tensor(0.3))
        if own:
            value = torch.where(level.detach().abs() > 0.5, number, level) + 0 * z
            pyro.factor("penalty", value, has_rsample=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            factor(not of_guide, z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            factor(of_guide, pyro.sample("z", dist.Normal(0 * x, 1.0)))

    options = {"epochs": 50, "learning_rate": 0.1, "capture": False, "progress": False}
    with pytest.raises(pv.training.NonFiniteError) as error:
        pv.fit(model, guide, torch.zeros(8), **options)
    assert error.value.excludes is excludes
    assert ("density of zero" in str(error.value)) is excludes

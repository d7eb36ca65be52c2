import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Rows, Stream, make_pair
from oracles import LinearGaussian
from pyro.optim.adagrad_rmsprop import AdagradRMSProp
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset

import pyro_vae as pv


def fit(pair, data, **changes):
    defaults = {"epochs": 2, "batch_size": 20, "seed": 0, "progress": False}
    return pv.fit(*pair, data, **(defaults | changes))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: (x,),
        TensorDataset,
        Rows,
        Stream,
        lambda x: DataLoader(TensorDataset(x), batch_size=20),
        lambda x: DataLoader(Rows(x), batch_size=20, shuffle=True),
    ],
)
def test_fit_and_evidence_accept_data_of_every_kind(wrap, binary):
    result = fit(make_pair(), wrap(binary), epochs=10, learning_rate=0.05, validation=wrap(binary))
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0] - 0.5
    assert result.history.validation_loss.notna().all()
    assert len(pv.evidence(result.model, result.guide, wrap(binary), num_particles=5).values) == 50


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_program_is_no_reason_for_a_warning(frozen, binary):
    pair = make_pair()
    fit(pair, binary)  # the guide creates its last layer
    pair[frozen].requires_grad_(False)
    before = [parameter.clone() for parameter in pair[frozen].parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(pair, binary, validation=binary)
    for parameter, value in zip(pair[frozen].parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_fit_accepts_read_only_and_strided_arrays(binary):
    array = np.asarray(binary.repeat(2, 1))[::2]
    array.setflags(write=False)
    fit(make_pair(), array)


@pytest.mark.parametrize(
    "objective",
    [
        pv.objectives.ELBO(2),
        pv.objectives.MeanFieldELBO(),
        pv.objectives.IWAE(5),
        pyro.infer.Trace_ELBO(),
    ],
)
def test_every_objective_reaches_the_maximum_likelihood_of_the_linear_gaussian_model(objective):
    """Compare with the maximum likelihood from principal components (Lucas et al. 2019)."""
    oracle = LinearGaussian(d=1, D=4, dtype=torch.float32)
    x = oracle.sample(500)

    class Normal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 4)
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, z):
            return dist.Normal(self.linear(z), self.log_scale.exp()).to_event(1)

    model = pv.LatentVariableModel(pv.priors.StandardNormal(1), Normal())
    guide = pv.guides.AmortizedNormal(model, nn.Identity())  # linear, so it contains the posterior
    fit(
        (model, guide),
        x,
        objective=objective,
        epochs=75,
        batch_size=100,
        learning_rate=0.04,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 75),
    )
    covariance = torch.cov(x.T.double(), correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    noise = values[1:].mean()
    weight = torch.linalg.eigh(covariance).eigenvectors[:, -1] * (values[0] - noise).sqrt()
    best = torch.distributions.MultivariateNormal(
        x.double().mean(0), torch.outer(weight, weight) + noise * torch.eye(4)
    )
    reached = pv.evidence(model, guide, x, num_particles=500, seed=0).mean
    assert reached == pytest.approx(best.log_prob(x.double()).mean().item(), abs=0.02)


def test_fit_with_a_custom_optimizer_and_scheduler(binary):
    made = []

    def optimizer(parameters):
        made.append(list(parameters))
        return torch.optim.SGD(made[0], lr=0.1)

    pair = make_pair()
    result = fit(
        pair,
        binary,
        epochs=3,
        optimizer=optimizer,
        scheduler=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    assert len(made) == 1
    assert set(map(id, made[0])) == {id(p) for m in pair for p in m.parameters()}
    assert result.history.learning_rate.tolist() == pytest.approx([0.1, 0.05, 0.025])


def test_plateau_scheduler_receives_the_validation_loss(binary):
    scheduler = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9
    )
    result = fit(make_pair(), binary, epochs=4, validation=binary, scheduler=scheduler)
    assert result.history.learning_rate.iloc[-1] < result.history.learning_rate.iloc[0]


def test_gradient_clipping_bounds_the_whole_gradient(binary):
    pair = make_pair()
    pair[1](binary)
    before = [p.detach().clone() for m in pair for p in m.parameters()]
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    fit(pair, binary, epochs=1, batch_size=50, optimizer=sgd, clip_norm=1e-2)
    moved = [p - q for p, q in zip((p for m in pair for p in m.parameters()), before, strict=True)]
    norm = torch.stack([m.norm() for m in moved]).norm().item()
    assert norm == pytest.approx(1e-2, rel=1e-3)


def test_early_stopping_restores_parameters_and_buffers_of_the_best_epoch(binary):
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [30], 16))
    )
    norm = nn.BatchNorm1d(30)
    guide = pv.guides.AmortizedNormal(model, nn.Sequential(nn.Linear(16, 30), norm, nn.Tanh()))
    train, validation = binary[:20], binary[20:]
    states = []

    def record(epoch, row):
        states.append([each.clone() for m in (model, guide) for each in m.state_dict().values()])

    result = fit(
        (model, guide),
        train,
        after_epoch=record,
        objective=pv.objectives.MeanFieldELBO(20),
        validation=validation,
        epochs=400,
        learning_rate=0.02,
        patience=15,
    )
    losses = result.history.validation_loss
    assert len(losses) == result.best_epoch + 15 < 400
    assert losses[result.best_epoch] == losses.min()
    batches = norm.num_batches_tracked.item()
    assert (
        batches == result.best_epoch
    )  # one minibatch per epoch; checks before the run do not count
    objective = pv.objectives.MeanFieldELBO(2000)
    model.eval()
    guide.eval()
    again = objective.loss(model, guide, validation) / len(validation)
    assert again == pytest.approx(losses.min(), abs=0.2)
    record(None, None)
    assert all(map(torch.equal, states[-1], states[result.best_epoch - 1]))
    assert not all(map(torch.equal, states[-1], states[-2]))  # differs from the last epoch


def test_seed_fixes_the_fit_and_keeps_the_global_rng_state(binary):
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        pair = make_pair()
        results.append(fit(pair, binary, objective=pv.objectives.IWAE(3)))
        after = torch.rand(1)
    torch.manual_seed(11)
    make_pair()
    assert torch.equal(after, torch.rand(1))
    a, b = results
    assert a.history.loss.tolist() == b.history.loss.tolist()
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_history_is_in_nats_per_data_point_for_any_plate_scale(binary):
    """plate("data", N, subsample=x) scales the loss by N/B; the history undoes this scale."""
    histories = []
    for full_size in (None, 5000):
        torch.manual_seed(4)
        decoder = nn.Linear(2, 16)

        def model(x, full_size=full_size, decoder=decoder):
            pyro.module("decoder", decoder)
            plate = pyro.plate("data", full_size or len(x), subsample=x if full_size else None)
            with plate:
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

        guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))
        histories.append(fit((model, guide), binary, batch_size=25).history.loss.tolist())
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_dynamic_binarization_is_redrawn_for_every_minibatch():
    gray = torch.full((40, 16), 0.5)
    seen = []

    def transform(x):
        seen.append(torch.bernoulli(x))
        return seen[-1]

    fit(make_pair(), gray, transform=transform, epochs=2, batch_size=40)
    assert len(seen) == 3  # the check and two epochs
    assert not torch.equal(seen[1], seen[2])


def test_parameters_created_later_are_trained(binary):
    calls = []

    def model(x):
        calls.append(1)
        late = pyro.param("late", torch.tensor(0.0)) if len(calls) > 3 else torch.tensor(0.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = (z + late).unsqueeze(-1).expand(*z.shape, 16)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [4]))
    fit((model, guide), binary, epochs=5, learning_rate=0.1)
    with pv.parameter_store(model, guide):
        assert pyro.param("late").item() != 0.0


def test_non_finite_loss_raises_with_its_epoch(binary):
    sgd = functools.partial(torch.optim.SGD, lr=1e30)
    with pytest.raises(FloatingPointError, match="in epoch"):
        fit(make_pair(), binary, optimizer=sgd, epochs=10)


def test_progress_bar_shows_the_loss(binary, capsys):
    fit(make_pair(), binary, progress=True)
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [100, 98, 33, 30])
def test_steps_of_a_subsampled_plate_do_not_grow_as_batches_shrink(batch_size):
    """Every step has the same size, also those of a last minibatch with fewer or more rows."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    result = pv.fit(
        model, guide, torch.ones(100), validation=torch.ones(40), epochs=1, batch_size=batch_size,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-3), progress=False,
    )  # fmt: skip
    exact = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)).item()
    steps = 3 if batch_size == 33 else -(-100 // batch_size)  # the last row joins
    with pv.parameter_store(model, guide):
        assert pyro.param("loc").item() == pytest.approx(1e-3 * steps, rel=0.01)
    assert result.history.loss.iloc[0] == pytest.approx(exact, abs=0.01)
    assert result.history.validation_loss.iloc[0] == pytest.approx(exact, abs=0.01)


def test_minibatches_with_a_global_latent_are_refused():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match=r'plate\("data", 50, subsample=x\)'):
        pv.fit(model, guide, torch.randn(50), batch_size=10, progress=False)
    pv.fit(model, guide, torch.randn(50), batch_size=50, epochs=1, progress=False)


def test_fit_with_an_optimizer_that_calls_its_closure_repeatedly():
    oracle = LinearGaussian(d=1, D=3, dtype=torch.float32)
    x = oracle.sample(50)
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(1), pv.likelihoods.Bernoulli(nn.Linear(1, 3))
    )
    guide = pv.guides.AmortizedNormal(model, nn.Identity())
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=5)
    result = fit(
        (model, guide), (x > 0).float(), objective=pv.objectives.MeanFieldELBO(20),
        optimizer=lbfgs, epochs=10, batch_size=50,
    )  # fmt: skip
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]


@pytest.mark.parametrize("objective", [pyro.infer.RenyiELBO(), pyro.infer.TraceGraph_ELBO()])
def test_objectives_without_a_differentiable_loss_are_refused(objective, binary):
    with pytest.raises(TypeError, match="with a differentiable_loss"):
        fit(make_pair(), binary, objective=objective)


def test_pyro_optimizer_is_refused(binary):
    with pytest.raises(TypeError, match=r"must make a torch.optim.Optimizer"):
        fit(make_pair(), binary, optimizer=pyro.optim.Adam({"lr": 0.1}))


def test_diverging_run_restores_the_best_state(binary):
    scheduler = functools.partial(
        torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1.0 if epoch < 3 else 1e35
    )
    pair = make_pair()
    with pytest.raises(FloatingPointError):
        fit(pair, binary, epochs=9, validation=binary, patience=5, scheduler=scheduler,
            optimizer=functools.partial(torch.optim.SGD, lr=0.01))  # fmt: skip
    assert all(p.isfinite().all() for module in pair for p in module.parameters())


class Once(IterableDataset):
    """A stream that can be read only once."""

    def __init__(self, x):
        self.rows = iter(x)

    def __iter__(self):
        return self.rows


def test_every_row_of_a_stream_is_used(binary):
    model, guide = make_pair()
    estimate = pv.evidence(model, guide, Once(binary), num_particles=2, batch_size=20)
    assert len(estimate.values) == 50
    with pytest.raises(ValueError, match="is empty: its loader yields no minibatch"):
        fit((model, guide), Once(binary), epochs=2)


@pytest.mark.parametrize("bad", [7.0, float("nan")])
@pytest.mark.parametrize("wrap", [Rows, lambda x: DataLoader(Rows(x), batch_size=20)])
def test_bad_values_late_in_a_stream_are_refused(bad, wrap, binary):
    x = binary.clone()
    x[45, 3] = bad
    pair = make_pair()
    for call in (
        lambda: fit(pair, wrap(x), epochs=1),
        lambda: pv.evidence(*pair, wrap(x), num_particles=2, batch_size=20),
        lambda: pv.elbo_surgery(*pair, wrap(x), batch_size=20),
    ):
        with pytest.raises(ValueError, match=r"outside the support of site 'x'|NaN or infinite"):
            call()


def test_bad_values_of_an_observed_covariate_are_refused():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z[..., 0]), obs=y)

    guide = pv.guides.AmortizedNormal(model, FirstArgument())
    x, y = torch.randn(50, 16), torch.ones(50)
    y[45] = 9.0
    for call in (
        lambda: fit((model, guide), (x, y)),
        lambda: pv.evidence(model, guide, (x, y), num_particles=2, batch_size=20),
    ):
        with pytest.raises(ValueError, match="outside the support of site 'y'"):
            call()


class FirstArgument(nn.Module):
    def forward(self, x, y):
        return x


def test_bad_values_computed_by_the_model_are_refused(binary):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            logits = z.expand(*z.shape[:-1], 16)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=2 * x - x)

    x = binary.clone()
    x[45, 3] = 0.5
    guide = pv.guides.AmortizedNormal(model, nn.Identity())
    with pytest.raises(ValueError, match="outside the support of site 'x'"):
        fit((model, guide), x)
    with pytest.raises(ValueError, match="outside the support of site 'x'"):
        pv.evidence(model, guide, x, num_particles=2, batch_size=20)


def test_batch_size_larger_than_the_data_uses_all_rows(binary):
    """This includes the default of 100, for 50 rows."""
    histories = [
        pv.fit(*pair, binary, epochs=2, seed=0, progress=False, validation=binary[:7], **options)
        for pair, options in zip(
            same_pairs(3), [{}, {"batch_size": 50}, {"batch_size": 7000}], strict=True
        )
    ]
    first, *others = (result.history.loss.tolist() for result in histories)
    assert all(other == first for other in others)


def same_pairs(count):
    for _ in range(count):
        torch.manual_seed(8)
        yield make_pair()


@pytest.mark.parametrize("make", [list, lambda x: list(x.split(20)), lambda x: [x], lambda x: []])
def test_lists_are_refused_with_a_remedy(make, binary):
    told = r"data must be a tensor, .* got a list.* torch.stack\(rows\) or numpy.stack\(rows\)"
    with pytest.raises(ValueError, match=told):
        fit(make_pair(), make(binary))
    with pytest.raises(ValueError, match=told):
        pv.evidence(*make_pair(), make(binary), num_particles=2)


def test_items_that_cannot_be_collated_are_refused(binary):
    class Objects(Rows):
        def __getitem__(self, i):
            return object()

    with pytest.raises(ValueError, match="data has items that torch's DataLoader cannot collate: "):
        fit(make_pair(), Objects(binary))


def test_items_that_are_dictionaries_are_refused(binary):
    rows = StackDataset(x=binary, y=torch.zeros(len(binary)))
    for data in (rows, DataLoader(rows, batch_size=10)):
        with pytest.raises(ValueError, match=r"with the keys \['x', 'y'\].*collate_fn"):
            fit(make_pair(), data)


def test_learning_rate_with_a_custom_optimizer_is_refused(binary):
    with pytest.raises(ValueError, match=r"learning_rate=0.001 is for the default optimizer, and"):
        fit(make_pair(), binary, learning_rate=1e-3, optimizer=torch.optim.Adam)
    result = fit(make_pair(), binary, optimizer=functools.partial(torch.optim.Adam, lr=0.3))
    assert result.history.learning_rate.tolist() == [0.3, 0.3]
    assert fit(make_pair(), binary).history.learning_rate.tolist() == [1e-3, 1e-3]


def test_num_data_smaller_than_the_data_is_refused(binary):
    for num_data, call in {
        49: lambda o: fit(make_pair(), binary, objective=o),
        19: lambda o: fit(make_pair(), DataLoader(Rows(binary), batch_size=20), objective=o),
        10: lambda o: o.loss(*make_pair(), binary),
    }.items():
        with pytest.raises(ValueError, match=f"BetaTCVAE has num_data={num_data}, but got"):
            call(pv.objectives.BetaTCVAE(num_data=num_data))
    fit(make_pair(), binary, objective=pv.objectives.BetaTCVAE(num_data=50))


@pytest.mark.parametrize("capture", [False, True])
def test_fit_with_an_optimizer_without_a_learning_rate(capture, binary, tmp_path, without_compiler):
    """Pyro's AdagradRMSProp has eta instead; a run with it resumes bitwise."""
    optimizer = functools.partial(AdagradRMSProp, eta=0.1)
    pairs = same_pairs(2)
    whole = fit(next(pairs), binary, optimizer=optimizer, epochs=4, capture=capture)
    assert whole.history.learning_rate.isna().all()
    assert whole.history.loss.iloc[-1] < whole.history.loss.iloc[0]
    checkpoint = pv.training.Checkpoint(tmp_path, resume=True)
    pair, options = next(pairs), {"checkpoint": checkpoint, "capture": capture}
    fit(pair, binary, optimizer=optimizer, epochs=2, **options)
    torch.manual_seed(8)
    resumed = fit(make_pair(), binary, optimizer=optimizer, epochs=4, **options)
    assert resumed.history.loss.tolist() == whole.history.loss.tolist()


@pytest.mark.parametrize(
    "optimizer",
    [
        getattr(torch.optim, "Adafactor", torch.optim.Adadelta),  # torch 2.4 has no Adafactor
        functools.partial(ClippedAdam, lrd=0.9),
    ],
)
def test_history_has_the_learning_rate_of_any_optimizer(optimizer, binary):
    rates = fit(make_pair(), binary, optimizer=optimizer).history.learning_rate
    assert rates.notna().all()


@pytest.mark.parametrize(
    "optimizer",
    [
        pyro.optim.Adam({"lr": 0.1}),
        pyro.optim.Adam,
        pyro.optim.ClippedAdam({"lr": 0.1}),
        pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1}
        ),
    ],
)
def test_svi_optimizers_are_refused_with_a_remedy(optimizer, binary):
    with pytest.raises(TypeError, match=r"must make a torch.optim.Optimizer .*is for Pyro's SVI"):
        fit(make_pair(), binary, optimizer=optimizer)


def test_other_kinds_of_schedulers_are_refused(binary):
    of_pyro = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1}
    )
    for scheduler in (of_pyro, lambda optimizer: None, 3):
        with pytest.raises(TypeError, match="scheduler must make a learning rate scheduler of tor"):
            fit(make_pair(), binary, scheduler=scheduler)
    rms = functools.partial(AdagradRMSProp, eta=0.1)
    decay = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    with pytest.raises(ValueError, match="the groups of AdagradRMSProp have no learning rate"):
        fit(make_pair(), binary, optimizer=rms, scheduler=decay)


class Classifier(nn.Module):
    """A pair without latents, trained with a supervised loss."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 2)

    def model(self, x, y):
        pyro.module("classifier", self)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.net(x)), obs=y)

    def guide(self, x, y):
        pass


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    "objective", [pv.objectives.ELBO(2), pv.objectives.IWAE(2), pyro.infer.Trace_ELBO()]
)
def test_pair_without_latents_is_trained(objective, capture, binary, without_compiler):
    """The loss and the negative evidence both equal the cross-entropy."""
    pair, y = Classifier(), (binary.sum(1) > 8).long()
    fit((pair.model, pair.guide), (binary, y), objective=objective, epochs=40, learning_rate=0.1,
        capture=capture)  # fmt: skip
    entropy = nn.functional.cross_entropy(pair.net(binary), y).item()
    assert entropy < 0.2
    evidence = pv.evidence(pair.model, pair.guide, (binary, y), num_particles=2)
    assert -evidence.mean == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (pv.objectives.InfoVAE(), "InfoVAE compares the latent variables of guide and prior"),
        (
            pv.objectives.ReweightedWakeSleep(2, sleep=1.0),
            "ReweightedWakeSleep with sleep > 0 trains",
        ),
        (pv.objectives.BetaTCVAE(num_data=50), "needs one latent site"),
        (pv.objectives.CUBO(), "depends on no parameter"),
    ],
)
def test_objectives_that_need_latents_are_refused_without_them(objective, message, binary):
    pair, y = Classifier(), torch.zeros(50, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        fit((pair.model, pair.guide), (binary, y), objective=objective)
    with pytest.raises(ValueError, match="needs a latent variable, but this pair has none"):
        pv.elbo_surgery(pair.model, pair.guide, (binary, y), progress=False)


class Subsampling(nn.Module):
    """A pair whose plate has N from a given function."""

    def __init__(self, num_data):
        super().__init__()
        self.num_data = num_data
        self.rate = nn.Linear(1, 16)
        self.code = nn.Linear(16, 1)

    def plate(self, x):
        num_data = self.num_data(self, x)
        return pyro.plate("data", num_data, subsample=None if num_data == len(x) else x)

    def model(self, x):
        pyro.module("pair", self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.rate(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with self.plate(x):
            pyro.sample("z", dist.Normal(self.code(x), 1.0).to_event(1))


@pytest.mark.parametrize("objective", [pv.objectives.ELBO, pyro.infer.Trace_ELBO])
@pytest.mark.parametrize(
    "num_data",
    [
        lambda pair, x: 50,
        lambda pair, x: 10 * len(x),
        lambda pair, x: 50 if pair.training else len(x),
    ],
    ids=["number of data", "multiple of the minibatch", "depends on the mode"],
)
@pytest.mark.parametrize("batch_size", [50, 20])
def test_losses_and_steps_are_the_same_for_any_scale(batch_size, num_data, objective, binary):
    """Adam would hide a factor on the gradient; plain gradient descent does not."""
    found = []
    for count in (lambda pair, x: len(x), num_data):
        torch.manual_seed(0)
        pair = Subsampling(count)
        result = fit(
            (pair.model, pair.guide),
            binary[:50],
            objective=objective(),
            validation=binary[:30],
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            epochs=2,
            batch_size=batch_size,
            capture=False,
        )
        losses = result.history[["loss", "validation_loss"]].to_numpy()
        found.append([torch.tensor(losses).float(), *(p.detach() for p in pair.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("transform", "error", "message"), [
    (lambda x: x.numpy(), TypeError, "transform must return x as a tensor, got ndarray"),
    (lambda x: None, TypeError, "transform must return x as a tensor, got NoneType"),
    (lambda x: x[:5], ValueError, "as many rows as it got, 10, but returned shape"),
    (lambda x: x.sum(), ValueError, "as many rows as it got"),
], ids=["array", "none", "rows", "scalar"])  # fmt: skip
def test_transform_returns_a_tensor_with_as_many_rows(binary, transform, error, message):
    with pytest.raises(error, match=message):
        pv.fit(*make_pair(), binary, epochs=1, batch_size=10, transform=transform, progress=False)

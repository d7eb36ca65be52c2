"""fit_seeds: equal fits in any number of processes, resumed from checkpoints; its errors."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def make_pair():
    """Return a pair. Workers import this module, and would import another ``conftest``."""
    decoder, encoder = pv.nets.MLP(2, [8], 16), pv.nets.MLP(16, [8])
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder))
    return model, pv.guides.AmortizedNormal(model, encoder=encoder)


OPTIONS = {"epochs": 3, "batch_size": 20, "learning_rate": 0.02, "capture": False}


def params_of(fit):
    return [p.detach().clone() for m in (fit.model, fit.guide) for p in m.parameters()]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.seed == b.seed
        assert a.history["loss"].equals(b.history["loss"])
        for p, q in zip(params_of(a), params_of(b), strict=True):
            assert torch.equal(p, q)


@pytest.fixture
def x():
    return torch.bernoulli(torch.full((80, 16), 0.3))


def test_fits_equal_those_of_fit_in_any_number_of_processes(x):
    options = OPTIONS | {"validation": x[:20], "patience": 1, "epochs": 6}
    alone = []
    for seed in (3, 1):
        torch.manual_seed(seed)
        alone.append(pv.fit(*make_pair(), x, seed=seed, progress=False, **options))
    before = torch.get_rng_state()
    for num_workers in (1, 2):
        fits = pv.fit_seeds(
            make_pair, x, seeds=[3, 1], num_workers=num_workers, progress=False, **options
        )
        assert_same(fits, alone)
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(params_of(fits[0])[0], params_of(fits[1])[0])


def test_workers_have_the_default_dtype_of_the_call(x):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        one, two = (
            pv.fit_seeds(make_pair, x.double(), seeds=2, num_workers=n, progress=False, **OPTIONS)
            for n in (1, 2)
        )
    finally:
        torch.set_default_dtype(before)
    assert_same(two, one)
    assert params_of(two[0])[0].dtype == torch.float64
    fits = pv.fit_seeds(make_pair, x, seeds=2, num_workers=2, progress=False, **OPTIONS)
    assert params_of(fits[0])[0].dtype == before


def test_fits_of_other_processes_name_their_execution(x):
    options = OPTIONS | {"capture": True, "batch_size": 10, "epochs": 2}
    fits = pv.fit_seeds(make_pair, x, seeds=2, num_workers=2, progress=False, **options)
    assert [fit.execution.partition(",")[0] for fit in fits] == ["captured", "captured"]


def test_programs_with_pyro_params_and_closures_reach_the_workers(x):
    size = 16

    def pair():
        start = torch.randn(())

        def model(x):
            loc = pyro.param("loc", lambda: start.clone())
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                mean = z[..., None].expand(*z.shape, size)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.mean(-1), 0.5))

        return model, guide

    found = [
        pv.fit_seeds(pair, x, seeds=2, num_workers=n, progress=False, **OPTIONS) for n in (1, 2)
    ]
    values = []
    for fits in found:
        locs = []
        for fit in fits:
            with pv.parameter_store(fit.model, fit.guide):
                locs.append(pyro.param("loc").item())
        values.append(locs)
    assert values[0] == values[1]
    assert values[0][0] != values[0][1]


def test_parameters_in_the_global_store_are_ignored(x):
    """Worker processes do not have them."""
    alone = pv.fit_seeds(make_pair, x, seeds=2, num_workers=1, progress=False, **OPTIONS)
    pyro.param("of another program", torch.zeros(2, 3))
    for num_workers in (1, 2):
        options = {"num_workers": num_workers, "progress": False, **OPTIONS}
        assert_same(alone, pv.fit_seeds(make_pair, x, seeds=2, **options))
    assert list(pyro.get_param_store()) == ["of another program"]


def test_a_second_call_resumes_from_the_checkpoints(x, tmp_path):
    epochs = []

    def counted(epoch, row):
        epochs.append(epoch)

    options = OPTIONS | {"num_workers": 1, "progress": False, "after_epoch": counted}
    short = pv.fit_seeds(make_pair, x, seeds=2, checkpoint=tmp_path, **(options | {"epochs": 2}))
    assert epochs == [1, 2, 1, 2]
    epochs.clear()
    resumed = pv.fit_seeds(make_pair, x, seeds=2, checkpoint=tmp_path, **options)
    assert epochs == [3, 3]
    whole = pv.fit_seeds(make_pair, x, seeds=2, **options)
    assert_same(resumed, whole)
    assert short[0].history["loss"].equals(whole[0].history["loss"][:2])
    epochs.clear()
    again = pv.fit_seeds(make_pair, x, seeds=2, checkpoint=tmp_path, **options)
    assert epochs == []
    assert_same(again, whole)


def test_relative_folders_are_those_of_the_caller(x, tmp_path, monkeypatch):
    """Worker processes of an earlier call keep their working directory."""
    pv.fit_seeds(make_pair, x, seeds=2, num_workers=2, progress=False, **OPTIONS)
    monkeypatch.chdir(tmp_path)
    options = {"checkpoint": "runs", "progress": False, **OPTIONS}
    pv.fit_seeds(make_pair, x, seeds=2, num_workers=2, **options)
    for seed in range(2):
        assert any((tmp_path / "runs" / f"seed-{seed}").iterdir())


def test_schedules_start_again_for_each_seed(x):
    objective = pv.objectives.BetaELBO(pv.objectives.Linear(steps=10))
    options = OPTIONS | {"objective": objective, "num_workers": 1, "progress": False}
    (first,) = pv.fit_seeds(make_pair, x, seeds=[7], **options)
    fits = pv.fit_seeds(make_pair, x, seeds=[5, 7], **options)
    assert_same([fits[1]], [first])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": []}, ValueError, "seeds must be one or more integers"),
        ({"seeds": [1, 1]}, ValueError, "seeds must be one or more integers, all different"),
        ({"seeds": 0}, ValueError, "seeds must be"),
        ({"seeds": [0.5]}, TypeError, "each seed in seeds must be an integer, got 0.5"),
        ({"seeds": "12"}, TypeError, "seeds must be"),
        ({"num_workers": 0}, ValueError, "num_workers must be"),
        ({"seed": 3}, TypeError, "sets 'seed' of each fit"),
        ({"eposch": 3}, TypeError, "'eposch' is not an argument of fit"),
        ({"epochs": 0}, ValueError, "epochs must be"),
    ],
)
def test_wrong_arguments_are_refused(x, options, error, message):
    with pytest.raises(error, match=message):
        pv.fit_seeds(make_pair, x, **({"num_workers": 1, "progress": False} | options))


def test_functions_that_do_not_make_new_pairs_are_refused(x):
    pair = make_pair()
    with pytest.raises(ValueError, match="make_pair returned a program that it returned before"):
        pv.fit_seeds(lambda: pair, x, progress=False)
    with pytest.raises(TypeError, match=r"make_pair must return \(model, guide\), got 3"):
        pv.fit_seeds(lambda: 3, x, progress=False)
    with pytest.raises(TypeError, match="make_pair"):
        pv.fit_seeds(pair, x, progress=False)


def test_what_cannot_be_sent_to_a_process_is_refused(x):
    lock = threading.Lock()

    def pair():
        with lock:
            return make_pair()

    with pytest.raises(TypeError, match=r"cannot be sent to another process.*num_workers=1\.$"):
        pv.fit_seeds(pair, x, seeds=2, num_workers=2, progress=False, **OPTIONS)
    assert len(pv.fit_seeds(pair, x, seeds=2, num_workers=1, progress=False, **OPTIONS)) == 2


def test_an_error_in_a_worker_is_that_of_the_fit(x):
    options = OPTIONS | {"learning_rate": 1e30, "epochs": 20}
    with pytest.raises(pv.training.NonFiniteError, match="in epoch 1, step") as raised:
        pv.fit_seeds(make_pair, x, seeds=2, num_workers=2, progress=False, **options)
    assert raised.value.epoch == 1
    assert len(raised.value.rows) == 20
    assert raised.value.folder is None  # it was temporary
    assert "To reproduce" not in str(raised.value)


def test_an_error_names_the_checkpoint_in_the_users_folder(x, tmp_path):
    options = OPTIONS | {"learning_rate": 1e30, "epochs": 20, "num_workers": 1, "progress": False}
    with pytest.raises(pv.training.NonFiniteError, match="To reproduce") as raised:
        pv.fit_seeds(make_pair, x, seeds=1, checkpoint=tmp_path, **options)
    assert raised.value.folder.exists()


class TwoArgumentsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_pickled_keeps_its_message(x):
    def pair():
        model, guide = make_pair()
        model.likelihood.decoder.register_forward_hook(fail)
        return model, guide

    def fail(module, inputs, output):
        raise TwoArgumentsError("left", "right")

    with pytest.raises(Exception, match="left and right"):
        pv.fit_seeds(pair, x, seeds=2, num_workers=2, progress=False, **OPTIONS)

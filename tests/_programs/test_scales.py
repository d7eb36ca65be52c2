"""Evaluation of programs whose training scales sites."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

BETA = 0.3
WEIGHT = torch.tensor([[0.8, -0.4, 0.3], [0.1, 0.9, -0.7]])
CALLS = {
    "evidence": lambda m, g, x: pv.evidence(m, g, x, num_particles=3, seed=1).values,
    "surgery": lambda m, g, x: pv.elbo_surgery(m, g, x, seed=1).marginal_kl,
    "collapse": lambda m, g, x: pv.collapse_report(m, g, x, seed=1).rate,
    "compare": lambda m, g, x: (
        pv.compare({"a": (m, g)}, x, seed=1).entries[0].runs[0].evidence.values
    ),
    "IWAE": lambda m, g, x: pv.objectives.IWAE(1).loss(m, g, x),
}


def pair_of(scale, plate=lambda x: pyro.plate("cells", len(x))):
    torch.manual_seed(0)
    encoder = nn.Linear(3, 2)

    def model(x):
        shift = pyro.param("shift", torch.zeros(3))
        with plate(x):
            with pyro.poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT + shift, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with plate(x), pyro.poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(encoder(x), 0.8).to_event(1))

    return model, guide


@pytest.fixture(scope="module")
def x():
    return torch.randn(40, 3)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_scaled_programs_are_refused_with_advice_and_evaluated_without_scales(call, x):
    torch.manual_seed(2)
    scaled, plain = pair_of(BETA), pair_of(1.0)
    with pytest.raises(ValueError, match=r"site 'z' is scaled.*pass pv\.unscaled\(model\)"):
        call(*scaled, x)
    torch.manual_seed(3)
    found = call(*map(pv.unscaled, scaled), x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, call(*plain, x))


def test_the_unscaled_program_has_the_fitted_parameters(x):
    model, guide = pair_of(BETA)
    fit = pv.fit(model, guide, x, epochs=3, learning_rate=0.05, progress=False, seed=0)
    assert fit.history.loss.notna().all()
    with pv.parameter_store(model, guide):
        shift = pyro.param("shift").detach().clone()
    assert shift.abs().min() > 0
    with pv.parameter_store(pv.unscaled(model), pv.unscaled(guide)):
        torch.testing.assert_close(pyro.param("shift").detach(), shift)
    terms = pv.terms(pv.unscaled(model), pv.unscaled(guide), x)
    assert not terms.scaled_sites


@pytest.mark.parametrize("scale", [0.5, torch.tensor(2.0), torch.rand(10)])
def test_the_scale_of_subsampling_is_kept(scale, x):
    plate = lambda x: pyro.plate("data", 40, subsample=x)  # noqa: E731
    losses = []
    for each in (pair_of(scale, plate), pair_of(1.0, plate)):
        torch.manual_seed(1)
        losses.append(pv.objectives.ELBO().loss(*map(pv.unscaled, each), x[:10]))
    assert losses[0] == pytest.approx(losses[1])
    terms = pv.terms(*map(pv.unscaled, pair_of(scale, plate)), x[:10])
    assert terms.scale == 4.0


def test_an_inner_plate_that_subsamples_is_still_refused(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 6, subsample=x[0]):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 6, subsample=x[0]):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="an inner plate that subsamples"):
        pv.evidence(pv.unscaled(model), pv.unscaled(guide), x, num_particles=2)


def test_a_program_must_be_callable():
    with pytest.raises(TypeError, match="program must be callable"):
        pv.unscaled(3)


def _scaled(scale):
    def program(x, model):
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0 if model else x / 2, 1.0))
            if model:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return program


@pytest.mark.parametrize(("of_model", "of_guide", "agree"), [
    (torch.tensor(0.5), torch.tensor(0.5), True),
    (0.5, torch.tensor(0.5), True),
    (torch.full((8,), 0.5), 0.5, True),
    (torch.tensor(0.5), torch.tensor(3.0), False),
    (torch.tensor(0.5), 1.0, False),
    (0.5, 1.0, False),
    (torch.linspace(0.1, 1.0, 8), 0.5, False),
], ids=["tensors", "number", "rows", "others", "model", "numbers", "vary"])  # fmt: skip
def test_scales_of_both_programs_agree(of_model, of_guide, agree):
    model, guide = _scaled(of_model), _scaled(of_guide)
    pair = functools.partial(model, model=True), functools.partial(guide, model=False)
    if agree:
        pv.objectives.ELBO().loss(*pair, torch.randn(8))
        return
    with pytest.raises(ValueError, match=r"'z' is scaled by .* in the model and by"):
        pv.objectives.ELBO().loss(*pair, torch.randn(8))


def test_scales_agree_up_to_the_rounding_of_a_subsample():
    """The model has 0.3 N/B, and the guide 0.3."""

    def model(x):
        with pyro.plate("data", 60_001, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(2, [4]))
    for scale in (0.3, torch.tensor(0.3)):
        pair = [pyro.poutine.scale(program, scale=scale) for program in (model, guide)]
        for rows in range(1, 20):
            pv.objectives.ELBO().loss(*pair, torch.randn(rows, 2))

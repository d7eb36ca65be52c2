"""The argument precision= of fits and estimators, and estimators that do not depend on it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from interrupting import Interrupting
from rounded_products import rounded

import pyro_vae as pv
from pyro_vae._utils.precision import matmul_precision
from pyro_vae.training import Checkpoint

AIS = pv.evaluation.AIS(num_temperatures=4, num_chains=2, leapfrog_steps=1)
ASCENT = pv.evaluation.Ascent(window=2, patience=1, max_steps=4)
CALLS = {
    "fit": lambda m, g, x, **o: pv.fit(m, g, x, epochs=1, progress=False, **o),
    "evidence": lambda m, g, x, **o: pv.evidence(m, g, x, num_particles=10, **o),
    "chains": lambda m, g, x, **o: pv.evidence(m, g, x, method=AIS, **o),
    "sandwich": lambda m, g, x, **o: pv.sandwich(m, g, like=x, ais=AIS, **o),
    "gaps": lambda m, g, x, **o: pv.inference_gaps(m, g, x, ascent=ASCENT, num_particles=9, **o),
    "diagnose": lambda m, g, x, **o: pv.diagnose(
        m, g, x, x, ascent=ASCENT, num_particles=10, num_data=9, refit=False, **o
    ),
}


class StopError(Exception):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", ["normally", "by an error"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_precision_holds_inside_of_the_call(call, ends, binary):
    x = binary[:20]
    model, guide = make_pair()
    guide(x)
    seen = []

    def watching(x):
        seen.append(torch.get_float32_matmul_precision())
        if ends == "by an error" and len(seen) == 3:
            raise StopError
        return guide(x)

    with matmul_precision("high"):
        try:
            call(model, watching, x, precision="medium")
        except StopError:
            assert ends == "by an error"
        assert torch.get_float32_matmul_precision() == "high"
        assert set(seen) == {"medium"}
        if ends == "normally":
            seen.clear()
            call(model, watching, x)
            assert set(seen) == {"high"}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_words_are_refused(call, binary):
    message = 'precision must be "highest", "high", "medium" or None, got'
    with pytest.raises(ValueError, match=message):
        call(*make_pair(), binary, precision="low")


# Resuming


def test_a_fit_resumes_with_the_precision_of_its_checkpoint(binary, tmp_path):
    def fit(epochs, precision, resume=True):
        checkpoint = Checkpoint(tmp_path, resume=resume)
        torch.manual_seed(0)
        return pv.fit(*make_pair(), binary, epochs=epochs, precision=precision, seed=0,
                      checkpoint=checkpoint, progress=False)  # fmt: skip

    fit(1, "medium", resume=False)
    for other in (None, "highest"):
        with pytest.raises(ValueError, match="a run with precision medium, but here it is highest"):
            fit(2, other)
    with matmul_precision("medium"):
        assert len(fit(2, None).history) == 2


def test_evidence_resumes_with_the_same_precision(binary):
    model, guide = make_pair()
    guide(binary)
    options = {"num_particles": 10, "batch_size": 10, "seed": 0}
    with pytest.raises(pv.evaluation.Interrupted) as stopped:
        pv.evidence(model, guide, binary, progress=Interrupting(2), precision="high", **options)
    with pytest.raises(ValueError, match="a call with precision='high', got precision='highest'"):
        pv.evidence(model, guide, binary, resume=stopped.value, **options)
    found = pv.evidence(model, guide, binary, resume=stopped.value, precision="high", **options)
    assert len(found.values) == len(binary)


def test_other_processes_have_the_precision_of_this_one(binary):
    def make():  # a function of conftest.py is not found in every process
        likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], binary.shape[1]))
        model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
        return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(binary.shape[1], [8]))

    def after_epoch(epoch, row):
        return {"is_medium": float(torch.get_float32_matmul_precision() == "medium")}

    options = {"seeds": 2, "num_workers": 2, "epochs": 1, "progress": False}
    with matmul_precision("medium"):
        fits = pv.fit_seeds(make, binary, after_epoch=after_epoch, **options)
    assert [fit.history.is_medium[1] for fit in fits] == [1.0, 1.0]


# Log-weights


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x, 0.6).to_event(1))


ESTIMATORS = {
    "terms": lambda x: pv.terms(model, guide, x, num_particles=5).log_weight,
    "evidence": lambda x: pv.evidence(model, guide, x, num_particles=50, seed=0).values,
    "chains": lambda x: pv.evidence(model, guide, x, method=AIS, seed=0).values,
    "gaps": lambda x: (
        pv.inference_gaps(
            model, guide, x, ascent=ASCENT, num_particles=50, seed=0
        ).log_evidence.values
    ),
    "surgery": lambda x: torch.tensor(pv.elbo_surgery(model, guide, x, seed=0).marginal_kl),
    "holes": lambda x: torch.tensor(pv.prior_holes(model, guide, x, seed=0).share),
    "improvements": lambda x: torch.tensor(
        next(
            entry.value
            for entry in pv.diagnose(
                model, guide, x, x + 0.1, ascent=ASCENT, num_particles=50, refit=False
            ).losses
        )
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
def test_estimates_without_networks_do_not_depend_on_the_precision(estimate):
    x = 0.5 + torch.randn(40, 2)
    torch.manual_seed(1)
    expected = estimate(x)
    torch.manual_seed(1)
    with rounded() as products:
        found = estimate(x)
    assert products.number == 0  # no float32 product
    assert torch.equal(found, expected)

"""The protocols of the published tables (examples/published)."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyro_vae as pv

FOLDER = Path(__file__).parent.parent / "examples" / "published"
PIXELS = 9


@pytest.fixture(scope="module")
def published():
    """Return the modules ``pairs``, ``protocols`` and ``run``."""
    sys.path.insert(0, str(FOLDER))
    try:
        import pairs
        import protocols
        import run
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(pairs=pairs, protocols=protocols, run=run)


def test_warm_up_ends_with_epoch_100(published):
    weight = published.protocols.WarmUp(steps_per_epoch=500)
    steps = torch.tensor([0.0, 499.0, 500.0, 49_000.0, 49_499.0, 49_500.0, 1e6])
    expected = torch.tensor([0.01, 0.01, 0.02, 0.99, 0.99, 1.0, 1.0])
    torch.testing.assert_close(weight(steps), expected)


def test_normalized_adam_is_adam_on_normalized_gradients(published):
    tensors = [torch.randn(3, 4), torch.randn(5)]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    normalized = published.protocols.NormalizedAdam(ours, lr=0.1, fused=True)
    adam = torch.optim.Adam(theirs, lr=0.1)
    for _ in range(3):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = 1e4 * torch.randn_like(mine)
            its.grad = mine.grad / mine.grad.norm()
        normalized.step()
        adam.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_evaluation_sets_are_those_of_the_paper_seed(published):
    data = pv.datasets.load("digits", binarize="none")
    validation, test = published.protocols.binary(data)
    again, _ = published.protocols.binary(data)
    assert torch.equal(validation, again)
    assert set(test.unique().tolist()) == {0.0, 1.0}
    # The mean of N Bernoulli variables is within 5 standard errors in all but 6 in 10 million runs.
    p = data.test
    error = (p * (1 - p)).sum().sqrt() / p.numel()
    assert (test.mean() - p.mean()).abs() < 5 * error


def test_stages_have_the_learning_rates_of_the_paper(published):
    data = SimpleNamespace(train=torch.rand(20, PIXELS), validation=torch.rand(20, PIXELS))
    model, guide = published.pairs.tanh_pair(data.train, latents=2, width=5)
    fit = published.protocols.stages(
        model, guide, data, objective=pv.objectives.IWAE(2), epochs=14, progress=False
    )
    # One epoch in stage 0, three in stage 1, nine in stage 2.
    expected = [1e-3] + 3 * [1e-3 * 10 ** (-1 / 7)] + 9 * [1e-3 * 10 ** (-2 / 7)]
    expected.append(1e-3 * 10 ** (-3 / 7))
    assert fit.history["learning_rate"].tolist() == pytest.approx(expected)


def test_last_bias_gives_the_mean_image(published):
    mean_image = torch.rand(PIXELS)
    train = torch.stack([mean_image, mean_image])
    model, _ = published.pairs.tanh_pair(train, latents=2, width=5)
    decoder = model.likelihood.decoder
    with torch.no_grad():
        decoder[-1].weight.zero_()
    torch.testing.assert_close(decoder(torch.randn(2)).sigmoid(), mean_image.clamp(0.001, 0.999))


@pytest.mark.parametrize("levels", ["one_level", "two_levels"])
@pytest.mark.parametrize("prior", ["standard_normal", "vamp"])
def test_pairs_evaluate(published, levels, prior):
    make = getattr(published.pairs, levels)(getattr(published.pairs, prior))
    model, guide = make(torch.rand(3, PIXELS))
    terms = pv.terms(model, guide, torch.rand(4, PIXELS).round(), num_particles=3)
    assert terms.log_weight.shape == (3, 4)
    assert terms.log_weight.isfinite().all()


def test_exemplar_row_gets_the_positions_of_the_images(published):
    """Fit it by its protocol: the drawn exemplars are never one's own."""
    data = SimpleNamespace(train=torch.rand(40, PIXELS), validation=torch.rand(20, PIXELS),
                           test=torch.rand(20, PIXELS))  # fmt: skip
    model, guide = published.pairs.exemplars(data.train)
    assert model.prior.num_drawn == 20
    fit = published.protocols.early_stopping(
        model, guide, data, epochs=2, positions=True, progress=False
    )
    assert fit.history.validation_loss.notna().all()
    assert model.prior.stored_codes.ne(0).any(1).all()
    p_z = model.train().prior(torch.tensor([0, 1]))
    assert p_z.batch_shape == (2,)
    assert pv.evidence(model, guide, data.test.round(), num_particles=10).mean < 0


def test_log_p_resumes_after_the_part_that_was_finished(published, tmp_path, monkeypatch):
    model, guide = published.pairs.tanh_pair(torch.rand(30, PIXELS), latents=2, width=5)
    images = torch.rand(23, PIXELS).round()
    calls = []

    def evidence(model, guide, x, **options):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pv.evidence(model, guide, x, **options)

    monkeypatch.setattr(published.run, "pv", SimpleNamespace(evidence=evidence))
    options = {"num_particles": 500, "batch_size": 7, "images_at_a_time": 7, "capture": False}
    with pytest.raises(KeyboardInterrupt):
        published.run.evidence_in_parts(tmp_path, model, guide, images, **options)
    estimate, seconds = published.run.evidence_in_parts(tmp_path, model, guide, images, **options)
    assert calls == [7, 14, 21, 21, 23]  # the third was interrupted
    assert len(estimate.values) == 23
    assert seconds > 0
    again, same = published.run.evidence_in_parts(tmp_path, model, guide, images, **options)
    assert torch.equal(again.values, estimate.values)
    assert same == seconds
    options["num_particles"] = 400
    assert published.run.evidence_in_parts(tmp_path, model, guide, images, **options)[1] != same
    whole = pv.evidence(model, guide, images, num_particles=500, seed=1)
    errors = whole.monte_carlo_errors.hypot(estimate.monte_carlo_errors)
    # All 23 values are within 6 standard errors in all but 5 in 100 million runs.
    assert ((whole.values - estimate.values).abs() < 6 * errors).all()

"""The density of a mixture and the gradient of its samples, against sums and quadrature."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def random_mixture(k, d, batch=(), dtype=torch.float64):
    logits = torch.randn(*batch, k, dtype=dtype)
    loc, raw = torch.randn(2, *batch, k, d, dtype=dtype)
    return [logits, 1.5 * loc, 0.3 + raw.exp() / 2]


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 1), (2, 4)])
def test_density_is_the_sum_over_components(k, d):
    logits, loc, scale = random_mixture(k, d, (5,))
    q = pv.distributions.MixtureOfDiagNormals(logits, loc, scale)
    z = torch.randn(7, 5, d, dtype=torch.float64)
    expected = sum(
        logits.softmax(-1)[:, i] * dist.Normal(loc[:, i], scale[:, i]).log_prob(z).sum(-1).exp()
        for i in range(k)
    )
    torch.testing.assert_close(q.log_prob(z), expected.log())
    torch.testing.assert_close(q.expand((7, 5)).log_prob(z), expected.log())


def test_samples_of_a_mixture_have_its_mean_and_variance():
    q = pv.distributions.MixtureOfDiagNormals(*random_mixture(3, 2))
    z = q.sample((200_000,))
    error = (z.var(0) / 200_000).sqrt()
    assert ((z.mean(0) - q.mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), q.variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("d", [1, 2])
def test_gradient_of_samples_matches_the_expectation(d):
    """For weights, means and scales, within 5 standard errors (1 in 10^5 each)."""
    parameters = [p.requires_grad_() for p in random_mixture(3, d)]

    def f(z):
        return torch.sin(z[..., 0] + 0.3) + 0.2 * z[..., -1] ** 2 * torch.cos(z[..., 0])

    axis = torch.linspace(-12, 12, 1201 if d == 2 else 20_001, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    q = pv.distributions.MixtureOfDiagNormals(*parameters)
    exact = (q.log_prob(points).exp() * f(points)).sum() * (axis[1] - axis[0]) ** d
    expected = torch.autograd.grad(exact, parameters)

    repeats, count = 40, 5000
    drawn = []
    for _ in range(repeats):
        q = pv.distributions.MixtureOfDiagNormals(*parameters)
        drawn.append(torch.autograd.grad(f(q.rsample((count,))).mean(), parameters))
    for number, gradient in enumerate(expected):
        estimates = torch.stack([each[number] for each in drawn])
        error = estimates.std(0) / repeats**0.5
        assert ((estimates.mean(0) - gradient).abs() < 5 * error + 1e-12).all()
        assert (error < 0.1).all()


def test_one_component_is_a_normal_with_pathwise_gradient():
    loc, scale = torch.randn(1, 3).requires_grad_(), (torch.rand(1, 3) + 0.5).requires_grad_()
    z = pv.distributions.MixtureOfDiagNormals(torch.zeros(1), loc, scale).rsample()
    assert z.shape == (3,)
    gradients = torch.autograd.grad(z.sum(), [loc, scale])
    torch.testing.assert_close(gradients[0], torch.ones(1, 3))
    torch.testing.assert_close(gradients[1], ((z - loc) / scale).detach(), rtol=1e-4, atol=1e-5)


def test_wrong_shapes_and_scales_are_refused():
    with pytest.raises(ValueError, match=r"logits \(..., K\)"):
        pv.distributions.MixtureOfDiagNormals(torch.zeros(2), torch.zeros(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="scale"):
        pv.distributions.MixtureOfDiagNormals(
            torch.zeros(2), torch.zeros(2, 4), -torch.ones(2, 4), validate_args=True
        )


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shared_components_are_scored_like_separate_ones(batch, one_scale):
    """Each mixture has its own weights, of which some are zero."""
    k, d = 5, 2
    logits = torch.randn(*batch, k).masked_fill(torch.arange(k) == 1, -torch.inf)
    loc, scale = torch.randn(k, d), torch.rand(1 if one_scale else k, d) + 0.3
    given = [each.double().requires_grad_() for each in (logits, loc, scale)]
    logits, loc, scale = given[0], given[1], given[2].expand(k, d)
    q = pv.distributions.MixtureOfDiagNormals(logits, loc, scale)
    separate = [each.expand(2, 3, k, d).contiguous() for each in (loc, scale)]
    reference = pv.distributions.MixtureOfDiagNormals(logits, *separate)
    z = torch.randn(4, 2, 3, d, dtype=torch.float64)
    found, expected = q.log_prob(z), reference.log_prob(z)
    torch.testing.assert_close(found, expected)
    weight = torch.rand_like(found)
    found, expected = (torch.autograd.grad((t * weight).sum(), given) for t in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    one = z[0, 0, 0]
    torch.testing.assert_close(q.log_prob(one).expand(2, 3), reference.log_prob(one))


@pytest.mark.parametrize("center", [0.0, 100.0, 1e5])
def test_variance_of_a_mixture_far_from_zero(center):
    """The difference of the second moment and the squared mean would cancel in float32."""
    logits, loc, scale = torch.randn(3, 4), torch.randn(3, 4, 2) + center, torch.rand(3, 4, 2) + 0.5
    weights, wide = logits.double().softmax(-1).unsqueeze(-1), loc.double()
    within = (weights * scale.double().square()).sum(-2)
    between = (weights * (wide - (weights * wide).sum(-2, keepdim=True)).square()).sum(-2)
    rounding = 1e-5 + (1e-6 * center) ** 2
    mixture = pv.distributions.MixtureOfDiagNormals
    found = mixture(logits, loc, scale).variance.double()
    torch.testing.assert_close(found, within + between, rtol=0, atol=4 * rounding)
    alike = mixture(logits, loc[:, :1].expand(-1, 4, -1), scale).variance.double()
    torch.testing.assert_close(alike, within, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("offset", [1e3, 1e6, -1e9])
def test_shared_components_far_from_zero(offset, one_scale):
    """The expanded squares would cancel; moving everything changes no density or gradient."""
    logits = torch.randn(3, dtype=torch.float64)
    loc = offset + torch.tensor([[0.0, 1.0], [2.0, 3.0], [-4.0, 0.5]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 2.0], [1.3, 0.4], [0.7, 1.0]], dtype=torch.float64)
    given = [each.requires_grad_() for each in (logits, loc, scale[:1] if one_scale else scale)]
    q = pv.distributions.MixtureOfDiagNormals(logits, loc, given[2].expand(3, 2))
    z = (loc.detach().unsqueeze(1) + torch.randn(3, 5, 2, dtype=torch.float64)).requires_grad_()
    found, expected = q.log_prob(z), q.log_joint(z).logsumexp(-1)  # the second by differences
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weight = torch.rand_like(found)
    found, expected = (
        torch.autograd.grad((each * weight).sum(), [z, *given], retain_graph=True)
        for each in (found, expected)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("position", [0, 25, 50])
def test_one_component_far_away_does_not_change_the_others(position):
    loc = torch.randn(51, 2)
    near = torch.arange(51) != position
    loc[position] = 1e10
    mixture = pv.distributions.MixtureOfDiagNormals(torch.zeros(51), loc, torch.ones(51, 2))
    alone = pv.distributions.MixtureOfDiagNormals(torch.zeros(50), loc[near], torch.ones(50, 2))
    z = loc[near] + torch.randn(50, 2)
    expected = alone.log_prob(z) + math.log(50 / 51)
    torch.testing.assert_close(mixture.log_prob(z), expected)


@pytest.fixture
def few_at_a_time(monkeypatch):
    for name in ("_LOG_DENSITIES_AT_A_TIME", "_LOG_DENSITIES_IN_CACHE"):
        monkeypatch.setattr(pv.distributions._mixtures, name, 37)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_density_of_many_values_with_many_components(few_at_a_time, one_scale, dtype, error):
    """Values are scored in parts of a few log-densities."""
    k, d = 11, 3
    logits = torch.randn(k, dtype=dtype).masked_fill(torch.arange(k) == 4, -torch.inf)
    loc, scale = 100 + torch.randn(k, d, dtype=dtype), torch.rand(1 if one_scale else k, d) + 0.3
    q = pv.distributions.MixtureOfDiagNormals(logits, loc, scale.to(dtype).expand(k, d))
    for rows in (1, 4, 29):
        z = 100 + 3 * torch.randn(2, rows, d, dtype=dtype)
        wide = pv.distributions.MixtureOfDiagNormals(
            *(each.double() for each in (logits, loc, q.scale))
        )
        expected = wide.log_joint(z.double()).logsumexp(-1)
        torch.testing.assert_close(q.log_prob(z).double(), expected, rtol=error, atol=error)
    assert (q.log_prob(torch.full_like(z, 1e4)) < -1e6).all()
    unchecked = pv.distributions.MixtureOfDiagNormals(logits, loc, q.scale, validate_args=False)
    z[0, 3, 1] = torch.nan
    assert unchecked.log_prob(z).isnan().nonzero().tolist() == [[0, 3]]


def test_derivatives_of_the_density_of_many_values(few_at_a_time):
    """All modes of differentiation agree, also if values are scored in parts."""
    logits = torch.randn(11).masked_fill(torch.arange(11) == 2, -torch.inf)
    q = pv.distributions.MixtureOfDiagNormals(logits, torch.randn(11, 3), torch.ones(11, 3))
    z, direction = torch.randn(2, 8, 3)
    backward = torch.func.grad(lambda value: q.log_prob(value).sum())(z)
    forward = torch.func.jvp(q.log_prob, (z,), (direction,))[1]
    torch.testing.assert_close(forward, (backward * direction).sum(-1))
    assert torch.func.hessian(lambda value: q.log_prob(value).sum())(z).isfinite().all()
    outer = torch.func.jvp(
        lambda v: torch.func.grad(lambda w: (w * q.log_prob(v)).sum())(torch.ones(8)),
        (z,),
        (direction,),
    )[1]
    torch.testing.assert_close(outer, forward)
    torch.testing.assert_close(torch.vmap(q.log_prob)(z.unsqueeze(1)).squeeze(1), q.log_prob(z))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, direction)
        found = torch.autograd.forward_ad.unpack_dual(q.log_prob(dual)).tangent
    torch.testing.assert_close(found, forward)

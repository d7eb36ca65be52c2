"""Networks keep leading dimensions and sizes, and every weight gets a gradient."""

import functools

import pytest
import torch
from capturing import check_same
from torch import nn

import pyro_vae as pv

SHAPES = [(1, 28, 20), (3, 7, 5), (2, 1, 1), (1, 8, 8), (1, 9, 2)]
ENCODERS = [pv.nets.ConvEncoder, pv.nets.ResidualEncoder]
DECODERS = [pv.nets.ConvDecoder, pv.nets.ResidualDecoder]


def assert_gradient_reaches_all(net, output):
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", ENCODERS)
def test_encoders_accept_images_of_any_size_and_leading_dimensions(make, shape, dtype):
    encoder = make(shape, channels=(4, 6, 5), activation=nn.ELU).to(dtype)
    x = torch.randn(2, 3, *shape, dtype=dtype)
    features = encoder(x)
    assert features.shape == (2, 3, encoder.out_features)
    each = torch.stack([torch.stack([encoder(image) for image in row]) for row in x])
    torch.testing.assert_close(features, each)
    assert encoder(x[:, :0]).shape == (2, 0, encoder.out_features)
    assert_gradient_reaches_all(encoder, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", DECODERS)
def test_decoders_return_images_of_any_size(make, shape, dtype):
    decoder = make(4, shape, channels=(4, 6, 5), parameters_per_output=2, activation=nn.ELU).to(
        dtype
    )
    z = torch.randn(2, 3, 4, dtype=dtype)
    images = decoder(z)
    assert images.shape == (2, 3, 2 * shape[0], *shape[1:])
    each = torch.stack([torch.stack([decoder(code) for code in row]) for row in z])
    torch.testing.assert_close(images, each)
    assert_gradient_reaches_all(decoder, images)


@pytest.mark.parametrize("make", DECODERS)
def test_every_pixel_of_an_image_depends_on_z(make):
    z = torch.randn(4, requires_grad=True)
    decoder = make(4, (2, 11, 6), channels=(4, 6), activation=nn.ELU)
    jacobian = torch.autograd.functional.jacobian(decoder, z)
    assert (jacobian.abs().amax(-1) > 0).all()


def test_residual_block_adds_its_branch_to_the_identity():
    block = pv.nets.ResidualBlock(3, nn.Tanh)
    x = torch.randn(2, 3, 5, 4)
    first, second = block.branch[1], block.branch[3]
    torch.testing.assert_close(block(x) - x, second(torch.tanh(first(torch.tanh(x)))))
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.nets.ConvEncoder((28, 28)), r"must be \(channels, height, width\)"),
        (lambda: pv.nets.ConvEncoder((1, 0, 28)), r"all positive, got \(1, 0, 28\)"),
        (lambda: pv.nets.ResidualEncoder((1, 8, 8), channels=()), "at least one, got"),
        (lambda: pv.nets.ResidualEncoder((1, 8, 8), blocks=0), "blocks must be at least 1"),
        (lambda: pv.nets.ConvDecoder(0, (1, 8, 8)), "in_features must be at least 1, got 0"),
        (lambda: pv.nets.ConvDecoder(3, (1, 8, 8), channels=(4, 0)), "must be positive"),
        (lambda: pv.nets.ConvDecoder(3, (1, 8)), r"must be \(channels, height, width\)"),
        (
            lambda: pv.nets.ResidualDecoder(3, (1, 8, 8), parameters_per_output=0),
            "parameters_per_output must be at least 1",
        ),
        (lambda: pv.nets.ResidualDecoder(3, (1, 8, 8), blocks=0), "blocks must be at least 1"),
        (
            lambda: pv.nets.ConvEncoder((1, 28, 20))(torch.zeros(5, 560)),
            r"ending in \(1, 28, 20\) .* got shape \(5, 560\): .*nn.Unflatten",
        ),
        (lambda: pv.nets.ResidualEncoder((1, 2, 2))(torch.zeros(2, 2)), r"got shape \(2, 2\)"),
        (lambda: pv.nets.GatedMLP(3, []), "GatedMLP needs a hidden layer or out_features"),
        (lambda: pv.nets.GatedMLP(3, [0]), "must be positive"),
        (lambda: pv.nets.GatedMLP(3, [2], 0), "must be positive"),
        (lambda: pv.nets.Joined(nn.Identity())(), "needs tensors of shape"),
        (lambda: pv.nets.Joined(nn.Identity())(torch.ones(())), r"got shapes \[\(\)\]"),
        (
            lambda: pv.nets.Joined(nn.Identity())(torch.ones(2, 3), torch.ones(4, 3)),
            r"broadcast, got \[\(2, 3\), \(4, 3\)\]",
        ),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: pv.nets.GatedMLP(3, 5),
        lambda: pv.nets.ConvEncoder((1, 8, 8), channels=4),
        lambda: pv.nets.ResidualDecoder(3, (1, 8, 8), channels=4),
    ],
)
def test_a_number_as_sequence_of_sizes_is_refused(make):
    with pytest.raises(TypeError, match="must be a sequence"):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_layers_are_products_of_two_linear_layers(dtype):
    net = pv.nets.GatedMLP(3, [5, 4], 2).to(dtype)
    x = torch.randn(6, 7, 3, dtype=dtype)
    h = x
    for layer in (net[0], net[2]):
        n = layer.out_features // 2
        a = h @ layer.weight[:n].T + layer.bias[:n]
        b = h @ layer.weight[n:].T + layer.bias[n:]
        h = a * torch.sigmoid(b)
    torch.testing.assert_close(net(x), net[4](h))
    torch.testing.assert_close(net(x)[2, 3], net(x[2, 3]))
    assert pv.nets.GatedMLP(3, [5])(torch.randn(6, 7, 3)).shape == (6, 7, 5)
    assert_gradient_reaches_all(net, net(x))


def test_gated_layers_are_initialized_with_variance_two_over_fan_in():
    net = pv.nets.GatedMLP(50, [100], 40)
    for layer in (net[0], net[2]):
        n = layer.weight.numel()
        normalized = layer.weight.square().mean() * layer.in_features / 2
        assert abs(normalized - 1) < 5 * (2 / n) ** 0.5  # the error of a Gaussian's variance
        assert abs(layer.weight.mean()) < 5 * (2 / layer.in_features / n) ** 0.5


def test_joined_networks_broadcast_leading_dimensions():
    net = pv.nets.Joined(pv.nets.MLP(2 + 3 + 1, [8], 4))
    z, y, t = torch.randn(5, 6, 2), torch.randn(6, 3), torch.randn(1)
    out = net(z, y, t)
    assert out.shape == (5, 6, 4)
    torch.testing.assert_close(out[2, 3], net.network(torch.cat([z[2, 3], y[3], t])))
    labels = torch.eye(3, dtype=torch.long)[torch.arange(6) % 3]
    torch.testing.assert_close(net(z, labels, t), net(z, labels.float(), t))


@pytest.mark.parametrize(("encoder", "decoder"), [*zip(ENCODERS, DECODERS, strict=True)])
def test_captured_steps_of_image_networks_equal_eager_steps(
    encoder, decoder, binary, without_compiler
):
    shape = (1, 3, 5)

    def make():
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Bernoulli(
                nn.Sequential(decoder(2, shape, channels=(4, 3)), nn.Flatten(-3))
            ),
        )
        features = nn.Sequential(nn.Unflatten(-1, shape), encoder(shape, channels=(3, 4)))
        return model, pv.guides.AmortizedNormal(model, encoder=features)

    check_same(make, binary[:, :15], double=True, objective=pv.objectives.IWAE(3), epochs=2,
               execution="captured, not compiled")  # fmt: skip


@pytest.mark.parametrize("make", [
    lambda activation: pv.nets.ResidualBlock(3, activation),
    lambda activation: pv.nets.ResidualEncoder((3, 6, 6), [4], activation=activation),
    lambda activation: pv.nets.ConvEncoder((3, 6, 6), [4], activation=activation),
    lambda activation: pv.nets.MLP(6, [4], 5, activation=activation),
], ids=["block", "residual", "convolutions", "mlp"])  # fmt: skip
def test_networks_with_activations_in_place(make):
    torch.manual_seed(1)
    expected = make(torch.nn.ReLU)
    torch.manual_seed(1)
    found = make(functools.partial(torch.nn.ReLU, inplace=True))
    x = torch.randn(2, 3, 6, 6)
    before = x.clone()
    assert torch.equal(found(x), expected(x))
    assert torch.equal(x, before)

"""Exported encoders and decoders: their values equal those of the pair, for any number of rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.serialization import export_decoder, export_encoder

ROWS = [1, 2, 7]


def make_pair(guide=pv.guides.AmortizedNormal):
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(3, [5], 6)),
    )
    return model, guide(model, pv.nets.MLP(6, [5]))


def images(rows):
    return torch.rand(rows, 6).round()


def posterior(guide, *args, site="z"):
    return poutine.trace(guide).get_trace(*args).nodes[site]["fn"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", [pv.guides.AmortizedNormal, pv.guides.AmortizedMultivariateNormal]
)
def test_encoder_returns_the_moments_of_the_guide(family, tmp_path):
    model, guide = make_pair(family)
    guide.encoder.append(nn.Dropout(0.5))  # off in the exported program
    export_encoder(tmp_path / "encoder.pt2", model, guide, images(4))
    assert guide.training
    encoder = torch.export.load(tmp_path / "encoder.pt2").module()
    guide.eval()
    for rows in ROWS:
        x = images(rows)
        found, expected = encoder(x), posterior(guide, x)
        assert [*found] == ["z.mean", "z.stddev"]
        close(found["z.mean"], expected.mean)
        close(found["z.stddev"], expected.stddev)


def test_encoder_returns_the_parameters_of_a_guide_without_moments(tmp_path):
    def flow(model, encoder):
        return pv.guides.AmortizedFlow(model, encoder, flow=pv.flows.Planar, length=2)

    model, guide = make_pair(flow)
    encoder = export_encoder(tmp_path / "encoder.pt2", model, guide, images(4)).module()
    for rows in ROWS:
        x = images(rows)
        found = encoder(x)
        assert [*found] == ["parameters"]
        close(found["parameters"], guide.parameters_of(x))


def test_decoder_of_encoder_is_the_reconstruction(tmp_path):
    """A point guide has one z for each x, so pv.reconstruct has no noise."""
    model, guide = make_pair(pv.guides.AmortizedDelta)
    encoder = export_encoder(tmp_path / "encoder.pt2", model, guide, images(4)).module()
    export_decoder(tmp_path / "decoder.pt2", model, guide, images(4))
    decoder = torch.export.load(tmp_path / "decoder.pt2").module()
    for rows in ROWS:
        x = images(rows)
        close(decoder(encoder(x)["z.mean"])["x"], pv.reconstruct(model, guide, x))


def own_pair():
    """Two latents, one in an inner plate, a covariate, two observed sites, and a pyro.param."""
    net = nn.Linear(3, 2)

    def model(x, shift):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("inner", 2, dim=-2):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            loc = net(z) * scale + shift
            pyro.sample("first", dist.Normal(loc, 1.0).to_event(1), obs=x[..., :2])
            last = w.sum(-2, keepdim=True).exp()
            pyro.sample("last", dist.Poisson(last), obs=x[..., 2].expand(last.shape))

    encoder = nn.Linear(4, 3)

    def guide(x, shift):
        pyro.module("encoder", encoder)
        code = encoder(torch.cat([x, shift], -1))
        width = pyro.param("width", torch.tensor(0.1), constraint=dist.constraints.positive)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(code, width).to_event(1))
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("w", dist.LogNormal(code[..., 0], width))

    def closed_form(z, w, shift):
        scale = pyro.param("scale")
        return net(z) * scale + shift, w.sum(-2).exp()

    return model, guide, closed_form, encoder


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="exports need torch 2.13",
)
def test_plain_functions_with_their_fitted_parameters(tmp_path):
    model, guide, closed_form, encoder = own_pair()
    x, shift = torch.randn(20, 3).abs().round(), torch.randn(20, 1)
    fit = pv.fit(model, guide, (x, shift), epochs=2, learning_rate=0.1, batch_size=20,
                 capture=False, progress=False, seed=0)  # fmt: skip
    assert fit.history.loss.notna().all()
    args = (model, guide, x[:3], shift[:3])
    of_x = export_encoder(tmp_path / "encoder.pt2", *args).module()
    of_z = export_decoder(tmp_path / "decoder.pt2", *args).module()
    for rows in ROWS:
        x, shift = torch.randn(rows, 3), torch.randn(rows, 1)
        z, w = torch.randn(rows, 3), torch.randn(2, rows)
        with torch.no_grad(), pv.parameter_store(model, guide):
            assert pyro.param("scale") != 0.5  # of the fit
            first, last = closed_form(z, w, shift)
            code, width = encoder(torch.cat([x, shift], -1)), pyro.param("width")
        found = of_z(z, w, shift)
        close(found["first"], first)
        close(found["last"].squeeze(), last.squeeze())
        found = of_x(x, shift)
        close(found["z.mean"], code)
        close(found["z.stddev"], width.expand(rows, 3))
        close(found["w.mean"], dist.LogNormal(code[:, 0], width).mean.expand(2, rows))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_matches_the_pair_for_any_number_of_rows(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, guide = make_pair()
    export_encoder(tmp_path / "encoder.onnx", model, guide, images(4))
    export_decoder(tmp_path / "decoder.onnx", model, guide, images(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx"]
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    assert "RandomNormal" not in str((tmp_path / "encoder.onnx").read_bytes())
    for rows in ROWS:
        x, z = images(rows), torch.randn(rows, 3)
        q = posterior(guide, x)
        mean, stddev = encoder.run(["z.mean", "z.stddev"], {"x": x.numpy()})
        close(torch.tensor(mean), q.mean.detach())
        close(torch.tensor(stddev), q.stddev.detach())
        (image,) = decoder.run(["x"], {"z": z.numpy()})
        close(torch.tensor(image), model.likelihood(z).mean.detach())


@pytest.mark.parametrize("kind", ["VampPrior", "AggregatedPosterior"])
def test_decoders_of_models_whose_prior_runs_a_guide(kind, tmp_path):
    """The latents are given, so the density of the prior is not needed."""
    model, guide = make_pair(pv.guides.AmortizedFlow)
    x = images(5)
    guide(x)
    if kind == "VampPrior":
        prior = pv.priors.VampPrior(3, pseudo_inputs=images(4))
    else:
        prior = pv.priors.AggregatedPosterior(guide, x)
    model = pv.LatentVariableModel(prior, model.likelihood)
    guide = pv.guides.AmortizedFlow(model, pv.nets.MLP(6, [5]))
    if kind == "VampPrior":
        prior.bind_guide(guide)
    module = export_decoder(tmp_path / "decoder.pt2", model, guide, x).module()
    for rows in ROWS:
        z = torch.randn(rows, 3)
        close(module(z)["x"], model.likelihood(z).mean.detach())
    # Afterwards the prior has its own density.
    assert not torch.allclose(
        prior().log_prob(z), dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(z)
    )


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="exports need torch 2.13",
)
@pytest.mark.parametrize("part", ["export", "onnx"])
def test_errors_of_an_old_torch_name_the_version_that_is_needed(part, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise TypeError("export() got an unexpected keyword argument")

    if part == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
        monkeypatch.setattr(torch.onnx, "export", refuse)
    else:
        monkeypatch.setattr(torch.export, "export", refuse)
    file = tmp_path / f"decoder.{'onnx' if part == 'onnx' else 'pt2'}"
    error = TypeError if part == "onnx" else ValueError  # of the program, with a new torch
    with pytest.raises(error, match="unexpected keyword") as caught:
        export_decoder(file, *make_pair(), images(4))
    assert "update torch" not in str(caught.value)
    for version in ("2.4.1", "2.12.0+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        message = rf"unexpected keyword.*update torch: .* torch 2\.13 and newer, and {version[:5]}"
        with pytest.raises(ValueError, match=message):
            export_decoder(file, *make_pair(), images(4))
    assert not [*tmp_path.iterdir()]


def simple(x, rows=lambda x: x.shape[0], loc=lambda z, x: z):
    with pyro.plate("data", rows(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc(z, x), 1.0).to_event(1), obs=x)


def of_length(x):
    simple(x, rows=len)


def autoregressive(x):
    simple(x, loc=lambda z, x: z + x.roll(1, -1).tril())


def global_latent(x):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    simple(x, loc=lambda z, x: z + shift)


def cauchy(x):
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("x", dist.Cauchy(z, 1.0).to_event(1), obs=x)


def simple_guide(x):
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def global_guide(x):
    pyro.sample("shift", dist.Normal(0.0, 1.0))
    simple_guide(x)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (of_length, simple_guide, r"Take the number of rows from x\.shape\[0\]"),
        (autoregressive, simple_guide, r"E\[x\|z\] depends on x itself"),
        (global_latent, global_guide, "sites other than the latents of data points"),
        (cauchy, simple_guide, "observed site 'x' has no closed-form mean"),
    ],
)
def test_models_that_are_no_function_of_z_are_refused(model, guide, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_decoder(tmp_path / "decoder.pt2", model, guide, torch.randn(4, 6))
    assert not [*tmp_path.iterdir()]


def chain_model(x):
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(z, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(y, 1.0).to_event(1), obs=x)


def chain_guide(x):
    with pyro.plate("data", x.shape[0]):
        y = pyro.sample("y", dist.Normal(x, 1.0).to_event(1))
        pyro.sample("z", dist.Normal(y, 1.0).to_event(1))


def test_guides_that_are_no_function_of_x_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"depends on samples of other sites.* at site 'z'"):
        export_encoder(tmp_path / "encoder.pt2", chain_model, chain_guide, torch.randn(4, 6))


def test_files_are_replaced_only_on_request_and_as_a_whole(tmp_path, monkeypatch):
    pair, file = make_pair(), tmp_path / "encoder.pt2"
    with pytest.raises(ValueError, match=r"must end with \.pt2 or \.onnx, got 'encoder\.pt'"):
        export_encoder("encoder.pt", *pair, images(4))
    file.write_bytes(b"before")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        export_encoder(file, *pair, images(4))

    def fail(exported, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            export_encoder(file, *pair, images(4), overwrite=True)
    assert file.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [file]
    export_encoder(file, *pair, images(1), overwrite=True)
    assert torch.export.load(file).module()(images(5))["z.mean"].shape == (5, 3)


def test_angles_are_exported_with_their_mean_directions(tmp_path):
    """The attributes of torch are a location on any turn, and the root of a circular variance."""
    net = nn.Linear(3, 1)

    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            components = dist.VonMises(torch.stack([z + 9.0, z + 10.0], -1), 20.0)
            weights = dist.Categorical(torch.ones_like(components.loc))
            angle = dist.MixtureSameFamily(weights, components)
            pyro.sample("x", angle, obs=x[:, 0])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.VonMises(10.0 + net(x)[:, 0], 20.0))

    x = torch.randn(4, 3)
    encoder = export_encoder(tmp_path / "encoder.pt2", model, guide, x).module()
    decoder = export_decoder(tmp_path / "decoder.pt2", model, guide, x).module()
    found, expected = encoder(x), pv.encode(model, guide, x)
    close(found["z.mean"], expected.mean)
    close(found["z.stddev"], expected.std)
    shifted = found["z.mean"] + 9.5
    close(decoder(found["z.mean"])["x"], torch.atan2(shifted.sin(), shifted.cos()))


class WithBounds(nn.Module):
    """A likelihood whose support depends on the latents."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def forward(self, z):
        return dist.Uniform(-9.0, 9.0 + self.decoder(z).exp()).to_event(1)


def test_a_support_whose_bounds_depend_on_latents_is_exported(tmp_path):
    x = torch.rand(20, 3)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), WithBounds())
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(3, [4]))
    guide(x)
    program = pv.serialization.export_decoder(tmp_path / "decoder.pt2", model, guide, x)
    z = torch.randn(7, 2)
    torch.testing.assert_close(program.module()(z)["x"], model.likelihood(z).mean)

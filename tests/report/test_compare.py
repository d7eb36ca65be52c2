import dataclasses
import math
import warnings

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from rich.console import Console

import pyro_vae as pv
from pyro_vae._programs.pair_state import changed, digests
from pyro_vae.evaluation._surgery import code_scores
from pyro_vae.plots import learning_curves


@pytest.fixture(scope="module")
def comparison():
    torch.manual_seed(0)
    left = torch.arange(16) < 8
    rows = torch.where(torch.rand(160, 1) < 0.5, left, ~left)
    x = torch.bernoulli(torch.where(rows, 0.9, 0.1))
    train, test = x[:100], x[100:]
    fits = {}
    for name, epochs in (("short", 1), ("long", 60)):
        torch.manual_seed(1)
        fits[name] = pv.fit(
            *make_pair(), train, validation=test, epochs=epochs, batch_size=20,
            learning_rate=0.02, seed=0, progress=False,
        )  # fmt: skip
    pairs = {**fits, "as programs": (fits["long"].model, fits["long"].guide)}
    return pv.compare(pairs, test, train=train, num_particles=200, image_shape=(4, 4))


def test_entries_are_sorted_and_differences_are_paired(comparison):
    assert [e.name for e in comparison.entries] == ["long", "as programs", "short"]
    for same in ("long", "as programs"):  # the same samples
        found = comparison.difference(same)
        assert (found.mean, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)
    found = comparison.difference("short")
    values = {e.name: e.log_evidence[0] for e in comparison.entries}
    paired = values["short"] - values["long"]
    assert found.mean == pytest.approx(paired.mean().item())
    assert found.standard_error == pytest.approx((paired.std() / math.sqrt(60)).item())
    assert found.mean < -4 * found.standard_error
    assert comparison.difference("long", "short").mean == -found.mean
    assert comparison.best == ["long", "as programs"]
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'nobody'"):
        comparison.difference("nobody")


def test_dataframe_matches_the_results(comparison):
    frame = comparison.to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    entry = comparison.entries[0]
    row = frame.loc[entry.name]
    (run,) = entry.runs
    assert row.log_evidence == pytest.approx(run.evidence.mean)
    assert row.standard_error == pytest.approx(run.evidence.standard_error)
    assert row.test_elbo == run.evidence.elbo < row.log_evidence
    assert row.gap == pytest.approx(row.log_evidence - row.test_elbo)
    assert row.unreliable_share == run.evidence.unreliable_share
    assert row.mutual_information == run.surgery.mutual_information
    assert row.active_units == run.collapse.num_active
    assert row.log_n == pytest.approx(math.log(100))
    assert row.epochs == 60
    assert row.num_parameters == sum(
        p.numel() for m in (run.fit.model, run.fit.guide) for p in m.parameters()
    )
    assert frame.loc["as programs"].epochs == 0
    assert math.isnan(frame.loc["as programs"].seconds)


def test_table_fits_eighty_columns(comparison):
    text = str(comparison)
    for entry in comparison.entries:
        assert f"{entry.mean.mean:.2f}±{entry.mean.standard_error:.2f}" in text
        assert f"{entry.term('mutual_information'):.2f}" in text
    assert "…" not in text
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines[: lines.index("", 2)]) <= 80


def test_a_narrow_table_folds_names_and_keeps_all_digits(comparison):
    entry = dataclasses.replace(comparison.entries[0], name="a long name of several words " * 2)
    texts = {}
    for width in (40, 80, 300):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(dataclasses.replace(comparison, entries=(entry,)))
        texts[width] = capture.get()
    shown = f"{entry.mean.mean:.2f}±{entry.mean.standard_error:.2f}"
    assert shown in texts[80]
    assert shown in texts[300]
    digits = {width: sorted(filter(str.isdigit, text)) for width, text in texts.items()}
    assert digits[40] == digits[80] == digits[300]


def test_table_prints_markup_in_names_literally(binary):
    assert "[red]x" in str(pv.compare({"[red]x": make_pair()}, binary, num_particles=3))


def test_pair_without_surgery_is_noted_and_the_others_compared(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    radial = dist.transforms.Radial(1)

    def guide(x):  # a flow that Pyro can score only at its own samples
        with pyro.plate("data", len(x)):
            base = dist.Normal(x / 2, 0.7).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [radial]))

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    comparison = pv.compare(
        {"radial": (model, guide), "plain": (model, plain)}, torch.randn(30, 1), num_particles=50
    )
    (entry,) = (e for e in comparison.entries if e.name == "radial")
    assert entry.runs[0].surgery is None
    assert "guide site 'z' cannot be scored" in entry.runs[0].note
    assert math.isnan(comparison.to_dataframe().loc["radial"].rate)
    text = comparison.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "radial has no ELBO surgery" in text
    assert "-" in str(comparison)


def test_surgery_of_a_part_of_the_codes_is_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(code_scores, "_PAIRS", 100)
    monkeypatch.setattr(code_scores, "_FEWEST_BY_DEFAULT", 40)
    x, pairs = torch.bernoulli(torch.full((60, 16), 0.4)), {}
    for name, kind in [("flow", pv.guides.AmortizedFlow), ("normal", pv.guides.AmortizedNormal)]:
        likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 16))
        model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
        pairs[name] = model, kind(model, pv.nets.MLP(16, [4]))
    comparison = pv.compare(pairs, x, num_particles=30)
    (note,) = [note for note in comparison.notes if "mutual information" in note]
    assert "of 'flow' are estimated from the samples of 40 data points" in note
    page = comparison.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "samples of 40 data points" in page
    pairs.pop("flow")
    assert "samples of" not in " ".join(pv.compare(pairs, x, num_particles=30).notes)


def test_every_pair_is_checked_before_any_is_evaluated(binary, monkeypatch):
    evaluated = []
    monkeypatch.setattr("pyro_vae.report._compare.evidence", lambda *a, **k: evaluated.append(a))
    with pytest.raises(ValueError, match="the guide cannot run on data x"):
        pv.compare({"good": make_pair(), "bad": make_pair(data=9)}, binary)
    assert evaluated == []


def test_only_parameters_of_the_pair_are_counted():
    linear = torch.nn.Linear(1, 4)

    def model(x):
        pyro.module("linear", linear)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("l", torch.zeros(1)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(linear(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))

    pyro.param("unrelated", torch.zeros(1000))
    comparison = pv.compare({"a": (model, guide)}, torch.randn(5, 4), num_particles=3)
    assert comparison.entries[0].num_parameters == 9


def test_compare_refuses_pairs_and_image_shapes_that_do_not_fit(binary):
    with pytest.raises(TypeError, match="pairs must be a dictionary"):
        pv.compare([make_pair()], binary)
    with pytest.raises(ValueError, match=r"image_shape \(3, 3\) does not fit"):
        pv.compare({"a": make_pair()}, binary, image_shape=(3, 3))
    assert pv.compare({1: make_pair()}, binary, num_particles=2).entries[0].name == "1"


def test_model_that_does_not_observe_x_is_compared_without_pictures(tmp_path):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + x[:, :2], 1.0).to_event(1), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((y - x[:, :2]) / 2, 1.0).to_event(1))

    data = (torch.randn(20, 4), torch.randn(20, 2))
    comparison = pv.compare({"a": (model, guide)}, data, num_particles=50, image_shape=(2, 2))
    assert comparison.entries[0].pictures is None
    assert comparison.to_html(tmp_path / "p.html").read_text(encoding="utf-8").count("<img") == 2


def options(**changes):
    return {"epochs": 2, "batch_size": 25, "learning_rate": 0.02, "seed": 0, "progress": False} | (
        changes
    )


def other_guide(model, encoder=None):
    return pv.guides.AmortizedNormal(model, encoder or pv.nets.MLP(16, [4]))


def test_two_fits_of_one_pair_are_refused(binary):
    model, guide = make_pair()
    first = pv.fit(model, guide, binary, **options())
    later = pv.fit(model, guide, binary, objective=pv.objectives.IWAE(3), **options())
    with pytest.raises(ValueError, match=r"'first' differs from .* its fit: .* 'later' shares"):
        pv.compare({"first": first, "later": later}, binary, num_particles=3)
    with pytest.raises(ValueError, match=r"weight has changed since\. A fit trains its pair"):
        pv.compare({"first": first}, binary, num_particles=3)
    pv.compare({"later": later, "again": later, "now": (model, guide)}, binary, num_particles=3)


@pytest.mark.parametrize("as_fits", [True, False], ids=["fits", "programs"])
def test_one_model_with_two_guides_is_refused_unless_frozen(as_fits, binary):
    def pairs():
        found = {"a": pv.fit(model, guide, binary, **options())}
        if frozen:
            model.requires_grad_(False)
        found["b"] = pv.fit(model, other_guide(model), binary, **options())
        return found if as_fits else {n: (fit.model, fit.guide) for n, fit in found.items()}

    frozen = False
    model, guide = make_pair()
    with pytest.raises(
        ValueError, match=r"'a' differs .*: model\.\S+ has changed .* 'b' shares it"
    ):
        pv.compare(pairs(), binary, num_particles=3)
    frozen = True
    model, guide = make_pair()
    pv.compare(pairs(), binary, num_particles=3)


def test_one_encoder_in_two_guides_is_refused(binary):
    first, second, encoder = make_pair()[0], make_pair()[0], pv.nets.MLP(16, [4])
    fits = {
        name: pv.fit(model, other_guide(model, encoder), binary, **options())
        for name, model in (("a", first), ("b", second))
    }
    with pytest.raises(ValueError, match=r"'a' differs .*: guide\.encoder\.\S+ has changed"):
        pv.compare(fits, binary, num_particles=3)


def bare_pair():
    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 16), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.5))

    return model, guide


def test_fits_that_share_pyro_params_are_refused(binary):
    model, guide = bare_pair()
    fits = {name: pv.fit(model, guide, binary, **options()) for name in "ab"}
    with pytest.raises(ValueError, match=r"'a' differs .*: param\.loc has changed since, and 'b'"):
        pv.compare(fits, binary, num_particles=3)
    apart = {name: pv.fit(*bare_pair(), binary, **options()) for name in "ab"}
    pv.compare(apart, binary, num_particles=3)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))

    fit = apart["a"]
    pv.compare({"fitted": fit, "naive": (fit.model, prior)}, binary, num_particles=3)


def test_running_averages_changed_by_a_later_fit_are_refused(binary):
    """The model's parameters are frozen, but not the running averages of its batch norm."""
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8, affine=False))
    decoder.append(torch.nn.Linear(8, 16)).requires_grad_(False)
    likelihood = pv.likelihoods.Bernoulli(decoder)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    fits = {name: pv.fit(model, other_guide(model), binary, **options()) for name in "ab"}
    with pytest.raises(ValueError, match=r"running_mean has changed since, and 'b' shares it"):
        pv.compare(fits, binary, num_particles=3, vectorize_particles=False)


def test_pairs_trained_by_pyro_must_not_share_parameters(binary):
    model, guide = make_pair()
    pairs = {"a": (model, guide), "b": (model, other_guide(model))}
    for pair in pairs.values():
        svi = pyro.infer.SVI(*pair, pyro.optim.Adam({"lr": 0.01}), pv.objectives.ELBO())
        svi.step(binary)
    with pytest.raises(ValueError, match=r"'a' and 'b' share model\.\S+, which both may have"):
        pv.compare(pairs, binary, num_particles=3)
    model.requires_grad_(False)
    pv.compare(pairs, binary, num_particles=3)


def test_fit_changed_by_pyro_warns(binary):
    fit = pv.fit(*make_pair(), binary, **options())
    svi = pyro.infer.SVI(fit.model, fit.guide, pyro.optim.Adam({}), pv.objectives.ELBO())
    svi.step(binary)
    with pytest.warns(UserWarning, match="'a' differs from .* its fit: .* with its current values"):
        pv.compare({"a": fit}, binary, num_particles=3)


def test_buffers_changed_by_evaluation_do_not_warn(binary):
    def count(module):
        module.runs += 1

    model, guide = make_pair()
    guide.encoder.register_buffer("runs", torch.zeros(()))
    guide.encoder.register_forward_hook(lambda module, *_: count(module))
    pairs = {"a": pv.fit(model, guide, binary, **options())}
    pv.evidence(model, guide, binary, num_particles=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pv.compare(pairs, binary, num_particles=100)


def test_fitted_pair_may_be_evaluated_and_change_dtype(binary):
    fit = pv.fit(*make_pair(), binary, **options())
    pv.evidence(fit.model, fit.guide, binary, num_particles=3)
    fit.model.double(), fit.guide.double()
    pv.compare({"a": fit}, binary.double(), num_particles=3)


def test_changed_detects_any_single_change():
    """Change the last bit of one entry, and swap two rows."""
    values = torch.randn(50, 3)
    model, guide = make_pair()
    encoder = guide.encoder
    encoder.register_buffer("values", values.clone())
    before = digests(model, guide)
    assert changed(model, guide, before) == []
    for number in torch.randint(150, (20,)).tolist():
        flat = values.clone().flatten()
        flat[number] = torch.nextafter(flat[number], torch.tensor(10.0))
        encoder.values = flat.reshape(50, 3)
        assert changed(model, guide, before) == ["guide.encoder.values"]
    encoder.values = values[torch.tensor([1, 0, *range(2, 50)])]
    assert changed(model, guide, before) == ["guide.encoder.values"]
    encoder.values = values.clone()
    assert changed(model, guide, before) == []


def linear_gaussian(loc):
    """Return a model with mean ``loc`` and its exact posterior: x ~ N(loc, 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + loc) / 2, 0.5**0.5))

    return model, guide


def test_runs_of_a_method_are_averaged_and_paired_by_seed():
    x = 2**0.5 * torch.randn(60).double()

    def fits(locs, seeds):
        empty = pd.DataFrame({"loss": [0.0], "validation_loss": [0.0]})
        return [
            pv.training.Fit(*linear_gaussian(loc), empty, 1, 1.0, "eager", seed=seed)
            for loc, seed in zip(locs, seeds, strict=True)
        ]

    a, b = [0.1, 0.2, 0.4], [0.5, 0.7, 0.6]
    pairs = {"a": fits(a, [0, 1, 2]), "b": fits(b, [2, 0, 1]), "c": fits(b, [5, 0, 1])}
    comparison = pv.compare(pairs, x, num_particles=30)

    def exact(locs):
        return torch.stack([dist.Normal(loc, 2**0.5).log_prob(x) for loc in locs])

    entries = {entry.name: entry for entry in comparison.entries}
    torch.testing.assert_close(entries["a"].log_evidence, exact(a))
    torch.testing.assert_close(entries["b"].log_evidence, exact([0.7, 0.6, 0.5]))
    assert entries["b"].seeds == [0, 1, 2]
    frame = comparison.to_dataframe()
    assert frame.loc["b"].runs == 3
    assert frame.loc["b"].log_evidence == pytest.approx(exact(b).mean().item())
    assert frame.loc["b"].gap == pytest.approx(0.0, abs=1e-9)
    paired = (exact(a) - exact([0.7, 0.6, 0.5])).mean(1)
    found = comparison.difference("a", "b")
    assert found.has_replicates
    assert found.mean == pytest.approx(paired.mean().item())
    assert found.standard_error >= (paired.std() / 3**0.5).item()
    assert comparison.difference("a", "c").standard_error != found.standard_error  # other seeds
    assert comparison.notes == []


def test_a_method_with_one_run_has_a_note():
    x = torch.randn(30)
    pairs = {"one": linear_gaussian(0.0), "two": [linear_gaussian(0.1), linear_gaussian(0.2)]}
    comparison = pv.compare(pairs, x, num_particles=30)
    assert comparison.notes[0].startswith("One run of 'one'")
    assert "One run of 'one'" in str(comparison)
    assert not comparison.difference("one", "two").has_replicates


def test_runs_with_the_same_seed_have_a_note(binary):
    """They have the same order of the data and the same noise, so their spread is too small."""
    torch.manual_seed(0)
    fits = [pv.fit(*make_pair(), binary, **options()) for _ in range(2)]
    assert fits[0].seed == fits[1].seed
    notes = pv.compare({"a": fits}, binary, num_particles=3).notes
    assert any(note.startswith("Runs of 'a' have the same seed") for note in notes)
    assert any(note.startswith("Two runs of 'a'") for note in notes)


def test_runs_with_equal_parameters_are_refused(binary):
    def same_fit():
        torch.manual_seed(0)
        return pv.fit(*make_pair(), binary, **options())

    with pytest.raises(ValueError, match="'a, run 1' and 'a, run 2' have equal parameters"):
        pv.compare({"a": [same_fit(), same_fit()]}, binary, num_particles=3)
    pv.compare({"a": same_fit(), "b": same_fit()}, binary, num_particles=3)  # a control may tie


def test_names_that_are_equal_as_text_are_refused(binary):
    with pytest.raises(ValueError, match=r"must differ as text, got \[1, '1'\]"):
        pv.compare({1: make_pair(), "1": make_pair()}, binary, num_particles=3)


def not_finite_above_100(value):
    """Return a pair whose log p(x) has this value if x is above 100."""

    class Broken(dist.Normal):
        def log_prob(self, x):
            return torch.where(x > 100, value, super().log_prob(x))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Broken(z, 1.0), obs=x)

    _, guide = linear_gaussian(0.0)
    return model, guide


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_method_without_a_finite_log_evidence_is_last_and_not_among_the_best(value):
    x = torch.randn(120)
    x[110] = 101.0  # in the second minibatch
    pairs = {"broken": not_finite_above_100(value), "far": linear_gaussian(9.0)}
    pairs["near"] = linear_gaussian(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.evaluation.UnreliableEvidence)
        comparison = pv.compare(pairs, x, num_particles=30)
    assert comparison.entries[-1].name == "broken"
    assert "broken" not in comparison.best
    assert any("log p(x) of 'broken' is NaN or infinite" in note for note in comparison.notes)


def test_one_held_out_row_has_no_error():
    pairs = {"one": linear_gaussian(0.0), "two": linear_gaussian(0.1)}
    comparison = pv.compare(pairs, torch.randn(1), num_particles=30)
    assert "nan" not in str(comparison)
    assert any("only one held-out data point" in note for note in comparison.notes)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize("particles", [20, 21])
def test_khat_needs_21_particles_in_all_texts(particles, tmp_path):
    model, guide = linear_gaussian(0.3)
    x, available = torch.randn(30), particles == 21
    found = pv.compare({"a": (model, guide)}, x, num_particles=particles, seed=0)
    estimate = pv.evidence(model, guide, x, num_particles=particles, seed=0)
    gaps = pv.inference_gaps(model, guide, x, num_particles=particles, seed=0)
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert found.to_dataframe().unreliable_share.notna().all() == available
    assert math.isnan(estimate.unreliable_share) != available
    for text in (repr(found), page):
        assert ("it needs at least 21" in " ".join(text.split()).lower()) != available
        assert "100.0%" not in text
    for each in (estimate, gaps):
        assert ("k-hat: not available, needs 21 samples" in repr(each)) != available
    few = pv.diagnose(model, guide, x, x, num_particles=particles, refit=False)
    assert ("k-hat" in few["unreliable log p(x)"].note) == available


def test_unreliable_estimates_have_a_note():
    model, _ = linear_gaussian(0.0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 2, 0.2))  # narrow, and far from the posterior

    x = torch.randn(30)
    with pytest.warns(pv.evaluation.UnreliableEvidence):
        comparison = pv.compare({"narrow": (model, guide)}, x, num_particles=500)
    assert "method=pv.evaluation.AIS()" in comparison.notes[-1]
    chains = pv.evaluation.AIS(num_temperatures=5, num_chains=5, start="prior", pilot=2)
    by_chains = pv.compare({"narrow": (model, guide)}, x, method=chains)
    assert by_chains.entries[0].runs[0].evidence.method == "ais"
    assert math.isnan(by_chains.to_dataframe().loc["narrow"].test_elbo)


def test_the_same_pair_twice_in_a_method_is_refused(binary):
    fit = pv.fit(*make_pair(), binary, **options())
    with pytest.raises(ValueError, match="runs 'a, run 1' and 'a, run 2' are the same pair"):
        pv.compare({"a": [fit, fit]}, binary, num_particles=3)
    with pytest.raises(ValueError, match="method 'a' must have at least one run"):
        pv.compare({"a": []}, binary)
    with pytest.raises(ValueError, match="pair 'a' must be"):
        pv.compare({"a": 3}, binary)


def test_learning_curves_are_elbos_of_the_validation_data(binary):
    held_out = {"validation": binary[:20]}
    torch.manual_seed(3)
    fits = {
        "elbo": [pv.fit(*make_pair(), binary, **options(seed=s, **held_out)) for s in (0, 1)],
        "iwae": pv.fit(
            *make_pair(), binary, objective=pv.objectives.IWAE(5), **options(**held_out)
        ),
        "alone": pv.fit(*make_pair(), binary, **options()),
    }
    comparison = pv.compare(fits, binary, num_particles=3)
    (axes,) = learning_curves(comparison).axes
    drawn = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert drawn["iwae"] == fits["iwae"].history.validation_elbo.tolist()
    assert drawn["elbo"] == fits["elbo"][0].history.validation_elbo.tolist()
    assert fits["elbo"][1].history.validation_elbo.tolist() in drawn.values()
    assert drawn["alone (objective on training data)"] == (-fits["alone"].history.loss).tolist()
    assert "ELBO of the validation data" in axes.get_ylabel()
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(shown) == ["alone (objective on training data)", "elbo", "iwae"]


def test_learning_curves_without_validation_are_the_objectives(binary):
    fit = pv.fit(*make_pair(), binary, **options(epochs=30))
    (axes,) = learning_curves(pv.compare({"a": fit}, binary, num_particles=3)).axes
    assert axes.get_ylabel().startswith("bound (objective on training data)")
    late = -fit.history.loss.iloc[3:]
    low, high = axes.get_ylim()
    assert low < late.min() < late.max() < high


def test_learning_curves_of_an_older_history(binary):
    """Saved histories may lack the ELBO, and an ELBO may be infinite."""
    one, other = (
        pv.fit(*make_pair(), binary, validation=binary, **options(epochs=4)) for _ in range(2)
    )
    old = dataclasses.replace(one, history=one.history.drop(columns="validation_elbo"))
    other.history.loc[2, "validation_elbo"] = -math.inf
    comparison = pv.compare({"old": old, "new": other}, binary, num_particles=3)
    (axes,) = learning_curves(comparison).axes
    labels = {line.get_label() for line in axes.lines}
    assert labels == {"old (objective on training data)", "new"}
    assert all(math.isfinite(limit) for limit in axes.get_ylim())

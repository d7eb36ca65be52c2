"""The command line: the built-in comparison, a user's own pairs, data files, saved pairs."""

import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from new_processes import run_python
from typer.testing import CliRunner

import pyro_vae as pv
from pyro_vae import cli
from pyro_vae.cli import _data, _results
from pyro_vae.report import LedgerEntry

NAMES = ("baseline", "objective: IWAE-3", "guide: flow", "prior: mixture",
         "control: MeanFieldELBO")  # fmt: skip
FOLDERS = ("baseline", "objective-IWAE-3", "guide-flow", "prior-mixture",
           "control-MeanFieldELBO")  # fmt: skip
FAST = ("--epochs", "2", "--evidence-particles", "30")
SMALL = (*FAST, "--hidden", "8", "--latents", "2", "--particles", "3")

OWN = """
import torch
import pyro
import pyro.distributions as dist
import pyro_vae as pv


def make_pair(scale=1.0):
    decoder = torch.nn.Linear(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(3, [4]))


def pairs(train):
    assert train.shape[1:] == (3,)
    return {
        "narrow": make_pair(),
        "objective: IWAE": (*make_pair(), {"objective": pv.objectives.IWAE(2), "epochs": 1}),
    }


def one():
    return {"only": make_pair()}


shared = make_pair()
shared_network = torch.nn.Linear(2, 3)


def same_networks():
    return {"shared": shared}


def two_arguments(train, test):
    return {}


def a_pair():
    return make_pair()


def nothing():
    pass


def empty():
    return {}


def not_a_pair():
    return {"a": make_pair()[0]}


def no_guide():
    return {"a": (make_pair()[0], None)}


def wrong_option():
    return {"a": (*make_pair(), {"object": 3})}


def options_of_another_type():
    return {"a": (*make_pair(), "IWAE")}


def fails():
    return {"a": make_pair(scale=dict()["scale"])}


def another_site():
    model, _ = make_pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    return {"a": (model, guide)}


number = 3
"""


@dataclass
class Call:
    """The arguments of a call of pv.diagnose."""

    model: object
    guide: object
    train: torch.Tensor
    test: torch.Tensor
    seed: int

    def diagnosis(self):
        """Return a diagnosis with the measured log p(x), and with chosen losses."""
        found = pv.evidence(
            self.model, self.guide, self.test, num_particles=30, seed=self.seed, progress=False
        )
        entries = (
            LedgerEntry("log p(x), test", found.mean, found.standard_error, f"seed {self.seed}"),
            LedgerEntry("mutual information", math.nan, math.nan, "not measured"),
            LedgerEntry("prior gain", 0.10, 0.01, ""),
            LedgerEntry("amortization gap, training", 0.06, 0.01, ""),
            LedgerEntry("unreliable log p(x)", 0.0, math.nan, "", "share"),
        )
        return pv.report.Diagnosis(entries, len(self.train), len(self.test))


@pytest.fixture(autouse=True)
def diagnoses(monkeypatch):
    """Replace pv.diagnose, which takes minutes; list the diagnoses that were made."""
    found = []

    def diagnose(model, guide, train, test, *, seed, **options):
        found.append(Call(model, guide, train, test, seed))
        return found[-1].diagnosis()

    monkeypatch.setattr(pv, "diagnose", diagnose)
    return found


@pytest.fixture(autouse=True)
def modules_of_users(monkeypatch):
    """Forget the modules and search paths of a test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("mypa", "nomodule", "broken", "late")):
            del sys.modules[name]


def run(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    return (torch.randn(60, 2) @ torch.randn(2, 3) + torch.randn(60, 3)).numpy()


@pytest.fixture
def place(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypairs.py").write_text(OWN, encoding="utf-8")
    np.save(tmp_path / "x.npy", rows)
    return tmp_path


def fails(capsys, monkeypatch, *arguments):
    """Run the program, check that it ends with one line on stderr, and return the line."""
    monkeypatch.setattr(sys, "argv", ["pyro-vae", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    return message


def numbers_of(folder):
    """Return the results of a command without the facts that differ between two runs."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "facts"}


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    """Run the comparison of the built-in pairs once, with two seeds."""
    folder = tmp_path_factory.mktemp("built_in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pv,
            "diagnose",
            lambda m, g, train, test, *, seed, **_: Call(m, g, train, test, seed).diagnosis(),
        )
        result = run("compare", *SMALL, "--seeds", "2", "--output", folder / "out put")
    assert result.exit_code == 0, result.output
    return result.output, folder / "out put"


def test_compare_prints_the_diagnosis_first(built_in):
    output, _ = built_in
    parts = [
        "Diagnosis of baseline, seed 0",
        "300 test and 1297 training data points",
        "Comparison",
        "300 held-out data points",
        "Differences from baseline",
        '"prior: a better one gains up to 0.10',
        "not tested here",
        "Results: ",
        "Time: ",
    ]
    places = [output.index(part) for part in parts]
    assert places == sorted(places)
    for name in NAMES:
        assert name in output


def test_compare_writes_a_page_a_table_and_all_numbers(built_in):
    _, folder = built_in
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert page.count("<img") == 5
    table = pd.read_csv(folder / "table.csv", index_col="name")
    assert sorted(table.index) == sorted(NAMES)
    assert set(table.runs) == {2}
    assert "seconds" not in table
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    facts = content["facts"]
    assert facts["data set"] == "digits, binarized once"
    assert "1,297 training, 200 validation and 300 test data points" in facts["sizes"]
    assert facts["command"].startswith("pyro-vae compare --latents 2 --hidden 8 --particles 3")
    assert facts["command"].endswith(f"--output '{folder}'")
    assert facts["seeds"] == "0, 1"
    for fact in (*facts.values(), content["diagnosis"]["verdict"][0], content["advice"][0]):
        assert fact in page
    assert content["diagnosis"]["entries"][1]["value"] is None  # NaN
    rows = {row["name"]: row for row in content["comparison"]["methods"]}
    for name in NAMES:
        assert rows[name]["log_evidence"] == pytest.approx(table.loc[name, "log_evidence"])
        of_runs = [run for run in content["runs"] if run["name"] == name]
        assert [run["seed"] for run in of_runs] == [0, 1]
        mean = np.mean([run["log_evidence"] for run in of_runs])
        assert rows[name]["log_evidence"] == pytest.approx(mean)
    changes = {row["name"]: row["difference"] for row in content["differences"]["methods"]}
    assert sorted(changes) == sorted(NAMES[1:])
    for name, change in changes.items():
        difference = rows[name]["log_evidence"] - rows["baseline"]["log_evidence"]
        assert change == pytest.approx(difference)


def test_pairs_of_the_first_seed_are_saved(built_in, diagnoses):
    _, folder = built_in
    assert sorted(p.name for p in (folder / "pairs").iterdir()) == sorted(FOLDERS)
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    test = pv.datasets.load("digits").test
    for name, place in zip(NAMES, FOLDERS, strict=True):
        saved = pv.load(folder / "pairs" / place)
        assert saved.notes["name"] == name
        assert saved.notes["seed"] == 0
        found = pv.evidence(saved.model, saved.guide, test, num_particles=30, seed=0)
        (row,) = (r for r in content["runs"] if (r["name"], r["seed"]) == (name, 0))
        assert found.mean == pytest.approx(row["log_evidence"], rel=1e-5)
    result = run("diagnose", folder / "pairs" / "prior-mixture", "--output", folder / "diagnosis")
    assert result.exit_code == 0, result.output
    assert "300 test and 1297 training data points" in result.output
    assert torch.equal(diagnoses[-1].test, test)
    table = pd.read_csv(folder / "diagnosis" / "diagnosis.csv", index_col="name")
    entries = numbers_of(folder / "diagnosis")["diagnosis"]["entries"]
    assert entries[0]["value"] == pytest.approx(table.value.iloc[0])


def test_pairs_start_from_the_same_weights():
    from pyro_vae.cli._arms import arms

    starts = []
    for arm in arms(64, 4, 8, 3):
        torch.manual_seed(3)
        model, guide = arm.make_pair()
        weights = [model.likelihood.state_dict(), guide.encoder.state_dict()]
        starts.append({f"{i} {n}": v for i, each in enumerate(weights) for n, v in each.items()})
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(value, starts[0][name]) for name, value in start.items())


@pytest.mark.slow
def test_a_seed_fixes_every_number(built_in, tmp_path):
    """Run again beside three busy processes, and with other workers' order."""
    import subprocess

    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        result = run("compare", *SMALL, "--seeds", "2", "--output", tmp_path / "again")
    finally:
        for process in busy:
            process.kill()
    assert result.exit_code == 0, result.output
    assert numbers_of(tmp_path / "again") == numbers_of(built_in[1])


def test_the_test_data_do_not_depend_on_the_seed(place, diagnoses):
    for seed in (0, 5):
        output = place / str(seed)
        options = (*FAST, "--seed", seed, "--seeds", 1, "--output", output)
        assert run("compare", "mypairs.py:one", "--data", "x.npy", *options).exit_code == 0
    first, second = diagnoses
    assert torch.equal(first.test, second.test)
    assert torch.equal(first.train, second.train)
    assert (first.seed, second.seed) == (0, 5)
    assert not torch.equal(
        first.guide.encoder.state_dict()["0.weight"], second.guide.encoder.state_dict()["0.weight"]
    )
    assert _data.load_splits("digits").test.equal(pv.datasets.load("digits").test)


def test_dynamic_option_runs(tmp_path, diagnoses):
    result = run("compare", "--dynamic", *SMALL, "--seeds", "1", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert diagnoses[0].train.unique().tolist() == [0, 1]
    assert numbers_of(tmp_path)["comparison"]["notes"][0].startswith("One run of each method")


def test_checkpoints_resume(place):
    options = (*FAST, "--data", "x.npy", "--seeds", 1, "--checkpoint", "run", "--output", "out")
    assert run("compare", "mypairs.py:pairs", *options).exit_code == 0
    first = numbers_of(place / "out")
    assert sorted(p.name for p in (place / "run").iterdir()) == ["narrow", "objective-IWAE"]
    assert run("compare", "mypairs.py:pairs", *options).exit_code == 0
    assert numbers_of(place / "out") == first


@pytest.mark.parametrize("reference", ["mypairs_of_a_file.py:pairs", "mypackage.own:pairs"])
def test_own_pairs_are_compared(reference, place, diagnoses):
    if "package" in reference:
        (place / "mypackage").mkdir()
    path = reference.partition(":")[0].removesuffix(".py").replace(".", "/") + ".py"
    (place / "mypairs.py").rename(place / path)
    result = run("compare", reference, "--data", "x.npy", *FAST, "--seeds", 2, "--output", "out")
    assert result.exit_code == 0, result.output
    content = numbers_of(place / "out")
    assert content["differences"]["from"] == "narrow"
    runs = {(row["name"], row["seed"]): row for row in content["runs"]}
    assert len(runs) == 4
    assert {runs["objective: IWAE", seed]["epochs"] for seed in (0, 1)} == {1}
    assert {runs["narrow", seed]["epochs"] for seed in (0, 1)} == {2}
    assert runs["narrow", 0]["log_evidence"] != runs["narrow", 1]["log_evidence"]
    torch.manual_seed(0)  # the first pair is made and fitted as if by pv.fit_seeds
    splits = _data.load_splits("x.npy")
    function = vars(sys.modules[reference.removesuffix(".py:pairs").removesuffix(":pairs")])
    fit = pv.fit(
        *function["pairs"](splits.train)["narrow"], splits.train, validation=splits.validation,
        epochs=2, batch_size=200, learning_rate=4e-3, patience=15, seed=0, progress=False,
    )  # fmt: skip
    found = pv.evidence(fit.model, fit.guide, splits.test, num_particles=30, seed=0)
    assert found.mean == pytest.approx(runs["narrow", 0]["log_evidence"], rel=1e-5)
    result = run("diagnose", "out/pairs/narrow", "--data", "x.npy", "--pairs", reference,
                 "--name", "narrow")  # fmt: skip
    assert result.exit_code == 0, result.output
    loaded = diagnoses[-1]
    again = pv.evidence(loaded.model, loaded.guide, splits.test, num_particles=30, seed=0)
    assert again.mean == pytest.approx(found.mean, rel=1e-5)


def test_the_check_of_a_pair_does_not_change_its_fit(place):
    """Its ``pyro.param`` values start from the values that the function gives them."""
    (place / "mypairs_with_params.py").write_text(
        "import torch, pyro\nimport pyro.distributions as dist\n"
        "def model(x):\n"
        "    loc = pyro.param('loc', lambda: torch.randn(3))\n"
        "    with pyro.plate('data', len(x)):\n"
        "        z = pyro.sample('z', dist.Normal(0.0, 1.0))\n"
        "        pyro.sample('x', dist.Normal(z[..., None] + loc, 1.0).to_event(1), obs=x)\n"
        "def guide(x):\n"
        "    with pyro.plate('data', len(x)):\n"
        "        pyro.sample('z', dist.Normal(x.mean(-1) / 2, 0.7))\n"
        "def pairs():\n"
        "    return {'a': (lambda x: model(x), lambda x: guide(x))}\n"
    )
    options = (
        "--data",
        "x.npy",
        "--epochs",
        1,
        "--learning-rate",
        1e-9,
        "--evidence-particles",
        30,
    )
    result = run(
        "compare", "mypairs_with_params.py:pairs", *options, "--seeds", 2, "--output", "out"
    )
    assert result.exit_code == 0, result.output
    runs = numbers_of(place / "out")["runs"]
    assert runs[0]["log_evidence"] != pytest.approx(runs[1]["log_evidence"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mypairs"], "'mypairs' does not name a function: expected FILE.py:FUNCTION or"),
        (["mypair.py:pairs"], "there is no file mypair.py: expected FILE.py:FUNCTION"),
        (["nomodule.sub:pairs"], "cannot import nomodule.sub: ModuleNotFoundError: No module"),
        (["mypairs.py:pair"], "mypairs.py has no function 'pair'. Its functions are make_pair"),
        (["mypairs.py:number"], "must be a function that returns a dictionary"),
        (["mypairs.py:two_arguments"], "must have no argument, or one for the training data"),
        (["mypairs.py:fails"], "mypairs.py:fails raised KeyError: 'scale' (line "),
        (["mypairs.py:a_pair"], "pv.fit, got a tuple of 2 (function, AmortizedNormal)"),
        (["mypairs.py:nothing"], "got an object of type NoneType"),
        (["mypairs.py:empty"], "got an object of type dict"),
        (["mypairs.py:not_a_pair"], "but 'a' is an object of type function"),
        (["mypairs.py:no_guide"], "but the guide of 'a' is an object of type NoneType"),
        (["mypairs.py:wrong_option"], "'object' is not an option of 'a' in mypairs.py"),
        (["mypairs.py:options_of_another_type"], "the options of 'a' in mypairs.py"),
        (["mypairs.py:same_networks"], "return the same networks for 'shared'. Make all networks"),
        (["mypairs.py:another_site"], "'a' of mypairs.py:another_site cannot be fitted: "),
        (["mypairs.py:one", "--data", "wide.npy"], "'only' of mypairs.py:one cannot be fitted: "),
        (["mypairs.py:one", "--hidden", "8"], "--hidden is for the pairs of this command"),
        (["broken.py:pairs"], "cannot import broken.py: SyntaxError: "),
        (["late.py:pairs"], "cannot import late.py: NameError: name 'nothing' is not defined (l"),
        (["random.py:pairs"], "random.py has the name of another module, 'random'"),
    ],
)
def test_mistakes_in_own_pairs_are_one_line(arguments, message, place, capsys, monkeypatch):
    (place / "broken.py").write_text("def pairs(:\n    pass\n")
    (place / "late.py").write_text("import torch\nnothing\n")
    (place / "random.py").write_text("def pairs():\n    return {}\n")
    np.save(place / "wide.npy", np.zeros((60, 5)))
    data = [] if "--data" in arguments else ["--data", "x.npy"]
    assert message in fails(capsys, monkeypatch, "compare", *arguments, *data, *FAST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnits"], "--data mnits is unknown: expected one of digits, mnist"),
        (["--data", "y.npy"], "there is no file y.npy"),
        (["--data", "x.npy", "--test", "y.npy"], "there is no file y.npy"),
        (["--data", "x.npy", "--test", "y.txt"], "y.txt must be of type .npy, .npz, .csv, .pt"),
        (["--data", "digits", "--test", "x.npy"], "--test is for files, but digits has its own"),
        (["--data", "x.npy", "--dynamic"], "--dynamic needs the intensities of a data set"),
        (["--data", "pickled.npy"], "cannot read pickled.npy: Object arrays cannot be loaded"),
        (["--data", "pickled.pt"], "cannot read pickled.pt: Weights only load failed"),
        (["--data", "text.csv"], "cannot read text.csv: could not convert string"),
        (["--data", "semicolons.csv"], "If its cells are separated by ';', write it with commas"),
        (["--data", "units.csv"], "cannot read units.csv: could not convert string 'four'"),
        (["--data", "empty.csv"], "train of empty.csv must have at least one row"),
        (["--data", "two.npz"], "two.npz must have one array, or arrays named train, validation"),
        (["--data", "text.npy"], "train of text.npy must be an array of numbers, got <U1"),
        (["--data", "cut.npz"], "cannot read cut.npz: "),
        (["--data", "few.npy"], "few.npy must have at least 10 rows, got 4"),
        (["--data", "shapes.npz"], "has rows of different shapes"),
        (["--data", "x.npy"], "rows of zeros and ones, but x.npy, split at random"),
        (["--data", "flat.npy"], "has one dimension. Save an array of shape (rows, numbers)"),
        (["--data", "gaps.csv"], "has 8 missing numbers among its train data. Fill them"),
        (["--output", "x.npy"], "cannot write --output x.npy"),
        (["--output", "full"], "is not a saved pair, so it is not replaced"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--learning-rate", "-1"], "--learning-rate must be positive and finite, got -1"),
        (["--latents", "0"], "--latents must be at least 1, got 0"),
        (["--hidden", "0"], "--hidden must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--evidence-particles", "0"], "--evidence-particles must be at least 1"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, place, capsys, monkeypatch):
    np.save(place / "pickled.npy", np.array([{}]), allow_pickle=True)
    torch.save(pv.nets.MLP(2, [3]), place / "pickled.pt")
    (place / "text.csv").write_text("a,b\n1,2\n3,four\n")
    (place / "empty.csv").write_text("")
    (place / "semicolons.csv").write_text("a;b\n1,5;0,5\n")
    (place / "units.csv").write_text("size (a; b),c\n1,2\n3,four\n")
    (place / "gaps.csv").write_text("a,b\n" + "1,\n" * 11)
    np.save(place / "flat.npy", np.ones(60))
    np.savez(place / "two.npz", a=np.zeros((20, 3)), b=np.zeros((20, 3)))
    np.save(place / "text.npy", np.array(["a"] * 20))
    (place / "cut.npz").write_bytes((place / "two.npz").read_bytes()[:100])
    np.save(place / "few.npy", np.zeros((4, 3)))
    np.savez(place / "shapes.npz", train=np.zeros((20, 3)), test=np.zeros((20, 4)))
    (place / "full" / "pairs" / "baseline").mkdir(parents=True)
    message_found = fails(capsys, monkeypatch, "compare", *arguments)
    assert message in message_found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a saved pair"),
        (["."], "is not the folder of a saved pair"),
        (["pair", "--data", "y.npy"], "there is no file y.npy"),
        (["pair", "--data", "x.npy"], "pass model"),
        (["pair", "--data", "x.npy", "--pairs", "mypairs.py:pairs"],
         "--name must be one of narrow, objective: IWAE, got None"),
        (["pair", "--data", "x.npy", "--pairs", "mypairs.py:pairs", "--name", "wide"],
         "--name must be one of narrow, objective: IWAE, got wide"),
        (["damaged", "--data", "x.npy"], "damaged"),
    ],
)  # fmt: skip
def test_mistakes_of_diagnose_are_one_line(arguments, message, place, capsys, monkeypatch):
    sys.path.insert(0, str(place))
    import mypairs

    torch.manual_seed(0)
    model, guide = mypairs.make_pair()
    pv.fit(model, guide, torch.randn(20, 3), epochs=1, progress=False)
    for name in ("pair", "damaged"):
        pv.save(place / name, model, guide)
    (place / "damaged" / "record.json").write_text("{}")
    assert message in fails(capsys, monkeypatch, "diagnose", *arguments)


def test_the_program_ends_without_a_traceback(tmp_path):
    result = run_python("pyro_vae", ["compare", "--data", "mnits"], tmp_path)
    assert result.returncode == 1
    assert "expected one of digits, mnist" in result.stderr
    assert "Traceback" not in result.stderr


def parts_of(splits):
    return [part.double().numpy() for part in (splits.train, splits.validation, splits.test)]


def test_all_formats_give_the_same_rows(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", rows)
    np.savez("x.npz", anything=rows)
    torch.save(torch.tensor(rows), "x.pt")
    pd.DataFrame(rows, columns=list("abc")).to_csv("x.csv", index=False)
    np.savetxt("plain.csv", rows, delimiter=",", fmt="%.9g")
    np.save("big.npy", rows.astype(">f8"))
    parts = parts_of(_data.load_splits("x.npy"))
    assert [len(part) for part in parts] == [42, 6, 12]
    whole = np.concatenate(parts)
    assert whole[np.lexsort(whole.T)] == pytest.approx(rows[np.lexsort(rows.T)])
    for name in ("x.npz", "x.pt", "x.csv", "plain.csv", "big.npy"):
        for part, expected in zip(parts_of(_data.load_splits(name)), parts, strict=True):
            assert part == pytest.approx(expected, abs=1e-6)


def test_named_parts_are_kept(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("all.npz", train=rows[:30], validation=rows[30:40], test=rows[40:], labels=["a"])
    for part, expected in zip(
        parts_of(_data.load_splits("all.npz")), (rows[:30], rows[30:40], rows[40:]), strict=True
    ):
        assert np.array_equal(part, expected)
    torch.save({"train": torch.tensor(rows[:40]), "test": torch.tensor(rows[40:])}, "some.pt")
    splits = _data.load_splits("some.pt")
    assert [len(part) for part in parts_of(splits)] == [36, 4, 20]
    assert "split at random with a fixed seed, 10% for validation" in splits.description
    np.save("x.npy", rows[:40])
    np.save("held_out.npy", rows[40:])
    splits = _data.load_splits("x.npy", test=Path("held_out.npy"))
    assert np.array_equal(parts_of(splits)[2], rows[40:])
    assert [len(part) for part in parts_of(splits)] == [36, 4, 20]


def test_dtypes_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dtype, expected in (
        ("float64", torch.float32),
        ("float16", torch.float32),
        ("int64", torch.int64),
        ("uint8", torch.uint8),
        ("bool", torch.bool),
    ):
        np.save("x.npy", np.ones((20, 2), dtype))
        assert _data.load_splits("x.npy").train.dtype == expected
    np.save("images.npy", np.ones((20, 3, 4)))
    assert _data.load_splits("images.npy").image_shape == (3, 4)


def test_built_in_pairs_take_a_file_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).integers(0, 2, (60, 3, 4)).astype(bool))
    result = run("compare", "--data", "images.npy", *SMALL, "--seeds", 1, "--output", "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("<img") == 5


def test_names_of_folders_are_safe_and_differ():
    names = ["a: b", "a/b", "A-B", "..", "", "~root", "x" * 200, "größe", "a\\b\n", "pair"]
    safe = _results.safe_names(names)
    assert len({name.lower() for name in safe}) == len(names)
    for name in safe:
        assert 0 < len(name) <= 64
        assert not set(name) & set('/\\:*?"<>|~\n ')
        assert name.strip(".-") == name


def test_json_has_no_nan(tmp_path):
    folder = _results.ResultFolder(tmp_path / "new" / "folder")
    folder.write_json({"a": [math.nan, np.float64(1.5), np.bool_(True)], "b": {"c": math.inf}})
    text = (tmp_path / "new" / "folder" / "results.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [None, 1.5, True], "b": {"c": None}}


def test_csv_with_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(f"{i},{i * i}" for i in range(20))
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    splits = _data.load_splits("x.csv")
    assert sum(map(len, parts_of(splits))) == 20


def test_csv_files_of_pandas(tmp_path, monkeypatch):
    """Its names 0, 1, 2 are not data, and neither are its row numbers."""
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(20, 3).double()
    frame = pd.DataFrame(rows.numpy())
    frame.to_csv("x.csv", index=False)
    splits = _data.load_splits("x.csv")
    read = torch.cat([splits.train, splits.validation, splits.test])
    torch.testing.assert_close(read.sort(0).values, rows.float().sort(0).values)
    frame.to_csv("numbered.csv")
    with pytest.raises(ValueError, match=r"first column has no name.*index=False"):
        _data.load_splits("numbered.csv")


def test_a_missing_number_in_the_first_row_is_an_error(tmp_path, monkeypatch):
    """The row must not be taken for names, and left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("1.5,,2.5\n" + "1,2,3\n" * 20)
    assert torch.cat([*split_file("x.csv")]).isnan().sum() == 1


def split_file(path):
    splits = _data.load_splits(path)
    return splits.train, splits.validation, splits.test


@pytest.mark.parametrize("columns", [1, 3])
def test_missing_numbers_of_a_csv_file_are_nan(columns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(50, columns))
    rows[np.random.default_rng(1).uniform(size=rows.shape) < 0.2] = np.nan
    pd.DataFrame(rows).add_prefix("c").to_csv("x.csv", index=False)
    np.save("x.npy", rows)
    for found, expected in zip(split_file("x.csv"), split_file("x.npy"), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)

"""The HTML page of a comparison: its content, and its layout in a browser."""

import base64
import html.parser
import math
import re
import shutil
import subprocess

import pytest
import torch
from conftest import make_pair

import pyro_vae as pv
from pyro_vae.report import LedgerEntry

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LONG_NAME = "prior: a-name-without-a-space-that-is-longer-than-a-phone-is-wide-" + "x" * 40


DIAGNOSIS = pv.report.Diagnosis(
    (
        LedgerEntry("log p(x), test", -8.25, 0.5, "a <b>note</b>"),
        LedgerEntry("prior gain", 3.4, 0.1, ""),
        LedgerEntry("approximation gap", 1.0, math.nan, ""),
        LedgerEntry("mutual information", math.nan, math.nan, "not known"),
        LedgerEntry("unreliable log p(x)", 0.25, math.nan, "k-hat above 0.7", "share"),
    ),
    num_train=100,
    num_test=60,
)


@pytest.fixture(scope="module")
def comparison():
    torch.manual_seed(0)
    left = torch.arange(16) < 8
    rows = torch.where(torch.rand(160, 1) < 0.5, left, ~left)
    x = torch.bernoulli(torch.where(rows, 0.9, 0.1))
    train, test = x[:100], x[100:]
    fits = {
        name: pv.fit_seeds(
            make_pair, train, seeds=2, num_workers=1, epochs=epochs, batch_size=20,
            learning_rate=0.02, validation=test, progress=False,
        )
        for name, epochs in (("baseline", 30), (LONG_NAME, 1))
    }  # fmt: skip
    return pv.compare(fits, test, train=train, num_particles=200, image_shape=(4, 4))


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    return comparison.to_html(
        tmp_path_factory.mktemp("page") / "page.html",
        DIAGNOSIS,
        {"data set": "halves & <others>", "command": "pyro-vae compare", "device": "cpu"},
        baseline="baseline",
    )


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.images, self.texts, self.addresses, self.open = [], {}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "img":
            self.images.append(attributes["src"])
        self.addresses += [attributes[k] for k in ("href", "src") if k in attributes]

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_page_is_self_contained(page):
    found = Page(page)
    kinds = [source.partition(";base64,")[0] for source in found.images]
    # Differences, surgery, curves; reconstructions, samples.
    assert kinds == ["data:image/svg+xml"] * 3 + ["data:image/png"] * 2
    for kind, source in zip(kinds, found.images, strict=True):
        content = base64.b64decode(source.partition(",")[2])
        assert b"</svg>" in content if "svg" in kind else content.startswith(b"\x89PNG")
    assert all(address.startswith("data:") for address in found.addresses)
    assert not re.search(r"url\(|@import|<script", page.read_text(encoding="utf-8"))


def test_page_has_all_tables(comparison, page):
    found = Page(page)
    # Differences, held-out data, surgery, fits. The baseline has no row among the differences.
    assert found.texts["th"].count(LONG_NAME) == 4
    assert found.texts["th"].count("baseline") == 3
    cells = found.texts["td"]
    entry = comparison.entries[-1]
    assert f"{entry.term('distortion'):.2f}" in cells
    row = comparison.differences_from("baseline").loc[LONG_NAME]
    assert f"{row.difference:+.2f} ± {row.standard_error:.2f}" in cells
    assert f"{row.low:+.2f} to {row.high:+.2f}" in cells
    assert ("yes" if row.is_told_apart else "no") in cells


def test_page_states_the_facts(page):
    found = Page(page)
    facts = dict(zip(found.texts["dt"], found.texts["dd"], strict=True))
    assert facts["data set"] == "halves & <others>"
    assert facts["command"] == "pyro-vae compare"
    assert facts["sizes"] == "60 held-out data points, 100 for the surgery"
    assert facts["seeds"] == "0, 1"
    assert torch.__version__ in facts["versions"]
    assert re.match(r"\d{4}-\d\d-\d\dT", facts["date"])
    assert re.match(r"\d+ s", facts["time of the fits"])
    assert not any("seconds" in heading for heading in found.texts["th"])


def test_page_has_the_diagnosis_before_the_comparison(page, comparison):
    found = Page(page)
    titles = found.texts["h2"]
    assert titles[:3] == ["Diagnosis of baseline", "Differences from baseline", "Held-out data"]
    cells = found.texts["td"]
    for value in ("-8.25 ± 0.50", "1.00", "-", "25.0%", "a <b>note</b>"):
        assert value in cells
    verdict = [
        "prior: a better one gains up to 3.40 ± 0.10 nats. Try VampPrior or MixtureOfNormals."
    ]
    assert DIAGNOSIS.verdict == verdict  # the error of the approximation gap is unknown
    assert found.texts["li"] == [*verdict, *comparison.advice(DIAGNOSIS, "baseline")]
    assert {"mutual information is unknown: not known.", DIAGNOSIS.notes[1]} <= {*found.texts["p"]}


def test_page_without_a_diagnosis(comparison, tmp_path):
    found = Page(comparison.to_html(tmp_path / "page.html"))
    assert found.texts["h2"][0] == "Held-out data"
    assert "li" not in found.texts
    with pytest.raises(ValueError, match="name must be one of"):
        comparison.to_html(tmp_path / "page.html", baseline="nobody")
    with pytest.raises(TypeError, match="path must be"):
        comparison.to_html(3)


def test_equal_comparisons_have_equal_figures(comparison, tmp_path):
    pages = [Page(comparison.to_html(tmp_path / f"{i}.html")) for i in range(2)]
    assert pages[0].images == pages[1].images


@pytest.mark.parametrize("name", ["<b>&", r"$\nothing$", "_hidden", "", "Größe\nin zwei Zeilen"])
def test_page_shows_any_name(name, binary, tmp_path):
    pairs = {name: make_pair(), "other": make_pair()}
    path = pv.compare(pairs, binary, num_particles=3).to_html(tmp_path / "page.html")
    assert Page(path).texts["th"].count(name) == 3
    assert "<b>" not in path.read_text(encoding="utf-8")


def test_page_of_data_that_are_not_images(tmp_path):
    x = torch.bernoulli(torch.full((20, 16), 0.5))
    page = pv.compare({"a": make_pair()}, x, num_particles=3).to_html(tmp_path / "p.html")
    assert len(Page(page).images) == 2


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    return path


# Frames of a few widths, and for each: the width of its content, cells that are wider than their
# frame or cut off, and pictures that were not drawn.
MEASURE = """
<!DOCTYPE html><body><script>
const page = %s, found = [];
let open = 0;
for (const width of [390, 1024, 1440]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = page;
  open += 1;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    const all = [...root.querySelectorAll("body *")];
    const cells = [...root.querySelectorAll("td, tbody th, dd, dt, p, li, figure, img")];
    const outside = cells.filter(c => c.getBoundingClientRect().right > width);
    const cut = cells.filter(c => c.scrollWidth > c.clientWidth + 1 && c.clientWidth > 0);
    const blank = [...root.querySelectorAll("img")].filter(image => !image.naturalWidth);
    const first = root.querySelector("tbody td");
    found.push([width, root.scrollWidth, outside.length, cut.length, blank.length,
                getComputedStyle(first).display].join(" "));
    open -= 1;
    if (!open) document.body.dataset.found = found.sort().join("|");
  };
  document.body.append(frame);
}
</script></body>
"""


def in_browser(browser, path, *options):
    """Open a page without a window, and return its document and its errors."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *options, path.as_uri()]
    return subprocess.run(  # noqa: S603 - no input of a user
        command, capture_output=True, text=True, check=True, timeout=120
    )


def test_page_fits_a_phone_and_a_laptop(browser, page, tmp_path):
    import json

    text = json.dumps(page.read_text(encoding="utf-8")).replace("</", r"<\/")
    frames = tmp_path / "frames.html"
    frames.write_text(MEASURE % text, encoding="utf-8")
    done = in_browser(
        browser, frames, "--dump-dom", "--virtual-time-budget=20000", "--window-size=1500,900",
        f"--user-data-dir={tmp_path / 'profile'}",
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    measured = [row.split() for row in found[1].split("|")]
    assert sorted(int(row[0]) for row in measured) == [390, 1024, 1440]
    for width, content, outside, cut, blank, display in measured:
        assert int(content) <= int(width)
        assert (outside, cut, blank) == ("0", "0", "0")
        assert display == ("flex" if width == "390" else "table-cell")

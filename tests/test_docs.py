import io
import posixpath
import re
from functools import reduce
from html.parser import HTMLParser
from inspect import ismodule
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from new_processes import run_python

import pyro_vae as pv

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
FOLDERS = sorted(
    path.parent.name
    for path in ROOT.glob("pyro_vae/[a-z]*/__init__.py")
    if path.parent.name != "cli"  # the command line has a page of its own
)


class Site:
    """The pages of the built site."""

    def __init__(self, folder):
        self.folder = folder

    def html(self, page):
        return (self.folder / f"{page}.html").read_text()

    def summary(self, page):
        """Return the names in a page's tables, and their links and first sentences."""
        return {
            cells[0][0]: (cells[0][1], cells[1][0])
            for cells in _Tables.of(self.html(page))
            if len(cells) == 2
        }


class _Tables(HTMLParser):
    """Collects the rows of the tables of class ``summary``: text and last link of each cell."""

    @classmethod
    def of(cls, html):
        self = cls()
        self.rows, self.inside = [], False
        self.feed(html)
        return self.rows

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.inside = "summary" in attributes.get("class", "")
        elif self.inside and tag == "tr":
            self.rows.append([])
        elif self.inside and tag == "td":
            self.rows[-1].append(["", None])
        elif self.inside and tag == "a" and self.rows and self.rows[-1]:
            self.rows[-1][-1][1] = attributes.get("href")

    def handle_endtag(self, tag):
        if tag == "table":
            self.inside = False

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1][0] += data.strip("\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    pytest.importorskip("typer", reason="needs the extra `cli`")
    folder = tmp_path_factory.mktemp("site")
    # .ci/run builds the site with its notebooks. Without a run, the language of cells is unknown.
    settings = ["nb_execution_mode=off", "suppress_warnings=myst-nb.lexer"]
    options = ["-W", "--keep-going", "-q", *(f"-D{setting}" for setting in settings)]
    arguments = [*options, str(DOCS), str(folder)]
    result = run_python("sphinx", arguments, tmp_path_factory.mktemp("build"))
    assert result.returncode == 0, result.stderr
    return Site(folder)


class _Anchors(HTMLParser):
    """Collects the ids of a page, its links, and the files that a browser loads for it."""

    @classmethod
    def of(cls, html):
        self = cls()
        self.ids, self.links, self.files = [], [], []
        self.feed(html)
        return self

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if attributes.get("id") else []
        target = attributes.get("href") or attributes.get("src")
        if tag == "a" and target:
            self.links.append(target)
        elif tag in ("img", "script", "link", "source") and target:
            self.files.append(target)


def inventory(site):
    from sphinx.util.inventory import InventoryFile

    data = (site.folder / "objects.inv").read_bytes()
    if hasattr(InventoryFile, "loads"):
        found = InventoryFile.loads(data, uri="").data
    else:  # Sphinx before 8.2
        found = InventoryFile.load(io.BytesIO(data), "", posixpath.join)
    return {kind: set(names) for kind, names in found.items()}


def test_the_first_page_of_the_reference_lists_every_name_of_the_package(site):
    summary = site.summary("reference/index")
    assert set(summary) == set(pv.__all__)
    for name, (link, text) in summary.items():
        assert link, f"{name} has no entry"
        assert text, f"{name} has no first sentence"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_page_of_a_folder_lists_every_name(site, folder):
    page = f"reference/{folder}"
    summary = site.summary(page)
    module = getattr(pv, folder)
    inside = [value for name in module.__all__ if ismodule(value := getattr(module, name))]
    assert set(summary) >= set(module.__all__)
    assert all(any(hasattr(owner, name) for owner in (module, *inside)) for name in summary)
    for name, (link, text) in summary.items():
        assert text, f"{name} has no first sentence"
        assert link, f"{name} has no entry"
        path, _, target = link.partition("#")
        entry = (Path(page).parent / path).with_suffix("").as_posix() if path else page
        assert f'id="{target}"' in site.html(entry), name
    assert "[source]" in site.html(page)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_page_of_a_folder_has_no_raw_markup(site, folder):
    html = site.html(f"reference/{folder}")
    assert not re.search(r":(class|func|meth|attr|mod|math):(<|`)", html)
    assert "alpha simple" not in html  # "levels: L." as item L of a list


def test_the_reference_names_nothing_that_does_not_exist(site):
    kinds = {kind: names for kind, names in inventory(site).items() if kind.startswith("py:")}
    for kind, names in kinds.items():
        for name in names:
            # An attribute of instances alone is not an attribute of the class.
            path = name.rpartition(".")[0] if kind == "py:attribute" else name
            assert _resolves(path), name


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_nothing_that_does_not_exist(page):
    text = (DOCS / f"{page}.md").read_text()
    for name in set(re.findall(r"\b(?:pv|pyro_vae)((?:\.[A-Za-z]\w*)+)", text)):
        assert _resolves(f"pyro_vae{name}"), f"pv{name}"


def _resolves(path):
    names = path.split(".")[1:]
    try:
        value = reduce(getattr, names, pv)
    except AttributeError:
        return False
    return value is not None


def test_the_reference_has_every_option_of_the_command_line(site):
    typer = pytest.importorskip("typer.main", reason="needs the extra `cli`")
    from pyro_vae import cli

    found = inventory(site)["std:cmdoption"]
    options = {re.sub(r"[][]", "", name.lower()) for name in found}  # some Click has [PAIRS]
    group = typer.get_command(cli.app)
    expected = {
        f"pyro-vae-{name}.{option}".lower()
        for name, command in group.commands.items()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert options == expected
    assert all(f"pyro-vae {name}" in site.html("reference/command-line") for name in group.commands)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_starts_with_a_sentence(page):
    _, title, text, *_ = re.split(r"^# (.*)\n\n", (DOCS / f"{page}.md").read_text(), flags=re.M)
    assert title
    assert re.match(r"[A-Z`](?:[^.]|\.\S)*[\w)`]\.\s", text), text[:80]


def test_every_page_links_to_the_next(site):
    page, visited = "index", []
    while page:
        visited.append(page)
        link = re.search(r'<link rel="next"[^>]* href="([^"]+)"', site.html(page))
        page = link and _relative(page, link[1])
    assert sorted(visited) == PAGES


def test_every_link_inside_of_the_site_has_a_target(site):
    root = site.folder.resolve()
    pages = {path: _Anchors.of(path.read_text()) for path in root.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.files:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.exists()
            if found and parts.fragment and target in pages:
                found = unquote(parts.fragment) in pages[target].ids
            if not found:
                broken.append(f"{path.relative_to(root)}: {link}")
    assert not broken


def test_a_page_has_each_id_once_and_loads_nothing_from_a_network(site):
    for path in site.folder.rglob("*.html"):
        page = _Anchors.of(path.read_text())
        assert len(page.ids) == len(set(page.ids)), path
        assert not [file for file in page.files if urlsplit(file).netloc], path


def test_the_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    links = [link for link in links if not urlsplit(link).scheme]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def _relative(page, link):
    parts = []
    for part in (*Path(page).parent.parts, *Path(link).with_suffix("").parts):
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


@pytest.fixture
def mathml(monkeypatch):
    pytest.importorskip("sphinx", reason="needs the extra `docs`")
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    import mathml

    return mathml


def _translated(mathml, source, inline=False):
    from docutils import nodes

    kind = nodes.math if inline else nodes.math_block
    return mathml._mathml(kind(source, source))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"\frac12 x", "mfrac(1, 2), x"),
        (r"\log p", "log, \u2061, mspace(), p"),
        (r"D \log p", "D, mspace(), log, \u2061, mspace(), p"),
        (r"\lvert x \rvert", "|, x, |"),
        (r"\log(p)", "log, \u2061, (, p, )"),
        (r"q(z) \log p", "q, (, z, ), mspace(), log, \u2061, mspace(), p"),
        (r"= \log(p)", "=, log, \u2061, (, p, )"),
        (r"\hat p_1", "msub(mover(p, \u02c6), 1)"),
        (r"\underbrace{a}_b", "munder(munder(a, \u23df), b)"),
        (r"\sum_i^n a_i", "munderover(\u2211, i, n), msub(a, i)"),
        (r"\text{a \& b}", "a & b"),
    ],
)
def test_equations_have_the_structure_of_latex(source, expected, mathml):
    root = ElementTree.fromstring(_translated(mathml, source))  # noqa: S314 (of docutils)
    assert ", ".join(map(_outline, root)) == expected


@pytest.mark.parametrize("source", ["p(x|z)", "a / b", "a.", r"|x|", r"\|x\|^2", r"\lvert x\rvert"])
def test_symbols_that_are_ordinary_in_latex_have_no_spaces(source, mathml):
    root = ElementTree.fromstring(_translated(mathml, source))  # noqa: S314 (of docutils)
    symbols = [element for element in root.iter() if element.text in {"|", "\u2016", "/", "."}]
    assert symbols
    assert {(symbol.get("lspace"), symbol.get("rspace")) for symbol in symbols} == {("0", "0")}


def test_a_formula_that_cannot_be_translated_is_a_warning(mathml, monkeypatch):
    warnings = []
    monkeypatch.setattr(mathml.logger, "warning", lambda *values, **_: warnings.append(values))
    for source in (r"\unknown", r"a \\ b", r"\frac{1"):
        assert _translated(mathml, source, inline=True) == source
    assert len(warnings) == 3


def _outline(element):
    children = ", ".join(map(_outline, element))
    return (element.text or "").strip() or f"{element.tag.partition('}')[2]}({children})"

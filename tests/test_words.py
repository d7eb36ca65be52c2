"""The words of the project: docstrings, comments, messages and pages in plain standard English.

Readers who know torch and Pyro, many of them not native speakers, read each sentence once. So some
words and constructions must not come back, and sentences stay short.
"""

import ast
import io
import itertools
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
MODULES = [
    path
    for folder in ("pyro_vae", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__)
]
LONGEST = 35  # words of a sentence, outside of tables

# A pattern, and the reason with the words to use.
BANNED = {
    r"lest": "archaic: write 'so that ... not', or a condition",
    r"anew": "archaic: write 'again'",
    r"likewise": "write 'in the same way', or name the thing",
    r"mend(s|ed|ing)?": "write 'fix' or 'repair'",
    r"\w*datum": "write 'data point'",
    r"whoever": "name the person: the user, the caller",
    r"thereof|therein|whereof|hitherto|thither|hence(forth)?": "archaic: name the thing",
    r"(is|are|was|were) (?-i:none)": "write 'is not a ...' or 'there is no ...'",
    r"(go|goes|going|gone|went) on (with|from)": "write 'resume' or 'continue'",
    r"\w*reparam(eteris|etris|etriz)\w*": "American spelling, as in torch: 'reparameterize'",
    r"(binar|normal|initial|optim|regular|vector|central|summar)is(e|ed|es|ing|ation)": (
        "American spelling, as in torch: -ize"
    ),
    r"(colour|behaviour|centre|neighbour|labelled|modelled)s?": "American spelling, as in torch",
    r"as it stands|as they stand": "write 'unchanged'",
    r"at the hand of|by hand of": "name the function",
    r"what (comes|came) of it": "name the result",
    r"knows nothing of": "objects do not know: write 'is independent of' or 'does not use'",
}


def comments_and_strings(path):
    """Yield (line, text) of each comment and of each string with a space in it."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def names(path):
    return [
        (node.lineno, node.name.replace("_", " "))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]


def findings(texts):
    for line, text in texts:
        for pattern, reason in BANNED.items():
            for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                yield f"line {line}: {match[0]!r}: {reason}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_no_banned_words(path):
    texts = itertools.chain(comments_and_strings(path), names(path))
    assert not sorted(findings(texts)), path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_banned_words(path):
    text = re.sub(r"`[^`\n]*`", "code", path.read_text(encoding="utf-8"))
    assert not sorted(findings(enumerate(text.splitlines(), start=1))), path


def prose(text):
    """Return a text without code, formulas, tables and markup."""
    text = re.sub(r"(?ms)^\s*\.\. math::.*?(?=\n\n|\Z)", " ", text)
    text = re.sub(r"(?s)```.*?```|\$\$.*?\$\$|<!--.*?-->", " ", text)
    text = re.sub(r"(?ms)^\s*=+ +=.*=+ +=+$", " ", text)
    text = re.sub(r"(?m)^\s*(>>>|\.\.\. |\||    \S).*$", " ", text)
    text = re.sub(r"\$[^$]+\$", "x", text)
    text = re.sub(r":[\w:]+:`~?([^`]*)`", r"\1", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*\*|`+[^`]*`+", lambda code: "" if code[0] == "**" else "code", text)


def sentences(text):
    text = re.sub(r"^:.*$", "", text, flags=re.MULTILINE)  # directives and their options
    ends = r"\n\s*\n|\n\s*(?:[-*]|\d\.) |\n(?=#)|\n(?=\s*[*\w]+(?: \([^)]*\))?: )"
    for block in filter(None, re.split(ends, prose(text))):
        yield from re.split(r"(?<=[\w)'\"][.?!])\s+", " ".join(block.split()))


def long_sentences(text):
    return [s for s in sentences(text) if len(s.split()) > LONGEST]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_of_pages_are_short(path):
    assert not long_sentences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.is_relative_to(ROOT / "pyro_vae")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_sentences_of_docstrings_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            assert not long_sentences(ast.get_docstring(node) or "")


def test_the_checks_find_what_they_are_for():
    assert [*findings([(1, "a datum"), (2, "go on with it"), (3, "reparameterised")])]
    assert not [*findings([(1, "a data point, resumed and reparameterized")])]
    assert long_sentences("Word " * 36 + ".")
    assert not long_sentences("Word " * 20 + "end. " + "Word " * 20 + "end.\n\n    " + "code " * 40)


def test_names_of_tests_contain_no_bytes(request):
    """Processes that share the tests must give them equal names, at any time."""
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if re.search(r"\\x[01][0-9a-f]", name)] == []

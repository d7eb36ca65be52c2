"""Sphinx: equations as MathML. Browsers draw it without scripts and without a network.

docutils translates LaTeX to MathML. A formula that docutils cannot translate is a warning, so the
build with ``-W`` fails.
"""

import re
from html import escape
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

APPLY_FUNCTION, DOUBLE_BAR = "\u2061", "\u2016"
BRACES = {"\u23de", "\u23df"}
ACCENTS = {"\u02c6", "\u02c9", "~", "\u02d9", "\u00a8", "\u2192"}  # hat, bar, tilde, dots, vec


def _inline(self, node):
    self.body.append(_mathml(node))
    raise nodes.SkipNode


def _block(self, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    anchors = "".join(f'<span id="{name}"></span>' for name in node["ids"])
    self.body.append(f'<div class="math">{anchors}{number}{_mathml(node)}</div>\n')
    raise nodes.SkipNode


def _mathml(node):
    source = node.astext()
    try:
        text = tex2mathml(_with_braces(source), as_block=isinstance(node, nodes.math_block))
    except MathError as error:
        logger.warning("cannot translate %r to MathML: %s", source, error, location=node)
        return escape(source)
    return _corrected(text)


def _with_braces(source):
    r"""Write ``\frac12`` as ``\frac{1}{2}``, because docutils reads the number 12."""
    return re.sub(r"(\\[dt]?frac)\s*(\d)(\d)", r"\1{\2}{\3}", source)


def _corrected(text):
    """Correct spaces, bars, labels of braces and indices of accents in the output of docutils."""
    text = text.replace("&ApplyFunction;", APPLY_FUNCTION).replace(r"\&amp;", "&amp;")
    root = ElementTree.fromstring(text)  # noqa: S314 (of docutils)
    for parent in root.iter():
        children = list(parent)
        if parent.tag.endswith(("msub", "msup")) and _is_brace(children[0]):
            parent.tag = children[0].tag  # the label is below or above the brace
        if parent.tag.endswith("munderover") and children[2].text in ACCENTS:
            base, index, accent = children
            over = ElementTree.Element(parent.tag.replace("munderover", "mover"), accent="true")
            over.extend([base, accent])
            parent.tag = parent.tag.replace("munderover", "msub")
            parent[:] = [over, index]
        for index, child in enumerate(children):
            if child.text == DOUBLE_BAR:
                child.set("stretchy", "false")
            if child.text != APPLY_FUNCTION:
                continue
            following = children[index + 1 : index + 2]
            if following and following[0].text != "(":
                parent.insert(list(parent).index(child) + 1, _thin_space(child))
            before = children[index - 2 : index - 1] if index > 1 else []
            if before and (before[0].text in (")", "]") or not before[0].tag.endswith("}mo")):
                parent.insert(list(parent).index(children[index - 1]), _thin_space(child))
    ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _is_brace(element):
    children = list(element)
    return len(children) == 2 and children[1].text in BRACES


def _thin_space(element):
    namespace = element.tag.partition("}")[0] + "}"
    return ElementTree.Element(namespace + "mspace", {"width": "0.167em"})


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

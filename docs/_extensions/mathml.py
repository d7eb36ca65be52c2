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
ORDINARY = {"|", DOUBLE_BAR, "/", "."}  # symbols that LaTeX draws without spaces
OPERANDS = {"mi", "mn", "mtext", "mrow", "mfrac", "msqrt", "msub", "msup", "msubsup", "mover"}
PARTS = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2}
PARTS |= {"msubsup": 3, "munderover": 3}  # docutils gives fewer parts for a missing argument
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
        text = tex2mathml(_for_docutils(source), as_block=isinstance(node, nodes.math_block))
        return _corrected(text)
    except (MathError, AttributeError) as error:  # docutils: ``\\`` outside of a table has no node
        logger.warning("cannot translate %r to MathML: %s", source, error, location=node)
        return escape(source)


def _for_docutils(source):
    r"""Write ``\frac12`` as ``\frac{1}{2}``, because docutils reads 12, and ``\lvert`` as ``|``."""
    source = re.sub(r"\\[lr]vert(?![a-zA-Z])\s*", "|", source)
    return re.sub(r"(\\[dt]?frac)\s*(\d)(\d)", r"\1{\2}{\3}", source)


def _corrected(text):
    """Correct spaces, bars, labels of braces and indices of accents in the output of docutils."""
    text = text.replace("&ApplyFunction;", APPLY_FUNCTION).replace(r"\&amp;", "&amp;")
    root = ElementTree.fromstring(text)  # noqa: S314 (of docutils)
    for parent in root.iter():
        children, tag = list(parent), parent.tag.rpartition("}")[2]
        if len(children) != PARTS.get(tag, len(children)):
            raise MathError(f"<{tag}> has {len(children)} parts, expected {PARTS[tag]}")
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
            if child.text in ORDINARY and child.tag.endswith("mo"):
                child.attrib.update(lspace="0", rspace="0")
            if child.text != APPLY_FUNCTION:
                continue
            name, following = children[index - 1], children[index + 1 : index + 2]
            if index > 1 and _is_operand(children[index - 2]):
                parent.insert(list(parent).index(name), _thin_space(child))
            if following and following[0].text != "(":
                parent.insert(list(parent).index(child) + 1, _thin_space(child))
    ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _is_brace(element):
    children = list(element)
    return len(children) == 2 and children[1].text in BRACES


def _is_operand(element):
    return element.tag.rpartition("}")[2] in OPERANDS or element.text in {")", "]"}


def _thin_space(element):
    namespace = element.tag.partition("}")[0] + "}"
    return ElementTree.Element(namespace + "mspace", {"width": "0.167em"})


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Sphinx: equations as MathML. Browsers draw it without scripts and without a network.

docutils translates LaTeX to MathML. A formula that docutils cannot translate is a warning, so the
build with ``-W`` fails.
"""

import re
from html import escape

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


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
        text = tex2mathml(source, as_block=isinstance(node, nodes.math_block)).strip()
        return _spaced(text)
    except MathError as error:
        logger.warning("cannot translate %r to MathML: %s", source, error, location=node)
        return escape(source)


def _spaced(text):
    """Insert a thin space after a function's name if no parenthesis follows. Keep bars short."""
    text = text.replace("<mo>\u2016</mo>", '<mo stretchy="false">\u2016</mo>')
    name = r"(<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()"
    return re.sub(name, r'\1<mspace width="0.167em"></mspace>', text)


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

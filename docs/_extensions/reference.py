"""Directives that make the reference from ``__all__`` and from the command line's application.

``.. summary:: pyro_vae.flows`` is a table of a folder's names, and ``.. entries:: pyro_vae.flows``
has the entry of each. A name of several folders has one entry, and its other names are aliases.
"""

import functools
import inspect
import re
import sys
import typing

import typer.main
from docutils.parsers.rst import directives
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import pyro_vae
import pyro_vae.cli

# Where other references list a class under another name than that of its module or annotation.
_DISTRIBUTION = "pyro.distributions.TorchDistribution"
OTHER_NAMES = {
    "Figure": "matplotlib.figure.Figure",
    "Path": "pathlib.Path",
    "Tensor": "torch.Tensor",
    "TorchDistribution": _DISTRIBUTION,
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pd.DataFrame": "pandas.DataFrame",
    "pyro.distributions.torch_distribution.TorchDistribution": _DISTRIBUTION,
    "pyro.infer.ELBO": "pyro.infer.elbo.ELBO",
    "torch.nn.modules.container.Sequential": "torch.nn.Sequential",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}


def public_names(module):
    """Return the names of ``__all__``, or of the public classes that the module defines."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


def members(module, path):
    """Yield the full name and the value of each public name, also of public modules inside."""
    for name in public_names(module):
        value = getattr(module, name)
        yield f"{path}.{name}", value
        if inspect.ismodule(value):
            yield from members(value, f"{path}.{name}")


@functools.cache
def all_names():
    """Return a dictionary from the id of each public object to its full names, shortest first."""
    names = {}
    for name, value in members(pyro_vae, "pyro_vae"):
        names.setdefault(id(value), []).append(name)
    return {key: sorted(found, key=lambda name: name.count(".")) for key, found in names.items()}


def folder_of(names):
    """Return the folder on whose page the entry of an object is, or None for the first page."""
    return next((name.split(".")[1] for name in names if name.count(".") > 1), None)


def description(path, value):
    """Return the docstring of an object, or the comment ``#:`` before a constant, as lines."""
    if type(value).__module__ != "typing":
        return (inspect.getdoc(value) or "").splitlines()
    folder, _, name = path.rpartition(".")
    for module in list(sys.modules):
        if module.startswith(f"{folder}._") and getattr(sys.modules[module], name, None) is value:
            return ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), [])
    return []


def first_paragraph(lines):
    """Return the lines before the first empty one, joined, and the lines after it."""
    end = lines.index("") if "" in lines else len(lines)
    return " ".join(lines[:end]), lines[end + 1 :]


def table(path, module, names):
    """Yield the lines of a table of names of a module, with their first sentences."""
    yield from (".. list-table::", "   :class: summary", "   :widths: auto", "")
    for name in names:
        text, _ = first_paragraph(description(f"{path}.{name}", getattr(module, name)))
        yield from (f"   * - :py:obj:`{name} <{path}.{name}>`", f"     - {text}")
    yield ""


class _NamesDirective(SphinxDirective):
    required_arguments = 1

    def run(self):
        path = self.arguments[0]
        module = functools.reduce(getattr, path.split(".")[1:], pyro_vae)
        return self.parse_text_to_nodes("\n".join(self.lines(path, module)))


class Summary(_NamesDirective):
    """A table of the names of a module with the first sentences of their docstrings.

    The option ``folders`` selects the names that are modules, and without it all others are listed.
    """

    option_spec: typing.ClassVar = {"folders": directives.flag}

    def lines(self, path, module):
        """Yield the lines of the table."""
        kind = "currentmodule" if "folders" in self.options else "module"
        yield from (f".. py:{kind}:: {path}", "")
        names = public_names(module)
        if path == "pyro_vae":
            folders = "folders" in self.options
            names = [name for name in names if inspect.ismodule(getattr(module, name)) == folders]
        yield from (".. container::", "")  # it gets the id of the module, and the table has none
        yield from (f"   {line}" for line in table(path, module, names))


class Entries(_NamesDirective):
    """The entries of the names of a module: signatures, docstrings, members and sources."""

    def lines(self, path, module):
        """Yield the lines of all entries."""
        _, rest = first_paragraph(description(path, module))
        yield from (f".. py:currentmodule:: {path}", "", *rest, "")
        folder = path.split(".")[1] if path != "pyro_vae" else None
        done = set()
        for name, value in members(module, path):
            names = all_names()[id(value)]
            if id(value) in done or folder_of(names) != folder:
                continue
            done.add(id(value))
            if inspect.ismodule(value) and folder is None:
                continue  # it has a page
            if inspect.ismodule(value):
                yield from (f".. py:module:: {name}", "", f".. rubric:: {name}", "")
                yield from (*description(name, value), "")
                yield from table(name, value, public_names(value))
                continue
            yield from self.entry(names[0], value)
            for alias in names[1:]:
                kind = "class" if inspect.isclass(value) else "function"
                self.env.domains["py"].note_object(alias, kind, names[0], aliased=True)

    def entry(self, name, value):
        """Yield the lines of one entry."""
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, BaseException) else "class"
            yield from (f".. auto{kind}:: {name}", "   :members:")
            if shown_bases(value):
                yield "   :show-inheritance:"
            yield ""
        elif inspect.isroutine(value):
            yield from (f".. autofunction:: {name}", "")
        else:
            module, _, short = name.rpartition(".")
            yield from (f".. py:currentmodule:: {module}", "", f".. py:data:: {short}", "")
            yield from (*(f"   {line}" for line in description(name, value)), "")


class CommandLine(SphinxDirective):
    """All commands of the program ``pyro-vae``, with their options, from the application itself."""

    def run(self):
        """Return the parsed text."""
        group = typer.main.get_command(pyro_vae.cli.app)
        lines = [line for name in group.commands for line in self.command(name, group)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)

    def command(self, name, group):
        """Yield the lines of one command."""
        command = group.commands[name]
        full = f"pyro-vae {name}"
        context = command.make_context(name, [], resilient_parsing=True)
        yield from (full, "-" * len(full), "", *inspect.cleandoc(command.help).splitlines(), "")
        yield from (f".. program:: {full}", "")
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is not None:
                signature, text = record
                text = re.sub(r"--[a-z]\S*\b", r"``\g<0>``", " ".join(text.split()))
                yield from (f".. option:: {signature}", "", f"   {text}", "")


def shown_bases(cls):
    """Return the base classes, with the next public or foreign one in place of a private one."""
    shown = []
    for base in cls.__bases__:
        for candidate in base.__mro__:
            if id(candidate) in all_names() or not candidate.__module__.startswith("pyro_vae"):
                if candidate is not object and candidate not in shown:
                    shown.append(candidate)
                break
    return shown


def public_bases(app, name, cls, options, bases):
    """Make autodoc show these base classes."""
    bases[:] = shown_bases(cls)


def own_or_other_name(app, env, node, content):
    """Find the one public name that ends as a reference does, or correct one to another project.

    The docstring of ``pyro_vae.fit`` is written in ``pyro_vae.training``, so it says ``Fit``.
    """
    if node.get("refdomain") != "py":
        return None
    head, dot, rest = node["reftarget"].partition(".")
    ours = [names[0] for names in all_names().values() if names[0].endswith(f".{head}")]
    if len(ours) == 1:
        name, kind = f"{ours[0]}{dot}{rest}", node["reftype"]
        domain = env.domains["py"]
        return domain.resolve_xref(env, node["refdoc"], app.builder, kind, name, node, content)
    node["reftarget"] = OTHER_NAMES.get(node["reftarget"], node["reftarget"])  # for intersphinx
    return None


def before_napoleon(app, what, name, obj, options, lines):
    """Protect what Napoleon and reStructuredText would read in another way.

    Napoleon takes the words before a colon in a property's first line for a type: the colon is
    doubled until :func:`after_napoleon`. In "levels: L.", the letter is the number of a list item.
    """
    lines[:] = [re.sub(r"^( +\*{0,2}\w+: )(?=[A-Za-z]\.( |$))", r"\1\\", line) for line in lines]
    if what in ("attribute", "property"):
        lines[:1] = [line.replace(": ", ":: ") for line in lines[:1]]


def after_napoleon(app, what, name, obj, options, lines):
    """Undo the doubled colon, and leave attributes that are properties to their own entries."""
    if what in ("attribute", "property"):
        lines[:1] = [line.replace(":: ", ": ") for line in lines[:1]]
    for row, line in reversed([*enumerate(lines)]):
        attribute = line.removeprefix(".. attribute:: ")
        if attribute != line and isinstance(getattr(obj, attribute, None), property):
            lines.insert(row + 1, "   :no-index:")


def correct_links_of_sources(app, page, template, context, doctree):
    """Link each source to the entry under its public name: viewcode takes one module for a file."""
    if not page.startswith("_modules/pyro_vae"):
        return
    module = sys.modules[page.removeprefix("_modules/").replace("/", ".")]

    def corrected(match):
        name, dot, rest = match["name"].partition(".")
        names = all_names().get(id(getattr(module, name, None)))
        return f"{match['start']}{names[0]}{dot}{rest}" if names else match[0]

    block = r'<div class="viewcode-block" id="(?P<name>[\w.]+)">\s*<a [^>]*href="[^"#]*#'
    context["body"] = re.sub(rf"(?P<start>{block})[\w.]+", corrected, context["body"])


def setup(app):
    """Register the directives."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("summary", Summary)
    app.add_directive("entries", Entries)
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("html-page-context", correct_links_of_sources)
    app.connect("missing-reference", own_or_other_name, priority=400)
    return {"parallel_read_safe": True}

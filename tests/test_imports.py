"""The import rules of docs/architecture.md: the ways between files run in one direction."""

import ast
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__file__).parent

# Each file or package, and what of this project it may import. Nothing else may it.
ALLOWED = {
    "inputs": set(),
    "real": {"inputs"},
    "signatures": set(),
    "circular": {"real"},
    "supports": {"circular"},
    "mappings": {"circular"},
    "making": {"mappings", "signatures"},
    "nets": {"inputs", "making"},
    "tilted": set(),
    "closed_forms": {"tilted"},
    "sites": {"closed_forms"},
    "runs": {"sites"},
    "outside": {"sites", "supports"},
    "enumeration": {"sites"},
    "rules": {"enumeration", "sites"},
    "positive": set(),
    "arguments": set(),
    "seeding": set(),
    "latents": {"circular", "enumeration", "runs", "seeding", "sites", "supports"},
    "implicit": set(),
    "samples": {"implicit", "sites"},
    "dreams": {"runs", "sites"},
    "traces": {"dreams", "enumeration", "outside", "rules", "runs", "samples", "sites"},
    "validating": set(),
    "processes": set(),
    "progress": {"processes"},
    "minibatches": {"arguments", "inputs", "seeding"},
    "datasets": {"signatures"},
    "likelihoods": {"arguments", "inputs", "making", "positive", "real", "signatures", "tilted"},
    "divergences": {"closed_forms", "sites", "traces"},
    "predictions": {"enumeration", "sites", "traces"},
    "baselines": {"sites", "traces"},
    "terms": {"arguments", "baselines", "divergences", "dreams", "predictions", "rules", "samples",
              "seeding", "sites", "traces"},
    "mixtures": {"implicit", "inputs", "real"},
    "flows": {"implicit", "inputs", "making", "nets", "signatures"},
    "objectives": {"arguments", "terms", "traces"},
    "codenames": set(),
    "reach": {"codenames"},
    "identity": set(),
    "modules": {"identity", "reach"},
    "capture": {"modules", "reach", "seeding"},
    "fits": {"identity", "reach", "traces"},
    "programs": {"fits", "identity", "modules", "traces"},
    "priors": {"arguments", "making", "minibatches", "mixtures", "positive", "programs", "real",
               "rules", "runs", "seeding", "signatures", "sites"},
    "layers": {"arguments", "flows", "inputs", "making", "sites"},
    "models": {"inputs", "layers", "making", "priors", "sites"},
    "guides": {"circular", "flows", "inputs", "latents", "layers", "making", "mixtures", "models",
               "nets", "positive", "runs", "seeding", "sites", "terms"},
    "storage": set(),
    "state": {"fits", "mappings", "modules", "programs", "reach", "traces"},
    "interrupts": set(),
    "recipes": {"flows", "guides", "latents", "layers", "likelihoods", "making", "mappings",
                "models", "nets", "priors"},
    "positions": {"runs", "seeding", "traces"},
    "minibatch_supports": {"minibatches", "sites", "traces"},
    "contract": {"inputs", "minibatch_supports", "minibatches", "modules", "positions", "programs",
                 "sites", "traces", "validating"},
    "saving": {"guides", "mappings", "modules", "programs", "reach", "recipes", "state", "storage",
               "traces"},
    "training": {"arguments", "capture", "contract", "fits", "interrupts", "minibatches", "modules",
                 "objectives", "processes", "programs", "progress", "reach", "saving", "seeding",
                 "sites", "state", "storage", "traces", "validating"},
    "evaluation": {"arguments", "capture", "contract", "enumeration", "interrupts", "latents",
                   "minibatches", "mixtures", "modules", "predictions", "processes", "programs",
                   "progress", "runs", "seeding", "sites", "terms", "traces", "validating"},
    "comparison": {"arguments", "contract", "evaluation", "fits", "identity", "minibatches",
                   "modules", "objectives", "programs", "progress", "seeding", "state", "terms",
                   "traces", "training"},
    "cli": {"", "arguments", "processes", "progress", "seeding"},  # the front door
    "__main__": {"cli"},
}  # fmt: skip
# Who may import what of the world outside, where that is a rule.
TORCH_ONLY = {"implicit", "inputs", "nets", "positive", "processes", "tilted"}
PYRO_AND_TORCH_ONLY = {
    "baselines",
    "circular",
    "closed_forms",
    "divergences",
    "dreams",
    "enumeration",
    "latents",
    "outside",
    "runs",
    "predictions",
    "samples",
    "sites",
    "supports",
    "traces",
    "terms",
    "mixtures",
    "flows",
    "layers",
    "guides",
    "objectives",
    "models",
    "priors",
    "likelihoods",
    "real",
}
STANDARD = {"__future__", "abc", "collections", "contextlib", "contextvars", "copy", "dataclasses",
            "functools", "itertools", "math", "os", "typing", "warnings"}  # fmt: skip


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path):
    """The name of a file or package directly below pyro_vae."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path):
    """Full names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield node.module
            if node.module == "pyro_vae":
                yield from (f"pyro_vae.{alias.name}" for alias in node.names)


def parts_imported(path):
    names = set()
    for module in imported_modules(path):
        root, *rest = module.split(".")
        if root == "pyro_vae":
            names.add(rest[0] if rest else "")
    if path.name != "cli.py" and "" in names and len(names) > 1:
        names.discard("")  # `from pyro_vae import programs` names the part itself
    return names - {part_of(path)}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_import_only_what_lies_before_them(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: give it its place in ALLOWED and in architecture.md"
    assert parts_imported(path) <= ALLOWED[part]


def test_the_rules_have_no_way_back():
    seen = []
    for part, allowed in ALLOWED.items():
        assert allowed - {""} <= set(seen), f"{part} may import what comes after it"
        seen.append(part)


@pytest.mark.parametrize("part", sorted(PYRO_AND_TORCH_ONLY | TORCH_ONLY))
def test_programs_and_terms_know_only_pyro_and_torch(part):
    allowed = {"torch", "pyro_vae"} | STANDARD | (set() if part in TORCH_ONLY else {"pyro"})
    place = ROOT / part
    for path in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        assert {module.split(".")[0] for module in imported_modules(path)} <= allowed


def test_a_way_back_would_be_seen(tmp_path, monkeypatch):
    path = tmp_path / "terms.py"
    path.write_text("def late():\n    from pyro_vae import guides\n")
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    assert parts_imported(path) == {"guides"}


def test_public_names_are_written_out():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(pyro_vae.__all__)
    assert sorted(pyro_vae.__all__) == pyro_vae.__all__

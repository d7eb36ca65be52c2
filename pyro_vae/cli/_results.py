"""The folder of results: a page, a table, all numbers, and the pairs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro_vae as pv


class ResultFolder:
    """A folder for the results of one command.

    Args:
        path: the folder, which is created.

    Raises:
        ValueError: The folder cannot be written, or its folder of pairs has other content.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot write --output {path}: {error.strerror or error}. Pass the path of a "
                "folder, which may be new"
            ) from error
        if not os.access(path, os.W_OK):
            raise ValueError(f"cannot write --output {path}. Pass a writable folder")

    def pair_folders(self, names: Sequence[str]) -> dict[str, Path]:
        """Return a folder for the pair of each name.

        Raises:
            ValueError: A folder exists and is not a saved pair.
        """
        safe = safe_names(names)
        folders = {name: self.path / "pairs" / safe[i] for i, name in enumerate(names)}
        for folder in folders.values():
            if folder.exists() and not (folder / "record.json").is_file():
                raise ValueError(
                    f"{folder} is not a saved pair, so it is not replaced. Remove it, or pass "
                    "another --output"
                )
        return folders

    def write_json(self, content: Mapping[str, Any]) -> None:
        """Write ``results.json``. NaN and infinite numbers become null."""
        text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
        (self.path / "results.json").write_text(text + "\n", encoding="utf-8")


def safe_names(names: Sequence[str]) -> list[str]:
    """Return different names of folders, with letters, digits, dots and hyphens alone.

    Example:
        >>> safe_names(["objective: IWAE-10", "a/b", "A b", "../"])
        ['objective-IWAE-10', 'a-b', 'A-b-2', 'pair']
    """
    found: list[str] = []
    for name in names:
        safe = re.sub(r"[^\w.]+", "-", name)[:60].strip("-.") or "pair"
        number, unique = 2, safe
        while unique.lower() in (each.lower() for each in found):
            unique, number = f"{safe}-{number}", number + 1
        found.append(unique)
    return found


def diagnosis_of(diagnosis: pv.report.Diagnosis) -> dict[str, Any]:
    """Return the ledger, the verdict and the notes of a diagnosis."""
    return {
        "entries": rows_of(diagnosis.to_dataframe()),
        "verdict": diagnosis.verdict,
        "notes": diagnosis.notes,
    }


def runs_of(comparison: pv.report.Comparison) -> list[dict[str, Any]]:
    """Return the numbers of each single run of a comparison."""
    return [
        {
            "name": entry.name,
            "seed": None if run.fit is None else run.fit.seed,
            "log_evidence": run.evidence.mean,
            "standard_error": run.evidence.standard_error,
            "monte_carlo_error": run.evidence.monte_carlo_error,
            "test_elbo": run.evidence.elbo,
            "unreliable_share": run.evidence.unreliable_share,
            "epochs": None if run.fit is None else len(run.fit.history),
            "best_epoch": None if run.fit is None else run.fit.best_epoch,
        }
        for entry in comparison.entries
        for run in entry.runs
    ]


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a data frame as dictionaries, with its index if that has a name."""
    if frame.index.name is not None:
        frame = frame.reset_index()
    return frame.to_dict("records")


def _plain(value: Any) -> Any:
    """Return a value of Python's own types, for JSON."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)

"""Figures measured before, on another machine: a chapter shows them beside its own run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from helpers.files import DataError

FOLDER = Path(__file__).resolve().parents[2] / "results"
"""In a clone of the repository; not there where the package alone is installed, as in Colab."""


def measured(
    name: str, *, folder: Path | None = None, **wanted: object
) -> tuple[pd.DataFrame, str]:
    """Return rows of a file of ``results/``, and a line that says where they come from.

    Parameters
    ----------
    name
        The file, such as ``"ladder.json"``: a report with `measured`, `commit`, `machine` and a
        list of `rows`.
    folder
        Where to look; `FOLDER` when None.
    wanted
        Columns and the value that a row must have to be returned.

    Returns
    -------
    DataFrame
        Without a row where the file is not here, or nothing that was asked for was measured.
    str
        To be shown beside it: these figures are of another run.

    Raises
    ------
    DataError
        When the file is damaged.
    """
    path = (folder or FOLDER) / name
    if not path.exists():
        return pd.DataFrame(), f"results/{name} is not here: only this run is shown"
    try:
        report = json.loads(path.read_text())
        machine, rows = report["machine"], pd.DataFrame(report["rows"])
        device, whole = machine.get("gpu") or machine["processor"], _short(report["commit"])
        when = report["measured"]
    except (ValueError, KeyError, TypeError) as error:
        fix = "fetch it again from the repository"
        raise DataError(f"the report is damaged ({error!r})", file=path, fix=fix) from error
    for column, value in wanted.items():
        rows = rows[rows[column] == value] if column in rows else rows.iloc[:0]
    if rows.empty:
        return rows, f"results/{name}: not measured for {wanted}"
    data = sorted(set(rows["data"].dropna().astype(str))) if "data" in rows else []
    commits = sorted(set(rows["commit"].dropna().map(_short))) if "commit" in rows else []
    source = ", ".join([*data, device, f"commit {' and '.join(commits) or whole}", when])
    line = f"NOT this run, results/{name}: {len(rows)} rows, {source}"
    return rows.reset_index(drop=True), line


def _short(commit: str) -> str:
    return commit[:7] + (" with changes" if commit.endswith("-changed") else "")

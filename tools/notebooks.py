"""Read, write and strip notebooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]
Cell = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_METADATA = {"tags", "mystnb", "jupyter"}


def read(path: Path) -> Notebook:
    """Return the notebook as parsed JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(notebook: Notebook, path: Path) -> None:
    """Write a notebook the way Jupyter does, so that a strip changes nothing else."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def source(cell: Cell) -> str:
    """Return the text of a cell; the format allows a string or a list of lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def tags(cell: Cell) -> set[str]:
    """Return the tags of a cell."""
    return set(cell["metadata"].get("tags", []))


def strip(notebook: Notebook, keep_outputs: bool = False) -> Notebook:
    """Return a copy without outputs, counts and the metadata that editors and papermill add."""
    cells = []
    for cell in notebook["cells"]:
        kept = {k: v for k, v in cell["metadata"].items() if k in CELL_METADATA}
        clean = {**cell, "metadata": kept, "source": source(cell).splitlines(keepends=True)}
        if cell["cell_type"] == "code" and not keep_outputs:
            clean |= {"outputs": [], "execution_count": None}
        cells.append(clean)
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def name(cell: Cell) -> str:
    """Return the name of a cell in messages."""
    return f"cell {cell.get('id', '?')}"

"""Read, write and strip notebooks; as a script: strip the chapters, or check their anatomy."""

from __future__ import annotations

import argparse
import json
import sys
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


def strip(notebook: Notebook) -> Notebook:
    """Return a copy without outputs, counts and the metadata that editors leave behind."""
    cells = []
    for cell in notebook["cells"]:
        kept = {k: v for k, v in cell["metadata"].items() if k in CELL_METADATA}
        clean = {**cell, "metadata": kept, "source": source(cell).splitlines(keepends=True)}
        if cell["cell_type"] == "code":
            clean |= {"outputs": [], "execution_count": None}
        cells.append(clean)
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def name(cell: Cell) -> str:
    """Return how messages call a cell."""
    return f"cell {cell.get('id', '?')}"


def main(argv: list[str] | None = None) -> int:
    """Strip notebooks in place, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description="Strip or check the notebooks of the book.")
    parser.add_argument("action", choices=["strip", "check"])
    parser.add_argument("paths", nargs="*", type=Path, help="default: all of notebooks/")
    options = parser.parse_args(argv)
    from anatomy import problems  # the rules read notebooks with this module

    failed = False
    for path in options.paths or sorted((ROOT / "notebooks").glob("*.ipynb")):
        if options.action == "strip":
            write(strip(read(path)), path)
            continue
        for problem in problems(read(path), path.stem):
            failed = True
            print(f"{path.name}: {problem}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Find what a reader should not see in an executed chapter."""

from __future__ import annotations

import json
import re

import notebooks as nbs
from notebooks import Cell, Notebook

# The remarks of the helpers begin with the slide; a page may show them.
OWN_LOG = re.compile(r"(slide \S.*\n?)+")


def _text(cell: Cell) -> str:
    """Return everything a cell printed or showed as text."""
    parts = []
    for output in cell.get("outputs", []):
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        parts.append(text if isinstance(text, str) else "".join(text))
    return "\n".join(parts)


def problems(notebook: Notebook, local: tuple[str, ...] = ()) -> list[str]:
    """Return what a reader should not see; ``local`` are folders of this machine."""
    found = []
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        kinds, text = nbs.tags(cell), _text(cell)
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{nbs.name(cell)} failed: {output['ename']}: {output['evalue']}")
            if output.get("name") == "stderr" and not OWN_LOG.fullmatch("".join(output["text"])):
                found.append(f"{nbs.name(cell)} wrote to stderr: {''.join(output['text'])[:300]}")
        if "check" in kinds and "Not answered yet" not in text:
            found.append(f"{nbs.name(cell)}: the check of an untouched stub said {text[:80]!r}")
        if "solution" in kinds and not re.search(r"^['\"]?Correct", text, re.M):
            found.append(f"{nbs.name(cell)}: the solution is not 'Correct' but {text[-80:]!r}")
        if "figure" in kinds:
            found += _figure_problems(cell)
        found += [
            f"{nbs.name(cell)} shows a path of this machine: {p}"
            for p in local
            if p in json.dumps(cell["outputs"])
        ]
    return found


def _figure_problems(cell: Cell) -> list[str]:
    images = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
    rest = [o for o in cell["outputs"] if o not in images and o.get("name") != "stderr"]
    found = [] if len(images) == 1 else [f"{nbs.name(cell)} shows {len(images)} images, not one"]
    return found + [
        f"{nbs.name(cell)} shows text beside its figure: {_text({'outputs': [o]})[:80]!r}"
        for o in rest
    ]

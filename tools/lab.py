"""Open copies of the chapters in JupyterLab, in my-notebooks/, which git ignores.

This keeps answers and outputs out of the way of `make book`, `make test` and `git pull`. A copy is
updated with its chapter until a reader edits it. Options are passed on to JupyterLab.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import notebooks as nbs
from notebooks import ROOT

SOURCES, COPIES = ROOT / "notebooks", ROOT / "my-notebooks"
RECORD = ".copied.json"  # the version of the chapter that each copy was made from


def digest(notebook: nbs.Notebook) -> str:
    """Return the SHA-256 of a notebook without its outputs."""
    return hashlib.sha256(json.dumps(nbs.strip(notebook), sort_keys=True).encode()).hexdigest()


def copy(sources: Path = SOURCES, copies: Path = COPIES) -> Iterator[str]:
    """Update the copies; yield a line for each edited copy whose chapter has changed."""
    copies.mkdir(exist_ok=True)
    record = copies / RECORD
    made = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for path in sorted(sources.glob("*.ipynb")):
        mine, now = copies / path.name, digest(nbs.read(path))
        before = made.get(path.name)
        if not mine.exists() or (before != now and digest(nbs.read(mine)) == before):
            mine.write_bytes(path.read_bytes())
            made[path.name] = now
        elif before != now:
            yield (
                f"{path.name} has changed since you edited your copy, which is kept. "
                f"To get the new version, rename {mine.relative_to(copies.parent)} and start again."
            )
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main(options: list[str]) -> None:
    """Update the copies and start JupyterLab."""
    from jupyterlab.labapp import LabApp

    for line in copy():
        print(line)
    os.chdir(ROOT)
    LabApp.launch_instance([f"--LabApp.default_url=/lab/tree/{COPIES.name}", *options])


if __name__ == "__main__":
    main(sys.argv[1:])

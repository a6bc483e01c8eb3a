"""Open the chapters in JupyterLab, as copies in my-notebooks/, which git does not look at.

So answers and outputs never get in the way of `make book`, `make test` or `git pull`. A copy
follows its chapter until something is written into it. Options are passed on to JupyterLab.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import notebooks as nbs

ROOT = Path(__file__).resolve().parent.parent
SOURCES, COPIES = ROOT / "notebooks", ROOT / "my-notebooks"
RECORD = ".copied.json"  # from which version of its chapter each copy was made


def digest(notebook: nbs.Notebook) -> str:
    """Return a SHA-256 of what a notebook holds, its outputs apart."""
    return hashlib.sha256(json.dumps(nbs.strip(notebook), sort_keys=True).encode()).hexdigest()


def copy(sources: Path = SOURCES, copies: Path = COPIES) -> Iterator[str]:
    """Bring the copies up to date; yield a line for each that is not, because it was changed."""
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
                f"{path.name} has changed since you wrote into your copy, which is kept: "
                f"rename {mine.relative_to(copies.parent)} and start again to get the new one."
            )
    record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main(options: list[str]) -> None:
    """Copy, and start JupyterLab."""
    from jupyterlab.labapp import LabApp

    for line in copy():
        print(line)
    os.chdir(ROOT)
    LabApp.launch_instance([f"--LabApp.default_url=/lab/tree/{COPIES.name}", *options])


if __name__ == "__main__":
    main(sys.argv[1:])

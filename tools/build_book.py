"""Build the pages of one study from its executed chapters, warnings as errors.

The book's source is staged in _build/<study>/source, so that the repository holds no output.
The pages replace the last ones in _build/<study>/html only when the whole build has succeeded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import computed_pages
from run_notebooks import RECORD, ROOT, digest, helpers_digest, no_progress_bars

JUPYTER_BOOK = (sys.executable, "-c", "from jupyter_book.cli.main import main; main()")
ZIP = "stimage-book.zip"
OFFLINE_LINK = re.compile(rb'<a class="offline-copy"[^>]*>(.*?)</a>')
AGAIN = "Run `make book` (or tools/run_notebooks.py without names) again."


def chapters_of(toc: dict[str, Any]) -> list[str]:
    """Return the notebooks that a table of contents names, in order, without suffix."""
    found = []
    for key, value in toc.items():
        if key in ("parts", "chapters", "sections"):
            found += [name for entry in value for name in chapters_of(entry)]
        elif key in ("file", "root") and value.startswith("notebooks/"):
            found.append(Path(value).stem)
    return found


def refusals(record: dict[str, Any], toc: dict[str, Any], root: Path, study: str) -> list[str]:
    """Return why pages may not be built from a record of ``run_notebooks.py``."""
    found = []
    if record["study"] != study:
        found.append(f"the chapters ran on {record['study']}, not on {study}")
    if not record["complete"]:
        found.append("only some of the chapters ran")
    if record["helpers"] != helpers_digest():
        found.append("src/helpers has changed since the chapters ran")
    for name in chapters_of(toc):
        ran, source = record["chapters"].get(name), root / "notebooks" / f"{name}.ipynb"
        if ran is None:
            found.append(f"{name} is in _toc.yml but has not run")
        elif not source.exists() or digest(source) != ran["source"]:
            found.append(f"notebooks/{name}.ipynb has changed since it ran")
    return found


def stage(root: Path, executed: Path, folder: Path, study: str) -> None:
    """Fill a folder with the book's source: pages, executed chapters, computed pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, folder / name)
    shutil.copytree(root / "book", folder / "book", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(executed, folder / "notebooks")
    computed_pages.stage(folder, study)


def write_zip(
    target: Path, folder: Path, name: str, read: Callable[[Path], bytes] = Path.read_bytes
) -> None:
    """Put the files of a folder into a zip as ``name``: equal bytes from equal content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != target)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(f"{name}/{path.relative_to(folder).as_posix()}")  # of 1980
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, read(path))


def without_offline_link(path: Path) -> bytes:
    """Return a file of the book without the link to the zip, which would be broken in the zip."""
    content = path.read_bytes()
    return OFFLINE_LINK.sub(rb"\1", content) if path.suffix == ".html" else content


def pack(html: Path) -> None:
    """Put all pages into one zip beside them, with its SHA-256."""
    write_zip(html / ZIP, html, "stimage-book", without_offline_link)
    total = hashlib.sha256((html / ZIP).read_bytes()).hexdigest()
    (html / f"{ZIP}.sha256").write_text(f"{total}  {ZIP}\n", encoding="utf-8")


def build(source: Path, html: Path) -> bool:
    """Build the pages and put them in place; return whether that succeeded."""
    with tempfile.TemporaryDirectory(prefix="html.", dir=html.parent) as scratch:
        command = [
            *JUPYTER_BOOK,
            *("build", str(source), "--path-output", scratch),
            *("-n", "-W", "--keep-going", "--quiet"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        (html.parent / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode != 0:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            return False
        pack(Path(scratch) / "_build" / "html")
        old = Path(scratch) / "old"
        if html.exists():
            html.rename(old)
        (Path(scratch) / "_build" / "html").rename(html)
    return True


def main(argv: list[str] | None = None) -> int:
    """Build the pages; return the exit status."""
    parser = argparse.ArgumentParser(description="Build the pages of the book.")
    parser.add_argument("--study", default=os.environ.get("STUDY", "demo"))
    parser.add_argument("--out", type=Path, help="default: _build/<study>")
    options = parser.parse_args(argv)
    out = (options.out or ROOT / "_build" / options.study).resolve()
    record = out / "notebooks" / RECORD
    if not record.exists():
        print(f"No chapter has run on {options.study} yet. {AGAIN}", file=sys.stderr)
        return 1
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    reasons = refusals(json.loads(record.read_text(encoding="utf-8")), toc, ROOT, options.study)
    if reasons:
        print(
            "\n".join(["No pages are built:", *(f"- {r}" for r in reasons), AGAIN]), file=sys.stderr
        )
        return 1
    if not sys.stderr.isatty():
        no_progress_bars()
    start = time.perf_counter()
    stage(ROOT, out / "notebooks", out / "source", options.study)
    if not build(out / "source", out / "html"):
        print(
            "No pages were built: fix the errors above and run `make book`. Old pages are kept.",
            file=sys.stderr,
        )
        return 1
    print(f"Pages of study {options.study} built in {time.perf_counter() - start:.0f} s. Open:")
    print(f"  {(out / 'html' / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

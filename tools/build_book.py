"""Build the pages of one study from its executed chapters; a warning is an error.

The book's source is staged in _build/<study>/source, so that the repository holds no output. The
pages in _build/<study>/html are replaced only when the whole build has succeeded.
"""

from __future__ import annotations

import argparse
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

import computed_pages
from helpers.files import sha256
from notebooks import ROOT
from run_chapter import RECORD
from run_notebooks import helpers_digest, no_progress_bars

JUPYTER_BOOK = (sys.executable, "-c", "from jupyter_book.cli.main import main; main()")
ZIP = "stimage-book.zip"
OFFLINE_LINK = re.compile(rb'<a class="offline-copy"[^>]*>(.*?)</a>')


def chapters_of(toc: Path) -> list[str]:
    """Return the notebooks that a table of contents names, in order, without suffix."""
    return re.findall(r"^ *- file: notebooks/(\w+)", toc.read_text(encoding="utf-8"), re.M)


def refusals(executed: Path, root: Path, study: str) -> list[str]:
    """Return why pages may not be built from a folder of executed chapters."""
    if not (executed / RECORD).exists():
        return [f"no chapter has run on {study} yet"]
    record, found = json.loads((executed / RECORD).read_text(encoding="utf-8")), []
    if record["study"] != study:
        found.append(f"the chapters ran on {record['study']}, not on {study}")
    if not record["complete"]:
        found.append("only some of the chapters ran")
    if record["helpers"] != helpers_digest():
        found.append("src/helpers has changed since the chapters ran")
    for name in chapters_of(root / "_toc.yml"):
        ran, source = record["chapters"].get(name), root / "notebooks" / f"{name}.ipynb"
        if ran is None:
            found.append(f"{name} is in _toc.yml but has not run")
        elif not source.exists() or sha256(source) != ran["source"]:
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
    """Zip the files of a folder under ``name``; equal content gives equal bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != target)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(f"{name}/{path.relative_to(folder).as_posix()}")  # dated 1980
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, read(path))


def without_offline_link(path: Path) -> bytes:
    """Return a file of the book without the link to the zip, which is broken inside the zip."""
    content = path.read_bytes()
    return OFFLINE_LINK.sub(rb"\1", content) if path.suffix == ".html" else content


def pack(html: Path) -> None:
    """Put all pages into a zip next to them, and its SHA-256 next to that."""
    write_zip(html / ZIP, html, "stimage-book", without_offline_link)
    (html / f"{ZIP}.sha256").write_text(f"{sha256(html / ZIP)}  {ZIP}\n", encoding="utf-8")


def build(source: Path, html: Path) -> bool:
    """Build the pages and replace the old ones; return whether that succeeded."""
    with tempfile.TemporaryDirectory(prefix="html.", dir=html.parent) as scratch:
        command = [*JUPYTER_BOOK, "build", source, "--path-output", scratch]
        command += ["-n", "-W", "--keep-going", "--quiet"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        (html.parent / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode != 0:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            return False
        made = Path(scratch) / "_build" / "html"
        pack(made)
        if html.exists():
            html.rename(Path(scratch) / "old")
        made.rename(html)
    return True


def main(argv: list[str] | None = None) -> int:
    """Build the pages; return the exit status."""
    parser = argparse.ArgumentParser(description="Build the pages of the book.")
    parser.add_argument("--study", default=os.environ.get("STUDY", "demo"))
    parser.add_argument("--out", type=Path, help="default: _build/<study>")
    options = parser.parse_args(argv)
    out = (options.out or ROOT / "_build" / options.study).resolve()
    if reasons := refusals(out / "notebooks", ROOT, options.study):
        fix = "Fix: run `make book`, or tools/run_notebooks.py without names."
        lines = ["No pages were built:", *(f"- {reason}" for reason in reasons), fix]
        print("\n".join(lines), file=sys.stderr)
        return 1
    if not sys.stderr.isatty():
        no_progress_bars()
    start = time.perf_counter()
    stage(ROOT, out / "notebooks", out / "source", options.study)
    if not build(out / "source", out / "html"):
        print("No pages were built, and old ones are unchanged.", file=sys.stderr)
        print("Fix: correct the errors above, then run `make book` again.", file=sys.stderr)
        return 1
    print(f"Pages of study {options.study} built in {time.perf_counter() - start:.0f} s. Open:")
    print(f"  {(out / 'html' / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

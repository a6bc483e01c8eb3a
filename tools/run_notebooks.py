"""Run the chapters of a study into _build/<study>/notebooks, several at a time.

``run.json`` in that folder records each chapter's source, run time and peak memory.
``tools/build_book.py`` builds pages only if the sources still match that record.

A chapter that has run is kept in _build/chapters and reused until something it depends on changes.
A run that stopped at chapter 7 therefore resumes there; ``--fresh`` runs everything.

``--also FOLDER`` runs code from a folder in each chapter's kernel, after its last cell. On demo,
the default is tests/wrong_answers, which gives wrong answers to the checks of the exercises.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
from tqdm import tqdm

from helpers.files import atomic, digest, sha256
from notebooks import ROOT
from run_chapter import RECORD, NotebookError, also_code

SOURCES = ROOT / "notebooks"
KEPT = ROOT / "_build" / "chapters"
WRONG_ANSWERS = ROOT / "tests" / "wrong_answers"
GB_PER_CHAPTER = 4
FIRST = "01"  # prepares the data that all others read
TOWER = "07"  # trains a tower that later chapters use; started with it, each would train its own
USE_TOWER = ("08", "09", "10", "11")
LONGEST = ("07", "08", "05", "11", "09")  # started early, so that no core is idle at the end


def helpers_digest() -> str:
    """Return a digest of the helper package: its code is part of what made a page."""
    package = ROOT / "src" / "helpers"
    own = (p for p in package.rglob("*") if p.is_file() and p.parent.name != "__pycache__")
    return digest(files={p.relative_to(package).as_posix(): sha256(p) for p in own})


def surroundings(study: str) -> dict[str, Any]:
    """Return everything that all chapters depend on: packages, helpers, results and data."""
    root = os.environ.get("STIMAGE_ROOT")  # without one, data come from helpers or a pinned hub
    data = Path(root).rglob("*") if root and study != "demo" else ()
    return {
        "study": study,
        "python": sys.version,
        "packages": sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions()),
        "helpers": helpers_digest(),
        "results": {p.name: sha256(p) for p in (ROOT / "results").glob("*.json")},
        "data": {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in data},
    }


def chapters(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Return the notebooks in order; ``names`` selects some by number, name or start of a name."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise SystemExit(f"{folder} has no chapters. Fix: name a folder that does (--notebooks).")
    wanted = [Path(name).stem for name in names or [""]]
    for name in wanted:
        if not any(p.stem.startswith(name) for p in found):
            there = ", ".join(p.stem for p in found)
            raise SystemExit(f"There is no chapter {name}. Fix: choose from {there}.")
    return [p for p in found if p.stem.startswith(tuple(wanted))]


def no_progress_bars() -> None:
    """Turn progress bars off: they are useful in a terminal but clutter a page."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def absolute_paths() -> None:
    """Make the caller's relative paths absolute, because a chapter runs in a different folder."""
    for name in ("STIMAGE_ROOT", "STIMAGE_CACHE", "HF_HOME"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())


def usual_jobs() -> int:
    """Return how many chapters to run at a time: up to 4, as cores and memory allow."""
    import psutil

    room = int(psutil.virtual_memory().total / 1e9 / GB_PER_CHAPTER)
    return max(1, min(4, joblib.cpu_count(), room))


def kernel_environment(jobs: int = 1) -> None:
    """Set the environment of every kernel; with several jobs, each gets its share of the cores."""
    no_progress_bars()
    os.environ.pop("MPLBACKEND", None)  # figures go to the page, whatever the shell prefers
    # On a busy machine, threads that spin for long while waiting make training 8 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // jobs)))
    if "OMP_NUM_THREADS" in os.environ:  # torch changes numba's thread count
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ |= {
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one in the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONWARNINGS": "ignore::SyntaxWarning:docrep.decorators",  # from importing squidpy
    }


async def run_one(path: Path, out: Path, options: list[str]) -> None:
    """Execute a chapter into a folder, in a process that ends when this task is cancelled.

    Raises
    ------
    NotebookError
        The chapter failed. The arguments are its name and the message.
    """
    silent, kept = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    with atomic(out) as made:
        command = [sys.executable, ROOT / "tools" / "run_chapter.py", path, made, *options]
        child = await asyncio.create_subprocess_exec(*map(str, command), stdout=silent, stderr=kept)
        try:
            _, said = await child.communicate()
        finally:
            if child.returncode is None:
                child.terminate()
                await child.wait()
        if child.returncode:
            raise NotebookError(path.stem, said.decode(errors="replace").strip())


async def run_all(
    folders: dict[Path, Path],
    jobs: int,
    options: list[str],
    started: Callable[[Path], None],
    ended: Callable[[Path], None],
) -> None:
    """Execute chapters into their folders, up to ``jobs`` at a time; a failure stops the others."""
    seats = asyncio.Semaphore(jobs)
    done = {path.stem[:2]: asyncio.Event() for path in folders}

    async def one(path: Path) -> None:
        number = path.stem[:2]
        for earlier in (FIRST, TOWER) if number in USE_TOWER else (FIRST,):
            if earlier in done and earlier != number:
                await done[earlier].wait()
        async with seats:
            started(path)
            await run_one(path, folders[path], options)
        ended(path)
        done[number].set()

    rank = {number: i for i, number in enumerate(LONGEST)}
    async with asyncio.TaskGroup() as group:
        for path in sorted(folders, key=lambda p: (rank.get(p.stem[:2], len(rank)), p.stem)):
            group.create_task(one(path))


def places(todo: list[Path], study: str, keep: Path, also: Path | None) -> dict[Path, Path]:
    """Return the folder of each chapter below ``keep``; its name changes with its inputs."""
    shared, found = surroundings(study), {}
    for path in todo:
        key = digest(source=sha256(path), also=also_code(path, also), **shared)
        found[path] = keep / f"{path.stem}-{key}"
    return found


class Report:
    """A bar that names the running chapters, and a line for each chapter that has ended."""

    def __init__(self, todo: list[Path], left: int) -> None:
        self.width, self.now = max(len(p.stem) for p in todo), []
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=left, desc="chapters", disable=hidden, leave=False)

    def started(self, path: Path) -> None:
        """Add a chapter to the bar."""
        self.now.append(path.stem)
        self.bar.set_postfix_str(f"now {', '.join(self.now)}")

    def ended(self, name: str, result: str) -> None:
        """Write the result of a chapter, and take it off the bar if it is there."""
        self.bar.write(f"  {name:{self.width}}  {result}")
        sys.stdout.flush()
        if name in self.now:
            self.now.remove(name)
            self.bar.update()


def run(
    folder: Path,
    out: Path,
    study: str,
    names: list[str] | None,
    timeout: int,
    keep: Path | None = None,
    jobs: int = 1,
    also: Path | None = None,
) -> dict[str, Any]:
    """Execute the chapters, replace ``out`` by the result, and return the record.

    Chapters already in ``keep`` are taken from there. The old ``out`` stays as it is until every
    chapter has run.
    """
    todo, ran = chapters(folder, names), {}
    record = {"study": study, "helpers": helpers_digest(), "complete": todo == chapters(folder)}
    options = [study, str(timeout), str(also or "")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as scratch:
        folders = places(todo, study, keep or Path(scratch), also)
        left = {path: place for path, place in folders.items() if not place.exists()}
        fresh = Path(scratch) / "complete"
        fresh.mkdir()

        def ended(path: Path, more: str = "") -> None:
            shutil.copy(folders[path] / path.name, fresh)
            facts = json.loads((folders[path] / RECORD).read_text(encoding="utf-8"))
            ran[path.stem] = facts
            cost = f"{facts['seconds']:6.1f} s  peak {facts['peak_mb'] / 1e3:.2f} GB"
            report.ended(path.stem, f"ok  {cost}{more}")

        report = Report(todo, len(left))
        with report.bar:
            for path in (path for path in todo if path not in left):
                ended(path, "  (unchanged: taken from an earlier run)")
            try:
                asyncio.run(run_all(left, jobs, options, report.started, ended))
            except ExceptionGroup as errors:
                error = errors.exceptions[0]
                if isinstance(error, NotebookError):
                    report.ended(error.args[0], "FAILED")
                raise error from None
        record["chapters"] = {path.stem: ran[path.stem] for path in todo}
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    return record


def prepare(name: str) -> None:
    """Print the study and its dataset root, and fetch its files before any chapter starts.

    Inside a chapter, a download would show no progress and would fail late.
    """
    from helpers import catalog, simulate

    root = os.environ.get("STIMAGE_ROOT") or "none (STIMAGE_ROOT is not set), so files are fetched"
    place = "none needed, it is simulated" if name == "demo" else root
    print(f"Study {name} · dataset root: {place}", flush=True)
    try:
        sections = catalog.study(name).sections
        if name == "demo":
            simulate.demo_root()
            return
        for section in sections:
            for kind in ("coord", "gene_exp", "image"):
                catalog.find(section.slide, kind, tech=section.tech)
    except catalog.DataError as error:
        raise SystemExit(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run the chapters; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the chapters of the book.")
    add = parser.add_argument
    add("names", nargs="*", help="only these, such as 02 or 02_tiles; pages need all")
    add("--study", default=os.environ.get("STUDY", "demo"))
    add("--notebooks", type=Path, default=SOURCES, help="the folder of the chapters")
    add("--out", type=Path, help="default: _build/<study>/notebooks")
    add("--timeout", type=int, default=3600, help="time limit of a cell, in seconds")
    add("--fresh", action="store_true", help="also run chapters that have not changed")
    add("--also", type=Path, help="a folder with code to run after each chapter")
    jobs_help = "chapters at a time; default: as cores and memory allow"
    add("--jobs", type=int, default=os.environ.get("JOBS"), help=jobs_help)
    options = parser.parse_args(argv)
    own = options.notebooks == SOURCES
    also = options.also or (WRONG_ANSWERS if own and options.study == "demo" else None)
    keep = KEPT if own and not options.fresh else None
    out = options.out or ROOT / "_build" / options.study / "notebooks"
    absolute_paths()
    if not sys.stderr.isatty():
        no_progress_bars()
    prepare(options.study)
    jobs = options.jobs or usual_jobs()
    kernel_environment(jobs if len(chapters(options.notebooks, options.names)) > 1 else 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    folder, start = options.notebooks.resolve(), time.perf_counter()
    try:
        record = run(
            folder, out.resolve(), options.study, options.names, options.timeout, keep, jobs, also
        )
    except NotebookError as error:
        print(f"\n{error.args[1]}\n\nPages that were built before are unchanged.", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"Chapters: {len(record['chapters'])}, in {seconds:.0f} s, written to {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

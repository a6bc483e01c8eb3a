"""Run the chapters of a study into _build/<study>/notebooks, several at a time.

``run.json`` in that folder records what ran, from which sources, how long and with how much memory.
``tools/build_book.py`` builds pages only from a record that still fits the sources.

A chapter that has run is kept in _build/chapters and taken from there until something it depends
on changes. A run that stopped at chapter 7 therefore resumes there; ``--fresh`` runs everything.

``--also FOLDER`` runs the code of a folder in each chapter's kernel, after its last cell. On demo,
it is tests/wrong_answers, which asks the checks of the exercises about wrong answers.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
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

from notebooks import ROOT
from run_chapter import RECORD, NotebookError, also_code, digest

SOURCES = ROOT / "notebooks"
KEPT = ROOT / "_build" / "chapters"
WRONG_ANSWERS = ROOT / "tests" / "wrong_answers"
GB_PER_CHAPTER = 4
FIRST = "01"  # prepares the data that all others read
TOWER = "07"  # trains the tower that these use; at the same time, each would train its own
USE_TOWER = ("08", "09", "10", "11")
LONGEST = ("07", "08", "05", "11", "09")  # start early, so that no core is idle at the end
UNTOUCHED = "The pages of the last complete run, if there are any, are unchanged."


def helpers_digest() -> str:
    """Return one SHA-256 over the helper package: its code is part of what made a page."""
    total = hashlib.sha256()
    files = (p for p in (ROOT / "src" / "helpers").rglob("*") if p.is_file())
    for path in sorted(p for p in files if p.parent.name != "__pycache__"):  # Python's, numba's
        total.update(f"{path.name} {digest(path)}\n".encode())
    return total.hexdigest()


def surroundings(study: str) -> str:
    """Return one SHA-256 over all that chapters share: helpers, packages, results and data."""
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    total = hashlib.sha256(f"{sys.version} {study} {helpers_digest()} {packages}".encode())
    for path in sorted((ROOT / "results").glob("*.json")):
        total.update(f"{path.name} {digest(path)}\n".encode())
    root = os.environ.get("STIMAGE_ROOT")  # without one, data come from helpers or a pinned hub
    for path in sorted(Path(root).rglob("*")) if root and study != "demo" else ():
        stat = path.stat()
        total.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()


def chapters(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Return the notebooks in order; ``names`` selects some by number, name or start of a name."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise SystemExit(f"There is no notebook in {folder}.")
    wanted = [Path(name).stem for name in names or [""]]
    for name in wanted:
        if not any(p.stem.startswith(name) for p in found):
            there = ", ".join(p.stem for p in found)
            raise SystemExit(f"No notebook is called {name}. There are: {there}.")
    return [p for p in found if p.stem.startswith(tuple(wanted))]


def no_progress_bars() -> None:
    """Turn progress bars off: they help a reader at a terminal and clutter a page."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def absolute_paths() -> None:
    """Make relative paths of the caller absolute: a chapter runs in a folder of its own."""
    for name in ("STIMAGE_ROOT", "STIMAGE_CACHE", "HF_HOME"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())


def usual_jobs() -> int:
    """Return how many chapters run at a time here: up to 4, as cores and memory allow."""
    import psutil

    room = int(psutil.virtual_memory().total / 1e9 / GB_PER_CHAPTER)
    return max(1, min(4, joblib.cpu_count(), room))


def kernel_environment(jobs: int = 1) -> None:
    """Set the environment of every kernel; with several jobs, each gets its share of the cores."""
    no_progress_bars()
    os.environ.pop("MPLBACKEND", None)  # figures go to the page, whatever the shell prefers
    # Threads that spin for long while they wait make training 8 times slower on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // jobs)))
    if "OMP_NUM_THREADS" in os.environ:  # torch takes over numba's number of threads
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ |= {
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one in the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONWARNINGS": "ignore::SyntaxWarning:docrep.decorators",  # whenever squidpy is imported
    }


async def run_one(path: Path, out: Path, options: list[str]) -> None:
    """Execute a chapter in a process of its own, which ends when this task is cancelled.

    Raises
    ------
    NotebookError
        The chapter failed. The arguments are its name and the message.
    """
    command = [sys.executable, ROOT / "tools" / "run_chapter.py", path, out, *options]
    silent, kept = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
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


def store(ran: Path, place: Path) -> None:
    """Keep a chapter that has run; another run may be storing the same one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent))  # renamed when complete
    shutil.copytree(ran, fresh, dirs_exist_ok=True)
    try:
        fresh.rename(place)
    except OSError:
        shutil.rmtree(fresh)
        if not place.exists():
            raise


def kept_at(todo: list[Path], study: str, keep: Path | None, also: Path | None) -> dict[Path, Path]:
    """Return where each chapter is kept after its run: the name tells all that its run rests on."""
    if keep is None:
        return {}
    shared, places = surroundings(study), {}
    for path in todo:
        key = hashlib.sha256(f"{digest(path)} {also_code(path, also)} {shared}".encode())
        places[path] = keep / f"{path.stem}-{key.hexdigest()[:16]}"
    return places


class Report:
    """A bar with the chapters that are running, and a line for each that has ended."""

    def __init__(self, todo: list[Path], left: list[Path]) -> None:
        self.width, self.ran = max(len(p.stem) for p in todo), {}
        self.now: list[str] = []
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=len(left), desc="chapters", disable=hidden, leave=False)

    def started(self, path: Path) -> None:
        """Show that a chapter is running."""
        self.now.append(path.stem)
        self.bar.set_postfix_str(f"now {', '.join(self.now)}")

    def ended(self, path: Path) -> None:
        """Show that a chapter is no longer running."""
        self.now.remove(path.stem)
        self.bar.update()

    def line(self, path: Path, place: Path, more: str = "") -> None:
        """Write the time and the memory of a chapter that has run, and remember them."""
        facts = json.loads((place / RECORD).read_text(encoding="utf-8"))
        self.ran[path.stem] = facts
        seconds, memory = f"{facts['seconds']:6.1f} s", f"peak {facts['peak_mb'] / 1e3:.2f} GB"
        self.bar.write(f"  {path.stem:{self.width}}  ok  {seconds}  {memory}{more}")
        sys.stdout.flush()

    def failed(self, name: str) -> None:
        """Write which chapter failed."""
        self.bar.write(f"  {name:{self.width}}  FAILED")


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

    The old folder stays as it is until every chapter has run.
    """
    todo = chapters(folder, names)
    places = kept_at(todo, study, keep, also)
    left = [path for path in todo if not (path in places and places[path].exists())]
    record = {"study": study, "helpers": helpers_digest(), "complete": todo == chapters(folder)}
    options = [
        "--study",
        study,
        "--timeout",
        str(timeout),
        *(["--also", str(also)] if also else []),
    ]
    report = Report(todo, left)
    out.parent.mkdir(parents=True, exist_ok=True)
    with report.bar, tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as scratch:
        fresh = Path(scratch) / "complete"
        fresh.mkdir()
        folders = {path: Path(scratch) / path.stem for path in left}

        def finish(path: Path, place: Path, more: str = "") -> None:
            shutil.copyfile(place / path.name, fresh / path.name)
            report.line(path, place, more)

        def ended(path: Path) -> None:
            finish(path, folders[path])
            if path in places:
                store(folders[path], places[path])
            report.ended(path)

        for path in (path for path in todo if path not in left):
            finish(path, places[path], "  (kept from an earlier run, nothing has changed)")
        try:
            asyncio.run(run_all(folders, jobs, options, report.started, ended))
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            if isinstance(error, NotebookError):
                report.failed(error.args[0])
            raise error from None
        record["chapters"] = {path.stem: report.ran[path.stem] for path in todo}
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    return record


def prepare(name: str) -> None:
    """Say which study runs and from where, and fetch its files before any chapter starts.

    Inside a chapter, a download would show no progress and would fail late.
    """
    from helpers import catalog, simulate

    root = os.environ.get("STIMAGE_ROOT") or "none (STIMAGE_ROOT is not set), so files are fetched"
    place = "none needed, it is simulated" if name == "demo" else root
    print(f"Study {name} · dataset root: {place}", flush=True)
    try:
        study = catalog.study(name)
        if name == "demo":
            simulate.demo_root()
            return
        for section in study.sections:
            for kind in ("coord", "gene_exp", "image"):
                catalog.find(section.slide, kind, tech=section.tech)
    except catalog.DataError as error:
        raise SystemExit(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run the chapters; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the chapters of the book.")
    parser.add_argument(
        "names", nargs="*", help="only these chapters, as 02 or 02_tiles (enough for no pages)"
    )
    parser.add_argument("--study", default=os.environ.get("STUDY", "demo"))
    parser.add_argument("--notebooks", type=Path, default=SOURCES, help="where the chapters are")
    parser.add_argument("--out", type=Path, help="default: _build/<study>/notebooks")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that one cell may take")
    parser.add_argument("--fresh", action="store_true", help="run even what has not changed")
    parser.add_argument("--also", type=Path, help="a folder with code to run after each chapter")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.environ.get("JOBS"),
        help="chapters at a time; default: as cores and memory allow",
    )
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, nothing is left
    folder, start = options.notebooks.resolve(), time.perf_counter()
    try:
        record = run(
            folder, out.resolve(), options.study, options.names, options.timeout, keep, jobs, also
        )
    except NotebookError as error:
        print(f"\n{error.args[1]}\n\n{UNTOUCHED}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"Chapters run: {len(record['chapters'])}, in {seconds:.0f} s, into {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Execute one chapter with papermill, in a fresh kernel; run_notebooks.py starts this script.

The given folder receives the executed notebook and ``run.json``: the time, the peak memory and the
digest of the source. When a cell fails, the script prints the cell with its traceback and exits
with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import notebooks as nbs

RECORD = "run.json"
ALSO = "also"  # id of the cell that --also adds
ANSI = re.compile(r"\x1b\[[0-9;]*m")
BEHIND = "behind. Keep results in the cache, through a helper, so that chapters run in any order."


class NotebookError(RuntimeError):
    """A cell of a chapter failed; the message holds the chapter, the cell and the traceback."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def also_code(path: Path, also: Path | None) -> str:
    """Return the code to run after a chapter: ``<chapter>.py``, then ``judge.py``."""
    own = also / f"{path.stem}.py" if also else None
    if not (own and own.exists()):
        return ""
    return "\n".join(p.read_text(encoding="utf-8") for p in (own, also / "judge.py"))


def peak_memory(stop: threading.Event) -> float:
    """Return the peak memory of all child processes in MB, measured until ``stop`` is set."""
    import psutil

    me, peak = psutil.Process(), 0
    while not stop.wait(0.2):
        total = 0
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                total += child.memory_info().rss
        peak = max(peak, total)
    return peak / 1e6


def kernel_settings() -> dict[str, Any]:
    """Return how kernels start: over files instead of open ports, and with their own log silent."""
    from traitlets.config import Config

    files = Config() if sys.platform == "win32" else Config(KernelManager={"transport": "ipc"})
    return {"config": files, "extra_arguments": ["--log-level=CRITICAL"]}


def clean(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return an executed notebook without times, local paths, papermill's marks and added code."""
    cells = []
    for cell in (c for c in notebook["cells"] if c.get("id") != ALSO):
        kept = {k: v for k, v in cell["metadata"].items() if k in nbs.CELL_METADATA}
        cells.append({**cell, "metadata": kept})
        if "injected-parameters" in kept.get("tags", []):
            cells[-1]["id"] = "injected-parameters"
    return {**notebook, "cells": cells, "metadata": {"kernelspec": nbs.KERNEL}}


def failure(path: Path, executed: dict[str, Any], error: Exception) -> str:
    """Return the message for a failed cell: chapter, cell, its code, the traceback.

    It covers an exception, a cell that exceeds the time limit, and a kernel that died.
    """
    code = [c for c in executed["cells"] if c["cell_type"] == "code"]
    bad = next(c for c in reversed(code) if c["metadata"].get("papermill", {}).get("start_time"))
    ids = [c["id"] for c in nbs.read(path)["cells"]]
    place = f"number {ids.index(bad['id']) + 1}" if bad["id"] in ids else "added for this run"
    traceback = "\n".join(getattr(error, "traceback", [str(error)]))
    kind = getattr(error, "ename", type(error).__name__)
    what = f"{kind}: {getattr(error, 'evalue', error)}".splitlines()[0]
    head = f"chapter {path.stem}, cell {bad['id']} ({place}): {what}"
    return f"{head}\n\n{nbs.source(bad).rstrip()}\n\n{ANSI.sub('', traceback).rstrip()}\n\n{head}"


def execute(path: Path, out: Path, study: str, timeout: int, also: Path | None = None) -> None:
    """Execute a chapter in a temporary folder; write it and its record to ``out``.

    Raises
    ------
    NotebookError
        A cell failed, or the chapter left files behind. Nothing is written then.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook, start, stop = nbs.read(path), time.perf_counter(), threading.Event()
    if code := also_code(path, also):
        cell = {"cell_type": "code", "id": ALSO, "source": code, "metadata": {}, "outputs": []}
        notebook["cells"].append(cell | {"execution_count": None})
    parameters = {} if study == "demo" else {"STUDY": study}  # the chapters themselves say demo
    with tempfile.TemporaryDirectory(prefix="chapter-") as folder, ThreadPoolExecutor(1) as watcher:
        source, scratch = Path(folder) / f"source-{path.name}", Path(folder) / path.name
        nbs.write(notebook, source)
        memory = watcher.submit(peak_memory, stop)
        try:
            papermill.execute_notebook(
                source, scratch, parameters, cwd=folder, kernel_name="python3",
                progress_bar=False, execution_timeout=timeout, **kernel_settings(),
            )  # fmt: skip
        except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(failure(path, nbs.read(scratch), error)) from None
        finally:
            stop.set()
        if left := sorted(p.name for p in Path(folder).iterdir() if p not in (scratch, source)):
            raise NotebookError(f"chapter {path.stem} leaves {', '.join(left)} {BEHIND}")
        done, seconds = nbs.read(scratch), time.perf_counter() - start
    for cell in (c for c in done["cells"] if c.get("id") == ALSO):  # no part of the chapter
        seconds -= cell["metadata"]["papermill"]["duration"]
    record = {"seconds": round(seconds, 1), "peak_mb": round(memory.result())}
    out.mkdir(parents=True, exist_ok=True)
    nbs.write(clean(done), out / path.name)
    (out / RECORD).write_text(json.dumps(record | {"source": digest(path)}), encoding="utf-8")


def main() -> int:
    """Execute the chapter named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Execute one chapter.")
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path, help="the folder for the executed chapter")
    parser.add_argument("--study", default="demo")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds a cell may take")
    parser.add_argument("--also", type=Path, help="a folder with code to run after the chapter")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, the kernel is ended
    try:
        execute(options.path, options.out, options.study, options.timeout, options.also)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

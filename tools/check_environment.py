"""Say whether this machine can run the book, in one OK, NOTE or FAIL line per check.

It needs the standard library only, so it also works before anything is installed. FAIL stops the
book, NOTE changes how it runs; the exit status is 1 after any FAIL.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
HUB = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
NEED_MEMORY_GB, NEED_DISK_GB = 4, 2
WAIT_S = 3

Line = tuple[str, str, str]  # OK, NOTE or FAIL; what was checked; what was found


def python() -> Iterator[Line]:
    """Check the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - readers run this with what they have
        yield "FAIL", "Python", f"{version}: the book needs 3.11 or newer"
    else:
        yield "OK", "Python", f"{version} in {sys.prefix}"


def bounds(project: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """Return the packages the book names itself, with their bounds, from pyproject.toml."""
    import tomllib  # new in Python 3.11, which is one of the things to report

    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    wanted = table["dependencies"] + table["optional-dependencies"]["book"]
    return dict(re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", line).groups() for line in wanted)


def pins(requirements: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """Return the tested version of every package."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return dict(m.groups() for line in lines if (m := re.match(r"([a-z0-9.-]+)==([^\s;]+)", line)))


def packages() -> Iterator[Line]:
    """Check the version of every package the book names, without importing any."""
    tested = pins()
    for name in bounds():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield "FAIL", name, "not installed: run `make book`, or pip install -r requirements.txt"
            continue
        if found.partition("+")[0] == tested[name]:
            yield "OK", name, found
        else:
            yield "NOTE", name, f"{found}; the book was tested with {tested[name]}"


def gpu() -> Iterator[Line]:
    """Check for a GPU that torch can use; torch is slow to import, so in a process of its own."""
    if importlib.util.find_spec("torch") is None:
        yield "NOTE", "GPU", "not checked: torch is not installed"
        return
    code = (
        "import torch; c = torch.cuda.is_available()\n"
        "print(torch.cuda.get_device_name(0) if c else "
        "'Apple GPU (mps)' if torch.backends.mps.is_available() else '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        yield "FAIL", "GPU", f"torch does not import: {done.stderr.strip().splitlines()[-1]}"
    elif name := done.stdout.strip():
        yield "OK", "GPU", name
    else:
        yield "NOTE", "GPU", "none: everything runs on the CPU"


def memory() -> Iterator[Line]:
    """Check the memory of the machine."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        yield "NOTE", "Memory", f"cannot be read here; {NEED_MEMORY_GB} GB are enough"
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    status = "OK" if size >= NEED_MEMORY_GB else "NOTE"
    yield status, "Memory", f"{size:.1f} GB ({NEED_MEMORY_GB} GB are enough)"


def disk() -> Iterator[Line]:
    """Check that the cache folder (as `make` sets it) can be written and has free space."""
    cache = Path(os.environ.get("STIMAGE_CACHE") or ROOT / ".cache").expanduser().resolve()
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    if not os.access(there, os.W_OK):
        yield "FAIL", "Disk", f"{there} cannot be written: set STIMAGE_CACHE to another folder"
    elif free < NEED_DISK_GB:
        yield "FAIL", "Disk", f"{free:.1f} GB free at {there}: {NEED_DISK_GB} GB are needed"
    else:
        yield "OK", "Disk", f"{free:.0f} GB free at {there}"


def dataset() -> Iterator[Line]:
    """Check the local copy of the dataset."""
    value = os.environ.get("STIMAGE_ROOT")
    if not value:
        yield "NOTE", "Dataset", "STIMAGE_ROOT is not set: demo is simulated, slides are downloaded"
        return
    root = Path(value).expanduser()
    found = [t for t in ("ST", "Visium", "VisiumHD") if (root / t / "coord").is_dir()]
    if not found:
        yield "FAIL", "Dataset", f"STIMAGE_ROOT={value} has no ST, Visium or VisiumHD folder"
        return
    slides = sum(1 for t in found for _ in (root / t / "coord").glob("*_coord.csv"))
    yield "OK", "Dataset", f"{slides} slides in {root} ({', '.join(found)})"


def bundle(folder: Path = ROOT) -> Iterator[Line]:
    """Check the files of the workshop edition against their checksums, but for the notebooks.

    Participants edit the notebooks. Outside the workshop edition there are no checksums.
    """
    sums = folder / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    wanted = dict(line.split("  ", 1)[::-1] for line in lines if not line.endswith(".ipynb"))
    bad = []
    for name, digest in wanted.items():
        path = folder / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            bad.append(name)
    if bad:
        some = f"{len(bad)} of {len(wanted)} files are missing or changed, first {bad[0]}"
        yield "FAIL", "Workshop", f"{some}: unpack the zip again"
    elif wanted:
        yield "OK", "Workshop", f"{len(wanted)} files, all as they were packed"


def hub(address: str = HUB) -> Iterator[Line]:
    """Check that the hub answers; give up soon, because a workshop may be offline."""
    parts = urlsplit(address)
    place = f"{parts.hostname}:{parts.port or 443}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield "NOTE", "Hub", "HF_HUB_OFFLINE is set: only downloaded slides can be used"
        return
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    command = [sys.executable, "-c", code, *place.rsplit(":", 1)]
    try:  # in a process of its own, because a name look-up has no time limit
        done = subprocess.run(command, capture_output=True, timeout=WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        yield "NOTE", "Hub", f"{place} did not answer in {WAIT_S} s: demo works, downloads do not"
        return
    if done.returncode == 0:
        yield "OK", "Hub", f"{place} answers"
    else:
        yield "NOTE", "Hub", f"{place} cannot be reached: demo works, downloads do not"


def main() -> int:
    """Print the lines and return the exit status."""
    failed = 0
    for check in (python, packages, gpu, memory, disk, dataset, bundle, hub):
        for status, what, found in check():
            failed += status == "FAIL"
            print(f"{status:4}  {what:18} {found}", flush=True)
        if failed and check is python:
            break  # the other checks need Python 3.11
    print(f"{failed} of these stop the book." if failed else "This machine can run the book.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

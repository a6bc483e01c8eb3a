"""Check whether this machine can run the book, with one OK, NOTE or FAIL line per check.

It needs only the standard library, so it works before anything is installed. FAIL means that the
book cannot run, NOTE that it runs differently; the exit status is 1 after any FAIL.
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
        yield "FAIL", "Python", f"{version} is too old: install 3.11 or newer"
    else:
        yield "OK", "Python", f"{version} in {sys.prefix}"


def packages() -> Iterator[Line]:
    """Check the versions of the packages in pyproject.toml, without importing any."""
    import tomllib  # new in Python 3.11, which is checked first

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", pinned, re.M))
    for line in project["dependencies"] + project["optional-dependencies"]["book"]:
        name = re.match(r"[A-Za-z0-9_.-]+", line)[0]
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
    """Check for a GPU that torch can use, in a separate process, because torch imports slowly."""
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
        error = done.stderr.strip().splitlines()[-1]
        yield "FAIL", "GPU", f"torch cannot be imported: install it again ({error})"
    elif name := done.stdout.strip():
        yield "OK", "GPU", name
    else:
        yield "NOTE", "GPU", "none: everything runs on the CPU"


def memory() -> Iterator[Line]:
    """Check the memory of the machine."""
    enough = f"{NEED_MEMORY_GB} GB are enough"
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        yield "NOTE", "Memory", f"unknown on this system; {enough}"
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    yield "OK" if size >= NEED_MEMORY_GB else "NOTE", "Memory", f"{size:.1f} GB ({enough})"


def disk() -> Iterator[Line]:
    """Check that the cache folder (as `make` sets it) is writable and has free space."""
    cache = Path(os.environ.get("STIMAGE_CACHE") or ROOT / ".cache").expanduser().resolve()
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e9
    fix = "set STIMAGE_CACHE to another folder"
    if not os.access(there, os.W_OK):
        yield "FAIL", "Disk", f"{there} is not writable: {fix}"
    elif free < NEED_DISK_GB:
        yield "FAIL", "Disk", f"{free:.1f} of {NEED_DISK_GB} GB free at {there}: make room or {fix}"
    else:
        yield "OK", "Disk", f"{free:.0f} GB free at {there}"


def dataset() -> Iterator[Line]:
    """Check the local copy of the dataset."""
    value = os.environ.get("STIMAGE_ROOT")
    if not value:
        yield "NOTE", "Dataset", "STIMAGE_ROOT is not set: demo is simulated, slides are downloaded"
        return
    root = Path(value).expanduser()
    if found := [t for t in ("ST", "Visium", "VisiumHD") if (root / t / "coord").is_dir()]:
        slides = sum(1 for t in found for _ in (root / t / "coord").glob("*_coord.csv"))
        yield "OK", "Dataset", f"{slides} slides in {root} ({', '.join(found)})"
    else:
        fix = "set STIMAGE_ROOT to the folder that has one, or unset it"
        yield "FAIL", "Dataset", f"{value} has no folder ST, Visium or VisiumHD: {fix}"


def bundle(folder: Path = ROOT) -> Iterator[Line]:
    """Check the files of the workshop edition against their checksums.

    Notebooks are left out, because participants edit them. Elsewhere there are no checksums.
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
        some = f"{len(bad)} of {len(wanted)} files are missing or changed, the first is {bad[0]}"
        yield "FAIL", "Workshop", f"{some}: unpack the zip again"
    elif wanted:
        yield "OK", "Workshop", f"{len(wanted)} files, all as they were packed"


def hub(address: str = HUB) -> Iterator[Line]:
    """Check that the hub answers; do not wait long, because a workshop may be offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield "NOTE", "Hub", "HF_HUB_OFFLINE is set: only slides already downloaded can be used"
        return
    parts = urlsplit(address)
    host, port = str(parts.hostname), str(parts.port or 443)
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    try:  # in a separate process, because a name look-up has no time limit
        command = [sys.executable, "-c", code, host, port]
        subprocess.run(command, capture_output=True, timeout=WAIT_S, check=True)
        yield "OK", "Hub", f"{host}:{port} answers"
    except subprocess.SubprocessError:
        yield "NOTE", "Hub", f"{host}:{port} cannot be reached: demo works, downloads do not"


def main() -> int:
    """Print the lines and return the exit status."""
    failed = 0
    for check in (python, packages, gpu, memory, disk, dataset, bundle, hub):
        for status, what, found in check():
            failed += status == "FAIL"
            print(f"{status:4}  {what:18} {found}", flush=True)
        if failed and check is python:
            break  # the other checks need Python 3.11
    print(f"Fix each FAIL first: {failed}." if failed else "This machine can run the book.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

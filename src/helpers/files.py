"""Complete files: one error type, checked downloads, and a cache that is written atomically."""

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from platformdirs import user_cache_path
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

FIX = (
    "set the environment variable STIMAGE_ROOT to a folder in the dataset's layout that has this "
    "file, or connect to the internet so that it can be fetched"
)
_SCRATCH = ".writing-"  # prefix of folders with unfinished files


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong, where, and how to fix it.

    Parameters
    ----------
    what
        What is wrong.
    slide, file
        The slide's official name, and the file.
    fix
        How to fix it.
    """

    def __init__(
        self,
        what: str,
        *,
        slide: str | None = None,
        file: Path | None = None,
        fix: str | None = None,
    ) -> None:
        places = {"slide": slide, "file": file}
        where = ", ".join(f"{kind} {name}" for kind, name in places.items() if name is not None)
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}. Fix: {fix}." if fix else f"{message}.")
        self.slide, self.file = slide, file


def listed(names: Iterable[object]) -> str:
    """Join the first five names with commas, for a message."""
    names = list(map(str, names))
    return ", ".join(names[:5] + ["..."] * (len(names) > 5))


def progress(*args: object, disable: bool = False, **options: object) -> tqdm:
    """Return a progress bar: a widget in a notebook, text elsewhere, nothing under TQDM_DISABLE.

    Takes the arguments of tqdm, whose notebook widgets ignore TQDM_DISABLE.
    """
    off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(*args, disable=disable or off, **options)


def cache_dir() -> Path:
    """Return the folder for computed files: ``STIMAGE_CACHE``, else the user's cache."""
    given = os.environ.get("STIMAGE_CACHE")
    folder = Path(os.path.expanduser(given)) if given else user_cache_path("stimage-book")
    return folder.absolute()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` if the block ends without an error.

    Works for a file or a folder. An interrupted run leaves `path` as it was; what it leaves next to
    it is removed after a day. If another process writes the same folder first, its result is kept.

    Raises
    ------
    DataError
        When the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{path.name}-", dir=path.parent))
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    for old in path.parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)
    temporary = scratch / path.name
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError:
            if not (temporary.is_dir() and path.is_dir()):
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _unwritable(path.parent, error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written ({error.strerror})",
        file=folder,
        fix="set STIMAGE_CACHE to a folder that is writable and has room",
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Return a short text that changes when the file does.

    It depends on name, size, modification time, and 16 samples of 64 kB spread evenly over the
    file, which cover a small file completely.
    """
    stat, samples = path.stat(), hashlib.sha256()
    with path.open("rb") as file:
        for i in range(16):
            file.seek(max(0, stat.st_size - 65_536) * i // 15)
            samples.update(file.read(65_536))
    return digest(
        name=path.name, size=stat.st_size, time=stat.st_mtime_ns, samples=samples.hexdigest()
    )


def digest(**settings: object) -> str:
    """Return a short text that identifies settings, as a key for what is computed with them."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_hub(
    repo_id: str,
    revision: str,
    filename: str,
    *,
    repo_type: str = "model",
    context: str,
    fix: str,
    slide: str | None = None,
) -> Path:
    """Fetch one file at a pinned revision into the hub's own cache, and check its bytes.

    Parameters
    ----------
    repo_id, revision, filename, repo_type
        As in `huggingface_hub.hf_hub_download`.
    context
        For the message: what needs the file, or where else it was searched for.
    fix
        For the message: how to get the file in another way.
    slide
        For the message: which slide needs the file.

    Raises
    ------
    DataError
        When the hub cannot be reached, refuses or lacks the file, or sends bytes that do not match
        their hash. If the file is missing, on the hub or while offline, the error's ``__cause__``
        is the hub's ``EntryNotFoundError``.
    """
    import httpx
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    place = {"repo_id": repo_id, "filename": filename, "revision": revision, "repo_type": repo_type}
    name = f"{filename} of {repo_id} at revision {revision[:8]}"
    if isinstance(cached := hub.try_to_load_from_cache(**place), str):
        return Path(cached)
    endpoint = hub.constants.ENDPOINT
    offline = hub.constants.HF_HUB_OFFLINE or not reachable(endpoint)
    try:
        if not offline:
            logger.info("fetching %s", name)
        file = Path(hub.hf_hub_download(**place, local_files_only=offline))
    except (hub.errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            problem = "is not in the hub's cache, and the hub cannot be reached"
        elif isinstance(error, EntryNotFoundError):
            problem = "is not on the hub"
        elif isinstance(error, GatedRepoError):
            problem = "is gated"
            fix = (
                f"ask for access at {endpoint}/{repo_id}, make a token there and set the "
                f"environment variable HF_TOKEN to it; or {fix}"
            )
        else:
            problem = f"could not be fetched: {error}"
        raise DataError(f"{name} {problem} ({context})", slide=slide, fix=fix) from error
    _verify_blob(file, slide)
    return file


def mistaken_for(start: bytes) -> str | None:
    """Say what a file is, if its first bytes are those of a failed download; else return None."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not text:
        return "is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page (HTML)"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer: fetch the file itself with `git lfs pull`"
    return None


def reachable(url: str) -> bool:
    """Return whether a host answers, within seconds; the hub's client would retry for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, http.client.HTTPException):
        return False
    return True


def fetch(url: str, sha256: str, slide: str | None = None) -> bytes:
    """Read a small file from the web, and check its SHA-256."""
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be fetched: {error}", slide=slide, fix=FIX) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"the bytes of {url} do not match their pinned hash",
            slide=slide,
            fix="try again; if the error persists, the file has changed: report it to the authors",
        )
    return data


def _verify_blob(file: Path, slide: str | None) -> None:
    """Check a fetched file against the hash that names it in the hub's cache."""
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        actual = sha256(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):  # git's own hash: sha1 of a header and the bytes
        data = blob.read_bytes()
        actual = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:  # a file system without links: the hub's client has compared the size only
        return
    if actual != blob.name:
        blob.unlink()
        raise DataError(
            "its bytes do not match their hash; it was deleted",
            slide=slide,
            file=file,
            fix="fetch it again",
        )

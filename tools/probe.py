"""Ask whether what the book relies on elsewhere is still there: pinned data, and every link.

Files on the hub are asked for, not downloaded: the answer names commit and hash, which must be the
pinned ones. Links of the pages, the chapters, README and CONTRIBUTING go through Sphinx's own link
checker. The exit status is 1 when anything is broken.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

import build_book
import repository
from build_book import JUPYTER_BOOK
from run_notebooks import ROOT

SHY = (
    *("academic.oup.com", "biorxiv.org", "cambridge.org", "cell.com", "ieeexplore.ieee.org"),
    *("jstor.org", "onlinelibrary.wiley.com", "opensource.org", "science.org", "sciencedirect.com"),
    *("tandfonline.com",),
)
"""Hosts that refuse programs. What is gone answers 404 there, too, and that stays broken."""
REFUSAL = re.compile(r"(?:401|403|418|429) Client Error.* for url: (\S+)")
LINKCHECK = {
    "user_agent": f"weekly link check of {repository.url()}",
    "linkcheck_anchors": False,  # a HEAD request is enough then; a GET follows where it is refused
    "linkcheck_retries": 3,
    "linkcheck_timeout": 30,
    "linkcheck_workers": 4,
    "linkcheck_rate_limit_timeout": 120,
    "linkcheck_allow_unauthorized": False,
    "linkcheck_report_timeouts_as_broken": True,  # or a timeout would not be tried again
}


class Finding(NamedTuple):
    """One thing that was asked for; `state` is ok, refused, unknown or broken."""

    state: str
    what: str
    why: str = ""


class Pin(NamedTuple):
    """A file of the hub that the helpers name, at a revision, with its SHA-256 where published."""

    kind: str
    repo: str
    revision: str
    file: str
    sha256: str | None = None
    gated: bool = False


# --- data --------------------------------------------------------------------------------------


def pins() -> list[Pin]:
    """Return every file on the hub that the helpers may ask for by themselves."""
    from helpers import catalog, towers

    found = [
        Pin("model", s.repo, s.revision, s.file, s.sha256, card.gated)
        for card in towers.CARDS.values()
        if (s := card.source)
    ]
    for study in catalog.STUDIES.values():
        for section in study.sections if study.name != "demo" else ():
            kinds = ("coord", "gene_exp", "image") + ("annotation",) * section.annotated
            files = [catalog.relative_path(section.slide, k, section.tech) for k in kinds]
            found += [Pin("dataset", catalog.DATASET, catalog.REVISION, str(f)) for f in files]
    return found


def address(pin: Pin, endpoint: str | None = None) -> str:
    """Return where the hub has a file."""
    from huggingface_hub import hf_hub_url

    where = {"repo_type": pin.kind, "revision": pin.revision, "endpoint": endpoint}
    return hf_hub_url(pin.repo, pin.file, **where)


def data(endpoint: str | None = None) -> list[Finding]:
    """Ask for every pinned file; fetch the table of slides, which is small, and hash it."""
    from huggingface_hub import constants

    from helpers import catalog, files

    found = []
    try:
        files.fetch(catalog.METADATA_URL, catalog.METADATA_SHA256)
        found.append(Finding("ok", catalog.METADATA_URL))
    except catalog.DataError as error:
        found.append(Finding("broken", catalog.METADATA_URL, str(error)))
    endpoint = endpoint or constants.ENDPOINT
    if not files.reachable(endpoint):
        return [*found, Finding("broken", endpoint, "the hub does not answer")]
    return found + [ask(pin, address(pin, endpoint)) for pin in pins()]


def ask(pin: Pin, url: str) -> Finding:
    """Compare what the hub says of one file with what the helpers expect."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import GatedRepoError

    try:
        told = get_hf_file_metadata(url, retry_on_errors=True)
    except GatedRepoError as error:
        return Finding("refused" if pin.gated else "broken", url, first_line(error))
    except Exception as error:  # the hub's client and httpx have a dozen kinds between them
        return Finding("broken", url, first_line(error))
    if pin.revision != "main" and told.commit_hash != pin.revision:
        return Finding("broken", url, f"the hub answers with commit {told.commit_hash}")
    if pin.sha256 and told.etag != pin.sha256:
        return Finding("broken", url, f"its hash is {told.etag}, pinned is {pin.sha256}")
    return Finding("ok", url)


def first_line(error: Exception) -> str:
    """Return what kind of error it is, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# --- links -------------------------------------------------------------------------------------


def stage(folder: Path) -> None:
    """Fill a folder with the book's source, README and CONTRIBUTING among the pages."""
    build_book.stage(ROOT, ROOT / "notebooks", folder, "demo")
    extra = ("README", "CONTRIBUTING")
    for name in extra:
        shutil.copy(ROOT / f"{name}.md", folder)
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    toc["parts"].append({"caption": "More", "chapters": [{"file": name} for name in extra]})
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")


def links(source: Path, **settings: Any) -> list[Finding]:
    """Follow every link to elsewhere of a staged book."""
    path = source / "_config.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config.setdefault("sphinx", {}).setdefault("config", {}).update(LINKCHECK | settings)
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="links.") as out:
        command = [*JUPYTER_BOOK, "build", str(source), "--path-output", out]
        command += ["--builder", "linkcheck"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        report = Path(out) / "_build" / "html" / "output.json"
        if not report.is_file():  # broken links are no reason; then there is one
            raise SystemExit(f"The links were not checked:\n{done.stdout}\n{done.stderr}")
        lines = report.read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    return [judge(link) for link in told if link["uri"].startswith(("http:", "https:"))]


def judge(link: dict[str, Any]) -> Finding:
    """Turn what Sphinx says of a link into a finding."""
    what = f"{link['uri']} in {link['filename']}"
    if link["status"] in ("working", "redirected"):
        return Finding("ok", what)
    if link["status"] != "broken":
        return Finding("unknown", what, link["info"])
    refusal = REFUSAL.search(link["info"])
    host = urlsplit(refusal[1]).hostname or "" if refusal else ""
    shy = any(host == name or host.endswith(f".{name}") for name in SHY)
    return Finding("refused" if shy else "broken", what, link["info"] or "it does not answer")


# --- the report --------------------------------------------------------------------------------


def report(found: list[Finding]) -> int:
    """Print what is not in order, the broken last; return the exit status."""
    states = ("ok", "unknown", "refused", "broken")
    for finding in sorted((f for f in found if f.state != "ok"), key=lambda f: states.index(f[0])):
        print(f"{finding.state:8} {finding.what}\n{'':8}   {finding.why}")
    count = Counter(finding.state for finding in found)
    print(", ".join(f"{count[state]} {state}" for state in states))
    return int(count["broken"] > 0)


def main() -> int:
    """Ask for everything; return the exit status."""
    found = data()
    with tempfile.TemporaryDirectory(prefix="probe.") as folder:
        stage(Path(folder) / "source")
        found += links(Path(folder) / "source")
    return report(found)


if __name__ == "__main__":
    sys.exit(main())

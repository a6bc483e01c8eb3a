"""Check that the pinned data and all external links of the book are still available.

The hub's answers for the pinned files must have the pinned commit and hash; nothing is downloaded.
Sphinx's link checker follows the links in the pages, the chapters, README and CONTRIBUTING. The
exit status is 1 if anything is broken.
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

import repository
from build_book import JUPYTER_BOOK
from build_book import stage as stage_book
from notebooks import ROOT

REFUSING = (
    *("academic.oup.com", "biorxiv.org", "cambridge.org", "cell.com", "ieeexplore.ieee.org"),
    *("jstor.org", "onlinelibrary.wiley.com", "opensource.org", "science.org", "sciencedirect.com"),
    *("tandfonline.com",),
)
"""Hosts that refuse requests from programs; a missing page still answers 404 and is broken."""
REFUSAL = re.compile(r"(?:401|403|418|429) Client Error.* for url: (\S+)")
LINKCHECK = {
    "user_agent": f"weekly link check of {repository.url()}",
    "linkcheck_anchors": False,  # so that HEAD is enough; if it is refused, GET is tried
    "linkcheck_retries": 3,
    "linkcheck_timeout": 30,
    "linkcheck_workers": 4,
    "linkcheck_rate_limit_timeout": 120,
    "linkcheck_allow_unauthorized": False,
    "linkcheck_report_timeouts_as_broken": True,  # without this, timeouts are not retried
}


class Finding(NamedTuple):
    """The result for a file or link; `state` is ok, unknown, refused or broken."""

    state: str
    what: str
    why: str = ""


class Pin(NamedTuple):
    """A file on the hub at the revision that the helpers use, with its SHA-256 if published."""

    kind: str
    repo: str
    revision: str
    file: str
    sha256: str | None = None
    gated: bool = False


# --- data ---------------------------------------------------------------------------------------


def pins() -> list[Pin]:
    """Return every file on the hub that the helpers may fetch."""
    from helpers import catalog, towers

    found = [
        Pin("model", s.repo, s.revision, s.file, s.sha256, card.gated)
        for card in towers.CARDS.values()
        if (s := card.source)
    ]
    real = (study for study in catalog.STUDIES.values() if study.name != "demo")
    for section in (section for study in real for section in study.sections):
        for kind in ("coord", "gene_exp", "image") + ("annotation",) * section.annotated:
            file = catalog.relative_path(section.slide, kind, section.tech)
            found.append(Pin("dataset", catalog.DATASET, catalog.REVISION, str(file)))
    return found


def address(pin: Pin, endpoint: str | None = None) -> str:
    """Return the address of a file on the hub."""
    from huggingface_hub import hf_hub_url

    where = {"repo_type": pin.kind, "revision": pin.revision, "endpoint": endpoint}
    return hf_hub_url(pin.repo, pin.file, **where)


def check_data(endpoint: str | None = None) -> list[Finding]:
    """Check every pinned file on the hub, and fetch the table of slides, which is small."""
    from huggingface_hub import constants

    from helpers import catalog, files

    table = Finding("ok", catalog.METADATA_URL)
    try:
        files.fetch(catalog.METADATA_URL, catalog.METADATA_SHA256)
    except catalog.DataError as error:
        table = Finding("broken", catalog.METADATA_URL, str(error))
    endpoint = endpoint or constants.ENDPOINT
    if not files.reachable(endpoint):
        return [table, Finding("broken", endpoint, "the hub does not answer: try again later")]
    return [table, *(check_pin(pin, address(pin, endpoint)) for pin in pins())]


def check_pin(pin: Pin, url: str) -> Finding:
    """Compare the hub's answer for a file with its pin."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import GatedRepoError

    try:
        answer = get_hf_file_metadata(url, retry_on_errors=True)
    except Exception as error:  # the hub's client and httpx raise a dozen types
        state = "refused" if pin.gated and isinstance(error, GatedRepoError) else "broken"
        first_line = str(error).strip().partition("\n")[0]
        return Finding(state, url, f"{type(error).__name__}: {first_line}")
    if pin.revision not in ("main", answer.commit_hash):
        return Finding("broken", url, f"pinned commit {pin.revision}, not {answer.commit_hash}")
    if pin.sha256 and answer.etag != pin.sha256:
        return Finding("broken", url, f"pinned hash {pin.sha256}, not {answer.etag}")
    return Finding("ok", url)


# --- links --------------------------------------------------------------------------------------


def stage(folder: Path) -> None:
    """Fill a folder with the book's source, with README and CONTRIBUTING as pages."""
    stage_book(ROOT, ROOT / "notebooks", folder, "demo")
    extra = ("README", "CONTRIBUTING")
    for name in extra:
        shutil.copy(ROOT / f"{name}.md", folder)
    toc = yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))
    toc["parts"].append({"caption": "More", "chapters": [{"file": name} for name in extra]})
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")


def check_links(source: Path, **settings: Any) -> list[Finding]:
    """Follow every external link of a staged book."""
    path = source / "_config.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config.setdefault("sphinx", {}).setdefault("config", {}).update(LINKCHECK | settings)
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="links.") as out:
        command = [*JUPYTER_BOOK, "build", source, "--path-output", out, "--builder", "linkcheck"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        report = Path(out) / "_build" / "html" / "output.json"
        if not report.is_file():  # broken links alone do not prevent it
            raise SystemExit(
                "The links were not checked, because the book could not be read."
                f" Fix the errors below, then run `make links` again:\n{done.stdout}\n{done.stderr}"
            )
        links = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return [judge(link) for link in links if link["uri"].startswith(("http:", "https:"))]


def judge(link: dict[str, Any]) -> Finding:
    """Turn Sphinx's result for a link into a finding."""
    what, why = f"{link['uri']} in {link['filename']}", link["info"]
    if link["status"] in ("working", "redirected"):
        return Finding("ok", what)
    if link["status"] != "broken":
        return Finding("unknown", what, why)
    refusal = REFUSAL.search(why)
    host = "." + (urlsplit(refusal[1]).hostname or "") if refusal else ""
    refuses = host.endswith(tuple(f".{name}" for name in REFUSING))
    return Finding("refused" if refuses else "broken", what, why or "no answer")


def report(found: list[Finding]) -> int:
    """Print every finding that is not ok, the broken ones last; return the exit status."""
    states = ("ok", "unknown", "refused", "broken")
    for finding in sorted(found, key=lambda f: states.index(f.state)):
        if finding.state != "ok":
            print(f"{finding.state:8} {finding.what}\n{'':8}   {finding.why}")
    count = Counter(finding.state for finding in found)
    print(", ".join(f"{count[state]} {state}" for state in states))
    return int(count["broken"] > 0)


def main() -> int:
    """Check data and links; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="links.") as folder:
        stage(Path(folder) / "source")
        return report(check_data() + check_links(Path(folder) / "source"))


if __name__ == "__main__":
    sys.exit(main())

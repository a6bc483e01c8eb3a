"""Make the workshop edition: a folder and a zip that work alone, in a room without internet.

_build/workshop holds the chapters without solutions and with them, the helpers, the environment
check, the data of the study, the book if it was built, and checksums; _build/workshop.zip is the
same in one file, equal bytes from equal content. Both appear complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import string
import sys
import tempfile
from pathlib import Path

import notebooks as nbs
from build_book import OFFLINE_LINK, ZIP, refusals, without_offline_link, write_zip
from helpers import catalog, simulate
from helpers.files import sha256
from notebooks import ROOT
from run_notebooks import chapters

COPIED = (
    *("LICENSE", "LICENSE-TEXT", "pyproject.toml", "requirements.txt"),
    *("src/helpers", "results", "tools/check_environment.py"),
)
PAGES = ("dataset", "failures", "results", "setup", "teaching")  # for links, and for teachers
OPEN = ("CC", "MIT")  # how licences begin that let slides be passed on
LIMIT_GB = 1.0  # of slides in a zip for participants, in 1e9 bytes
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.pyc", ".DS_Store", "checkpoint.pt")


def edition(notebook: nbs.Notebook, study: str, solutions: bool) -> nbs.Notebook:
    """Return a chapter for a study, stripped, with or without its solutions."""
    made = nbs.strip(notebook)
    for cell in made["cells"]:
        if "parameters" in nbs.tags(cell):
            text = nbs.source(cell).replace('STUDY = "demo"', f'STUDY = "{study}"')
            cell["source"] = text.splitlines(keepends=True)
    if not solutions:
        made["cells"] = [cell for cell in made["cells"] if "solution" not in nbs.tags(cell)]
    return made


def put_chapters(folder: Path, study: str) -> None:
    """Write both editions of every chapter, and the pages that they link to."""
    for name in ("exercises", "solutions"):
        (folder / name).mkdir(parents=True)
        for path in chapters(ROOT / "notebooks"):
            made = edition(nbs.read(path), study, solutions=name == "solutions")
            nbs.write(made, folder / name / path.name)
    (folder / "book").mkdir()
    for page in PAGES:
        text = OFFLINE_LINK.sub(rb"\1", (ROOT / "book" / f"{page}.md").read_bytes())
        text = text.replace(b"](../notebooks/", b"](../solutions/")
        (folder / "book" / f"{page}.md").write_bytes(text)


def slide_files(study: catalog.Study) -> dict[str, Path]:
    """Return the files of a real study, by their path in the official layout."""
    files = {catalog.METADATA: catalog.metadata_path()}
    for section in study.sections:
        for kind in ("image", "coord", "gene_exp") + ("annotation",) * section.annotated:
            official = catalog.relative_path(section.slide, kind, section.tech)
            files[str(official)] = catalog.find(section.slide, kind, tech=section.tech)
    return files


def trained_on(study: catalog.Study) -> list[Path]:
    """Return the cached models that were trained on slides of this study only."""
    own, found = {section.slide for section in study.sections}, []
    for weights in sorted((catalog.cache_dir() / "models").glob("*/model.safetensors")):
        facts = json.loads((weights.parent / "settings.json").read_text(encoding="utf-8"))
        if own.issuperset(facts.get("slides", ["unknown"])):
            found.append(weights.parent)
    return found


def put_data(folder: Path, study: catalog.Study, with_data: bool) -> str:
    """Copy slides and the models trained on them; return what to tell the participants."""
    data, trained = folder / "data", trained_on(study)
    data.mkdir()
    for model in trained:
        shutil.copytree(model, data / "models" / model.name, ignore=LEFT_BEHIND)
    more = f"; models trained on them: {len(trained)}" if trained else ""
    return put_slides(data, study, with_data) + more


def put_slides(data: Path, study: catalog.Study, with_data: bool) -> str:
    """Copy the slides where they may be passed on; return what to tell the participants."""
    if study.name == "demo":
        root = simulate.demo_root()
        shutil.copytree(root, data / root.name)
        return "the simulated slides"
    if not (with_data or study.licence.startswith(OPEN)):
        return f"no slides (licence: {study.licence}): set STIMAGE_ROOT to a folder that has them"
    files = slide_files(study)
    size = sum(path.stat().st_size for path in files.values()) / 1e9
    if size > LIMIT_GB:
        why = f"{size:.1f} GB, too large to pack"
        return f"no slides ({why}): set STIMAGE_ROOT to a folder that has them"
    for official, path in files.items():
        target = data / "STimage-1K4M" / official
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return f"the slides, {size:.1f} GB in the layout of the dataset"


def put_book(folder: Path, study: str, built: Path) -> str:
    """Copy the pages if they are those of these chapters; return what to tell the participants."""
    if not (built / "html" / "index.html").exists():
        return f"not here: the book was not built (`STUDY={study} make book` builds it)"
    if reasons := refusals(built / "notebooks", ROOT, study):
        return f"not here: the book is out of date ({'; '.join(reasons)})"
    shutil.copytree(
        built / "html",
        folder / "html",
        ignore=shutil.ignore_patterns(ZIP, f"{ZIP}.sha256"),  # the same pages once more
        copy_function=lambda page, copy: Path(copy).write_bytes(without_offline_link(Path(page))),
    )
    return "the book: open `index.html` in a browser"


def put_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder, as ``sha256sum --check`` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = [f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8", newline="\n")


def make(out: Path, study: catalog.Study, with_data: bool, built: Path) -> dict[str, str]:
    """Fill ``out/workshop`` and ``out/workshop.zip``; return the descriptions of data and book.

    The pages come from ``built``, where ``make book`` puts the study.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="workshop.", dir=out) as scratch:
        folder, packed = Path(scratch) / "workshop", Path(scratch) / "workshop.zip"
        put_chapters(folder, study.name)
        for name in COPIED:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=LEFT_BEHIND)
            else:
                shutil.copyfile(source, target)
        said = {"data": put_data(folder, study, with_data)}
        said["html"] = put_book(folder, study.name, built)
        for page in (ROOT / "tools" / "participants").glob("[!_.]*.*"):
            text = string.Template(page.read_text(encoding="utf-8"))
            filled = text.substitute(vars(study), study=study.name, **said)
            (folder / page.name).write_text(filled, encoding="utf-8", newline="\n")
        put_checksums(folder)
        write_zip(packed, folder, f"stimage-workshop-{study.name}")
        for made in (folder, packed):
            if (out / made.name).exists():
                (out / made.name).rename(Path(scratch) / f"old-{made.name}")
            made.rename(out / made.name)
    return said


def main(argv: list[str] | None = None) -> int:
    """Make the workshop edition; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the workshop edition of the book.")
    parser.add_argument("--study", default=os.environ.get("STUDY", "demo"))
    parser.add_argument("--out", type=Path, default=ROOT / "_build")
    help_data = "include slides even if their licence does not clearly allow passing them on"
    parser.add_argument("--with-data", action="store_true", help=help_data)
    options = parser.parse_args(argv)
    out = options.out.resolve()
    try:
        built = ROOT / "_build" / options.study
        said = make(out, catalog.study(options.study), options.with_data, built)
    except catalog.DataError as error:
        print(error, file=sys.stderr)
        return 1
    packed = out / "workshop.zip"
    print(f"The workshop edition of study {options.study}:\n  {out / 'workshop'}")
    print(f"  {packed} ({packed.stat().st_size / 1e6:.0f} MB, sha256 {sha256(packed)})")
    print(f"  data/  {said['data']}\n  html/  {said['html']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

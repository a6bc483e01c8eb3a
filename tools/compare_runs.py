"""Say whether two runs of the chapters show the same numbers, tables and figures.

``compare_runs.py BEFORE AFTER [names.json]`` prints one line per chapter and exits with 1 if any
differs. Times, sizes in bytes, rates, dates, addresses and paths are masked, because they change
from run to run. The JSON file maps old names to new ones, such as ``{"paired": "wilcoxon"}``.
"""

import base64
import io
import json
import re
import sys
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import numpy as np
from bs4 import BeautifulSoup
from PIL import Image

import notebooks as nbs

NUMBER = r"\d[\d,]*(?:\.\d+)?"
MASKS = {
    r"0x[0-9a-f]+": "<address>",
    r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d\S*)?": "<date>",
    r"(?<![\w.:/])(?:/[\w.~+-]+){2,}/?|\S*\.cache/\S*": "<path>",
    rf"{NUMBER} (?:\w+ )?(?:a|per) second|{NUMBER} ?\w* ?/ ?s\b": "<rate>",
    rf"{NUMBER} ?(?:ns|µs|ms|s|seconds?|min|minutes?|[kMG]i?B)(?!\w)": "<cost>",
    rf"/ this: +{NUMBER}": "/ this: <ratio of times>",
}
COST = re.compile(r"\b(?:seconds?|minutes?|ms|s|[MG]B)\b|_s\b")  # heading of a column of times


def text_of_html(html: str) -> tuple[str, list[str]]:
    """Return the text of an HTML output, with what a frame holds, and the frame's images."""
    page, images = BeautifulSoup(html, "html.parser"), []
    for frame in page.find_all("iframe", srcdoc=True):
        images += re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", frame["srcdoc"])
        inner, _ = text_of_html(frame["srcdoc"])
        frame.string = " ".join([inner, *re.findall(r"^const data = .*$", frame["srcdoc"], re.M)])
    for table in page.find_all("table"):
        heads = [th.get_text() for th in table.find("tr").find_all("th")]
        for nth in (i - len(heads) for i, head in enumerate(heads) if COST.search(head)):
            for row in table.find_all("tr")[1:]:
                row.find_all(["th", "td"])[nth].string = "<cost>"
    for hidden in page.find_all(["style", "script"]):
        hidden.decompose()
    return page.get_text(" "), images


def shown(cell: nbs.Cell, renamed: dict[str, str]) -> tuple[list[str], list[np.ndarray]]:
    """Return what a cell printed and displayed: its words, masked, and the pixels of its images."""
    streams, images = defaultdict(str), []
    for output in cell.get("outputs", []):  # what a cell prints arrives in pieces
        data = {key: "".join(value) for key, value in output.get("data", {}).items()}
        text, inside = "".join(output.get("text", "")) + data.get("text/plain", ""), []
        if "text/html" in data:
            text, inside = text_of_html(data["text/html"])
        images += [*inside, data["image/png"]] if "image/png" in data else inside
        streams[output.get("name", "results")] += text
    text = " ".join(f"[{name}] {streams[name]}" for name in sorted(streams))
    for pattern, put in (renamed | MASKS).items():
        text = re.sub(pattern, put, text)
    files = [io.BytesIO(base64.b64decode(image)) for image in images]
    return text.split(), [np.asarray(Image.open(f).convert("RGBA")) for f in files]


def difference(before: tuple[list, list], after: tuple[list, list]) -> str:
    """Return the first difference between words and images before and after, or ""."""
    (words, images), (new_words, new_images) = before, after
    for n, (word, new) in enumerate(zip_longest(words, new_words)):
        if word != new:
            part = slice(max(0, n - 3), n + 5)
            return f"'{' '.join(words[part])}' became '{' '.join(new_words[part])}'"
    if [image.shape for image in images] != [image.shape for image in new_images]:
        return f"{len(images)} images became {len(new_images)}, or their sizes differ"
    for old, new in zip(images, new_images, strict=True):
        if (apart := abs(old.astype(int) - new).max(axis=2)).any():
            return f"{(apart > 0).mean():.2%} of the pixels differ, by up to {apart.max()} of 255"
    return ""


def compare(before: Path, after: Path, renamed: dict[str, str]) -> dict[str, str]:
    """Return the first difference in each cell of a chapter that does not show the same."""
    if not (before.exists() and after.exists()):
        return {"all": "in one folder only"}
    old, new = ({c["id"]: c for c in nbs.read(path)["cells"]} for path in (before, after))
    found = {name: "in one run only" for name in old.keys() ^ new.keys()}
    for name in (name for name in old if name in new):
        if said := difference(shown(old[name], renamed), shown(new[name], {})):
            found[name] = said
    return found


def main(before: str, after: str, renamed: str | None = None) -> int:
    """Print one line per chapter; return the exit status."""
    names = json.loads(Path(renamed).read_text(encoding="utf-8")) if renamed else {}
    names = {rf"\b{re.escape(old)}\b": new for old, new in names.items()}
    chapters = sorted({p.name for folder in (before, after) for p in Path(folder).glob("*.ipynb")})
    differing = 0
    for chapter in chapters:
        found = compare(Path(before, chapter), Path(after, chapter), names)
        said = [f"{len(found)} cells differ: {', '.join(found)}", *found.values()][:2]
        print(f"{chapter:26}", "; first: ".join(said) if found else "identical")
        differing += bool(found)
    return int(differing > 0 or not chapters)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

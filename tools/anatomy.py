"""The anatomy of a chapter, one rule a function.

A rule takes a notebook and the file's name without suffix, and yields what is wrong, in words that
name the cell.  ``tests/test_notebooks.py`` applies them to every chapter, and breaks a good chapter
at least once per rule, so that a rule that no longer notices anything is noticed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import notebooks as nbs
import repository
from notebooks import Cell, Notebook

REPOSITORY = repository.url()
# Unconstrained, pip would replace Colab's numpy, pandas and IPython, which its kernel has imported.
COLAB_GUARD = f"""import sys

if "google.colab" in sys.modules:
    %pip list --format=freeze > preinstalled.txt
    %pip install -q -c preinstalled.txt "stimage-book @ git+{REPOSITORY}\""""
FIRST_TAGS = ("colab", "imports", "parameters", "setup")
LAST_HEADINGS = ("Key points", "Limits", "What is next", "References")
MAX_LINES, MAX_IMPORT_LINES = 20, 15
PARAMETER = re.compile(r"[A-Z][A-Z0-9_]* = .+?  # \S.*")
ROLE = re.compile(r"\{[a-z][a-z:-]*\}`|^\s*(```|:::+)\{", re.M)
LOCAL_PATH = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|tmp|work|mnt|private)/\w|\b[A-Z]:\\\w")
SENTENCE_END = re.compile(r"(?P<word>[\w)`*_%$\"']+)[.!?][*_)\"']* (?=[*_(\"']*[A-Z])")
LINE_START = re.compile(r"^\s*(?:[-*] |\d+\. )?\s*(?:\*\*[^*]+\*\*\s)?")
CODE_OR_MATH = re.compile(r"`[^`]*`|\$[^$]*\$")
ABBREVIATIONS = {"al", "cf", "Dr", "Fig", "vs", "No", "Eq", "approx"}


# --- looking things up -------------------------------------------------------------------------


def _cells(notebook: Notebook, tag: str) -> list[Cell]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and tag in nbs.tags(c)]


def _markdown(notebook: Notebook) -> list[Cell]:
    return [c for c in notebook["cells"] if c["cell_type"] == "markdown"]


def _headings(notebook: Notebook) -> list[tuple[int, str]]:
    """Return (position of the cell, text) of every second-level heading."""
    found = []
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            found += [(i, h.strip()) for h in re.findall(r"^## (.+)$", _prose(cell), re.M)]
    return found


def _prose(cell: Cell) -> str:
    """Return a Markdown cell without its fenced code."""
    return re.sub(r"^```.*?^```", "", nbs.source(cell), flags=re.M | re.S)


# --- the rules ---------------------------------------------------------------------------------


def valid(notebook: Notebook, _: str) -> Iterator[str]:
    """Nbformat 4.5, unique ids, the plain kernel and no other metadata."""
    from nbformat.validator import iter_validate

    for error in iter_validate(notebook):
        yield f"not a valid notebook: {str(error).splitlines()[0]}"
    if (notebook.get("nbformat"), notebook.get("nbformat_minor")) != (4, 5):
        yield "not nbformat 4.5"
    ids = [c.get("id") for c in notebook["cells"]]
    yield from (
        f"cell id {i} is used twice" for i in sorted({str(i) for i in ids if ids.count(i) > 1})
    )
    if notebook["metadata"] != {"kernelspec": nbs.KERNEL}:
        yield "metadata other than the plain python3 kernelspec: run tools/notebooks.py strip"


def stripped(notebook: Notebook, _: str) -> Iterator[str]:
    """No outputs, counts or editor metadata in the repository."""
    for cell in notebook["cells"]:
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield f"{nbs.name(cell)} carries outputs or a count: run tools/notebooks.py strip"
        if extra := set(cell["metadata"]) - nbs.CELL_METADATA:
            yield f"{nbs.name(cell)} carries metadata {sorted(extra)}: run tools/notebooks.py strip"


def title(notebook: Notebook, name: str) -> Iterator[str]:
    """First cell: numbered title, the question, the result in one sentence, the Colab link."""
    text = nbs.source(notebook["cells"][0])
    if not re.match(rf"# {int(name[:2])}\. \S", text):
        yield f"the first line is not '# {int(name[:2])}. Title'"
    yield from (
        f"the title cell has no {part}"
        for part in ("**Question.**", "**In one sentence.**")
        if part not in text
    )
    path = REPOSITORY.removeprefix("https://github.com/")
    link = f"[Open in Colab](https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}.ipynb)"
    if link not in text:
        yield f"the title cell has no link {link}"


def objectives(notebook: Notebook, _: str) -> Iterator[str]:
    """Second cell: three to five objectives; prerequisites, time and data."""
    text = nbs.source(notebook["cells"][1])
    if not text.startswith("## Objectives"):
        yield "the second cell does not start with '## Objectives'"
    if not 3 <= len(re.findall(r"^[-*] ", text, re.M)) <= 5:
        yield "not three to five objectives"
    for part in ("Prerequisites", "Time", "Data"):
        if f"**{part}.**" not in text:
            yield f"the objectives cell has no **{part}.** line"


def opening(notebook: Notebook, _: str) -> Iterator[str]:
    """Cells three to six: colab, imports, parameters, setup, in this order."""
    for position, tag in enumerate(FIRST_TAGS, start=2):
        cell = notebook["cells"][position]
        if cell["cell_type"] != "code" or tag not in nbs.tags(cell):
            yield f"cell number {position + 1} is not the code cell tagged {tag}"
        if len(_cells(notebook, tag)) != 1:
            yield f"not exactly one cell tagged {tag}"


def colab(notebook: Notebook, _: str) -> Iterator[str]:
    """The install for Colab is the same in every chapter, guarded, and hidden in the book."""
    for cell in _cells(notebook, "colab"):
        if re.sub(r"\n+", "\n", nbs.source(cell).strip()) != re.sub(r"\n+", "\n", COLAB_GUARD):
            yield f"{nbs.name(cell)} is not the guarded install that all chapters share"
        if "remove-cell" not in nbs.tags(cell):
            yield f"{nbs.name(cell)} is not tagged remove-cell"


def imports(notebook: Notebook, _: str) -> Iterator[str]:
    """All imports in one short cell, and each of them used."""
    code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "colab" not in nbs.tags(c)]
    later = "\n".join(nbs.source(c) for c in code if "imports" not in nbs.tags(c))
    for cell in code:
        text = nbs.source(cell)
        nodes = [
            n for n in ast.parse(_plain(text)).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        if "imports" not in nbs.tags(cell):
            if nodes:
                yield f"{nbs.name(cell)} imports: move it to the imports cell"
            continue
        if len(text.strip().splitlines()) > MAX_IMPORT_LINES:
            yield f"{nbs.name(cell)} is longer than {MAX_IMPORT_LINES} lines"
        for alias in (a for n in nodes for a in n.names):
            bound = alias.asname or alias.name.split(".")[0]
            if bound != "annotations" and not re.search(rf"\b{bound}\b", later):
                yield f"{nbs.name(cell)} imports {bound}, which the chapter never uses"


def _plain(text: str) -> str:
    """Return code with IPython's magics commented out, for the Python parser."""
    return re.sub(r"^(\s*)([%!].*)$", r"\1pass  # \2", text, flags=re.M)


def parameters(notebook: Notebook, _: str) -> Iterator[str]:
    """Commented scalars, one a line, STUDY = "demo" and SEED among them."""
    for cell in _cells(notebook, "parameters"):
        names = set()
        for line in filter(None, map(str.rstrip, nbs.source(cell).splitlines())):
            if line.startswith("#"):
                continue
            if not PARAMETER.fullmatch(line):
                yield f"{nbs.name(cell)}: not 'NAME = value  # comment': {line}"
                continue
            statement = ast.parse(line).body[0]
            names.add(statement.targets[0].id)
            if not isinstance(statement.value, ast.Constant | ast.UnaryOp):
                yield f"{nbs.name(cell)}: not a scalar: {line}"
        if 'STUDY = "demo"' not in nbs.source(cell) or "SEED" not in names:
            yield f'{nbs.name(cell)} has no STUDY = "demo" or no SEED'


def length(notebook: Notebook, _: str) -> Iterator[str]:
    """A code cell has one idea."""
    for cell in notebook["cells"]:
        lines = len(nbs.source(cell).strip().splitlines())
        if cell["cell_type"] == "code" and lines > MAX_LINES:
            yield f"{nbs.name(cell)} has {lines} lines, more than {MAX_LINES}"
        if not nbs.source(cell).strip():
            yield f"{nbs.name(cell)} is empty"


def rounds(notebook: Notebook, _: str) -> Iterator[str]:
    """Four to seven rounds, each with a prediction and with code."""
    fixed = {"Objectives", "Exercises", *LAST_HEADINGS}
    headings = _headings(notebook)
    own = [(i, h) for i, h in headings if h not in fixed]
    if not 4 <= len(own) <= 7:
        yield f"{len(own)} rounds of '## heading', not four to seven"
    for start, heading in own:
        stop = min((i for i, _ in headings if i > start), default=len(notebook["cells"]))
        cells = notebook["cells"][start:stop]
        if not any(c["cell_type"] == "code" for c in cells):
            yield f"round '{heading}' has no code"
        if not any("**Predict.**" in nbs.source(c) for c in cells):
            yield f"round '{heading}' has no **Predict.**"


def figures(notebook: Notebook, name: str) -> Iterator[str]:
    """A figure has a caption, a name, a text for who cannot see it, and leaves no repr behind."""
    seen = set()
    for cell in notebook["cells"]:
        settings = cell["metadata"].get("mystnb", {})
        if cell["cell_type"] != "code" or (
            "figure" not in nbs.tags(cell) and "figure" not in settings
        ):
            continue
        if "figure" not in nbs.tags(cell):
            yield f"{nbs.name(cell)} has a caption but no tag figure"
        figure, alt = settings.get("figure", {}), settings.get("image", {}).get("alt", "")
        label = figure.get("name", "")
        if len(figure.get("caption", "")) < 20:
            yield f"{nbs.name(cell)} has no caption to speak of"
        if not re.fullmatch(rf"fig-{name[:2]}-[a-z0-9-]+", label) or label in seen:
            yield f"{nbs.name(cell)}: figure name '{label}' is not a new fig-{name[:2]}-something"
        if len(alt) < 30 or alt == figure.get("caption"):
            yield f"{nbs.name(cell)} has no alt text that describes it"
        last = nbs.source(cell).strip().splitlines()[-1]
        if not last.endswith((";", "plt.show()")):
            yield f"{nbs.name(cell)} ends in neither ';' nor plt.show(), so a repr may show"
        seen.add(label)
    if not seen:
        yield "no figure at all"


def exercises(notebook: Notebook, _: str) -> Iterator[str]:
    """Two to four exercises: prompt and hint, a stub, a check, a hidden solution."""
    cells, numbers = notebook["cells"], []
    for i, cell in enumerate(cells):
        prompt = re.search(r"^### Exercise (\d+)(.*)$", nbs.source(cell), re.M)
        if cell["cell_type"] != "markdown" or not prompt:
            continue
        number = int(prompt[1])
        numbers.append(number)
        yield from _exercise(number, prompt[2], nbs.source(cell), cells[i + 1 :])
    if numbers != list(range(1, len(numbers) + 1)) or not 2 <= len(numbers) <= 4:
        yield f"exercises are numbered {numbers}, not 1 to 2, 3 or 4"


def _exercise(k: int, minutes: str, prompt: str, after: list[Cell]) -> Iterator[str]:
    if not re.fullmatch(r" \(\d+ minutes\)", minutes):
        yield f"exercise {k} does not say '(N minutes)' in its heading"
    following = []
    for cell in after:
        if re.search(r"^##", nbs.source(cell), re.M) and cell["cell_type"] == "markdown":
            break
        following.append(cell)
    text = prompt + "".join(nbs.source(c) for c in following if c["cell_type"] == "markdown")
    if "<details><summary>Hint</summary>\n\n" not in text:
        yield f"exercise {k} has no collapsed hint"
    code = [c for c in following if c["cell_type"] == "code"]
    kinds = [next(iter(nbs.tags(c) & {"exercise", "check", "solution"}), None) for c in code]
    if kinds[:3] != ["exercise", "check", "solution"]:
        yield f"exercise {k} is followed by {kinds}, not by stub, check, solution"
        return
    stub, check, solution = code[:3]
    if not re.search(rf"^answer_{k} = ", nbs.source(stub), re.M):
        yield f"exercise {k}: the stub does not assign answer_{k}"
    last = nbs.source(check).strip().splitlines()[-1]
    if f"def check_{k}(" not in nbs.source(check) or f"check_{k}(answer_{k})" not in last:
        yield f"exercise {k}: the check does not define check_{k} and call it on answer_{k}"
    if f"check_{k}(" not in nbs.source(solution).strip().splitlines()[-1]:
        yield f"exercise {k}: the last line of the solution does not call check_{k}"
    if "hide-cell" not in nbs.tags(solution) or not solution["metadata"].get("jupyter", {}).get(
        "source_hidden"
    ):
        yield f"exercise {k}: the solution is not hidden (tag hide-cell, jupyter.source_hidden)"


def quick_checks(notebook: Notebook, _: str) -> Iterator[str]:
    """At least two questions whose answer is collapsed."""
    asked = [c for c in _markdown(notebook) if "**Quick check.**" in nbs.source(c)]
    if len(asked) < 2:
        yield f"{len(asked)} quick checks, not two or more"
    for cell in asked:
        if "<details><summary>Answer</summary>\n\n" not in nbs.source(cell):
            yield f"{nbs.name(cell)}: the quick check has no collapsed answer"


def claims(notebook: Notebook, _: str) -> Iterator[str]:
    """The chapter asserts what it claims."""
    if not any("assert " in nbs.source(c) for c in _cells(notebook, "claims")):
        yield "no code cell tagged claims that asserts something"


def closing(notebook: Notebook, _: str) -> Iterator[str]:
    """Key points, limits, what is next and references with DOIs close the chapter."""
    last = tuple(h for _, h in _headings(notebook))[-len(LAST_HEADINGS) :]
    if last != LAST_HEADINGS:
        yield f"the chapter ends with {last}, not with {LAST_HEADINGS}"
    text = "\n".join(nbs.source(c) for c in _markdown(notebook))
    if "https://doi.org/10." not in text.rpartition("## References")[2]:
        yield "the references give no DOI"


def plain_markdown(notebook: Notebook, _: str) -> Iterator[str]:
    """Only what Jupyter, Colab and the book all show; images have a text."""
    for cell in _markdown(notebook):
        text = _prose(cell)
        if ROLE.search(nbs.source(cell)):
            yield f"{nbs.name(cell)} uses a role or directive, which only the book shows"
        unknown = set(
            re.findall(r"</?([a-z]+)[ >/]", re.sub(r"`[^`\n]*`|<https?://\S+>", "", text))
        )
        if unknown - {"details", "summary"}:
            yield f"{nbs.name(cell)} uses HTML other than details: {sorted(unknown)}"
        if "![](" in text:
            yield f"{nbs.name(cell)} has an image without a text"
        if text.count("<details>") != text.count("</details>"):
            yield f"{nbs.name(cell)} leaves a <details> open"
        if re.search(r"</summary>\n(?!\n)", text):
            yield f"{nbs.name(cell)} has no blank line after </summary>"


def one_sentence_per_line(notebook: Notebook, _: str) -> Iterator[str]:
    """One sentence a line in prose, so that a change shows as a changed sentence."""
    for cell in _markdown(notebook):
        for line in _prose(cell).partition("## References")[0].splitlines():
            if line.startswith(("#", "|", "<", "$$")):
                continue
            rest = CODE_OR_MATH.sub("x", LINE_START.sub("", line))
            words = [m["word"] for m in SENTENCE_END.finditer(rest)]
            if any(len(w) > 1 and w not in ABBREVIATIONS for w in words):
                yield f"{nbs.name(cell)} has two sentences on a line: {line[:60]}..."


def no_local_path(notebook: Notebook, _: str) -> Iterator[str]:
    """No path of somebody's machine."""
    for cell in notebook["cells"]:
        if found := LOCAL_PATH.search(nbs.source(cell)):
            yield f"{nbs.name(cell)} names a local path: {found[0]}"


RULES = (
    valid, stripped, title, objectives, opening, colab, imports, parameters, length, rounds,
    figures, exercises, quick_checks, claims, closing, plain_markdown, one_sentence_per_line,
    no_local_path,
)  # fmt: skip


def problems(notebook: Notebook, name: str) -> list[str]:
    """Return what is wrong with a chapter, one message a finding, each starting with the rule.

    ``name`` is the file's name without suffix, as ``01_loading``.
    """
    return [f"{rule.__name__}: {found}" for rule in RULES for found in rule(notebook, name)]

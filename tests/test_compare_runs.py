"""Two runs are the same when only times, places and new names differ."""

import base64
import copy
import io
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare_runs
import notebooks as nbs
from new_chapter import chapter


def png(value: int) -> str:
    pixels = np.full((8, 8, 3), 200, np.uint8)
    pixels[2, 2] = value
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def result(**data: str) -> dict:
    data = {f"{kind.replace('_', '/')}": value for kind, value in data.items()}
    return {"output_type": "display_data", "metadata": {}, "data": data}


def printed(*pieces: str) -> list[dict]:
    return [{"output_type": "stream", "name": "stdout", "text": [piece]} for piece in pieces]


TABLE = (
    "<table><thead><tr><th></th><th>seconds</th><th>score</th></tr></thead>"
    "<tbody><tr><th>a</th><td>{}</td><td>{}</td></tr></tbody></table>"
)
FRAME = (
    "<iframe srcdoc='" + escape("<h1>map</h1><script>\nconst data = {};\n</script>") + "'></iframe>"
)
SAME = [
    (printed("read in 1.5 s, 3.1 MB at /var/a/b\n"), printed("read in 2 s, ", "3 MB at /x/y\n")),
    (printed("74 a second, 1,320 tiles/s"), printed("9 a second, 1.1 tiles/s")),
    (printed("paired: p = 0.03"), printed("wilcoxon: p = 0.03")),
    ([result(text_plain="<A at 0x7f1>")], [result(text_plain="<A at 0x801>")]),
    (
        [result(text_html=TABLE.format(1.2, 0.5), text_plain="1.2 0.5")],
        [result(text_html=TABLE.format(9.9, 0.5), text_plain="9.9 0.5")],
    ),
    ([result(image_png=png(9))], [result(image_png=png(9), text_plain="")]),
    ([result(text_html=FRAME.format(1))], [result(text_html=FRAME.format(1))]),
]
OTHER = [
    (printed("macro-F1 0.51"), printed("macro-F1 0.52"), "macro-F1 0.52"),
    (printed("293 spots"), [], "became"),
    (
        [result(text_html=TABLE.format(1.2, 0.5))],
        [result(text_html=TABLE.format(1.2, 0.6))],
        "0.6",
    ),
    ([result(image_png=png(9))], [result(image_png=png(19))], "1.56% of the pixels"),
    ([result(image_png=png(9))], [], "became"),
    ([result(text_html=FRAME.format(1))], [result(text_html=FRAME.format(2))], "data = 2"),
]


def compared(tmp_path: Path, before: list[dict], after: list[dict]) -> int:
    for folder, outputs in (("before", before), ("after", after)):
        notebook = copy.deepcopy(chapter())
        next(c for c in notebook["cells"] if c["id"] == "code-2")["outputs"] = outputs
        (tmp_path / folder).mkdir()
        nbs.write(notebook, tmp_path / folder / "01_small.ipynb")
    (tmp_path / "names.json").write_text(json.dumps({"paired": "wilcoxon"}))
    names = ("before", "after", "names.json")
    return compare_runs.main(*(str(tmp_path / name) for name in names))


@pytest.mark.parametrize(("before", "after"), SAME)
def test_what_changes_from_run_to_run_is_masked(tmp_path, capsys, before, after):
    assert compared(tmp_path, before, after) == 0
    assert capsys.readouterr().out.split() == ["01_small.ipynb", "identical"]


@pytest.mark.parametrize(("before", "after", "said"), OTHER)
def test_a_difference_is_named_with_its_cell(tmp_path, capsys, before, after, said):
    assert compared(tmp_path, before, after) == 1
    line = capsys.readouterr().out
    assert "1 cells differ: code-2; first: " in line
    assert said in line


def test_what_is_in_one_run_only_is_a_difference(tmp_path, capsys):
    assert compared(tmp_path, [], []) == 0
    path = tmp_path / "after" / "01_small.ipynb"
    notebook = nbs.read(path)
    notebook["cells"].pop()
    nbs.write(notebook, path)
    assert compare_runs.main(str(tmp_path / "before"), str(tmp_path / "after")) == 1
    assert "differ: end; first: in one run only" in capsys.readouterr().out
    path.unlink()
    assert compare_runs.main(str(tmp_path / "before"), str(tmp_path / "after")) == 1
    assert "in one folder only" in capsys.readouterr().out
    (tmp_path / "before" / "01_small.ipynb").unlink()
    assert compare_runs.main(str(tmp_path / "before"), str(tmp_path / "after")) == 1

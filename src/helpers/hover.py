"""Maps that show the tile behind a point: one to hover over in a page, one for print.

`scatter` needs no server and no network: tiles, places and a short script travel inside the page,
in a frame of their own, so that neither the page's scripts nor a label can interfere.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from IPython.display import HTML
from PIL import Image

from helpers.files import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = 1_500_000
"""Bytes of one figure: some hundred thousand are read at once, ten million make a page slow."""
_TRIALS = ((48, 80), (48, 65), (32, 75), (32, 60), (16, 70))
"""Side in px and JPEG quality, the best first; JPEG's blocks of 16 px hold parts of one tile."""
_SCALE = 9999  # places travel as whole numbers up to this


def scatter(
    xy: np.ndarray,
    tiles: np.ndarray,
    text: Sequence[str],
    colours: Sequence,
    *,
    title: str,
    legend: Mapping[str, object] | None = None,
    limit: int = LIMIT,
) -> HTML:
    """Return a map for a page: hover over a point, tap it or step to it, and its tile is shown.

    Parameters
    ----------
    xy
        Places of the points, ``(n, 2)``; drawn with equal axes.
    tiles
        uint8 ``(n, size, size, 3)``; shrunk to 48 px, or further where the limit asks for it.
    text
        What is said about each point; shown as it is, never read as HTML.
    colours
        Of each point, as matplotlib knows them.
    title
        Over the map, and what a screen reader says.
    legend
        Colours by name.
    limit
        Bytes that the whole may have.

    Raises
    ------
    DataError
        When the numbers of places, tiles, texts and colours differ; a place is NaN; a colour is
        none; or the tiles do not fit into `limit`.
    """
    xy, tiles = _checked(xy, tiles)
    _same_number(len(xy), texts=text, colours=colours)
    low, high = xy.min(axis=0), xy.max(axis=0)
    unit = float(max(high - low)) or 1.0
    data = {
        "xy": np.rint((xy - low) / unit * _SCALE).astype(int).tolist(),
        "box": np.rint((high - low) / unit * _SCALE).astype(int).tolist(),
        "text": [str(t) for t in text],
        "colour": [_hex(c) for c in colours],
        "across": _across(len(xy)),
    }
    keys = "".join(
        f'<span><i style="background:{_hex(c)}"></i>{html.escape(str(name))}</span>'
        for name, c in (legend or {}).items()
    )
    parts = {"TITLE": html.escape(title), "KEYS": keys, "DATA": _json(data), "SPRITES": ""}
    room = limit - len(_framed(parts))
    for size, quality in _TRIALS:
        parts["SPRITES"] = _sprites(tiles, size, quality)
        if len(parts["SPRITES"]) <= room:
            return HTML(_framed(parts))
    what = f"{len(xy)} points and their tiles take more than the {limit:,} bytes of one figure"
    raise DataError(what, fix="show fewer points, chosen at random for example")


def along(
    xy: np.ndarray,
    tiles: np.ndarray,
    colours: Sequence | None = None,
    *,
    side_um: float | None = None,
    across: int = 16,
    ax: Axes | None = None,
) -> Axes:
    """Draw tiles along a map: in every square of a grid, the tile of the point nearest its middle.

    Parameters
    ----------
    xy, tiles, colours
        As for `scatter`; with `colours`, every tile has a frame in the colour of its point.
    side_um
        Side of a tile in um, for a scale bar as long as a tile is wide.
    across
        Squares along the longer side of the map.
    ax
        Where to draw; new axes when not given.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    from helpers.plots import scale_bar

    xy, tiles = _checked(xy, tiles)
    if colours is not None:
        _same_number(len(xy), colours=colours)
    ax = ax or plt.subplots(figsize=(7, 6))[1]
    side = float(max(np.ptp(xy, axis=0))) / across or 1.0
    square = np.floor((xy - xy.min(axis=0)) / side).astype(int).clip(max=across - 1)
    middle = xy.min(axis=0) + (square + 0.5) * side
    order = np.argsort(np.linalg.norm(xy - middle, axis=1), kind="stable")
    _, first = np.unique(square[order], axis=0, return_index=True)
    for i in order[first]:
        (x, y), r = middle[i], 0.42 * side
        ax.imshow(tiles[i], extent=(x - r, x + r, y - r, y + r))
        if colours is not None:
            edge = {"fill": False, "edgecolor": colours[i], "linewidth": 2}
            ax.add_patch(Rectangle((x - r, y - r), 2 * r, 2 * r, **edge))
    (left, bottom), (right, top) = middle.min(axis=0) - 0.6 * side, middle.max(axis=0) + 0.6 * side
    ax.set(xticks=[], yticks=[], aspect="equal", xlim=(left, right), ylim=(bottom, top))
    for edge in ax.spines.values():
        edge.set_visible(False)
    if side_um:
        whole = int(side_um) if float(side_um).is_integer() else side_um
        scale_bar(ax, side_um / (0.84 * side), length_um=whole)
    return ax


# --------------------------------------------------------------------------- what goes into a page


def _checked(xy: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    xy, tiles = np.asarray(xy), np.asarray(tiles)
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or xy.dtype.kind not in "fiu":
        raise DataError(f"places are {xy.dtype} {xy.shape}", fix="give numbers (n, 2), n above 0")
    if not np.isfinite(xy).all():
        bad = int((~np.isfinite(xy).all(axis=1)).argmax())
        raise DataError(f"point {bad} has no place", fix="leave out points that are NaN")
    square = tiles.ndim == 4 and tiles.shape[1] == tiles.shape[2] and tiles.shape[3] == 3
    if not square or tiles.dtype != np.uint8:
        what = f"tiles are {tiles.dtype} {tiles.shape}"
        raise DataError(what, fix="give uint8 (n, size, size, 3), as helpers.tiles cuts them")
    _same_number(len(xy), tiles=tiles)
    return xy.astype(float), tiles


def _same_number(n: int, **given: Sequence) -> None:
    for name, values in given.items():
        if isinstance(values, str) or len(values) != n:
            many = "one for all" if isinstance(values, str) else len(values)
            raise DataError(f"{many} {name} for {n} points", fix=f"give {n}, row by row")


def _hex(colour: object) -> str:
    """Return a colour as #rrggbb, which can be nothing but a colour."""
    from matplotlib.colors import to_hex

    try:
        return to_hex(colour)
    except ValueError as error:
        raise DataError(f"{colour!r} is no colour", fix="as matplotlib knows them") from error


def _across(n: int) -> int:
    """Return how many tiles lie side by side in the sheet."""
    return math.ceil(math.sqrt(n))


def _sprites(tiles: np.ndarray, size: int, quality: int) -> str:
    """Return all tiles in one JPEG, row by row, as an address that holds the picture itself."""
    across = _across(len(tiles))
    sheet = Image.new("RGB", (across * size, math.ceil(len(tiles) / across) * size), "white")
    for i, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % across * size, i // across * size))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _json(data: object) -> str:
    """Return JSON that cannot end the script it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _framed(parts: Mapping[str, str]) -> str:
    """Return the whole as a frame that can run its own script and reach nothing of the page."""
    inner = html.escape(re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], _PAGE))
    return (
        f'<div><iframe sandbox="allow-scripts" title="{parts["TITLE"]}" srcdoc="{inner}" '
        'style="width:100%;height:500px;border:0;display:block;background:#fff"></iframe></div>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Map</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
* {box-sizing: border-box}
html, body {height: 100%; margin: 0; background: #fff; color: #222}
body {display: flex; flex-direction: column; font: 14px/1.35 sans-serif; padding: 6px}
h1 {font-size: 14px; margin: 0 0 4px; text-align: center}
main {flex: 1; display: flex; min-height: 0; gap: 8px}
#plot {flex: 1; position: relative; min-height: 0; border: 1px solid #ddd}
canvas {position: absolute; inset: 0; width: 100%; height: 100%; touch-action: pan-y}
aside {width: 176px; overflow: auto; overflow-wrap: anywhere}
#tile {width: 168px; height: 168px; margin-bottom: 6px; border: 4px solid #ddd}
#tile {background-repeat: no-repeat; flex: none}
#text {white-space: pre-line}
footer {display: flex; flex-wrap: wrap; gap: 2px 12px; padding-top: 4px; font-size: 13px}
i {display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 4px}
@media (max-width: 520px) {
  main {flex-direction: column}
  aside {width: auto; height: 104px; display: flex; gap: 8px}
  #tile {width: 104px; height: 104px; margin: 0}
}
</style></head><body>
<h1>@TITLE@</h1>
<main><div id="plot"><canvas tabindex="0" role="img"></canvas></div>
<aside><div id="tile" role="img" aria-label="tile of the chosen point"></div>
<div id="text" aria-live="polite">Move over a point, tap it, or press the arrow keys.</div></aside>
</main>
<noscript>This map needs JavaScript; the figure with tiles drawn along the map does not.</noscript>
<footer>@KEYS@</footer>
<script>
"use strict";
const sprites = "@SPRITES@";
const data = @DATA@;
const get = (id) => document.getElementById(id);
const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d");
const rows = Math.ceil(data.xy.length / data.across);
let place = [], chosen = -1;
canvas.setAttribute("aria-label", document.querySelector("h1").textContent + ". Scatter plot of "
  + data.xy.length + " points; arrow keys go from point to point.");
get("tile").style.backgroundImage = "url(" + sprites + ")";
get("tile").style.visibility = "hidden";

function layout() {
  const box = canvas.getBoundingClientRect(), k = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * k);
  canvas.height = Math.round(box.height * k);
  pen.setTransform(k, 0, 0, k, 0, 0);
  const [w, h] = data.box, pad = 12;
  const scale = Math.max(0, Math.min((box.width - 2 * pad) / Math.max(w, 1),
                                     (box.height - 2 * pad) / Math.max(h, 1)));
  place = data.xy.map(([x, y]) =>
    [box.width / 2 + (x - w / 2) * scale, box.height / 2 - (y - h / 2) * scale]);
  draw();
  if (chosen >= 0) show(chosen);
}
function disc(i, radius, edge, width) {
  pen.beginPath();
  pen.arc(place[i][0], place[i][1], radius, 0, 7);
  pen.fillStyle = data.colour[i];
  pen.fill();
  pen.lineWidth = width;
  pen.strokeStyle = edge;
  pen.stroke();
}
function draw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const radius = place.length > 1200 ? 2.5 : place.length > 400 ? 3.5 : 5;
  place.forEach((_, i) => disc(i, radius, "#fff", 0.5));
  if (chosen >= 0) disc(chosen, 7, "#000", 2.5);
}
function show(i) {
  const box = get("tile"), side = box.clientWidth, column = i % data.across;
  box.style.backgroundSize = data.across * side + "px " + rows * side + "px";
  box.style.backgroundPosition =
    -column * side + "px " + -Math.floor(i / data.across) * side + "px";
  box.style.borderColor = data.colour[i];
  box.style.visibility = "visible";
  if (chosen !== i) get("text").textContent = data.text[i];
  chosen = i;
  draw();
}
function best(cost) {
  let found = -1, least = Infinity;
  place.forEach((p, i) => {
    const c = cost(p, i);
    if (c < least) [found, least] = [i, c];
  });
  return [found, least];
}
function point(event) {
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  const [found, far] = best((p) => Math.hypot(p[0] - x, p[1] - y));
  if (found >= 0 && far < (event.pointerType === "touch" ? 40 : 20)) show(found);
}
canvas.addEventListener("pointermove", point);
canvas.addEventListener("pointerdown", point);
const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
canvas.addEventListener("keydown", (event) => {
  if (!(event.key in arrows) || !place.length) return;
  event.preventDefault();
  const [dx, dy] = arrows[event.key], middle = [canvas.clientWidth / 2, canvas.clientHeight / 2];
  const from = chosen < 0 ? middle : place[chosen];
  const [found] = best((p, i) => {
    const x = p[0] - from[0], y = p[1] - from[1], on = x * dx + y * dy;
    if (chosen < 0) return Math.hypot(x, y);
    return i === chosen || on <= 0 ? Infinity : on + 2 * Math.abs(x * dy - y * dx);
  });
  if (found >= 0) show(found);
});
new ResizeObserver(layout).observe(canvas); /* its size may come after this script */
</script></body></html>
"""

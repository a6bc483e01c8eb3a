"""What every chapter of the book repeats, one module per stage of the pipeline.

``catalog -> (images, counts) -> slides -> tiles -> genes -> towers -> contrast -> evaluate ->
plots``, with ``simulate`` writing a small study that ``slides`` reads like any other.
``weights`` belongs to ``towers``; ``pairs``, ``model`` and ``training`` to ``contrast``;
``places``, ``splits``, ``scores``, ``linear``, ``probes``, ``clusters`` and ``spaces`` to
``evaluate``.
``captions`` uses ``contrast``; ``refit`` uses ``contrast`` and ``splits``; ``hover`` draws for a
page, and ``results`` reads what was measured before.
Arrows go one way: no module imports a later one.
Importing the package imports none of them, so that a chapter pays only for what it uses.
"""

__version__ = "0.1.0"

"""What every chapter of the book repeats, one module per stage of the pipeline.

``catalog -> (images, counts) -> slides -> tiles -> genes -> towers -> contrast -> plots``, with
``simulate`` writing a small study that ``slides`` reads like any other.  ``weights`` belongs to
``towers``; ``pairs``, ``model`` and ``training`` to ``contrast``, which hands on what they have;
``captions`` uses ``contrast``.  Arrows go one way: no module imports a later one.
Importing the package imports none of them, so that a chapter pays only for what it uses.
"""

__version__ = "0.1.0"

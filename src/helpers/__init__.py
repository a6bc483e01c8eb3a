"""What every chapter of the book repeats, one module per stage of the pipeline.

``files -> catalog -> (simulate, images, counts) -> slides -> tiles -> genes -> towers -> contrast
-> training`` leads from a raw slide to a trained model, and ``slides -> splits -> probing ->
metrics`` to a verdict on features; ``plots`` draws both. Arrows go one way: no module imports a
later one. Importing the package imports none of them, so a chapter pays only for what it uses.
"""

__version__ = "0.1.0"

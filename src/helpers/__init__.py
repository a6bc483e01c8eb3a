"""What several chapters of the book use, one module per stage of the pipeline.

``files -> catalog -> (simulate, images, counts) -> slides -> tiles -> genes -> towers -> contrast
-> (splits, probing, metrics) -> training -> plots``

Arrows go one way: a module imports only modules to its left, or before it in the same brackets.
The package itself imports none of them, so a chapter loads only what it uses; `splits`, `probing`
and `metrics` do not load torch.
"""

__version__ = "0.1.0"

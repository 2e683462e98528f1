"""The published modules of RepMLP (first paper): their arguments as ours."""

LAYERS = {}
RENAME = {}

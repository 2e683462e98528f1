"""The published modules of RepMLPNet (second paper): their arguments as ours."""

LAYERS = {}
RENAME = {}

"""The published modules of DCD: their arguments as ours."""

LAYERS = {}
RENAME = {}

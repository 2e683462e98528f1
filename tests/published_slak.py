"""The published modules of SLaK and RepLKNet: their arguments as ours."""

LAYERS = {}
RENAME = {}

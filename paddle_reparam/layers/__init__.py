"""The layers, one paper a file; importing this package registers them."""

from . import refconv as refconv
from . import replknet as replknet
from . import spconv as spconv

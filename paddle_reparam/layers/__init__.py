"""The layers, one paper a file; importing this package registers them."""

from . import refconv as refconv
from . import replknet as replknet
from . import repmlpnet as repmlpnet
from . import repmlp as repmlp
from . import spconv as spconv

"""The layers, one paper a file; importing this package registers them."""

from . import dcd as dcd
from . import dcd_matrix as dcd_matrix
from . import refconv as refconv
from . import replknet as replknet
from . import repmlp as repmlp
from . import repmlpnet as repmlpnet
from . import slak as slak
from . import spconv as spconv

"""The networks, one family a file; importing this package registers them."""

from . import resnet_spconv as resnet_spconv
from . import vgg_spconv as vgg_spconv

"""The networks, one family a file; importing this package registers them."""

from . import cifar as cifar
from . import condconv_dyconv as condconv_dyconv
from . import convnext as convnext
from . import faces as faces
from . import hbonet as hbonet
from . import mlp_repmlp as mlp_repmlp
from . import mobilenetv2_dcd as mobilenetv2_dcd
from . import mobileone as mobileone
from . import replknet as replknet
from . import repmlpnet as repmlpnet
from . import repvgg as repvgg
from . import resnet_dbb as resnet_dbb
from . import resnet_dcd as resnet_dcd
from . import resnet_repmlp as resnet_repmlp
from . import resnet_spconv as resnet_spconv
from . import shufflenetv1 as shufflenetv1
from . import slak as slak
from . import vgg_spconv as vgg_spconv

"""The layers, one paper a file; importing this package registers those that stand in for convolutions."""

from .acb import ACB2D as ACB2D
from .centered_weight_norm import CenteredWeightNormConv2D as CenteredWeightNormConv2D
from .condconv import CondConv2D as CondConv2D
from .dbb import DBB2D as DBB2D
from .dcd import DCDConv2D as DCDConv2D
from .dcd import DCDLinear as DCDLinear
from .dcd_matrix import DCDDepthwiseConv2D as DCDDepthwiseConv2D
from .dcd_matrix import DCDMatrixConv2D as DCDMatrixConv2D
from .dyconv import DYConv2D as DYConv2D
from .ghost import GhostConv2D as GhostConv2D
from .global_context import GlobalContext2D as GlobalContext2D
from .hetconv import HetConv2D as HetConv2D
from .mobileone import MobileOne2D as MobileOne2D
from .non_local import NonLocal2D as NonLocal2D
from .octconv import OctConv2D as OctConv2D
from .orthogonal_weight_norm import OrthogonalWeightNormConv2D as OrthogonalWeightNormConv2D
from .refconv import RefConv2D as RefConv2D
from .replknet import ReparamLargeKernelConv2D as ReparamLargeKernelConv2D
from .repmlp import RepMLP as RepMLP
from .repmlpnet import RepMLPBlock as RepMLPBlock
from .repvgg import RepVGG2D as RepVGG2D
from .slak import DecomposedLargeKernelConv2D as DecomposedLargeKernelConv2D
from .spconv import SPConv2D as SPConv2D
from .weight_norm import WeightNormConv2D as WeightNormConv2D

"""timm's MobileOne block: its arguments as ours."""

from paddle_reparam.models.mobileone import MobileOneBlock


def make_block(in_chs, out_chs, kernel_size, stride=1, num_conv_branches=1, group_size=None) -> MobileOneBlock:
    groups = 1 if group_size is None else in_chs // group_size
    block = MobileOneBlock(in_chs, out_chs, kernel_size, stride, groups, num_conv_branches)
    block.to(dtype="float64")
    return block


LAYERS = {"MobileOneBlock": make_block}
RENAME = {}

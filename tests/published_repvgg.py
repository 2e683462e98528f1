"""The published RepVGG block: its arguments as ours."""

from paddle_reparam.models.repvgg import RepVGGBlock


def make_block(in_channels, out_channels, kernel_size, padding, stride=1, groups=1, use_se=False) -> RepVGGBlock:
    assert (kernel_size, padding) == (3, 1)  # The published block has no other ones.
    block = RepVGGBlock(in_channels, out_channels, stride, groups, se=use_se)
    block.to(dtype="float64")
    return block


LAYERS = {"RepVGGBlock": make_block}
#: Squeeze-and-excitation is the one of RepMLPNet here.
RENAME = {"RepVGGBlock": lambda key: key.replace("se.down.", "se.fc1.").replace("se.up.", "se.fc2.")}

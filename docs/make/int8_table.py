"""Train small networks on CIFAR-10, release them, and measure what eight bits cost them, naively and by this library.

`--images` is a folder with `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. What is measured goes to `measured/int8.json`;
`measured_tables.py` writes the table of it on its page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam import create_model, reparameterize, replace
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.onnx_export import export_onnx, onnx_versions
from paddle_reparam.deploy.quantization import drop_on, quantize_onnx
from paddle_reparam.deploy.runtimes.onnx_runtime import need
from paddle_reparam.errors import MissingFile, ReparamError, exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.images import read_rgb
from paddle_reparam.measure.timing import machine_facts
from paddle_reparam.ppcls import setup
from paddle_reparam.report import format_markdown
from paddle_reparam.weights.checkpoints import load_into, save

# isort: split
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

MEASURED = Path(__file__).resolve().parents[1] / "measured" / "int8.json"
CALIBRATION_IMAGES = 256
SIZE, CLASSES = 32, 10
SPEC = [[None, 3, SIZE, SIZE]]
#: What the networks are given: pixels 0..255, less this, divided by that.
MEAN, SCALE = 125.0, 63.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--cache", type=Path, required=True, help="where trained weights are kept")
    parser.add_argument("--epochs", type=int, default=2, help="how long networks are trained (2)")
    parser.add_argument("--training-images", type=int, default=2000, help="of each class (2000)")
    parser.add_argument("--test-images", type=int, default=200, help="of each class (200)")
    parser.add_argument("--largest-drop", type=float, default=0.5, help="what may be lost, in percentage points (0.5)")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="some of them")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        training, test = (
            read_images(given.images / part, count)
            for part, count in (("train", given.training_images), ("test", given.test_images))
        )
        for name in given.networks:
            net = train(name, *training, given.epochs, given.cache)
            fused, _ = reparameterize(net, fold_bn=True, input_spec=SPEC, fixed_size=True)
            rows = {name: NETWORKS[name][1]}
            if name in CHAINS:
                rows[name + UNEVEN] = "the same function: its channels are multiplied by 1/16 to 16, and divided again"
            for row_name, what in rows.items():
                if row_name != name:
                    make_uneven(fused)
                found = measured(fused, training[0][:CALIBRATION_IMAGES], test, given.largest_drop)
                print(f"{row_name}: {found['int8']}", flush=True)
                facts = {"versions": onnx_versions(), "machine": machine_facts()}
                _write({"network": row_name, "what": what, **found}, facts)
    return result[0]


def _write(row: dict[str, Any], facts: dict[str, Any]) -> None:
    """Put a network's row in the place of what was measured of it before."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["int8"] if MEASURED.is_file() else []
    by_name = {each["network"]: each for each in [*rows, row]}
    order = [row_name for name in NETWORKS for row_name in (name, name + UNEVEN)]
    rows = [by_name[name] for name in order if name in by_name]
    text = json.dumps({"int8": rows, **facts}, indent=1) + "\n"
    atomic_write(MEASURED, lambda path: path.write_text(text, encoding="utf-8"))


def measured(
    fused: nn.Layer, calibration: np.ndarray, test: tuple[np.ndarray, np.ndarray], largest_drop: float
) -> dict[str, Any]:
    """Return what a trained network, fused, gives up in int8, naively and by this library."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_inference(fused, folder, SPEC)
        source = export_onnx(folder)
        measure = drop_on(source, [test], largest_drop)
        _quantize_naively(source, folder / "naive.onnx", calibration)
        naive, found = None, []
        with contextlib.suppress(ReparamError):  # where onnxruntime cannot load what its quantiser wrote
            naive = measure(folder / "naive.onnx").to_dict()

        def drop(file: Path) -> float:
            found.append(measure(file))
            return found[-1].drop

        settings = quantize_onnx(source, folder / "int8.onnx", calibration, drop=drop, largest_drop=largest_drop)
        sizes = [file.stat().st_size for file in (source, folder / "int8.onnx")]
    return {
        "naive": naive,
        "all_int8": found[0].to_dict(),
        "int8": found[-1].to_dict(),
        "settings": settings,
        "bytes": sizes,
    }


@paddle.no_grad()
def make_uneven(fused: nn.Layer) -> None:
    """Multiply each channel between two convolutions of a chain by a power of two, and divide by it in the next one.

    With ReLU between them the function stays the same to the bit. Channels that differ so much are what makes networks
    that were trained for long collapse in int8 (Nagel et al., "Data-Free Quantization", 2019).
    """
    draw = np.random.default_rng(0)
    convs = [layer for layer in fused.sublayers() if isinstance(layer, nn.Conv2D)]
    for conv, following in zip(convs, convs[1:]):
        factor = 2.0 ** draw.integers(-4, 5, conv._out_channels)
        outputs = paddle.to_tensor(factor.astype("float32"))
        conv.weight.set_value(conv.weight * outputs.reshape([-1, 1, 1, 1]))
        conv.bias.set_value(conv.bias * outputs)
        # What an output of the next one reads: one channel in a depthwise convolution, else all of them.
        axis = [-1, 1, 1, 1] if following._groups > 1 else [1, -1, 1, 1]
        following.weight.set_value(following.weight / outputs.reshape(axis))


def _quantize_naively(source: Path, target: Path, images: np.ndarray) -> None:
    """Quantise as onnxruntime does unless told: one scale for each tensor, weights included, from largest numbers."""
    tool = need("onnxruntime.quantization")
    [name] = [value.name for value in need("onnx").load(str(source)).graph.input]

    class Reader(tool.CalibrationDataReader):
        batches = iter([{name: images[i : i + 16]} for i in range(0, len(images), 16)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    prepared = target.with_name("prepared.onnx")
    tool.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    tool.quantize_static(str(prepared), str(target), Reader())


def to_markdown(file: dict[str, Any]) -> str:
    """Return what was measured as a table for a page."""

    def change(agreement: dict[str, Any] | None) -> str:
        if agreement is None:
            return "cannot be loaded"
        points = 100 * (agreement["accuracy"] - agreement["reference_accuracy"])
        return f"{points:+.2f} ({agreement['agreement']:.1%})"

    rows = []
    for row in file["int8"]:
        kept, others = (len(row["settings"][key]) for key in ("float32", "int8"))
        rows.append(
            [
                row["network"], f"{row['int8']['reference_accuracy']:.2%}", change(row["naive"]),
                change(row["all_int8"]), change(row["int8"]), f"{kept} of {kept + others}",
                len(row["settings"]["equalized"]), f"{row['bytes'][1] / row['bytes'][0]:.2f}",
            ]
        )  # fmt: skip
    header = [
        "network", "float32, top-1", "naive int8, points", "all layers int8", "shipped int8", "layers in float32",
        "maps equalised", "size",
    ]  # fmt: skip
    images = file["int8"][0]["int8"]["images"]
    versions = ", ".join(f"{package} {version}" for package, version in file["versions"].items())
    return f"{format_markdown(header, rows)}\n\n{images} test images of CIFAR-10; {versions}."


# ---------------------------------------------------------------------------------------------------------------------
# The networks


class _ConvBN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2D(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias_attr=False)
        super().__init__(conv, nn.BatchNorm2D(outputs))


class _Branches(nn.Layer):
    """MobileOne's layer: several convolutions, a 1x1 one and a BN alone, added; `rep` makes one convolution of them."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, count: int = 2
    ) -> None:
        super().__init__()
        self.geometry = {"kernel_size": kernel, "stride": stride, "padding": kernel // 2, "groups": groups}
        self.convs = nn.LayerList(_ConvBN(inputs, outputs, kernel, stride, groups) for _ in range(2))
        self.scale = _ConvBN(inputs, outputs, 1, stride, groups) if kernel > 1 else None
        self.skip = nn.BatchNorm2D(inputs) if inputs == outputs and stride == 1 else None
        self.fused: nn.Conv2D | None = None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.fused is not None:
            return F.relu(self.fused(x))
        branches = [*self.convs, *(branch for branch in (self.scale, self.skip) if branch is not None)]
        return F.relu(sum(branch(x) for branch in branches))

    @paddle.no_grad()
    def rep(self) -> None:
        """Make one convolution of the branches, in place."""
        size, groups = self.geometry["kernel_size"], self.geometry["groups"]
        first = self.convs[0][0]
        inputs, outputs = first._in_channels, first._out_channels
        fused = nn.Conv2D(inputs, outputs, **self.geometry)
        kernel = np.zeros(fused.weight.shape)
        bias = np.zeros(outputs)
        for branch in [*self.convs, *(branch for branch in (self.scale, self.skip) if branch is not None)]:
            conv, norm = (None, branch) if isinstance(branch, nn.BatchNorm2D) else branch
            gamma, beta, mean, variance = (
                tensor.numpy().astype(np.float64) for tensor in (norm.weight, norm.bias, norm._mean, norm._variance)
            )
            factor = gamma / np.sqrt(variance + norm._epsilon)
            bias += beta - mean * factor
            if conv is None:
                own = np.zeros([outputs, inputs // groups, 1, 1])
                own[np.arange(outputs), np.arange(outputs) % (inputs // groups)] = 1
            else:
                own = conv.weight.numpy().astype(np.float64)
            rim = (size - own.shape[2]) // 2
            kernel[:, :, rim : size - rim, rim : size - rim] += own * factor.reshape(-1, 1, 1, 1)
        fused.weight.set_value(kernel.astype("float32"))
        fused.bias.set_value(bias.astype("float32"))
        self.fused = fused


class _Residual(nn.Layer):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _ConvBN(inputs, outputs, 3, stride)
        self.second = _ConvBN(outputs, outputs, 3)
        self.shortcut = _ConvBN(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def _head(channels: int) -> list[nn.Layer]:
    return [nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def _mobileone() -> nn.Layer:
    widths = [(32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 160, 2)]
    layers: list[nn.Layer] = [_Branches(3, 32, 3, 2)]
    for inputs, outputs, stride in widths:
        layers += [_Branches(inputs, inputs, 3, stride, inputs), _Branches(inputs, outputs, 1)]
    return nn.Sequential(*layers, *_head(160))


def _repvgg() -> nn.Layer:
    setup()
    from ppcls.arch.backbone.model_zoo.repvgg import RepVGG

    return RepVGG(num_blocks=[2, 4, 14, 1], width_multiplier=[0.1875, 0.1875, 0.1875, 0.625], class_num=CLASSES)


def _resnet(layer: str, **options: object) -> Callable[[], nn.Layer]:
    def build() -> nn.Layer:
        blocks = [_Residual(24, 24, 1), _Residual(24, 48, 2), _Residual(48, 96, 2)]
        net = nn.Sequential(_ConvBN(3, 24, 3, 2), nn.ReLU(), *blocks, *_head(96))
        replace(net, layer, where=lambda path, conv: conv._in_channels > 3 and conv._kernel_size[0] > 1, **options)
        return net

    return build


#: Name -> what builds it, and what it is.
NETWORKS: dict[str, tuple[Callable[[], nn.Layer], str]] = {
    "RepVGG_A0, a quarter as wide": (_repvgg, "PaddleClas' RepVGG_A0 with a quarter of the channels"),
    "MobileOne-like": (_mobileone, "11 layers of branches, depthwise and 1x1 in turns, 32 to 160 channels"),
    "ResNet of RefConv": (_resnet("RefConv2D"), "three residual blocks of 24, 48 and 96 channels"),
    "ResNet of SPConv": (_resnet("SPConv2D"), "the same of SPConv"),
    "ResNet of DCD": (_resnet("DCDConv2D"), "the same of DCD"),
    "RepMLPNet_micro": (lambda: create_model("RepMLPNet_micro", class_num=CLASSES), "this library's own"),
    "SLaK_micro": (lambda: create_model("SLaK_micro", class_num=CLASSES), "this library's own"),
}


#: Those that are a chain of convolutions and ReLUs, and what is added to their names where their channels are uneven.
CHAINS, UNEVEN = ("RepVGG_A0, a quarter as wide", "MobileOne-like"), ", uneven channels"


def read_images(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return so many images of each class under a folder, `[N, 3, 32, 32]` normalised, in turns, and their labels."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) != CLASSES:
        raise MissingFile(f"{folder}: it has no {CLASSES} folders of images, one a class")
    files = [sorted(path.glob("*.jpg"))[:count] for path in classes]
    pixels = np.stack([read_rgb(file) for row in zip(*files) for file in row])
    labels = np.tile(np.arange(CLASSES), len(pixels) // CLASSES)
    return ((pixels.transpose(0, 3, 1, 2) - MEAN) / SCALE).astype("float32"), labels


def train(name: str, images: np.ndarray, labels: np.ndarray, epochs: int, cache: Path) -> nn.Layer:
    """Return a network trained on images, in eval mode; it is trained once for a cache."""
    paddle.seed(0)
    net = NETWORKS[name][0]()
    file = cache / f"{name.replace(' ', '_').replace(',', '')}.pdparams"
    if file.is_file():
        load_into(net, file)
        net.eval()
        return net
    batch = 64
    steps = epochs * (len(images) // batch)
    rate = paddle.optimizer.lr.CosineAnnealingDecay(3e-3, steps)
    optimizer = paddle.optimizer.AdamW(rate, parameters=net.parameters(), weight_decay=0.02)
    draw = np.random.default_rng(0)
    for epoch in range(epochs):
        order = draw.permutation(len(images))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            x = images[chosen]
            if draw.integers(2):
                x = x[..., ::-1]
            x = np.roll(x, draw.integers(-3, 4, 2), (2, 3))
            scores = net(paddle.to_tensor(np.ascontiguousarray(x)))
            loss = F.cross_entropy(scores, paddle.to_tensor(labels[chosen]))
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            rate.step()
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {float(loss):.2f}", flush=True)
    net.eval()
    save(net.state_dict(), file)
    return net


if __name__ == "__main__":
    sys.exit(main())

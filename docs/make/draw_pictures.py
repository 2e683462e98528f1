"""Draw one picture for each paper, what is trained and what ships, into docs/images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.arithmetic import kernels
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.layers.refconv import refocused
from paddle_reparam.style import BLUE, GREEN, GREY, ORANGE, digest_of, save_with_digest

import paddle  # isort: skip - paddle_reparam quiets it

FOLDER = Path(__file__).resolve().parents[1] / "images"
#: One colour for what is trained and goes, what is frozen or ships, and what depends on the input.
TRAINED, SHIPPED, DYNAMIC = ORANGE, BLUE, GREEN


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all pictures, or those of the papers given, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"{', '.join(PICTURES)}; none: all of them")
    given = parser.parse_args(arguments)
    unknown = [paper for paper in given.papers if paper not in PICTURES]
    if unknown:
        parser.error(f"there is no picture {unknown[0]!r}; there are {', '.join(PICTURES)}")
    with exit_code() as result:
        for paper in given.papers or PICTURES:
            atomic_write(FOLDER / f"{paper}.png", lambda path, paper=paper: PICTURES[paper]().save(path))
    return result[0]


class Canvas:
    """A figure of 110 x `height` tenths of an inch, with what the pictures are made of; places are left and bottom."""

    def __init__(self, height: float, title: str) -> None:
        self.figure = Figure(figsize=(11, height / 10), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 110), ylim=(0, height))
        self.axes.set_axis_off()
        self.drawn: list[Any] = [height]
        self.text(1.5, height - 2.2, title, size=14, weight="bold", align="left")

    def digest(self) -> str:
        """Return a hash of everything that was drawn, with numbers to three digits."""
        return digest_of(self.drawn)

    def save(self, path: Path) -> None:
        """Write the picture, with the digest of what is on it."""
        save_with_digest(self.figure, path, self.digest())

    def text(self, x: float, y: float, text: str, size: float = 9, color: str = "#222222", align: str = "center",
             weight: str = "normal") -> None:  # fmt: skip
        """Write text with its middle at (x, y), or its left edge at x."""
        self.drawn.append([text, x, y, size, color, align, weight])
        self.axes.text(x, y, text, fontsize=size, color=color, ha=align, va="center", weight=weight, linespacing=1.35)

    def panel(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """Draw a light area with a heading in its upper left corner."""
        self.drawn.append([x, y, width, height])
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1.2", fc="#f7f7f5", ec="none", zorder=0)
        )
        self.text(x + 1.5, y + height - 2, title, size=10.5, weight="bold", align="left")

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 9) -> None:
        """Draw an operation."""
        self.drawn.append([x, y, width, height, color])
        shape = "round,pad=0,rounding_size=0.7"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, shape, fc="white", ec=color, lw=1.8, zorder=2))
        self.text(x + width / 2, y + height / 2, text, size=size)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = GREY, bend: float = 0.0) -> None:
        """Draw an arrow; `bend` curves it to a side."""
        self.drawn.append([start, end, color, bend])
        self.axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=color, lw=1.3, zorder=1,
                            shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}")
        )  # fmt: skip

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draw a filled rectangle."""
        self.drawn.append([x, y, width, height, color])
        self.axes.add_patch(Rectangle((x, y), width, height, fc=color, ec="none"))

    def sign(self, x: float, y: float, text: str, size: float = 15) -> None:
        """Write an operator between two things."""
        self.text(x, y, text, size=size, color="#444444")

    def kernel(self, x: float, y: float, width: float, height: float, values: np.ndarray, color: str, label: str = "",
               largest: float | None = None, size: float = 8.5) -> None:  # fmt: skip
        """Draw a matrix, negative values orange and positive ones purple, zeros white, with a label below."""
        largest = largest or float(np.abs(values).max())
        self.drawn.append([x, y, width, height, np.round(values / largest, 3).tolist(), color])
        self.axes.imshow(
            values, extent=(x, x + width, y, y + height), cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto",
            interpolation="nearest", zorder=2,
        )  # fmt: skip
        self.axes.add_patch(Rectangle((x, y), width, height, fc="none", ec=color, lw=1.4, zorder=3))
        if label:
            self.text(x + width / 2, y - 1.3 - 0.75 * label.count("\n"), label, size=size)


# ---------------------------------------------------------------------------------------------------------------------
# RefConv


def draw_refconv() -> Canvas:
    """Base kernels, their transform and the sum, for eight channels of a depthwise 3x3 convolution."""
    channels, map_k = 8, 3
    random = np.random.default_rng(2)
    base = _like_trained(random, channels)
    refocus = random.normal(size=(channels, channels, map_k, map_k)) * 0.11
    total = refocused(*(paddle.to_tensor(array) for array in (base, refocus))).numpy()
    largest = float(np.abs(total).max())

    canvas = Canvas(46, "RefConv: a trained kernel, refocused by a convolution over kernels")
    canvas.panel(1.5, 2, 73, 38, "trained")
    canvas.panel(77, 2, 31.5, 38, "ships")
    for y, planes, color, label in (
        (26, base, SHIPPED, "base weight Wb\n[8, 1, 3, 3], frozen"),
        (7.5, total, TRAINED, "Wt = Wb + T(Wb; Wr)\n[8, 1, 3, 3]"),
    ):
        _planes(canvas, 4, y, planes[:, 0], color, label, largest)
    canvas.box(41, 24.5, 31, 9, "T: convolution over the 8 kernels,\nseen as 8 channels of a 3x3 image;\n"
               "trained Wr [8, 8, 3, 3]", TRAINED, size=8.5)  # fmt: skip
    canvas.arrow((29.5, 29), (41, 29))
    canvas.text(35.2, 30.6, "as an image", size=8, color=GREY)
    canvas.arrow((56, 24.5), (29.8, 12.5), color=TRAINED, bend=-0.25)
    canvas.text(58.5, 17.6, "T(Wb; Wr)", size=8.5, color=TRAINED)
    canvas.arrow((16.5, 21.2), (16.5, 15.4), color=SHIPPED)
    canvas.sign(18.6, 18.3, "+", 13)
    canvas.box(50, 5.2, 15, 6, "depthwise 3x3\nwith Wt", TRAINED)
    canvas.arrow((29.8, 8.6), (50, 8.2))
    canvas.arrow((44, 4), (50, 6.5))
    canvas.text(42.8, 4, "x")
    canvas.arrow((65, 8.2), (70, 8.2))
    canvas.text(71.3, 8.2, "y")

    _planes(canvas, 80.2, 26, total[:, 0], SHIPPED, "Wt, computed once\n[8, 1, 3, 3]", largest)
    canvas.arrow((92.7, 21.2), (92.7, 14.2))
    canvas.box(85.2, 8.2, 15, 6, "depthwise 3x3\nwith Wt", SHIPPED)
    canvas.arrow((80.6, 11.2), (85.2, 11.2))
    canvas.text(79.4, 11.2, "x")
    canvas.arrow((100.2, 11.2), (104.8, 11.2))
    canvas.text(106, 11.2, "y")
    canvas.text(92.7, 5, "the same convolution, of the same size, as before", size=8, color=GREY)
    return canvas


def _planes(canvas: Canvas, x: float, y: float, planes: np.ndarray, color: str, label: str, largest: float) -> None:
    """Draw eight kernels in two rows of four, 25 wide, with a label below."""
    for number, plane in enumerate(planes):
        canvas.kernel(x + number % 4 * 6.4, y + (1 - number // 4) * 4.3, 5.6, 3.8, plane, color, largest=largest)
    canvas.text(x + 12.4, y - 2.2, label, size=8.5)


def _like_trained(random: np.random.Generator, channels: int) -> np.ndarray:
    """Return 3x3 kernels that look like trained ones, `[channels, 1, 3, 3]`: smooth in some direction."""
    v = np.array([-1.0, 0.0, 1.0])
    angles = np.linspace(0, np.pi, channels, endpoint=False)
    slopes = [np.cos(a) * v[None, :] + np.sin(a) * v[:, None] for a in angles]
    blob = np.exp(-(v[:, None] ** 2 + v[None, :] ** 2))
    kernels_ = [s * blob if i % 2 else blob - 0.4 * np.abs(s) for i, s in enumerate(slopes)]
    return np.stack(kernels_)[:, None] + 0.08 * random.normal(size=(channels, 1, 3, 3))


# ---------------------------------------------------------------------------------------------------------------------
# SPConv


def draw_spconv() -> Canvas:
    """The split, both paths and the gate; what ships; and which weights there are, against a plain 3x3."""
    channels, kept = 16, 8
    canvas = Canvas(59, "SPConv: full attention for some channels, little for the rest")
    canvas.panel(1.5, 23.5, 107, 29.5, "trained")
    canvas.panel(1.5, 1.5, 53, 20.5, "ships")
    canvas.panel(56, 1.5, 52.5, 20.5, "weights, from each of 16 channels to each")

    _stack(canvas, 4, 29, channels, kept)
    canvas.text(7, 47.2, "x: 16 channels", size=8.5)
    for y, text in ((41.2, "gwc: 3x3, 2 groups"), (34.8, "pwc: 1x1"), (27.5, "conv1x1: 1x1")):
        canvas.box(24, y, 19, 4.2, text, TRAINED)
    canvas.arrow((11, 42), (24, 43.3))
    canvas.arrow((11, 40), (24, 36.9))
    canvas.arrow((11, 32), (24, 29.6))
    canvas.text(17.2, 45, "representative", size=8, color=SHIPPED)
    canvas.text(17, 28.3, "uncertain", size=8, color=GREY)
    canvas.sign(46.3, 40.2, "+")
    canvas.arrow((43, 43.3), (45.2, 41.2))
    canvas.arrow((43, 36.9), (45.2, 39.4))
    canvas.arrow((47.6, 40.2), (51, 40.2))
    canvas.box(51, 38.2, 7, 4, "BN1", TRAINED)
    canvas.box(51, 27.6, 7, 4, "BN2", TRAINED)
    canvas.arrow((43, 29.6), (51, 29.6))
    canvas.text(61.5, 41.6, "u3", size=9)
    canvas.text(61.5, 31, "u1", size=9)
    canvas.box(66, 32.6, 17.5, 5, "gate g, by channel:\nsigmoid(GAP u3 - GAP u1)", DYNAMIC, size=8)
    canvas.arrow((58, 40.2), (87, 40.2))
    canvas.arrow((58, 29.6), (87, 29.6))
    canvas.arrow((64, 40.2), (67, 37.6))
    canvas.arrow((64, 29.6), (67, 32.6))
    canvas.arrow((83.5, 35.1), (87, 35.1), color=DYNAMIC)
    canvas.box(87, 27.6, 13.5, 14.6, "g u3\n+ (1 - g) u1", DYNAMIC)
    canvas.arrow((100.5, 35.1), (104.4, 35.1))
    canvas.text(105.8, 35.1, "y")

    for y, text in ((14, "3x3, 2 groups"), (8.8, "1x1"), (3.6, "1x1")):
        canvas.box(8, y, 15, 3.8, text, SHIPPED, size=8.5)
        canvas.arrow((5, 10.7), (8, y + 1.9))
        canvas.arrow((23, y + 1.9), (28, 10.7 + (y - 8.8) * 0.2))
    canvas.text(3.8, 10.7, "x")
    canvas.box(28, 8, 14, 5.4, "g u3\n+ (1 - g) u1", DYNAMIC, size=8.5)
    canvas.arrow((42, 10.7), (45.5, 10.7))
    canvas.text(46.8, 10.7, "y")
    canvas.text(39, 4.6, "BN1, BN2 and the network's\nBN are folded in", size=8, color=GREY)

    plain = np.full((channels, channels), 9.0)
    split = np.ones((channels, channels))
    split[:, :kept] += np.count_nonzero(kernels.ungroup(np.ones((channels, kept // 2, 3, 3)), 2), axis=(2, 3))
    for x, taps, label in ((61, plain, "plain 3x3: 9"), (84, split, "SPConv: 10 or 1")):
        canvas.kernel(x, 5.4, 12.5, 12.5, taps, GREY, largest=10.0)
        canvas.text(x + 6.2, 3.5, f"{label}; {int(taps.sum())} in all", size=8)
    return canvas


def _stack(canvas: Canvas, x: float, y: float, channels: int, kept: int) -> None:
    """Draw channels as bars, the first of them above in another colour."""
    for number in range(channels):
        color = SHIPPED if number < kept else "#bbbbbb"
        canvas.bar(x, y + (channels - 1 - number) * 1.05, 6.5, 0.85, color)


# ---------------------------------------------------------------------------------------------------------------------
# SLaK and RepLKNet


def draw_slak() -> Canvas:
    """The three kernels of SLaK and their sum, and the two of RepLKNet, in their real sizes."""
    random = np.random.default_rng(0)
    tall, wide, small = (_large_kernel(random, *size) for size in ((51, 5), (5, 51), (5, 5)))
    two = kernels.sum_kernels([tall, small])
    cross = kernels.sum_kernels([two, wide])
    unit, largest = 0.34, 1.0

    canvas = Canvas(57, "SLaK and RepLKNet: large kernels from parallel branches")
    canvas.panel(1.5, 24, 50, 27.5, "SLaK, trained: three, with 40% zeros")
    canvas.panel(53.5, 24, 55, 27.5, "ships: two, whose sum is a cross in 51x51")
    canvas.panel(1.5, 1.5, 50, 21, "RepLKNet, trained: two")
    canvas.panel(53.5, 1.5, 55, 21, "ships: one")

    def place(x: float, middle: float, kernel: np.ndarray, color: str, label: str) -> float:
        """Draw a kernel in its size, the middle at a height, and return its right edge."""
        height, width = kernel.shape[2] * unit, kernel.shape[3] * unit
        canvas.kernel(x, middle - height / 2, width, height, kernel[0, 0], color, label, largest, size=8)
        return x + width

    middle = 38
    x = place(5.5, middle, tall, TRAINED, "51x5")
    canvas.sign(x + 3, middle, "+")
    x = place(x + 6, middle, wide, TRAINED, "5x51")
    canvas.sign(x + 3, middle, "+")
    x = place(x + 6, middle, small, TRAINED, "5x5")
    canvas.text(27.5, 29.3, "each depthwise, with a BN of its own", size=8, color=GREY)
    x = place(57.5, middle, two, SHIPPED, "51x5 + 5x5")
    canvas.sign(x + 3, middle, "+")
    x = place(x + 6, middle, wide, SHIPPED, "5x51")
    canvas.sign(x + 3, middle, "=", 13)
    places = kernels.sum_kernels([np.ones((1, 1, 51, 5)), np.ones((1, 1, 5, 51))])
    place(x + 6, middle, cross, GREY, f"{np.count_nonzero(places)} of {places.size} places")

    large, small = _large_kernel(random, 31, 31, 0.0), _large_kernel(random, 5, 5, 0.0)
    middle = 11.5
    x = place(9, middle, large, TRAINED, "31x31")
    canvas.sign(x + 4, middle, "+")
    place(x + 8, middle, small, TRAINED, "5x5")
    canvas.text(40, middle, "no zeros, nothing\nis decomposed", size=8, color=GREY)
    place(66, middle, kernels.sum_kernels([large, small]), SHIPPED, "31x31 + 5x5")
    canvas.text(91, middle, "in both, the BNs are\nfolded into the kernels", size=8, color=GREY)
    return canvas


def _large_kernel(random: np.random.Generator, height: int, width: int, zeros: float = 0.4) -> np.ndarray:
    """Return a kernel `[1, 1, height, width]` that is stronger in the middle, with a share of zeros."""
    rows, columns = (np.arange(size) - size // 2 for size in (height, width))
    strength = np.exp(-np.hypot(rows[:, None], columns[None, :]) / 18)
    kernel = strength * random.uniform(0.3, 1.0, (height, width)) * random.choice([-1, 1], (height, width))
    return (kernel * (random.random((height, width)) >= zeros))[None, None]


# ---------------------------------------------------------------------------------------------------------------------
# DCD


def draw_dcd() -> Canvas:
    """The decomposition for two images, in real sizes: 64 channels, 8 latent ones."""
    random = np.random.default_rng(1)
    channels, latent = 64, 8
    static = random.normal(size=(channels, channels))
    p, q = random.normal(size=(channels, latent)), random.normal(size=(channels, latent))
    canvas = Canvas(65, "DCD: one static kernel, and a small dynamic matrix between two thin ones")
    canvas.panel(1.5, 18, 107, 41, "the kernel for an image x:  W(x) = \u039b(x) W0 + P \u03a6(x) Q\u1d40")
    for y, name in ((36.5, "one image"), (20.5, "another image")):
        scale = 1 + 0.6 * random.uniform(-1, 1, channels)
        dynamic = random.normal(size=(latent, latent))
        kernel = scale[:, None] * static + p @ dynamic @ q.T / latent**0.5
        canvas.text(8, y + 7, name, size=9)
        canvas.kernel(15, y, 3, 14, scale[:, None] - 1, DYNAMIC)
        canvas.kernel(20, y, 14, 14, static, SHIPPED, largest=3.0)
        canvas.sign(37, y + 7, "+")
        canvas.kernel(40, y, 3, 14, p, SHIPPED)
        canvas.kernel(45.5, y + 5, 4.2, 4.2, dynamic, DYNAMIC)
        canvas.kernel(52, y + 5.5, 14, 3, q.T, SHIPPED)
        canvas.sign(69.5, y + 7, "=")
        canvas.kernel(73, y, 14, 14, kernel, DYNAMIC, largest=8.0)
    for x, label in ((16.5, "\u039b(x)\n64"), (27, "W0: 64 x 64"), (41.5, "P\n64 x 8"), (47.6, "\u03a6(x)\n8 x 8"),
                     (59, "Q\u1d40: 8 x 64"), (80, "W(x): 64 x 64")):  # fmt: skip
        canvas.text(x, 52.2, label, size=8.5)
    canvas.text(98, 43.5, "green:\ndepends on\nthe image", size=9, color=DYNAMIC)
    canvas.text(98, 27.5, "blue: the same\nfor all images,\ntrained", size=9, color=SHIPPED)

    canvas.panel(1.5, 1.5, 107, 15, "ships, for a 1x1: BNs folded; W(x) itself is formed only where that is less work")
    canvas.box(10, 4, 20, 6, "1x1 with W0 and Q\u1d40\n64 -> 64 + 8", SHIPPED, size=8.5)
    canvas.box(46, 8, 12, 4, "times \u039b(x)", DYNAMIC, size=8.5)
    canvas.box(38, 2.6, 10, 4, "\u03a6(x)", DYNAMIC, size=8.5)
    canvas.box(55, 2.6, 12, 4, "P: 8 -> 64", SHIPPED, size=8.5)
    canvas.text(5, 7, "x")
    canvas.arrow((6.2, 7), (10, 7))
    canvas.arrow((30, 8.4), (46, 10))
    canvas.arrow((30, 5.6), (38, 4.6))
    canvas.arrow((48, 4.6), (55, 4.6))
    canvas.sign(72.5, 7.2, "+")
    canvas.arrow((58, 10), (71, 7.8))
    canvas.arrow((67, 4.6), (71, 6.6))
    canvas.arrow((74, 7.2), (78, 7.2))
    canvas.text(79.3, 7.2, "y")
    canvas.text(95, 7, "\u039b and \u03a6: averages of x,\ntwo small layers", size=8.5, color=DYNAMIC)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# RepMLP


def draw_repmlp() -> Canvas:
    """FC3, a convolution as a fully connected layer, and their sum, for one channel of a 7x7 partition."""
    random = np.random.default_rng(3)
    side, k = 7, 3
    fc3 = random.normal(size=(side * side, side * side)) * 0.16
    kernel = np.array([[0.5, 0.7, 0.4], [-0.6, 1.0, 0.6], [-0.4, -0.7, 0.5]])[None, None]
    matrix = kernels.conv_as_linear(kernel, side, side)
    total = fc3 + matrix
    unit = total[side * side // 2].reshape(side, side)

    canvas = Canvas(54, "RepMLP: convolutions beside a fully connected layer, merged into it")
    canvas.panel(1.5, 1.5, 70, 46.5, "trained, for one channel and a partition of 7x7 pixels")
    canvas.panel(73.5, 1.5, 35, 46.5, "ships")
    canvas.kernel(7, 26, 15, 15, fc3, TRAINED, "FC3: 49 x 49,\nfrom each pixel to each", 1.0)
    canvas.sign(26.8, 33.5, "+")
    canvas.kernel(31.5, 26, 15, 15, matrix, TRAINED, "the convolution\nas 49 x 49", 1.0)
    canvas.sign(51, 33.5, "=")
    canvas.kernel(54.5, 26, 15, 15, total, SHIPPED, "fused: 49 x 49", 1.0)
    canvas.kernel(35.2, 9, 7.6, 7.6, kernel[0, 0], TRAINED, "3x3 + BN", 1.0)
    canvas.arrow((39, 17), (39, 22.3), color=TRAINED)
    canvas.text(41, 19.2, "each row holds the kernel,\nwhere it lies for one pixel", size=8, color=GREY, align="left")
    canvas.text(14.5, 12.5, "FC3 sees all pixels and\nknows no neighbours;\nthe convolution brings them", size=8.5,
                color=GREY)  # fmt: skip
    canvas.text(60, 9, f"{k * k} weights of the kernel\nbecome {np.count_nonzero(matrix)} of {matrix.size}", size=8.5,
                color=GREY)  # fmt: skip

    canvas.kernel(
        83.5, 28.5, 15, 12, unit, SHIPPED, "what the middle pixel reads:\nrow 25 of the fused layer, as 7x7", 1.0
    )
    canvas.box(81, 15.2, 20, 6, "one fully connected layer\nper partition", SHIPPED)
    canvas.text(78, 18.2, "x")
    canvas.arrow((79, 18.2), (81, 18.2))
    canvas.arrow((101, 18.2), (103.6, 18.2))
    canvas.text(104.8, 18.2, "y")
    canvas.text(91, 7.5, "the Global Perceptron stays:\nRepMLP adds it to each partition,\nRepMLPNet multiplies by it",
                size=8.5, color=GREY)  # fmt: skip
    return canvas


PICTURES: dict[str, Callable[[], Canvas]] = {
    "dcd": draw_dcd,
    "refconv": draw_refconv,
    "repmlp": draw_repmlp,
    "slak": draw_slak,
    "spconv": draw_spconv,
}


if __name__ == "__main__":
    sys.exit(main())

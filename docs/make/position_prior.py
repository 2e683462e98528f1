"""Does RepMLP gain where positions mean something, and only there? Digits in the middle, and digits shifted at random.

A small network is trained on each, once with convolutions and once with RepMLP in the place of two of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.report import format_markdown
from paddle_reparam.surgery.rewrite import replace

# isort: split
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

IMAGES = ("aligned", "shifted")
NETWORKS = ("convolutions", "RepMLP")
#: Of the 1797 digits so few are trained on, as with all of them hardly one is wrong in the end.
_TRAINED_ON, _BATCH, _SIDE, _DIGIT = 400, 40, 16, 8


class _Plain(nn.Layer):
    """Two convolutions of stride 2, two that keep the map of 4x4, the average and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*_conv_bn_relu(1, 16, 2), *_conv_bn_relu(16, 32, 2))
        self.keep = nn.Sequential(*_conv_bn_relu(32, 32, 1), *_conv_bn_relu(32, 32, 1))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear(self.keep(self.reduce(x)).mean([2, 3]))


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> list[nn.Layer]:
    conv = nn.Conv2D(in_channels, out_channels, 3, stride, 1, bias_attr=False)
    return [conv, nn.BatchNorm2D(out_channels), nn.ReLU()]


def _build(network: str) -> nn.Layer:
    model = _Plain()
    if network == "RepMLP":
        side = _SIDE // 4
        replace(model, "RepMLP", where="keep.*", height=side, width=side, partition=[side, side], fc3_groups=4)
    return model


def _placed(digits: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return digits `[N, 8, 8]` on a field of 16x16, each so many pixels from the top and from the left."""
    field = np.zeros((len(digits), 1, _SIDE, _SIDE), np.float32)
    for image, digit, (top, left) in zip(field, digits, shifts):
        image[0, top : top + _DIGIT, left : left + _DIGIT] = digit
    return field


def _accuracy(images: str, network: str, seed: int, epochs: int) -> tuple[float, int]:
    """Train one network; return the share of right answers on the digits left, and its number of parameters."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(data.target))
    digits, labels = (data.images[order] / 16).astype(np.float32), data.target[order]
    last = _SIDE - _DIGIT

    def shifts(count: int) -> np.ndarray:
        if images == "aligned":
            return np.full((count, 2), last // 2)
        return generator.integers(0, last + 1, (count, 2))

    tested = _placed(digits[_TRAINED_ON:], shifts(len(digits) - _TRAINED_ON))
    paddle.seed(seed)
    model = _build(network)
    steps = epochs * _TRAINED_ON // _BATCH
    rate = paddle.optimizer.lr.CosineAnnealingDecay(0.003, steps)
    optimizer = paddle.optimizer.AdamW(rate, parameters=model.parameters(), weight_decay=0.01)
    for _ in range(epochs):
        mixed = generator.permutation(_TRAINED_ON)
        pixels = _placed(digits[mixed], shifts(_TRAINED_ON))
        for start in range(0, _TRAINED_ON, _BATCH):
            here = slice(start, start + _BATCH)
            loss = F.cross_entropy(model(paddle.to_tensor(pixels[here])), paddle.to_tensor(labels[mixed[here]]))
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            rate.step()
    model.eval()
    with paddle.no_grad():
        answers = model(paddle.to_tensor(tested)).numpy().argmax(1)
    parameters = sum(math.prod(p.shape) for p in model.parameters() if not p.stop_gradient)
    return float((answers == labels[_TRAINED_ON:]).mean()), parameters


def measure(seeds: int, epochs: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Return what each network reaches on each kind of images, by seed; both see the same images in the same order."""
    accuracies: dict[str, dict[str, list[float]]] = {each: {network: [] for network in NETWORKS} for each in IMAGES}
    parameters = {}
    for images in IMAGES:
        for network in NETWORKS:
            for seed in range(seeds):
                began = time.perf_counter()
                share, parameters[network] = _accuracy(images, network, seed, epochs)
                accuracies[images][network].append(share)
                told(f"{images}, {network}, seed {seed}: {share:.2%} ({time.perf_counter() - began:.0f} s)")
    return {
        "command": f"python docs/make/position_prior.py --seeds {seeds} --epochs {epochs}",
        "epochs": epochs,
        "position_prior": accuracies,
        "parameters": parameters,
    }


def to_markdown(measured: Mapping[str, Any]) -> str:
    """Return what was measured as a table for a page, and what RepMLP gains, seed by seed."""
    rows, gains = [], {}
    for images, of_each in measured["position_prior"].items():
        for network, shares in of_each.items():
            each = ", ".join(f"{100 * share:.2f}" for share in shares)
            rows.append([images, network, f"{measured['parameters'][network]:,}", f"{100 * np.mean(shares):.2f}", each])
        plain, rich = (np.array(of_each[network]) for network in NETWORKS)
        gains[images] = 100 * (rich - plain)
    table = format_markdown(["digits", "network", "parameters", "accuracy, %: mean", "by seed"], rows)
    said = "; ".join(
        f"{images} {gain.mean():+.2f} points, by seed {', '.join(f'{each:+.2f}' for each in gain)}"
        for images, gain in gains.items()
    )
    return f"`{measured['command']}`\n\n{table}\n\nWhat RepMLP gains: {said}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how often each network is trained (3)")
    parser.add_argument("--epochs", type=int, default=60, help="over the digits that are trained on (60)")
    default = Path(__file__).resolve().parents[1] / "measured" / "position_prior.json"
    parser.add_argument("--output", type=Path, default=default, help="the file to write")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.epochs < 1:
        parser.error("--seeds and --epochs are 1 or more")
    with exit_code() as result:
        text = json.dumps(measure(given.seeds, given.epochs, print), indent=2, sort_keys=True) + "\n"
        atomic_write(given.output, lambda path: path.write_text(text, encoding="utf-8"))
    return result[0]


if __name__ == "__main__":
    sys.exit(main())

"""What there is: every registered network with its sizes, what fusing makes of it, and what was published of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from ..errors import ReparamError
from ..registry import Published, create_model, get_model, list_models
from ..report import format_markdown
from ..surgery.flops import measure
from ..surgery.places import RewriteReport
from ..surgery.rewrite import reparameterize
from ..training.sparsity import eligible

#: Which layers feed which does not depend on the size of the images, so a network is traced with small ones if it can.
_SMALL = 64


@dataclass(frozen=True)
class Sizes:
    """A network in train form and fused, in numbers and multiply-adds per image."""

    parameters: int
    fused_parameters: int
    macs: int
    fused_macs: int
    #: What fusing put in the place of what, with counts.
    fusing: str

    def cells(self) -> list[str]:
        """Return millions of parameters and of multiply-adds, each in train form and fused."""
        return [
            _millions(self.parameters, 3), _millions(self.fused_parameters, 3),
            _millions(self.macs, 1), _millions(self.fused_macs, 1),
        ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One network of the catalogue."""

    name: str
    published: Published
    nonzero_parameters: int
    sizes: Sizes


def networks() -> list[tuple[str, Published]]:
    """Return (name, one published variant) for every registered network; one without any stands for itself."""
    return [(name, variant) for name in list_models() for variant in get_model(name).published or [Published("")]]


def measure_network(name: str, published: Published) -> Row:
    """Build a network in train form, fuse it, and count both."""
    with paddle.utils.unique_name.guard():
        model = create_model(name, **published.options)
    maskable = sum(math.prod(place.parameter.shape) for place in eligible(model)[0])
    sizes = sizes_of(model, (published.input_size, published.input_size))
    return Row(name, published, round(sizes.parameters - published.sparsity * maskable), sizes)


def sizes_of(model: nn.Layer, image: tuple[int, int]) -> Sizes:
    """Count a network in train form and what fusing makes of it, for images of a height and width."""
    model.eval()
    spec = [[None, 3, *image]]
    train = measure(model, spec)
    fused, report = _fuse(model, image)
    size = measure(fused, spec)
    return Sizes(train.parameters, size.parameters, train.macs_per_image, size.macs_per_image, _summary(report))


def _fuse(model: nn.Layer, image: tuple[int, int]) -> tuple[nn.Layer, RewriteReport]:
    if min(image) > _SMALL:
        try:
            return reparameterize(model, fold_bn=True, input_spec=[[None, 3, _SMALL, _SMALL]])
        except ReparamError:
            pass  # It takes images of its own size only.
    return reparameterize(model, fold_bn=True, input_spec=[[None, 3, *image]])


def _summary(report: RewriteReport) -> str:
    kinds = Counter(what if " -> " in what else "norm folded" for _, what in report.touched)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def configs_of(folder: Path) -> dict[str, list[str]]:
    """Return name of a network -> the configs under `folder` whose `Arch` it is, as paths relative to it."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        # The name is all that is needed, and the core has no YAML reader.
        match = re.search(r"^Arch:.*?\bname: (\w+)", path.read_text(encoding="utf-8"), re.M | re.S)
        if match:
            found.setdefault(match[1], []).append(path.relative_to(folder).as_posix())
    return found


def _millions(number: int, digits: int) -> str:
    return f"{number / 1e6:.{digits}f}"


def to_markdown(rows: list[Row], configs: Mapping[str, list[str]], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the catalogue as a table in Markdown; `measured`: name of a network -> what a run of its config gave."""
    header = [
        "network", "options", "input", "parameters, M: train", "fused", "non-zero", "multiply-adds, M: train", "fused",
        "fusing gives", "published top-1, %", "source", "measured here", "config",
    ]  # fmt: skip
    lines = []
    for row in rows:
        published = row.published
        options = ", ".join(f"{key}={value}" for key, value in published.options.items())
        parameters, fused, macs, fused_macs = row.sizes.cells()
        same = row.nonzero_parameters == row.sizes.parameters
        lines.append([
            row.name, f"`{options}`" if options else "", str(published.input_size), parameters, fused,
            "" if same else _millions(row.nonzero_parameters, 3), macs, fused_macs, row.sizes.fusing,
            "" if published.top1 is None else f"{published.top1:.2f}", published.source,
            "" if options else _measured(measured.get(row.name)),
            " ".join(f"[{path.split('/')[0]}](../ppcls_configs/{path})" for path in configs.get(row.name, [])),
        ])  # fmt: skip
    return format_markdown(header, lines) + "\n"


def _measured(result: Mapping[str, Any] | None) -> str:
    return "" if result is None else f"{result['top1']:.2f} ({result['what']})"

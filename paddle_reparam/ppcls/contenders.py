"""What a benchmark times: networks by name, of this library or PaddleClas', configs, and exported folders."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..deploy.programs import program_file
from ..deploy.released import MANIFEST, check_files, read_manifest
from ..errors import ReparamError, UsageError
from ..measure import benchmark
from ..measure.benchmark import Contender, InferenceReport
from ..measure.sweeps import name_of
from ..measure.ways import BOUNDED, Network, WaysReport, time_ways
from ..registry import get_layer, list_layers, list_models
from ..surgery.flops import ModelSize
from .errors import ConfigError


@contextlib.contextmanager
def as_wrong_usage(what: str) -> Iterator[None]:
    """Raise a `ReparamError` of the `with` block as a `ConfigError` that says what of the command line it is about."""
    try:
        yield
    except UsageError:
        raise
    except ReparamError as error:
        raise ConfigError(f"{what}: {error}") from error


def images_of(targets: Sequence[str], size: int | None) -> tuple[int, int, int]:
    """Return the shape of the images that all targets are timed on: of this size, or what folders and configs say.

    Raises `ConfigError` where a folder takes others: times on images of two sizes cannot be compared.
    """
    from .command import read_config
    from .reparam import image_shape

    known: dict[str, tuple[int, ...]] = {}
    for target in targets:
        path = Path(target)
        if path.is_dir() and (path / MANIFEST).is_file():
            with as_wrong_usage(target):
                taken = read_manifest(path)["input"]
            [[_, *shape], *others] = taken["shape"]
            if others:
                raise ConfigError(f"{target}: its network takes several inputs, and is timed on images alone")
            if size is None or taken["size"] == "fixed":
                known[target] = tuple(shape)
        elif path.suffix == ".yaml" and size is None:
            known[target] = tuple(image_shape(read_config(target)))
    shape = (3, size, size) if size is not None else next(iter(known.values()), (3, 224, 224))
    for target, of_target in known.items():
        if of_target != shape:
            asked = f"--size {size} asks for" if size is not None else f"{next(iter(known))} takes"
            raise ConfigError(
                f"{target} takes images of {'x'.join(map(str, of_target))}, and {asked} {'x'.join(map(str, shape))}; "
                "times on images of two sizes cannot be compared"
            )
    return shape


def contenders_of(
    target: str,
    folder: Path,
    shape: tuple[int, int, int],
    forms: Sequence[str] = ("fused",),
    onnx: bool = False,
    bounded: Sequence[str] = (),
    **options: Any,
) -> Iterator[Contender]:
    """Yield what is to be timed of a target: an exported folder as it is, or the forms of a network, exported.

    `bounded` are precisions, of which a contender then says what their rounding may change; `options` the network's.
    """
    from .arch import get_builder
    from .command import read_config
    from .reparam import build_train_form

    path = Path(target)
    if path.is_dir():
        known: dict[str, Any] = {}
        with as_wrong_usage(target):
            program_file(path)
            if (path / MANIFEST).is_file():
                manifest = read_manifest(path)
                check_files(path, manifest)
                [[_, *shape]] = manifest["input"]["shape"]
                known = {"dtype": manifest["input"]["dtype"], "size": ModelSize(**manifest["size"]["fused"])}
        yield Contender(path.name, "exported", path, tuple(shape), **known)
        return
    with paddle.utils.unique_name.guard():
        if path.suffix == ".yaml":
            name, model = path.stem, build_train_form(read_config(target))
        else:
            name, build = target, get_builder(target)
            with as_wrong_usage(target):
                model = build(**options)
    try:
        yield from benchmark.prepare(name, model, folder, shape, forms, onnx, bounded)
    except benchmark.WrongImages as error:
        raise ConfigError(str(error)) from error


def sweep(
    targets: Sequence[str],
    of: str,
    values: Sequence[int],
    size: int = 224,
    channels: int = 124,
    threads: int = 2,
    rounds: int = 30,
) -> InferenceReport:
    """Time networks, fused, as their work grows, all of them in turns.

    `of` is what grows (of `sweeps.GROWS`). Where it is the kernel size, targets are depthwise layers of this library,
    of so many `channels`, or a SLaK. `size` is the side of the images, or maps, where it does not grow.
    """
    contenders, batches = [], values if of == "batch" else [1]
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            for value in [None] if of == "batch" else values:
                place, side = Path(folder) / str(value), value if of == "size" else size
                if of == "kernel_size":
                    found = _of_kernel_size(target, place, side, value, channels)
                else:
                    found = contenders_of(target, place, (3, side, side))
                for each in found:
                    each.name = name_of(target, of, value)
                    contenders.append(each)
        report = benchmark.run(contenders, batches, ["onednn"], threads, rounds, peaks=False)
    report.settings.update(of=of, targets=list(targets), values=list(values), size=size, channels=channels)
    return report


def time_networks(
    targets: Sequence[str],
    baseline: Path,
    report: WaysReport,
    runtimes: Sequence[str],
    save: Callable[[WaysReport], None],
) -> None:
    """Time networks in every way, each beside the export of its name in `baseline`, and add them to a report.

    Those that it holds are left as they are. `save` is called after each. Raises `ConfigError` where an export is not
    there.
    """
    folders = {target: baseline / Path(target).stem for target in targets}
    for target, folder in folders.items():
        with as_wrong_usage(f"--baseline {baseline}, for {target}"):
            program_file(folder)
    there = {network.name for network in report.networks}
    shape = (3, report.settings["size"], report.settings["size"])
    for target, folder in folders.items():
        if folder.name in there:
            continue
        with tempfile.TemporaryDirectory() as place:
            forms = list(contenders_of(target, Path(place), shape, ["every form"], bounded=BOUNDED))
            found = time_ways(forms, folder, runtimes, report.settings)
        report.networks.append(Network(folder.name, forms[0].bounds, found))
        save(report)


def _of_kernel_size(target: str, folder: Path, size: int, kernel_size: int, channels: int) -> Iterator[Contender]:
    """Yield a layer of this library, or a SLaK, with kernels of a size."""
    slaks = list_models("SLaK*")
    if target not in [*list_layers(), *slaks]:
        raise ConfigError(
            f"{target}: no kernel size can be chosen for it, but for {', '.join(slaks)} and single layers"
        )
    if target in slaks:
        # On the maps of the last stage, 7x7 for images of 224, a kernel of 13 meets everything.
        sizes = [kernel_size, kernel_size, kernel_size, min(kernel_size, 13), 5]
        yield from contenders_of(target, folder, (3, size, size), kernel_size=sizes)
        return
    k = kernel_size
    geometry = ConvGeometry(channels, channels, (k, k), padding=(k // 2,) * 4, groups=channels)
    with as_wrong_usage(f"{target} with a kernel of {k}"):
        layer = get_layer(target).layer.build(geometry)
    yield from benchmark.prepare(target, nn.Sequential(layer), folder, (channels, size, size))

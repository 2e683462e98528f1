"""Images compared by the features that a released network makes of them: two of them, or one with a gallery."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingFile, ReparamError, UsageError
from ..files import Folder, atomic_write
from .inference import InferenceModel
from .outputs import SHORTEST, unit_length
from .predict import Failed, NetworkOfImages, find_images
from .released import manifest_of_onnx, read_manifest

INDEX_SUFFIX = ".npz"
_ENTRIES = {"network", "names", "features"}


def gives_features(release: Folder) -> bool:
    """Return whether a released folder, or an ONNX file of one, puts features out; raises `ReparamError` for others."""
    manifest = manifest_of_onnx(InferenceModel(release)) if Path(release).is_file() else read_manifest(release)
    return "features" in manifest["output"]["keys"]


class FeatureExtractor(NetworkOfImages):
    """A release that makes features of images."""

    def __init__(self, release: Folder) -> None:
        """Raises `ReparamError` as its base does, and for what puts no features out."""
        super().__init__(release)
        if "features" not in self.manifest["output"]["keys"]:
            raise ReparamError(f"{release}: its network puts out no features, by which images could be compared")
        #: Of what was trained and how an image is read: networks of one fingerprint make the same features.
        self.fingerprint = _fingerprint(self.manifest)

    def features(self, paths: Iterable[Path], failed: Failed) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield each image with its features `[C]`, float32 and of length 1.

        `failed` is given the `ReparamError` of each image that cannot be read, or has no features.
        """
        for batch in self.batches(paths, failed):
            rows = self._network.run(np.stack([read.taken for read in batch]))[0]
            if rows.ndim != 2 or len(rows) != len(batch):
                raise ReparamError(f"the network puts out {list(rows.shape)} for {len(batch)} images, no features")
            rows = rows.astype(np.float64)
            for read, row, unit in zip(batch, rows, unit_length(rows)):
                if not np.isfinite(row).all() or np.linalg.norm(row) <= SHORTEST:
                    failed(ReparamError(f"{read.path}: its features have no direction"))
                else:
                    yield read.path, unit.astype(np.float32)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    config = source.get("config") or {}
    said = [
        source["weights"]["sha256"], config.get("sha256"), config.get("overrides"), manifest["input"],
        manifest["output"]["keys"],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass
class Gallery:
    """Known images: their names, and their features `[N, C]` of length 1, by the network of a fingerprint."""

    names: list[str]
    features: np.ndarray
    network: str

    def nearest(self, features: np.ndarray, most: int) -> list[tuple[str, float]]:
        """Return the names nearest to features `[C]` with their cosines, the nearest first."""
        cosines = self.features @ features
        return [(self.names[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:most]]

    def write(self, path: Folder) -> None:
        """Write an index file, which appears whole or not at all; raises `UsageError` for another suffix."""
        if Path(path).suffix != INDEX_SUFFIX:
            raise UsageError(f"{path}: an index file ends with {INDEX_SUFFIX}")
        names = np.frombuffer(json.dumps(self.names).encode(), np.uint8)
        network = np.frombuffer(self.network.encode(), np.uint8)
        atomic_write(path, lambda file: np.savez(file, network=network, names=names, features=self.features))


def read_gallery(place: Folder, extractor: FeatureExtractor, failed: Failed) -> Gallery:
    """Return the images below a folder with their features, or what an index file holds of them.

    Raises `MissingFile` for a place that does not exist, and `ReparamError` for a file that is no index, or one by
    another network. `failed` is as in `FeatureExtractor.features`.
    """
    path = Path(place)
    if not path.exists():
        raise MissingFile(f"there is no folder and no index file {place}")
    if path.is_file():
        return _read_index(path, extractor.fingerprint)
    found = list(extractor.features(find_images([path]), failed))
    if not found:
        raise ReparamError(f"{place}: none of its images has features")
    return Gallery([str(each) for each, _ in found], np.stack([row for _, row in found]), extractor.fingerprint)


def _read_index(path: Path, fingerprint: str) -> Gallery:
    remedy = "make it anew with --gallery FOLDER --index FILE"
    try:
        with zipfile.ZipFile(path) as file:
            # As it is written, so that what it holds is no larger than the file.
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
        with np.load(path, allow_pickle=False) as arrays:
            is_one = stored and set(arrays.files) == _ENTRIES
            entries = {name: arrays[name] for name in _ENTRIES} if is_one else {}
        names = json.loads(entries["names"].tobytes())
        gallery = Gallery(names, entries["features"], entries["network"].tobytes().decode())
        is_one = isinstance(names, list) and all(isinstance(name, str) for name in names)
        is_one = is_one and gallery.features.shape[:1] == (len(names),) and gallery.features.ndim == 2
        is_one = is_one and gallery.features.dtype == np.float32 and bool(np.isfinite(gallery.features).all())
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile):
        is_one = False
    if not is_one:
        raise ReparamError(f"{path} is no index file of this version of the library; {remedy}")
    if gallery.network != fingerprint:
        raise ReparamError(f"{path} was made by another network, whose features mean something else; {remedy}")
    return gallery


def cosine_of_two(extractor: FeatureExtractor, paths: Sequence[Path]) -> float:
    """Return the cosine between the features of two images; raises `ReparamError` where one has none."""

    def failed(error: ReparamError) -> None:
        raise error

    first, second = (row for path in paths for _, row in extractor.features([path], failed))
    return float(first @ second)

"""Convolutions that train rich and ship plain, for PaddlePaddle and PaddleClas."""

# Before paddle: 2.6 exports a zlib of its own, and Python's, where it is loaded after that one, crashes in it.
import zlib  # noqa: F401

__version__ = "0.1.0"

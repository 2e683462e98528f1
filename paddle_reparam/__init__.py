"""Convolutions that train rich and ship plain, for PaddlePaddle and PaddleClas."""

__version__ = "0.1.0"

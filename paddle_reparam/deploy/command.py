"""What every command that releases a network asks, whatever framework trained it."""

from __future__ import annotations

import argparse

from .programs import FORMATS


def add_release(parser: argparse.ArgumentParser, required: bool = True, file_format: str | None = None) -> None:
    """Add the options of a release; `file_format` is that which is written where none is asked for."""
    parser.add_argument("--weights", required=required, help="the weight file that training saved, in train form")
    parser.add_argument("--output", required=required, help="the folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier release in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="fuse and compare, and write nothing")
    usual = "else what this Paddle writes" if file_format is None else f"else {file_format}"
    parser.add_argument("--format", choices=FORMATS, default=file_format, help=f"the program's format; {usual}")
    parser.add_argument("--size", choices=("fixed", "dynamic"), default="fixed", help="of the images; fixed is faster")
    parser.add_argument("--onnx", action="store_true", help="put an ONNX file beside the export, compared as well")
    parser.add_argument("--verbose", action="store_true", help="print each layer that was fused, or why it was not")

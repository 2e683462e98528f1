"""Run commands in one process, or in each of several: `python -m paddle.distributed.launch commands.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paddle_reparam.ppcls import setup

setup()

import paddle  # noqa: E402 - after the library, which knows what Paddle 2.6 needs before it

from paddle_reparam.arithmetic.geometry import BATCH_NORMS  # noqa: E402
from paddle_reparam.ppcls import command, engine  # noqa: E402
from paddle_reparam.weights.checkpoints import save  # noqa: E402


class Frozen(engine.Engine):
    """Keeps the statistics of its batch norms, and `start.pdparams`, what the training starts from.

    Processes that normalise, each by its own half of a batch, do not compute what one process does with the whole.
    """

    def __init__(self, config: dict, mode: str = "train") -> None:
        super().__init__(config, mode)
        for layer in self.model.sublayers():
            if isinstance(layer, BATCH_NORMS):
                layer._use_global_stats = True
        if paddle.distributed.get_rank() == 0:
            save(self.model.state_dict(), Path(config["Global"]["output_dir"]) / "start.pdparams")


def run(commands: list[tuple[str, list[str]]]) -> list[int]:
    """Return the exit code of each command, (mode, arguments); RANK in them stands for the number of the process."""
    rank, plain = str(paddle.distributed.get_rank()), engine.Engine
    engine.Engine = Frozen
    codes = []
    try:
        for mode, given in commands:
            # Named from the start, as in a process of its own, parameters find the optimizer's state again.
            with paddle.utils.unique_name.guard():
                codes.append(command.main(mode, [argument.replace("RANK", rank) for argument in given]))
    finally:
        engine.Engine = plain
    return codes


if __name__ == "__main__":
    codes = run(json.loads(Path(sys.argv[1]).read_text()))
    print("exit codes", *codes, flush=True)
    sys.exit(codes[-1])

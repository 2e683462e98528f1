"""Run commands in one process, or in each of several: `python -m paddle.distributed.launch commands.py FILE`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from paddle_reparam.ppcls import setup

setup()

import contract  # noqa: E402 - after the library, which knows what Paddle 2.6 needs before it
import paddle  # noqa: E402
import ppcls.arch  # noqa: E402
from paddle import nn  # noqa: E402

from paddle_reparam import registry  # noqa: E402
from paddle_reparam.arithmetic.geometry import BATCH_NORMS  # noqa: E402
from paddle_reparam.layers.dcd import DCDLinear  # noqa: E402
from paddle_reparam.layers.repmlp import RepMLP  # noqa: E402
from paddle_reparam.ppcls import command, engine  # noqa: E402
from paddle_reparam.weights.checkpoints import save  # noqa: E402


class OfEveryLayer(nn.Layer):
    """Every registered layer side by side on images of 16 pixels, and a classifier of what each puts out."""

    def __init__(self, class_num: int = 2, pretrained: bool = False, use_ssld: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.BatchNorm2D(8), nn.ReLU())
        entries = [registry.get_layer(name) for name in registry.list_layers()]
        found = [first_of(entry.layer) for entry in entries if not entry.untestable]
        # Those that stand in for no convolution of any size.
        found.append((contract.Case(8, 8, 1), RepMLP(8, 8, 16, 16, 4, 4)))
        self.inputs = [case.inputs for case, _ in found]
        self.layers = nn.LayerList([layer for _, layer in found])
        self.fc = DCDLinear(sum(case.outputs for case, _ in found), class_num)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.stem(x)
        maps = [layer(x[:, :inputs]) for inputs, layer in zip(self.inputs, self.layers)]
        return self.fc(paddle.concat([each.mean([2, 3]) for each in maps], 1))


def first_of(layer: type) -> tuple[contract.Case, nn.Layer]:
    """Return the first convolution that a layer can stand in for, a common one where it can, and the layer for it."""
    cases = sorted(contract.CASES, key=lambda case: (case.inputs, case.kernel) != (8, 3))
    return next((case, made) for case in cases if (made := contract.build(layer, case, "float32")) is not None)


ppcls.arch.OfEveryLayer = OfEveryLayer


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


class Slow(engine.Engine):
    """Tells when an epoch begins; the first process takes its time over what it saves after the first one."""

    def _states(self, prefix: str, metric_info: dict) -> dict:
        if metric_info["epoch"] == 1 and paddle.distributed.get_rank() == 0:
            time.sleep(1)
            print("saves at", time.monotonic())
        return super()._states(prefix, metric_info)

    @staticmethod
    def _train_epoch(engine: engine.Engine, epoch: int, print_batch_step: int) -> None:
        print(f"epoch {epoch} begins at", time.monotonic())
        Slow.__base__._train_epoch(engine, epoch, print_batch_step)


def run(commands: list[tuple[str, list[str]]]) -> list[int]:
    """Return the exit code of each command, (mode, arguments); RANK in them stands for the number of the process.

    Batch norms are frozen but in the mode "train as it is".
    """
    rank, plain = str(paddle.distributed.get_rank()), engine.Engine
    codes = []
    try:
        for mode, given in commands:
            # Named from the start, as in a process of its own, parameters find the optimizer's state again.
            engine.Engine = Slow if mode == "train as it is" else Frozen
            with paddle.utils.unique_name.guard():
                codes.append(command.main(mode.split()[0], [argument.replace("RANK", rank) for argument in given]))
    finally:
        engine.Engine = plain
    return codes


if __name__ == "__main__":
    codes = run(json.loads(Path(sys.argv[1]).read_text()))
    print("exit codes", *codes, flush=True)
    sys.exit(codes[-1])

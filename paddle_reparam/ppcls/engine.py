"""PaddleClas' Engine with its inputs checked first."""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from ppcls.engine import engine as engine_module
from ppcls.utils import logger

from ..images import IMAGE_SUFFIXES, images_below
from ..training import processes
from ..training.epochs import start_epoch
from . import agreement, curves, disk_space, monitoring, resuming, saving, sparse
from .errors import ConfigError
from .guards import (
    Loader,
    RaisingLogger,
    check_loss,
    check_samples,
    check_states,
    check_weights,
    failures,
    readable_images,
    watch_outputs,
)
from .loading import strict_loading, weights_are_in
from .sentences import explained
from .validation import check_config, check_run

PaddleClasEngine = engine_module.Engine

#: The part of `DataLoader` -> the Engine's attribute that reads it.
_LOADERS = {
    "Train": "train_dataloader", "UnLabelTrain": "unlabel_train_dataloader", "Eval": "eval_dataloader",
    "Eval.Gallery": "gallery_dataloader", "Eval.Query": "query_dataloader",
    "Eval, gallery and query": "gallery_query_dataloader",
}  # fmt: skip


class Engine(PaddleClasEngine):
    """PaddleClas' Engine: a config that cannot work is refused at once, weights that do not fit are an error, and a run
    that was killed goes on from its last whole checkpoint as it would have gone on by itself."""

    #: Told after each step which share of a training's steps is done, in the place of a progress bar.
    watch: Callable[[float], None] | None = None

    def __init__(self, config: dict[str, Any], mode: str = "train") -> None:
        goes_on_by_itself = config["Global"].get("checkpoints") == "auto"
        with explained(f"{mode} cannot start", wrong_config=True):
            check_run(config, mode)
            check_config(config, mode)
            self.sparsity_settings = sparse.read_section(config) if mode == "train" else None
            self.monitor_settings = monitoring.read_section(config) if mode == "train" else None
        self.best: dict[str, Any] | None = None
        #: "best_model" and "latest" -> where that set is, without suffix.
        self.saved: dict[str, Path] = {}
        #: The step at which the monitor wrote last.
        self.monitored: int | None = None
        with contextlib.ExitStack() as held:
            if mode == "train":
                # Before PaddleClas opens its logs there.
                held.enter_context(saving.only_training_in(config["Global"]["output_dir"]))
                checkpoint = config["Global"]["checkpoints"]
                if goes_on_by_itself and checkpoint and paddle.distributed.get_rank() == 0:
                    config["Global"]["checkpoints"] = str(saving.placed(checkpoint))
            with explained(f"{mode} cannot start", wrong_config=True), strict_loading(config, mode):
                super().__init__(config, mode)
            failures.clear()
            network = getattr(self.model, "_layers", self.model)
            check_weights(network, config)
            if mode in ("eval", "infer"):
                watch_outputs(network)
            for split, name in _LOADERS.items():
                loader = getattr(self, name, None)
                if isinstance(loader, paddle.io.DataLoader):
                    check_samples(loader, config["Arch"].get("class_num"), split, _channels(config))
                    setattr(self, name, Loader(loader, split))
            self._output_folder = held.pop_all()
        if self.vdl_writer is not None:
            self.vdl_writer = curves.Log(self.vdl_writer)
        if mode == "train":
            with explained("train cannot start"):
                agreement.check_agreement(self)
            self.goes_on_by_itself = goes_on_by_itself
            self._plain_train_epoch, self.train_epoch_func = self.train_epoch_func, self._train_epoch

    def train(self) -> None:
        """Train, from `Global.checkpoints` where that is set."""
        resume = functools.partial(resuming.resume, config=self.config, on_resume=self._resume)
        with (
            self._output_folder,
            explained("the training stopped"),
            strict_loading(self.config, self.mode, resume),
            saving.whole_checkpoints(engine_module, self._states, self.saved),
            monitoring.progress(self),
        ):
            super().train()
        self._tell_where_the_weights_are()

    def _tell_where_the_weights_are(self) -> None:
        if self.best is not None and "best_model" in self.saved:
            told = f"of epoch {self.best['epoch']:.0f}, {self.best['metric']:.5f}"
            logger.info(f"best weights ({told}): {self.saved['best_model']}.pdparams")
        if "latest" in self.saved:
            logger.info(f"latest weights: {self.saved['latest']}.pdparams")

    def eval(self, epoch_id: int = 0) -> Any:
        """Evaluate, and return what is better the larger it is.

        An image that could not be read is an error, as no other one says anything of it.
        """
        with explained("the evaluation stopped"), curves.evaluation(self, epoch_id) as measured:
            # What is measured is then the network that the first process saves.
            processes.take_statistics_of_first(self.model)
            result = super().eval(epoch_id)
            if "HammingDistance" in self.config["Metric"]["Eval"][0]:
                # PaddleClas would keep as the best weights those whose distance is largest. What is left of 1 is the
                # accuracy.
                result = 1 - result
            measured["acc"] = result
        loaders = [getattr(self, name, None) for split, name in _LOADERS.items() if split.startswith("Eval")]
        failures.raise_any(sum(len(loader.dataset) for loader in loaders if loader is not None))
        return result

    def infer(self) -> Any:
        """Label the images that can be read; raises `ReparamError` afterwards where some cannot."""
        _name_every_class(self.postprocess_func)
        find, log = engine_module.get_image_list, engine_module.logger
        place = self.config["Infer"].get("infer_imgs")
        if not place:
            raise ConfigError("infer has no images: set Infer.infer_imgs to an image or to a folder of some")

        def readable(folder: str, infer_list: str | None = None) -> list[str]:
            if infer_list:
                images = find(folder, infer_list)
            else:
                # PaddleClas knows fewer endings of their names, and 2.4 no folders in a folder.
                images = [folder] if os.path.isfile(folder) else [str(path) for path in images_below(folder)]
            if not images:
                raise ConfigError(f"Infer.infer_imgs: there are no images in {place} ({', '.join(IMAGE_SUFFIXES)})")
            return readable_images(images, self.preprocess_func)

        engine_module.get_image_list = readable
        # Newer Engines log whatever goes wrong, and go on.
        engine_module.logger = RaisingLogger()
        try:
            with explained("infer stopped"):
                results = super().infer()
        finally:
            engine_module.get_image_list, engine_module.logger = find, log
        failures.raise_any()
        return results

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Export, as PaddleClas does, what was loaded when the Engine was made."""
        with explained("the export stopped"), weights_are_in():
            super().export(*args, **kwargs)

    @staticmethod
    def _train_epoch(engine: Engine, epoch: int, print_batch_step: int) -> None:
        """Train one epoch; what is random in it depends on the seed and the epoch alone, not on what ran before."""
        seed = engine.config["Global"].get("seed")
        if isinstance(seed, int) and not isinstance(seed, bool):
            rank = paddle.distributed.get_rank()
            # 32 bits is what numpy takes.
            drawn = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
            paddle.seed(drawn)
            np.random.seed(drawn)
            random.seed(drawn)
        sampler = getattr(engine.train_dataloader, "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch - 1)
        if not engine.config["Global"].get("iter_per_epoch"):
            # Newer Engines would begin with the batches that were left over from the epoch before.
            engine.__dict__.pop("train_dataloader_iter", None)
        start_epoch(engine.model, epoch)
        if getattr(engine, "ema", False):
            # At once: a mean of what two epochs set was trained by none.
            start_epoch(engine.model_ema.module, epoch)
        if not hasattr(engine, "sparse_training"):
            engine.sparse_training = sparse.start(engine, engine.sparsity_settings)
            # By now a resumed run knows its epoch, and the network has its masks.
            disk_space.require_space(engine, epoch)
        if engine.monitor_settings and not hasattr(engine, "monitor"):
            engine.monitor = monitoring.start(engine, engine.monitor_settings)
        monitor = getattr(engine, "monitor", None)
        original = engine.train_loss_func

        def checked(*args: Any, **kwargs: Any) -> Any:
            losses = original(*args, **kwargs)
            failures.raise_any()
            check_loss(losses, epoch, engine.global_step)
            # PaddleClas counts a step before its forward pass: the weights are those of the step before.
            done = engine.global_step - 1
            if engine.monitor_settings and done % engine.monitor_settings["interval"] == 0:
                if monitor and done != engine.monitored:
                    monitor.write(done)
                    engine.monitored = done
                processes.wait_for_first()
            monitoring.advance(engine, epoch)
            return losses

        # The losses may have weights of their own: what is a layer must stay one everywhere but here.
        engine.train_loss_func = checked
        try:
            engine._plain_train_epoch(engine, epoch, print_batch_step)
        finally:
            engine.train_loss_func = original
        if engine.monitor_settings and epoch == engine.config["Global"]["epochs"]:
            if monitor:
                monitor.write(engine.global_step, pictures=True)
                engine.monitored = engine.global_step
            processes.wait_for_first()

    def _states(self, prefix: str, metric_info: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the weights and the optimizer's state.

        Weights that the last step made useless end the run here, before they take the place of good ones.
        """
        check_states([self.model.state_dict(), *(o.state_dict() for o in self.optimizer)], self.global_step)
        if prefix == "best_model":
            self.best = {key: float(metric_info[key]) for key in ("metric", "epoch")}
        log = {} if self.vdl_writer is None else {"visualdl": self.vdl_writer.position(), "monitored": self.monitored}
        return {**metric_info, "best": self.best, "global_step": self.global_step, **log}

    def _resume(self, states: dict[str, Any]) -> dict[str, Any]:
        """Take over what a checkpoint kept; return the metric and the epoch that PaddleClas goes on from."""
        epochs = self.config["Global"]["epochs"]
        if states["epoch"] == epochs:
            if not self.goes_on_by_itself:
                raise ConfigError(
                    f"Global.checkpoints: all {epochs} epochs were done when it was saved; raise Global.epochs to go on"
                )
            logger.info(f"all {epochs} epochs are done; there is nothing left to train")
        self.best = states.get("best")
        self.saved.update(saving.sets_of(self.config["Global"]["checkpoints"]))
        self.global_step = int(states.get("global_step", 0))
        # Newer Engines may have epochs of another length than the data.
        steps = int(states["epoch"]) * getattr(self, "iter_per_epoch", len(self.train_dataloader))
        if self.global_step not in (0, steps):
            logger.warning(
                f"the {int(states['epoch'])} epochs before the checkpoint had {self.global_step} steps, and would have "
                f"{steps} now, as with other batches or another number of processes: a schedule of learning rates "
                "counts steps, and goes on from where it was"
            )
        place = (self.config["Global"]["checkpoints"], self.config["Global"]["output_dir"])
        if self.vdl_writer is not None and self.vdl_writer.go_on(states.get("visualdl"), *place):
            self.monitored = states.get("monitored")
        best = self.best["metric"] if self.best else states.get("metric", -1.0)
        return {"metric": best, "epoch": int(states["epoch"])}


class _Labels(dict):
    """The label of each class; one that the file of labels leaves out is called by its number."""

    def __missing__(self, number: int) -> str:
        return str(number)


def _name_every_class(postprocess: Any) -> None:
    postprocess = getattr(postprocess, "func", postprocess)
    if isinstance(getattr(postprocess, "class_id_map", None), dict):
        postprocess.class_id_map = _Labels(postprocess.class_id_map)


def _channels(config: dict[str, Any]) -> int | None:
    shape = config["Global"].get("image_shape")
    return shape[0] if isinstance(shape, (list, tuple)) and shape and isinstance(shape[0], int) else None


def register() -> None:
    """Make this the Engine that PaddleClas' own scripts import."""
    engine_module.Engine = Engine

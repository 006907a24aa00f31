"""Callbacks of certified training."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, RichProgressBar

from liplayers.errors import ArgumentError, ConfigError
from liplayers.losses import RadiusLoss
from liplayers.training.lookahead import Lookahead

__all__ = [
    "EpochLines",
    "EpsilonRamp",
    "LookaheadSync",
    "ProgressBar",
    "SaveWhenInterrupted",
    "Stopped",
    "Throughput",
    "ValidateAtEnd",
    "WeightEMA",
]


class ProgressBar(RichProgressBar):
    """Lightning's bar with samples per second and the validation metrics under short names, fit for 80 columns.

    Args:
        metrics: name of a logged metric → the name it is shown under.
    """

    def __init__(self, metrics: dict[str, str]) -> None:
        super().__init__()
        self._short = metrics

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        logged = trainer.progress_bar_metrics
        return {short: f"{logged[name]:.4g}" for name, short in self._short.items() if name in logged}


class EpochLines(L.Callback):
    """Writes a line after each epoch, where no bar can be seen.

    Args:
        write: takes the line.
        metrics: name of a logged metric → the name it is shown under.
    """

    def __init__(self, write: Callable[[str], object], metrics: dict[str, str]) -> None:
        self._write, self._short = write, metrics
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        of_all = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        logged = trainer.callback_metrics
        shown = [f"{short} {logged[name]:.4g}" for name, short in self._short.items() if name in logged]
        shown.append(f"{time.perf_counter() - self._start:.1f} s")
        self._write(f"epoch {trainer.current_epoch + 1}{of_all}: {', '.join(shown)}")


class Stopped(SystemExit):
    """Training was asked to stop by a signal; the exit status is that of shells, 128 + its number."""


class SaveWhenInterrupted(L.Callback):
    """Writes a checkpoint that resumes when training ends by Ctrl-C, SIGTERM or an exception.

    When a signal comes, `Stopped` is raised once the optimizer has stepped and any validation has ended, so that the
    resumed run is the same as one without a break. An exception between two arbitrary lines could be lost in a
    callback, or leave the optimizer half stepped. Ctrl-C again, a second or more later, ends at once and saves nothing.

    Of several processes all stop when one is asked to; an exception in one of them leaves no checkpoint, since all
    must take part in writing it.

    Args:
        path: the file.
        resume: the command that goes on from it, to be shown.

    Attributes:
        begun: whether training has begun; before, there is nothing to save.
        asked: the number of the signal that came, or 0.
    """

    def __init__(self, path: Path, resume: str) -> None:
        self.path, self.resume = path, resume
        self.begun = False
        self.asked = 0
        self._since = 0.0
        self._at_once = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = True
        self._listen()

    def _listen(self) -> None:
        """Begins once Lightning has set its handler, which ends with status 0; it restores what was before."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background job
                    signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = number, now
            with suppress(OSError):  # a pipe that nobody reads any more
                os.write(1, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not reentrant
        elif number == signal.SIGINT and now - self._since > 1:  # some senders signal twice
            self._at_once = True
            raise Stopped(128 + number)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        at_a_step = batch_idx % trainer.accumulate_grad_batches == 0  # a sum of gradients is not kept
        if at_a_step and trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            self.asked = self.asked or signal.SIGTERM
            self.raise_if_asked(trainer)

    def raise_if_asked(self, trainer: L.Trainer) -> None:
        """Raise `Stopped` if a signal came; called after training, one that came after the last step counts, too."""
        if self.asked:
            # Lightning kills the first process, which may still be writing, when another ends with an error
            raise Stopped(128 + self.asked if trainer.is_global_zero else 0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._at_once or not self.begun or (trainer.world_size > 1 and not isinstance(exception, Stopped)):
            return
        try:
            trainer.save_checkpoint(self.path)
        except OSError as error:  # what stopped the training is the news
            print(f"\n{self.path}: cannot be written ({error.strerror or error})", flush=True)
            return
        if trainer.is_global_zero:
            print(f"\nstopped in epoch {trainer.current_epoch + 1}; to go on: {self.resume}", flush=True)


class ValidateAtEnd(Checkpoint):
    """Ends training with a validation where it would end between two, so that every kept state can be the best.

    It is a checkpoint callback, since those run after the others, one of which may stop the training.

    Attributes:
        step: of the last validation.
    """

    step = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if (
            (last_epoch and trainer.is_last_batch)
            or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)
            or trainer.should_stop
        ):
            trainer.should_stop = True  # Lightning validates before it stops, in an epoch that is to be validated
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1


class WeightEMA(EMAWeightAveraging):
    """The moving average w̄ ← decay·w̄ + (1 − decay)·w of the raw parameters, after every optimizer step.

    Validation runs on w̄, and checkpoints hold it as their weights: what is selected and certified is the average. A
    bound holds for any raw parameters, so for averaged ones too; the average of `ManifoldLinear`'s is a contraction.

    Args:
        decay: within [0, 1); 0.999 averages over about 1000 steps.

    Raises:
        ArgumentError: `decay` out of range.
    """

    def __init__(self, decay: float) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ArgumentError(f"WeightEMA: decay={decay!r}; expected a number in [0, 1)")
        super().__init__(use_buffers=False, decay=decay)
        self._swapped = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._swapped:  # the checkpoint of an interrupted run would take one for the other
            self.on_validation_epoch_end(trainer, pl_module)


class LookaheadSync(L.Callback):
    """Lets `Lookahead(sync=True)` go to its slow weights before each validation and at the end of each epoch."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Lookahead):
                optimizer.synchronize()


class Throughput(L.Callback):
    """Logs the training throughput in samples per second, on the progress bar and for each epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0  # a run that resumes within an epoch does not start one

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0]) * trainer.world_size
        rate = self._samples / (time.perf_counter() - self._start)
        pl_module.log("samples/s", rate, prog_bar=True, on_step=True, on_epoch=False, logger=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rate = self._samples / (time.perf_counter() - self._start)
        pl_module.log("train/samples_per_second", rate, sync_dist=True)


class EpsilonRamp(L.Callback):
    r"""Raises the radius of an EMMA-type loss: ε(t) = ε_max·(start + (1 − start)·min(t/(share·E), 1)), t in epochs.

    With epsilon 108/255, start 1/30 and share 1/2 it is BRONet's 36/255·(0.1 + 2.9·min(2t/E, 1)).

    Args:
        epsilon: ε_max.
        start: share of ε_max at the first epoch.
        share: of the epochs after which ε_max is reached.

    Source: Lai et al. 2025, arXiv 2505.15174.
    """

    def __init__(self, epsilon: float, start: float = 1 / 30, share: float = 0.5) -> None:
        if not (epsilon > 0 and 0 < start <= 1 and 0 < share <= 1):
            raise ArgumentError(
                f"EpsilonRamp: epsilon={epsilon}, start={start}, share={share}; expected epsilon > 0, shares in (0, 1]"
            )
        self.epsilon, self.start, self.share = epsilon, start, share

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = pl_module.loss
        if not isinstance(loss, RadiusLoss):
            raise ConfigError(f"EpsilonRamp needs a loss with an epsilon (emma, logit_annealing, gloro); got {loss}")
        if not trainer.max_epochs or trainer.max_epochs < 1:
            raise ConfigError(f"EpsilonRamp: trainer.max_epochs={trainer.max_epochs}; expected the number of epochs")
        reached = min(1.0, trainer.current_epoch / (self.share * trainer.max_epochs))
        loss.epsilon = self.epsilon * (self.start + (1 - self.start) * reached)

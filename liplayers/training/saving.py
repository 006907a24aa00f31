"""Checkpoints that a run can always be resumed from: whole files, and some within a long epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from liplayers.errors import ArgumentError
from liplayers.files import save_tensors, whole_file

__all__ = ["SaveWithinEpoch", "WholeFileCheckpointIO"]


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and moves: whatever ends the process, the path holds the old or the new checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            save_tensors(checkpoint, part)


class SaveWithinEpoch(Checkpoint):
    """Writes a checkpoint whenever the number of optimizer steps is a multiple of `every`.

    Not after the last batch of an epoch: the checkpoint of the epoch follows its validation.

    Args:
        path: the file, written over each time.
        every: optimizer steps between two of them, at least 1.

    Raises:
        ArgumentError: `every` is not an integer of at least 1.
    """

    def __init__(self, path: Path, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"SaveWithinEpoch: every={every!r}; expected an integer of at least 1")
        self.path, self.every = path, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # a sum of gradients is not kept
        if stepped and not trainer.is_last_batch and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)

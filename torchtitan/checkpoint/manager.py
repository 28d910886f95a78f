"""When a run saves, and how a save happens on all ranks.

A save that fails on any rank is given up by all of them, with one message, and the run goes on.
"""

import secrets
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.background import BackgroundSaver
from torchtitan.checkpoint.contents import Contents, OptimizerState, Stateful
from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.checkpoint.plan import Planner
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.start import Start
from torchtitan.checkpoint.storage import reason
from torchtitan.checkpoint.write import CheckpointWriter, Writer, save
from torchtitan.config.errors import CheckpointError, UnsavedError
from torchtitan.config.sections import Checkpoint
from torchtitan.protocols.model import StateDictAdapter
from torchtitan.tools.logging import logger


class CheckpointManager:
    """All ranks make the same calls at the same steps. Built by build_checkpoint_manager."""

    def __init__(self, start: Start, *, options: Callable[[], str], background: BackgroundSaver | None):
        self._config = start.config
        self._saves = start.config.enable_checkpoint and not start.config.load_only
        self._folder = start.folder
        self._ranks = start.ranks
        self._contents = start.contents
        self._hugging_face = start.hugging_face
        self._options = options  # of the run, as TOML
        self._background = background
        self._planner = Planner(start.ranks)
        self._writer = CheckpointWriter()  # of the saves that training waits for
        self._saved_step: int | None = None  # known to rank 0, which makes checkpoints visible
        self.load = start.load

    def is_due(self, step: int) -> bool:
        """Whether a step is saved though it is not the last one."""
        config = self._config
        is_first = step == 1 and config.enable_first_step_checkpoint
        return self._saves and (step % config.interval == 0 or is_first)

    def maybe_save(self, step: int, *, last_step: bool = False) -> None:
        """Save if it is time. A failure is logged; that of the last step is a CheckpointError."""
        if last_step and self._saves:
            self._save_last(step)
        elif self.is_due(step):
            self._wait_for_save()
            state = self._contents.everything()
            if self._background is None:
                self._write(step, state)
            else:
                self._background.start(partial(self._write, step, state))

    def save(self, step: int) -> bool:
        """Save everything before returning; whether it is on the disk."""
        if not self._saves:
            return False
        self._wait_for_save()
        if not self._is_saved(step):
            self._write(step, self._contents.everything())
        return self._is_saved(step)

    def save_seed(self) -> None:
        """Save the initial weights as step 0, for runs of other layouts to start from."""
        self._write(0, dict(self._contents.weights()))
        if not self._is_saved(0):
            raise CheckpointError(f"the seed checkpoint could not be saved in {self._folder.path}")

    def maybe_wait_for_staging(self) -> None:
        """To be called before the weights change: an asynchronous save may still be copying them."""
        if self._background is not None:
            self._background.wait_for_copy()

    def close(self) -> None:
        """Wait for the save in flight, and free what saves need."""
        if self._background is not None:
            self._background.close()

    def _is_saved(self, step: int) -> bool:
        return self._ranks.ask_first(lambda: self._saved_step == step)

    def _wait_for_save(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _save_last(self, step: int) -> None:
        self._wait_for_save()
        self._saved_step = None  # what a save of this step left may be in another form
        if self._config.last_save_model_only:
            dtype = getattr(torch, self._config.export_dtype)
            self._write(step, {name: weight.to(dtype) for name, weight in self._contents.exported_weights().items()})
        else:
            self._write(step, self._contents.everything())
        if not self._is_saved(step):
            raise UnsavedError(f"the last checkpoint, of step {step}, could not be saved in {self._folder.path}")
        if self._config.last_save_in_hf:
            assert self._hugging_face is not None
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # all is saved, and a start makes up for a conversion
            self._hugging_face.rewrite(self._folder, step, self._ranks)

    def _write(self, step: int, state: dict[str, Any], writer: Writer | None = None) -> None:
        """Write a checkpoint and make it visible. Runs on all ranks, on the main thread or beside it."""
        began = time.monotonic()
        path = self._folder.incomplete(step)
        failure = ""
        try:
            save(path, state, planner=self._planner, writer=writer or self._writer)
            if self._ranks.is_first:
                self._folder.note_options(path, self._options())
                self._folder.note_excluded(path, self._config.exclude_from_loading)
                if self._hugging_face is not None:
                    self._hugging_face.note_description(path)
                self._folder.publish(path, step)
        except Exception as error:
            failure = reason(error)
        if self._ranks.is_first and failure:
            self._report_failure(step, failure)
        elif self._ranks.is_first:
            self._saved_step = step
            logger.info(f"Saved {self._folder.of(step)} in {time.monotonic() - began:.2f} s")
            self._folder.tidy(self._config.keep_latest_k, up_to=step)
        # The others wait here, not in a collective of the training, which has a shorter time-out.
        self._ranks.gather(None)

    def _report_failure(self, step: int, why: str) -> None:
        newest = "the folder cannot be read"
        with suppress(OSError):
            self._folder.remove([self._folder.incomplete(step)])
            steps = self._folder.steps()
            newest = (
                f"the newest whole checkpoint is {self._folder.of(steps[-1])}" if steps else "there is no older one"
            )
            newest += f"; {shutil.disk_usage(self._folder.path).free / 2**20:,.0f} MiB are free there"
        logger.error(f"Saving the checkpoint of step {step} failed: {why}. The run goes on; {newest}.")


def build_checkpoint_manager(
    checkpoint: Checkpoint,
    *,
    dump_folder: str,
    model_parts: Sequence[nn.Module],
    optimizer: OptimizerState,
    lr_scheduler: Stateful,
    dataloader: Stateful,
    train_state: Stateful,
    steps: int,
    options: Callable[[], str] = lambda: "",
    is_restart: bool = False,
    adapter: StateDictAdapter | None = None,
    hf_folder: str | None = None,
    tokenizer_path: str | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> CheckpointManager:
    """A collective call, after the process group is there.

    Args:
        train_state: flat, with the entry "step".
        dataloader: its state's keys differ between ranks that read different data.
        steps: training.steps.
        options: all of the run, as TOML; each checkpoint holds them.
        is_restart: torchrun has started these processes again; load_step was for the first ones.
        adapter, hf_folder, tokenizer_path, bos_id, eos_id: for Hugging Face's format.

    Raises:
        CheckpointError: the folder of checkpoints cannot be written, or the model has no Hugging Face format and one
            is asked for.
    """
    if adapter is None and (checkpoint.last_save_in_hf or checkpoint.initial_load_in_hf):
        option = "last_save_in_hf" if checkpoint.last_save_in_hf else "initial_load_in_hf"
        raise CheckpointError(
            f"checkpoint.{option}=true, and this model family has no Hugging Face format; leave it off"
        )
    ranks = Ranks()
    run = ranks.ask_first(lambda: secrets.token_hex(4)) if checkpoint.enable_checkpoint else ""
    folder = CheckpointFolder(Path(dump_folder) / checkpoint.folder, run=run, outputs=Path(dump_folder))
    background = None
    if checkpoint.enable_checkpoint and not checkpoint.load_only:
        ranks.ask_first(folder.create)
        if checkpoint.async_mode != "disabled":
            background = BackgroundSaver(pinned=checkpoint.async_mode == "async_with_pinned_mem")
    hugging_face = None
    if adapter is not None:
        tokenizer = Path(tokenizer_path) if tokenizer_path is not None else None
        hugging_face = HuggingFaceFormat(adapter, tokenizer_path=tokenizer, bos_id=bos_id, eos_id=eos_id)
        if hf_folder is not None:
            hugging_face.check_config(Path(hf_folder))
    states = {"lr_scheduler": lr_scheduler, "dataloader": dataloader, "train_state": train_state}
    start = Start(
        checkpoint,
        folder=folder,
        ranks=ranks,
        contents=Contents(model_parts, optimizer, states, ranks),
        hugging_face=hugging_face,
        steps=steps,
        is_restart=is_restart,
    )
    return CheckpointManager(start, options=options, background=background)

"""Saving and loading a run with torch.distributed.checkpoint.

A checkpoint is a folder `<dump_folder>/<folder>/step-N` with flat keys: the parameters under their own names, then
`optimizer.`, `lr_scheduler.`, `dataloader.`, `train_state.` and `rng.`. The keys and shapes do not tell how the
model was divided over ranks. It is written under another name and renamed when whole (checkpoint_storage.py), so
a run that is killed at any moment leaves the older one in charge.

A save that fails on any rank is given up by all of them, with one message, and the run goes on: the ranks agree
through torch.distributed.checkpoint, which gathers each rank's outcome before it writes `.metadata`.
"""

import pickle
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter

from torchtitan.checkpoint.background import BackgroundSaver
from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import (
    STATES,
    CheckpointFolder,
    CheckpointReader,
    CheckpointWriter,
    UnusableCheckpointError,
    check_weights,
    describing,
    read_metadata,
    reason,
)
from torchtitan.components.dataloader import DataloaderStateError
from torchtitan.config.errors import CheckpointError
from torchtitan.config.job_config import Checkpoint
from torchtitan.protocols.model import StateDictAdapter
from torchtitan.tools.logging import logger

# How long a rank waits for one that writes a large file to a slow disk.
TIMEOUT = timedelta(minutes=30)


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class CheckpointManager:
    """All ranks make the same calls at the same steps. Built by build_checkpoint_manager."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        folder: CheckpointFolder,
        ranks: Ranks,
        model_parts: Sequence[nn.Module],
        states: Mapping[str, Stateful],  # what is saved besides the weights; keys are those of STATES
        steps: int,  # at which the run is complete
        options: Callable[[], str],  # of the run, as TOML
        is_restart: bool,  # torchrun has started the processes again: load_step was obeyed before
        background: BackgroundSaver | None,
        hugging_face: HuggingFaceFormat | None,
    ):
        assert tuple(states) == STATES
        self._config = checkpoint
        self._folder = folder
        self._ranks = ranks
        self._model_parts = model_parts
        self._states = states
        self._steps = steps
        self._options = options
        self._is_restart = is_restart
        self._background = background
        self._hugging_face = hugging_face
        self._saved_step: int | None = None  # known to rank 0, which makes checkpoints visible

    # Saving

    def is_due(self, step: int) -> bool:
        """Whether a step is saved though it is not the last one."""
        config = self._config
        is_first = step == 1 and config.enable_first_step_checkpoint
        return config.enable_checkpoint and (step % config.interval == 0 or is_first)

    def maybe_save(self, step: int, *, last_step: bool = False) -> None:
        """Save if it is time. A failure is logged; that of the last step is a CheckpointError."""
        if last_step and self._config.enable_checkpoint:
            self._save_last(step)
        elif self.is_due(step):
            self._wait_for_save()
            if self._background is None:
                self._write(step, self._everything())
            else:
                state = self._everything()
                self._background.start(partial(self._write, step, state), state)

    def save(self, step: int) -> bool:
        """Save everything before returning; whether it is on the disk."""
        if not self._config.enable_checkpoint:
            return False
        self._wait_for_save()
        if not self._is_saved(step):
            self._write(step, self._everything())
        return self._is_saved(step)

    def save_seed(self) -> None:
        """Save the initial weights as step 0, for runs of other layouts to start from."""
        self._write(0, dict(self._weights()))
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
            self._write(step, {name: weight.to(dtype) for name, weight in self._weights().items()})
        else:
            self._write(step, self._everything())
        if not self._is_saved(step):
            raise CheckpointError(f"the last checkpoint, of step {step}, could not be saved in {self._folder.path}")
        if self._config.last_save_in_hf:
            self._ranks.ask_first(lambda: self._convert_to_hf(step))

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        writer: Callable[[Path], StorageWriter] = CheckpointWriter,
    ) -> None:
        """Write a checkpoint and make it visible. Runs on all ranks, on the main thread or beside it."""
        began = time.monotonic()
        path = self._folder.incomplete(step)
        failure = ""
        try:
            save(state, storage_writer=writer(path), process_group=self._ranks.group)
            if self._ranks.is_first:
                read_metadata(path)  # finds the files of all ranks, unless the folder is not one that all share
                self._folder.note_options(path, self._options())
                self._folder.note_excluded(path, self._config.exclude_from_loading)
                self._folder.publish(path, step)
        except (Exception, CheckpointException) as error:
            failure = reason(error)
        if self._ranks.is_first and failure:
            self._report_failure(step, failure)
        elif self._ranks.is_first:
            self._saved_step = step
            logger.info(f"Saved {self._folder.of(step)} in {time.monotonic() - began:.2f} s")
            self._remove_old(step)
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

    def _remove_old(self, step: int) -> None:
        try:
            self._folder.keep_latest(self._config.keep_latest_k, up_to=step)
            self._folder.remove(self._folder.leftovers())
        except OSError as error:
            logger.warning(f"Old checkpoints in {self._folder.path} could not be removed: {reason(error)}")

    def _convert_to_hf(self, step: int) -> None:
        assert self._hugging_face is not None
        path, incomplete = self._folder.of(step), self._folder.incomplete(step)
        try:
            self._hugging_face.convert(path, incomplete)
            self._folder.publish(incomplete, step)
        except Exception as error:
            self._folder.remove([incomplete])
            raise CheckpointError(
                f"{path} could not be rewritten as Hugging Face safetensors ({reason(error)});"
                " it holds the weights in torch.distributed.checkpoint's format"
            ) from error
        logger.info(f"Rewrote {path} as Hugging Face safetensors")

    # Loading

    def load(self) -> bool:
        """Continue from the run's own checkpoint, or else start from initial_load_path; False if there is neither.

        A checkpoint that is damaged or does not fit is a CheckpointError, never a reason to take an older one.
        """
        config = self._config
        if config.enable_checkpoint and (step := self._choose_step()) is not None:
            self._load_run(step)
        elif config.initial_load_path is None:
            return False
        elif config.initial_load_in_hf:
            assert self._hugging_face is not None
            path = Path(config.initial_load_path)
            self._ranks.together(partial(self._hugging_face.load, path, self._weights()))
            logger.info(f"Loaded the model from Hugging Face safetensors in {path}")
        else:
            path, names = Path(config.initial_load_path), () if config.initial_load_model_only else STATES
            if self._hugging_face is not None:  # a checkpoint that was converted from its format has a config.json
                self._ranks.together(partial(self._hugging_face.check_config, path))
            self._load(path, names, excluded=config.exclude_from_loading)
        return True

    def _choose_step(self) -> int | None:
        steps, leftovers = self._ranks.ask_first(lambda: (self._folder.steps(), self._folder.leftovers()))
        if leftovers and self._ranks.is_first:
            names = ", ".join(path.name for path in leftovers)
            logger.warning(f"Not whole, ignored, and removed after the next save: {names} in {self._folder.path}")
        wanted = self._config.load_step
        # torchrun counts restarts machine by machine: one that has replaced another counts none
        if wanted == -1 or any(self._ranks.gather(self._is_restart)):
            return steps[-1] if steps else None
        if wanted not in steps:
            there_are = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"checkpoint.load_step={wanted}: no such step in {self._folder.path}, {there_are}")
        if wanted != steps[-1] and self._ranks.is_first:
            newer = ", ".join(f"step-{step}" for step in steps if step > wanted)
            logger.warning(
                f"{self._folder.path} has newer checkpoints ({newer}), from which a start without"
                " checkpoint.load_step would continue; remove them if this run replaces theirs"
            )
        return wanted

    def _load_run(self, step: int) -> None:
        path = self._folder.of(step)
        try:
            if step >= self._steps and self._ranks.ask_first(lambda: _holds_weights_only(path)):
                # Nothing is left to train, so the weights are not needed either.
                if self._config.last_save_in_hf and not self._ranks.ask_first(lambda: HuggingFaceFormat.is_at(path)):
                    self._ranks.ask_first(lambda: self._convert_to_hf(step))  # the run was killed while it did
                    self._ranks.ask_first(lambda: self._remove_old(step))
                train_state = self._states["train_state"]
                train_state.load_state_dict({**train_state.state_dict(), "step": step})
                logger.info(f"The run is complete: {path} holds the weights after its last step")
            elif step == 0:  # a seed checkpoint
                self._load(path, (), excluded=())
            else:
                self._load_own(path)
                if step >= self._steps and self._config.last_save_in_hf and self._ranks.is_first:
                    logger.warning(
                        f"{path} is the run's last checkpoint already, and not in Hugging Face's format:"
                        f" python scripts/convert_checkpoint.py to_hf {path} <new folder> writes one that is"
                    )
        except UnusableCheckpointError as error:
            older = self._ranks.ask_first(lambda: self._find_usable(before=step))
            if older is None:
                raise
            raise CheckpointError(f"{error}. To continue from step {older}: --checkpoint.load_step {older}") from error

    def _load_own(self, path: Path) -> None:
        """Leave out what exclude_from_loading says, unless the run that saved this has obeyed the same option already:
        a run that is started again, by torchrun or by the same command, continues.
        """
        excluded = self._config.exclude_from_loading
        if excluded and excluded == self._ranks.ask_first(lambda: self._folder.excluded_before(path)):
            try:
                return self._load(path, STATES, excluded=())
            except DataloaderStateError:  # the layout has changed once more
                if "dataloader" not in excluded:
                    raise
                excluded = ["dataloader"]
        if "train_state" in excluded:  # the next start would take the newest checkpoint, not those of the new count
            raise CheckpointError(
                "checkpoint.exclude_from_loading has train_state, so this run would count from step 0 in a folder that"
                f" has {path}; start it in another job.dump_folder, with --checkpoint.initial_load_path {path}"
                " --checkpoint.initial_load_model_only False"
            )
        return self._load(path, STATES, excluded=excluded)

    def _find_usable(self, *, before: int) -> int | None:
        for step in reversed([step for step in self._folder.steps() if step < before]):
            with suppress(CheckpointError):
                if not _holds_weights_only(self._folder.of(step)):
                    return step
        return None

    def _load(self, path: Path, names: Iterable[str], *, excluded: Iterable[str]) -> None:
        """Load the weights and the named states, but for those excluded."""
        began = time.monotonic()
        left_out = set(excluded) | ({"rng"} if "train_state" in excluded else set())
        names = [name for name in names if name not in left_out]
        if self._ranks.ask_first(lambda: HuggingFaceFormat.is_at(path)):
            raise UnusableCheckpointError(
                f"{path} holds Hugging Face safetensors, only weights; a new run can start from them"
                f" with --checkpoint.initial_load_path {path} --checkpoint.initial_load_in_hf"
            )
        metadata = self._ranks.together(partial(read_metadata, path))
        shapes = self._ranks.gather({name: tuple(weight.shape) for name, weight in self._weights().items()})
        check_weights(path, metadata, {name: shape for part in shapes for name, shape in part.items()})
        self._check_states(path, metadata, names)
        # First what is small: the data loader may find that it cannot go on there.
        self._read(path, metadata, {}, [name for name in names if name != "optimizer"])
        self._read(path, metadata, dict(self._weights()), [name for name in names if name == "optimizer"])
        if self._ranks.is_first:
            logger.info(f"Loaded {', '.join(['model', *names])} from {path} in {time.monotonic() - began:.2f} s")

    def _check_states(self, path: Path, metadata: Metadata, names: list[str]) -> None:
        held = {key.split(".")[0] for key in metadata.state_dict_metadata}
        missing = [name for name in names if name not in held]
        if names and missing == names:
            raise UnusableCheckpointError(
                f"{path} holds only weights, so this run cannot be continued from it; a new one can start from them"
                f" with --checkpoint.initial_load_path {path} --checkpoint.initial_load_model_only True"
            )
        if missing:
            excluded = ",".join([*self._config.exclude_from_loading, *missing])
            raise CheckpointError(
                f"{path} does not hold {', '.join(missing)};"
                f" to go on without, add --checkpoint.exclude_from_loading {excluded}"
            )

    def _read(self, path: Path, metadata: Metadata, state: dict[str, Any], names: list[str]) -> None:
        """Fill the tensors in `state`, and hand each named state its part of the checkpoint."""
        for name in names:
            state |= self._state(name)
        for key in [key for key in state if key.startswith(("dataloader.", "rng."))]:
            if key not in metadata.state_dict_metadata:
                del state[key]  # of a rank that the saving run did not have: for the state itself to judge
        with describing(path):
            load(state, storage_reader=CheckpointReader(path), process_group=self._ranks.group)
        for name in names:
            prefix = f"{name}."
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self._ranks.together(partial(self._states[name].load_state_dict, part))

    # What is saved and loaded: live tensors, not copies

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight for part in self._model_parts for name, weight in part.state_dict().items()}

    def _state(self, name: str) -> dict[str, Any]:
        return {f"{name}.{key}": value for key, value in self._states[name].state_dict().items()}

    def _everything(self) -> dict[str, Any]:
        everything: dict[str, Any] = dict(self._weights())
        for name in STATES:
            everything |= self._state(name)
        return everything


class RandomState:
    """Python's and torch's random number generators, each rank's own. A rank that has none saved keeps those it has."""

    def __init__(self, rank: int):
        self._key = f"rank_{rank}"

    def state_dict(self) -> dict[str, bytes]:
        states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {self._key: pickle.dumps(states)}

    def load_state_dict(self, state_dict: dict[str, bytes]) -> None:
        if self._key not in state_dict:
            return
        states = pickle.loads(state_dict[self._key])
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def _holds_weights_only(path: Path) -> bool:
    if HuggingFaceFormat.is_at(path):
        return True
    return not any(key.startswith("optimizer.") for key in read_metadata(path).state_dict_metadata)


def build_checkpoint_manager(
    checkpoint: Checkpoint,
    *,
    dump_folder: str,
    model_parts: Sequence[nn.Module],
    optimizer: Stateful,
    lr_scheduler: Stateful,
    dataloader: Stateful,
    train_state: Stateful,
    steps: int,
    options: Callable[[], str] = lambda: "",
    is_restart: bool = False,
    adapter: StateDictAdapter | None = None,
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
        adapter, tokenizer_path, bos_id, eos_id: for Hugging Face's format.

    Raises:
        CheckpointError: the folder of checkpoints cannot be written, or the model has no Hugging Face format and one
            is asked for.
    """
    if adapter is None and (checkpoint.last_save_in_hf or checkpoint.initial_load_in_hf):
        option = "last_save_in_hf" if checkpoint.last_save_in_hf else "initial_load_in_hf"
        raise CheckpointError(
            f"checkpoint.{option}=true, and this model family has no Hugging Face format; leave it off"
        )
    ranks = Ranks(dist.new_group(backend="gloo", timeout=TIMEOUT))
    path = Path(dump_folder) / checkpoint.folder
    folder = CheckpointFolder(path, run=ranks.ask_first(lambda: secrets.token_hex(4)))
    if checkpoint.enable_checkpoint:
        ranks.ask_first(folder.create)
    background = None
    if checkpoint.enable_checkpoint and checkpoint.async_mode != "disabled":
        background = BackgroundSaver(pinned=checkpoint.async_mode == "async_with_pinned_mem")
    hugging_face = None
    if adapter is not None:
        tokenizer = Path(tokenizer_path) if tokenizer_path is not None else None
        hugging_face = HuggingFaceFormat(adapter, tokenizer_path=tokenizer, bos_id=bos_id, eos_id=eos_id)
    return CheckpointManager(
        checkpoint,
        folder=folder,
        ranks=ranks,
        model_parts=model_parts,
        states={
            "optimizer": optimizer,
            "lr_scheduler": lr_scheduler,
            "dataloader": dataloader,
            "train_state": train_state,
            "rng": RandomState(ranks.rank),
        },
        steps=steps,
        options=options,
        is_restart=is_restart,
        background=background,
        hugging_face=hugging_face,
    )


__all__ = ["CheckpointManager", "build_checkpoint_manager"]

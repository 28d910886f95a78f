"""How a run starts: from which checkpoint, its own or another's, and with which parts of it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchtitan.checkpoint.contents import Contents
from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import STATES, UnusableCheckpointError, read_metadata
from torchtitan.components.data_state import DataloaderStateError
from torchtitan.config.errors import CheckpointError
from torchtitan.config.sections import Checkpoint
from torchtitan.protocols.hf_folder import holds_hf_weights
from torchtitan.tools.logging import logger


@dataclass(frozen=True)
class Start:
    """All ranks make the same calls."""

    config: Checkpoint
    folder: CheckpointFolder
    ranks: Ranks
    contents: Contents
    hugging_face: HuggingFaceFormat | None
    steps: int
    """At which the run is complete."""
    is_restart: bool
    """torchrun has started the processes again: load_step was obeyed before."""

    def load(self) -> bool:
        """Continue from the run's own checkpoint, or else start from initial_load_path; False if there is neither.

        A checkpoint that is damaged or does not fit is a CheckpointError, never a reason to take an older one.
        """
        config = self.config
        if config.enable_checkpoint and (step := self._choose_step()) is not None:
            self._load_run(step)
        elif config.initial_load_path is None:
            return False
        elif config.initial_load_in_hf:
            assert self.hugging_face is not None
            path = Path(config.initial_load_path)
            self.ranks.together(partial(self.hugging_face.load, path, self.contents.weights()))
            logger.info(f"Loaded the model from Hugging Face safetensors in {path}")
        else:
            path, names = Path(config.initial_load_path), () if config.initial_load_model_only else STATES
            if self.hugging_face is not None:  # a checkpoint that was converted from its format has a config.json
                self.ranks.together(partial(self.hugging_face.check_config, path))
            self.contents.load(path, names, excluded=config.exclude_from_loading)
        return True

    def _choose_step(self) -> int | None:
        steps, leftovers = self.ranks.ask_first(lambda: (self.folder.steps(), self.folder.leftovers()))
        if leftovers and self.ranks.is_first:
            names = ", ".join(path.name for path in leftovers)
            logger.warning(f"Not whole, ignored, and removed after the next save: {names} in {self.folder.path}")
        wanted = self.config.load_step
        # torchrun counts restarts machine by machine: one that has replaced another counts none
        if wanted == -1 or any(self.ranks.gather(self.is_restart)):
            return steps[-1] if steps else None
        if wanted not in steps:
            there_are = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"checkpoint.load_step={wanted}: no such step in {self.folder.path}, {there_are}")
        if wanted != steps[-1] and self.ranks.is_first:
            newer = ", ".join(f"step-{step}" for step in steps if step > wanted)
            logger.warning(
                f"{self.folder.path} has newer checkpoints ({newer}), from which a start without"
                " checkpoint.load_step would continue; remove them if this run replaces theirs"
            )
        return wanted

    def _load_run(self, step: int) -> None:
        path, is_complete = self.folder.of(step), step >= self.steps
        if self.hugging_face is not None:
            self.ranks.together(partial(self.hugging_face.check_config, path))
        try:
            if is_complete and self.ranks.ask_first(lambda: _holds_weights_only(path)):
                # Nothing is left to train, so the weights are not needed either.
                self._finish_conversion(step)
                self.contents.set_step(step)
                logger.info(f"The run is complete: {path} holds the weights after its last step")
            elif step == 0:  # a seed checkpoint
                self.contents.load(path, (), excluded=())
            else:
                self._load_own(path)
                if is_complete and self.config.last_save_in_hf and self.ranks.is_first:
                    logger.warning(
                        f"{path} is the run's last checkpoint already, and not in Hugging Face's format:"
                        f" python -m torchtitan convert to_hf {path} <new folder> writes one that is"
                    )
        except UnusableCheckpointError as error:
            older = self.ranks.ask_first(lambda: self._find_usable(before=step))
            if older is None:
                raise
            raise CheckpointError(f"{error}. To continue from step {older}: --checkpoint.load_step {older}") from error

    def _finish_conversion(self, step: int) -> None:
        """The run may have been killed in its last conversion."""
        path = self.folder.of(step)
        if self.config.last_save_in_hf and not self.ranks.ask_first(lambda: holds_hf_weights(path)):
            assert self.hugging_face is not None
            self.hugging_face.rewrite(self.folder, step, self.ranks)
            if self.ranks.is_first:
                self.folder.tidy(self.config.keep_latest_k, up_to=step)

    def _load_own(self, path: Path) -> None:
        """Leave out what exclude_from_loading says, unless the run that saved this has obeyed the same option already:
        a run that is started again, by torchrun or by the same command, continues.
        """
        excluded: Sequence[str] = self.config.exclude_from_loading
        if excluded and excluded == self.ranks.ask_first(lambda: self.folder.excluded_before(path)):
            try:
                return self.contents.load(path, STATES, excluded=())
            except DataloaderStateError:  # the data is another once more
                if "dataloader" not in excluded:
                    raise
                excluded = ["dataloader"]
        if "train_state" in excluded:  # the next start would take the newest checkpoint, not those of the new count
            raise CheckpointError(
                "checkpoint.exclude_from_loading has train_state, so this run would count from step 0 in a folder that"
                f" has {path}; start it in another job.dump_folder, with --checkpoint.initial_load_path {path}"
                " --checkpoint.initial_load_model_only False"
            )
        return self.contents.load(path, STATES, excluded=excluded)

    def _find_usable(self, *, before: int) -> int | None:
        for step in reversed([step for step in self.folder.steps() if step < before]):
            with suppress(CheckpointError):
                if not _holds_weights_only(self.folder.of(step)):
                    return step
        return None


def _holds_weights_only(path: Path) -> bool:
    if holds_hf_weights(path):
        return True
    return not any(key.startswith("optimizer.") for key in read_metadata(path).state_dict_metadata)

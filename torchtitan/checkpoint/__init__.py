"""All of saving and loading.

| file | what it holds |
|---|---|
| manager.py | when a run saves, and how a save happens on all ranks; `build_checkpoint_manager` |
| start.py | how a run starts: from which checkpoint, with which parts of it |
| contents.py | what of a run a checkpoint holds, and how it is taken back |
| folder.py | the folder with a run's checkpoints: which there are, how one becomes visible, which go |
| plan.py | who writes what: each rank decides for itself, once |
| write.py | the files of one, written; `save`, on all ranks |
| storage.py | the files of one, read and checked |
| upstream.py | upstream's checkpoints, under our keys |
| background.py | the asynchronous modes: a thread copies, a process writes |
| ranks.py | how all ranks come to one answer |
| hugging_face.py | safetensors and config.json, both ways |
| pretrained.py | a trained model from its path, for commands |

A save, of step 7. T is the trainer's thread; in the asynchronous modes B is its thread beside the training, and W the
process that writes; synchronously T does what B and W do. Every rank runs all lines but those of "rank 0".

    T   state = live weights, moments, counters                          manager.maybe_save
    B   who writes what: as last time? ranks -> ranks; if not: keys of what is no DTensor, ranks -> ranks
                                                                         plan.Planner
    B   copy -> memory shared with W; T waits before the next optimizer step
                                                                         background.Copier
    W   step-7.incomplete-<run>/__<rank>_0.distcp, synced                write.CheckpointWriter
    B   ranks -> rank 0: name, size and digest of what is where in it, or what went wrong
    W   rank 0, if all digests are those of last time: .metadata, .metadata.sha256, as last time
    B   if not: what is where in it, as bytes, ranks -> rank 0; then     write.save
    W   rank 0: .metadata, .metadata.sha256
    W   rank 0: sizes of all files
    B   rank 0: config.toml, excluded_from_loading.txt
    B   rank 0: sync these files and the folder                          folder.publish
    B   rank 0: rename to step-7, sync the parent
    B   rank 0: older ones renamed to step-N.incomplete-removed, then removed; leftovers of killed runs too
    B   all: wait for rank 0                                             manager._write

A crash up to the rename leaves step-7.incomplete-<run>, which no start reads, and which the next save of a later start
removes; the checkpoint before is in charge. Where another step-7 is replaced, it is renamed to
step-7.incomplete-replaced just before: a start that finds that and no step-7 renames it back. A crash after the rename
leaves step-7 whole, and perhaps older ones too many or half removed under a name that no start reads. When W dies
or a rank's copy or write fails, that rank says so where it would have answered with its file's contents: all give
the save up, rank 0 removes the folder, and the run goes on. When T dies, W ends itself.

A load, before the first step, all on T:

    rank 0: whole steps -> all: one of them, or load_step                start._choose_step
    rank 0: .metadata, its digest -> all, which read it each for itself  storage.parse_metadata
    rank 0: the sizes of all files                                       storage.check_files
    all: shapes of the model's weights against those of .metadata        storage.check_weights
    each: lr_scheduler, train_state, rng from the .distcp files; each state takes its own
    rank 0: dataloader, of all ranks -> all
    each: weights and moments, in place, from the entries that overlap its shards
                                                                         contents.load

No rank tells another what it reads. Each entry is read once, into memory, where its checksums are compared and a tensor
or a plain value is made of it: nothing in a checkpoint is run. A load changes no file, so a crash leaves what was
there. An error on one rank ends the load on all, with the file's name and the newest older step that could be loaded.

The files of Hugging Face's format are written when `step-N` in torch's format is whole already, into
step-N.incomplete-<run>: each rank reads the weights of a file, of 5 GB, writes it and waits for the others, as often as
there are files. Rank 0 adds the index and config.json and publishes the folder as above; a start that finds a complete
run without them makes them. Such files are loaded by each rank for itself, and only its shards' rows and columns.
"""

from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.checkpoint.manager import build_checkpoint_manager
from torchtitan.checkpoint.pretrained import check_divisible, find_pretrained
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import load_alone, reason

__all__ = [
    "HuggingFaceFormat",
    "Ranks",
    "build_checkpoint_manager",
    "check_divisible",
    "find_pretrained",
    "load_alone",
    "reason",
]

"""Documents: where they come from, in which order they are read, how they become sequences. Nothing here imports torch.

| file | what it holds |
|---|---|
| registry.py | the datasets by name; register_dataset |
| source.py | what a dataset offers: shards of documents |
| local.py | a path on this machine to its files |
| files.py, parquet.py, tokens.py | text and JSON lines; Parquet; token ids |
| hub.py | whatever Hugging Face `datasets` loads or streams |
| documents.py | dealt to streams, shuffled, endless, resumable |
| packing.py | tokenised, joined, cut into sequences |
| sequences.py | the one order of a run's sequences, and a rank's share of it |

components/dataloader.py puts them together and reads ahead of the step.
"""

from torchtitan.datasets.documents import Dealing, DocumentStreams, Position, choose_dealing
from torchtitan.datasets.files import TextFiles
from torchtitan.datasets.hub import HuggingFaceStream
from torchtitan.datasets.local import open_path
from torchtitan.datasets.packing import Cursor, pack
from torchtitan.datasets.registry import find_validation_dataset, get_dataset_names, open_dataset, register_dataset
from torchtitan.datasets.sequences import Division, Place, SequenceReader, SourcePlace
from torchtitan.datasets.source import Source, Text

__all__ = [
    "Cursor",
    "Dealing",
    "Division",
    "DocumentStreams",
    "HuggingFaceStream",
    "Place",
    "Position",
    "SequenceReader",
    "Source",
    "SourcePlace",
    "Text",
    "TextFiles",
    "choose_dealing",
    "find_validation_dataset",
    "get_dataset_names",
    "open_dataset",
    "open_path",
    "pack",
    "register_dataset",
]

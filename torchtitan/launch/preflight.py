"""The check before the processes of a run start: the options, and what they point to on this machine.

Imports no torch, so that a mistake costs a fraction of a second.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from torchtitan.components.tokenizer import PATH_ADVICE, find_tokenizer_file, get_download_advice
from torchtitan.config.errors import CheckpointError, ConfigError, DatasetError, TokenizerError, raise_all
from torchtitan.config.job_config import JobConfig
from torchtitan.config.manager import REPOSITORY, ConfigManager
from torchtitan.config.mixture import parse_mixture
from torchtitan.config.schema import either, meant_or_known, nearest
from torchtitan.datasets import get_dataset_names, open_dataset
from torchtitan.datasets.local import check_path
from torchtitan.launch.environment import about_compiler, about_wandb_key
from torchtitan.protocols.custom_import import check_custom_import
from torchtitan.protocols.hf_folder import check_hf_config, check_weight_names, read_weight_files
from torchtitan.protocols.train_spec import check_vocab_size, find_family, find_model, get_run_args, validate_run
from torchtitan.tools.packages import is_installed, is_liger_installed


def check(options: Sequence[str], *, nproc: int, nnodes: int = 1, num_gpus: int | None = None) -> Path:
    """Raise ConfigError with everything that is wrong with a run's options or with what they point to.

    Creates the run's output folder, to know that it can be written, and returns it. `--help` among the options prints
    and raises SystemExit.

    Args:
        nproc: processes on this machine, of which there are `nnodes`.
        num_gpus: of this machine; 0 means that the run is on CPU, None that it is not known.
    """
    config = ConfigManager().parse_args(options, warn=False)
    validate_run(
        config,
        world_size=nproc * nnodes,
        local_world_size=nproc,
        num_gpus=num_gpus,
        liger_installed=is_liger_installed(),
    )
    raise_all(
        [
            *(about_compiler(num_gpus) if config.training.compile and num_gpus is not None else ()),
            *find_what_is_missing(config),
        ]
    )
    outputs = Path(config.job.dump_folder)
    check_writable(outputs, given=f"job.dump_folder={outputs}")
    return outputs


def about_other_numbers(options: Sequence[str], *, nproc: int, nodes: range) -> Iterator[str]:
    """What is to be known of a run that may be started again on more machines than the fewest of `nodes`."""
    if len(nodes) == 1:
        return
    config = ConfigManager().parse_args(options, warn=False)
    given = f"--nnodes {nodes[0]}:{nodes[-1]}"
    if config.training.global_batch_size == -1:
        yield (
            f"{given}: training.global_batch_size is not set, so each number of machines has a global batch of its own;"
            " set it for a run that goes on as if nothing had been lost"
        )
    refused: dict[int, ConfigError] = {}
    for n in nodes[1:1024]:
        try:
            validate_run(config, world_size=nproc * n, local_world_size=nproc, liger_installed=is_liger_installed())
        except ConfigError as error:
            refused[n] = error
    if refused:
        numbers = f"{', '.join(map(str, list(refused)[:8]))}{', ...' if len(refused) > 8 else ''}"
        why = next(iter(refused.values()))
        yield f"{given}: the run cannot go on with {numbers} machines: {why}"


def find_what_is_missing(config: JobConfig) -> list[ConfigError]:
    """What the options point to and this machine lacks: packages, tokenizer, data, a checkpoint."""
    return [
        *_about_packages(config),
        *_about_tokenizer(config),
        *_about_dataset(config, "training"),
        *(_about_dataset(config, "validation") if config.validation.enabled else ()),
        *_about_initial_checkpoint(config),
    ]


def check_writable(folder: Path, *, given: str) -> None:
    """Create the folder if need be, and raise ConfigError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{given} cannot be written: {error.strerror}; name another folder") from None


def get_vocab_size(tokenizer_json: Path) -> int:
    """One more than the largest token id in a tokenizer.json; far faster than loading the tokenizer."""
    tokenizer = json.loads(tokenizer_json.read_bytes())
    vocab = tokenizer["model"]["vocab"]  # token -> id, or a list in the order of the ids
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max(chain(ids, (token["id"] for token in tokenizer.get("added_tokens", []))), default=-1)


def _about_packages(config: JobConfig) -> Iterator[ConfigError]:
    try:
        check_custom_import(config.experimental.custom_import)
    except ConfigError as error:
        yield error
    if config.metrics.enable_wandb and not is_installed("wandb"):
        yield ConfigError("metrics.enable_wandb needs the package wandb: pip install wandb")
    elif config.metrics.enable_wandb:
        yield from about_wandb_key()


def _about_tokenizer(config: JobConfig) -> Iterator[ConfigError]:
    path = Path(config.model.tokenizer_path)
    try:
        if path.exists():
            check_vocab_size(config, get_vocab_size(find_tokenizer_file(path)))
        else:
            how = get_download_advice(path, "tokenizer.json", "tokenizer_config.json")
            yield TokenizerError(f"{path} {_is_absent(path, Path.cwd(), REPOSITORY)}; {PATH_ADVICE}{how}")
    except TokenizerError as error:
        yield error
    except OSError as error:
        yield TokenizerError(f"model.tokenizer_path={path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError):
        yield TokenizerError(f"model.tokenizer_path={path} is not in the format of Hugging Face's tokenizer.json")


def _is_absent(path: Path, *looked_in: Path) -> str:
    """That it does not exist, and where a relative one was looked for."""
    return "does not exist" + ("" if path.is_absolute() else f" in {either(dict.fromkeys(looked_in))}")


def _about_dataset(config: JobConfig, section: Literal["training", "validation"]) -> Iterator[ConfigError]:
    options = getattr(config, section)
    names, given = get_dataset_names(), f"{section}.dataset={options.dataset}"
    if options.dataset is not None and options.dataset not in names:
        if not config.experimental.custom_import:  # which may register the dataset later
            yield DatasetError(f"{given} is unknown; {meant_or_known(options.dataset, names)}")
    elif options.dataset == "c4_test" and options.dataset_path is None:  # to open the others takes long
        try:
            open_dataset(options.dataset)
        except DatasetError as error:
            yield DatasetError(f"{given}: {error}")
    for part in parse_mixture(config.training.datasets) if section == "training" else ():
        if part.name not in names and not config.experimental.custom_import:
            path = Path(part.name).expanduser()
            if not path.exists() and (meant := nearest(part.name, names)):
                yield DatasetError(
                    f"training.datasets has {part.name}, no dataset and no path; did you mean {either(meant)}?"
                )
            else:
                yield from _about_dataset_path("training.datasets: ", path)
    if options.dataset_path is not None:
        yield from _about_dataset_path(f"{section}.dataset_path=", Path(options.dataset_path))


def _about_dataset_path(given: str, path: Path) -> Iterator[ConfigError]:
    try:
        check_path(path)
    except DatasetError as error:
        yield DatasetError(f"{given}{error}")


def _about_initial_checkpoint(config: JobConfig) -> Iterator[ConfigError]:
    path, checkpoint = config.checkpoint.initial_load_path, config.checkpoint
    own = Path(config.job.dump_folder, checkpoint.folder)
    if checkpoint.enable_checkpoint and any(own.glob("step-*")):
        return  # the run continues from its own, and the other is not needed any more
    given = f"checkpoint.initial_load_path={path}"
    try:
        if path is not None and not Path(path).exists():
            how = get_download_advice(Path(path)) if checkpoint.initial_load_in_hf else ""
            where = _is_absent(Path(path), Path.cwd())
            yield CheckpointError(f"{given} {where}; it takes the folder of a checkpoint{how}")
        elif path is not None and checkpoint.initial_load_in_hf:
            _check_hf_folder(Path(path), config)
    except OSError as error:
        yield CheckpointError(f"{given} cannot be read: {error.strerror}")
    except CheckpointError as error:
        yield error


def _check_hf_folder(path: Path, config: JobConfig) -> None:
    """Raise CheckpointError unless the weights there are the model's: all of them, and no others."""
    try:
        model = find_model(config)
    except ConfigError:  # validate_run tells of it
        return
    hf = find_family(config.model).hf if model is not None else None
    if hf is None:
        return  # experimental.custom_import may bring the model: it is checked when it is loaded
    args = get_run_args(config.model, max_seq_len=config.max_seq_len)
    check_hf_config(path, hf.write(args))
    needed, copies = hf.get_names(args).values(), hf.get_copies(args)
    check_weight_names(path, read_weight_files(path), needed=needed, known=[*needed, *copies])

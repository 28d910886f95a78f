"""Whatever happens to a run, it goes on from its last checkpoint as if nothing had, and says what happened.

"As if nothing had": loss and gradient norm of every step, in each of its lives, have the bits of a run that was left
alone. The last test of a fault is therefore always another start.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.finished_run import load_weights
from tests.full_disk import small_disk
from tests.integration_tests.lives import (
    OPTIONS,
    REPO,
    TIMEOUT_S,
    Life,
    before_step,
    checkpoints,
    errors,
    last_step,
    read_lines,
    read_records,
    read_steps,
    signal_at,
    train,
    write_data,
)
from tests.processes import find_worker, is_running, wait_until
from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.components import dataloader
from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.samples import Sampler
from torchtitan.components.validate import Validator
from torchtitan.config.errors import EXIT_MISTAKE
from torchtitan.datasets import SequenceReader
from torchtitan.distributed import utils
from torchtitan.protocols.hf_folder import holds_hf_weights
from torchtitan.train import EXIT_PREEMPTED, Trainer

STEPS, SHORT_STEPS, PAIR_STEPS = 200, 60, 80
MODES = ["disabled", "async"]  # without a GPU async_with_pinned_mem is the same as async
SAVING = f"--training.steps {STEPS} --checkpoint.enable_checkpoint --checkpoint.interval 5"
SHORT_SAVING = f"{SAVING} --training.steps {SHORT_STEPS}"
PAIR_SAVING = f"{SAVING} --training.steps {PAIR_STEPS} --parallelism.data_parallel_shard_degree 2"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that saved nothing on its way."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, f"{SAVING} --checkpoint.interval 1000000")
    return folder


@pytest.fixture(scope="module")
def undisturbed_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of fewer steps."""
    folder = tmp_path_factory.mktemp("undisturbed_short") / "run"
    train(folder, f"{SHORT_SAVING} --checkpoint.interval 1000000")
    return folder


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes."""
    folder = tmp_path_factory.mktemp("undisturbed_pair") / "run"
    train(folder, f"{PAIR_SAVING} --checkpoint.interval 1000000", world_size=2)
    return folder


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    """Each life of the run in `folder` trained the undisturbed run's steps, and together they trained all."""
    records, expected = read_records(folder), read_steps(undisturbed)
    assert list(records) == list(expected)
    for step, said in records.items():
        assert set(said) == {expected[step]}, f"step {step}"


# Kills


def kill_while_starting(life: Life, draw: random.Random) -> None:
    time.sleep(draw.uniform(0, 0.5))


def kill_while_training(life: Life, draw: random.Random) -> None:
    """After at least one save, since a third one waits for the first."""
    begin = last_step(life.folder)
    life.wait_for(lambda: last_step(life.folder) != begin)
    life.wait_for_step(last_step(life.folder) + draw.randint(10, 16))
    time.sleep(draw.uniform(0, 0.01))


def kill_as_a_save_begins(life: Life, draw: random.Random) -> None:
    wait_for_new_file(life, "step-*.incomplete-*", skip=draw.randint(0, 1))
    time.sleep(draw.uniform(0, 0.005))


def kill_as_bytes_are_written(life: Life, draw: random.Random) -> None:
    wait_for_new_file(life, "step-*.incomplete-*/*.distcp", skip=draw.randint(0, 1))


KILLS = [kill_while_starting, kill_as_a_save_begins] + 2 * [kill_while_training, kill_as_bytes_are_written]


def wait_for_new_file(life: Life, pattern: str, *, skip: int) -> None:
    seen = find_files(life, pattern)
    for _ in range(skip + 1):
        life.wait_for(lambda: not seen.issuperset(find_files(life, pattern)), interval_s=0.0002)
        seen.update(find_files(life, pattern))


def find_files(life: Life, pattern: str) -> set[Path]:
    """What matches among the run's checkpoints; nothing where a save gets its name while they are listed."""
    with suppress(FileNotFoundError):
        return set((life.folder / "checkpoint").glob(pattern))
    return set()


@pytest.mark.parametrize("mode", MODES)
def test_killed_again_and_again_a_run_ends_with_the_bits_of_one_left_alone(tmp_path, undisturbed, mode):
    folder = tmp_path / "run"
    options = f"{SAVING} --checkpoint.async_mode {mode} --checkpoint.keep_latest_k 2"
    draw = random.Random(mode)
    kills = draw.sample(KILLS, len(KILLS))
    half_written: set[Path] = set()
    children: list[int] = []
    said = ""
    while kills:
        life = Life(folder, options)
        kills[-1](life, draw)
        children += life.children()
        life.kill()
        assert life.wait() == [-signal.SIGKILL], life.last_words()
        said += life.output()
        left_over = find_files(life, "step-*.incomplete-*") - half_written
        half_written |= left_over
        if left_over or kills[-1] in (kill_while_starting, kill_while_training):
            kills.pop()  # otherwise the save was over when the kill came, and another life is needed

    train(folder, options)
    assert_as_undisturbed(folder, undisturbed)
    assert any(len(lives) > 1 for lives in read_records(folder).values())
    assert "Not whole, ignored, and removed after the next save: step-" in said
    assert checkpoints(folder) == [f"step-{STEPS - 5}", f"step-{STEPS}"]
    weights, expected = (load_weights(path / f"checkpoint/step-{STEPS}") for path in (folder, undisturbed))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    wait_until(lambda: not any(map(is_running, children)), "the end of a killed trainer's writers", TIMEOUT_S)


@pytest.mark.parametrize("mode", MODES)
def test_sigterm_finishes_the_step_and_saves_it(tmp_path, undisturbed_short, mode):
    hook = partial(signal_at, 22, signal.SIGTERM)
    life = Life(tmp_path / "run", f"{SHORT_SAVING} --checkpoint.async_mode {mode}", hook=hook)
    assert life.wait() == [EXIT_PREEMPTED], life.last_words()
    last = last_step(life.folder)
    assert f"Stopped by SIGTERM after step {last}; it is saved" in life.output()
    assert f"step-{last}" in checkpoints(life.folder)
    stop = json.loads((life.folder / "history.jsonl").read_text().splitlines()[-1])
    assert (stop["event"], stop["step"], stop["saved"]) == ("stop", last, True)
    life = train(life.folder, SHORT_SAVING)
    assert f"Training starts at step {last + 1}" in life.output()
    assert_as_undisturbed(life.folder, undisturbed_short)
    assert all(len(lives) == 1 for lives in read_records(life.folder).values())  # nothing was trained twice


def test_sigterm_is_answered_after_the_step_and_before_a_validation_and_amid_its_texts(tmp_path):
    options = f"{SHORT_SAVING} --validation.enabled --validation.freq 5 --validation.steps 1 --validation.seq_len 32"
    options += f" --validation.dataset_path {REPO}/LICENSE --validation.prompts this --validation.max_new_tokens 3"
    for hook, last in ((ask_to_stop_at_the_second_token, 1), (ask_to_stop_in_step_10, 10)):
        life = Life(tmp_path / "run", options, hook=hook)
        assert life.wait() == [EXIT_PREEMPTED], life.last_words()
        assert f"Stopped by SIGTERM after step {last}; it is saved" in life.output()
    assert [line["step"] for line in read_lines(life.folder) if "grad_norm" not in line] == [1, 5]
    events = [json.loads(line) for line in (life.folder / "history.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "text"] == [5]


def ask_to_stop_at_the_second_token() -> None:
    next_tokens, asked = Sampler._next_tokens, itertools.count(1)

    def ask(self: Sampler, *texts: torch.Tensor) -> torch.Tensor:
        if next(asked) == 2:
            Sampler._next_tokens = None  # there is no third
            ask_to_stop()
        return next_tokens(self, *texts)

    Sampler._next_tokens = ask


def ask_to_stop_in_step_10() -> None:
    train_step = Trainer.train_step

    def then_ask(trainer: Trainer, batches: Iterator[Batch]) -> bool:
        stop = train_step(trainer, batches)
        if trainer.step == 10:
            ask_to_stop()
        return stop

    Trainer.train_step = then_ask


@pytest.mark.parametrize("moment", ["start", "conversion"])
def test_sigterm_ends_at_once_what_has_nothing_to_lose(tmp_path, moment):
    options = "--training.steps 2 --checkpoint.enable_checkpoint --checkpoint.last_save_in_hf"
    hook = {"start": ask_to_stop_at_the_start, "conversion": ask_to_stop_in_the_conversion}[moment]
    life = Life(tmp_path / "run", options, hook=hook)
    assert life.wait() == [-signal.SIGTERM], life.last_words()
    assert checkpoints(life.folder) == ([] if moment == "start" else ["step-2"])
    life = train(life.folder, options)
    assert holds_hf_weights(life.folder / "checkpoint/step-2")


def ask_to_stop_at_the_start() -> None:
    Trainer.train_step = ask_to_stop


def ask_to_stop_in_the_conversion() -> None:
    HuggingFaceFormat.rewrite = ask_to_stop


def test_sigterm_to_one_rank_stops_all_at_the_same_step_whatever_they_are_at(tmp_path, undisturbed_pair):
    folder = tmp_path / "run"
    validating = "--validation.enabled --validation.freq 100 --validation.seq_len 32 --validation.dataset_path"
    options = f"{PAIR_SAVING} {validating} {REPO}/LICENSE"
    for hook, last in ((ask_in_validation, 1), (ask_in_a_save, 5), (ask_in_a_step_without_data, 19)):
        life = Life(folder, options, world_size=2, hook=hook)
        assert life.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED], life.last_words()
        assert f"Stopped by SIGTERM after step {last}; it is saved" in life.output()
        assert f"step-{last}" in checkpoints(folder)
    train(folder, PAIR_SAVING, world_size=2)
    assert_as_undisturbed(folder, undisturbed_pair)
    assert all(len(lives) == 1 for lives in read_records(folder).values())  # nothing was trained twice
    assert all("grad_norm" in line for line in read_lines(folder))  # no validation came to its end


def ask_to_stop(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ask_in_validation() -> None:
    """Of step 1, on rank 1, in the first batch; a second one never comes to it."""
    deal, sum_and_count = dataloader._deal, Validator._sum_and_count

    def deal_one(*args: Any) -> Iterator[Any]:
        yield next(deal(*args))
        threading.Event().wait()

    def ask_and_count(self: Validator, batch: Batch) -> torch.Tensor:
        ask_to_stop()
        return sum_and_count(self, batch)

    if os.environ["RANK"] == "1":
        dataloader._deal, Validator._sum_and_count = deal_one, ask_and_count


def ask_in_a_save() -> None:
    """Of step 5, on rank 0, which alone makes it visible; neither then begins step 6."""
    publish = CheckpointFolder.publish

    def ask_and_publish(self: CheckpointFolder, path: Path, step: int) -> None:
        if step == 5:
            ask_to_stop()
        publish(self, path, step)

    CheckpointFolder.publish = ask_and_publish


def ask_in_a_step_without_data() -> None:
    """The 15th, of which rank 0 has its batch; the other's never comes."""
    read, steps = SequenceReader.read, itertools.count(1)

    def read_14(self: SequenceReader) -> Iterator[Any]:
        yield from itertools.islice(read(self), 14)
        threading.Event().wait()

    if os.environ["RANK"] == "1":
        SequenceReader.read, dataloader.STOP_TIMEOUT_SECONDS = read_14, 0
        before_step(lambda trainer: ask_to_stop() if next(steps) == 15 else None)


def test_one_tensor_parallel_rank_without_data_takes_the_step_that_the_other_has_queued(tmp_path):
    """In the fused loss too, where what the ranks tell each other is as large as there are labels."""
    options = f"{SAVING} --parallelism.tensor_parallel_degree 2 --liger_kernel.enable_fused_linear_cross_entropy"
    options += " --training.steps 30 --comm.train_timeout_seconds 20"
    life = Life(tmp_path / "run", options, world_size=2, hook=ask_in_a_step_without_data_of_few_labels)
    assert life.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED], life.last_words()
    assert "Stopped by SIGTERM after step 14; it is saved" in life.output()


def ask_in_a_step_without_data_of_few_labels() -> None:
    read = SequenceReader.read

    def read_few_labels(self: SequenceReader) -> Iterator[Any]:
        for rows, *rest in read(self):
            rows[:, 9:] = IGNORE_INDEX
            yield rows, *rest

    SequenceReader.read = read_few_labels
    ask_in_a_step_without_data()


def test_torchrun_restarts_after_a_dead_worker_and_passes_sigterm_on(tmp_path, undisturbed_pair):
    folder, log = tmp_path / "run", tmp_path / "log"
    write_data(tmp_path / "data.jsonl")
    options = f"{OPTIONS} --training.dataset_path {tmp_path}/data.jsonl --job.dump_folder {folder} {PAIR_SAVING}"
    command = f"-m torchtitan.launch --nproc_per_node 2 --max_restarts 2 {options}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        launcher = subprocess.Popen([sys.executable, *command], cwd=REPO, env=environment, stdout=file, stderr=file)
    try:
        for num_restarts, rank in enumerate((1, 0), start=1):  # rank 0 is where the others meet
            begin = last_step(folder)
            wait_until(
                lambda begin=begin: last_step(folder) >= begin + 8 or launcher.poll() is not None, seconds=TIMEOUT_S
            )
            os.kill(find_worker(launcher.pid, rank), signal.SIGKILL)
            wait_until(
                lambda n=num_restarts: log.read_text().count("Training starts") > n or launcher.poll() is not None,
                seconds=TIMEOUT_S,
            )
        # not during the start, which SIGTERM ends at once
        wait_until(lambda: "step: " in log.read_text().rpartition("Training starts")[2], seconds=TIMEOUT_S)
        launcher.terminate()
        assert launcher.wait(TIMEOUT_S) == EXIT_PREEMPTED, log.read_text()
    finally:
        launcher.kill()
    said = log.read_text()
    assert said.count("will restart") == 2
    assert re.search(r"Stopped by SIGTERM after step (\d+); it is saved", said)[1] == str(last_step(folder))
    assert "Traceback" not in said
    train(folder, PAIR_SAVING, world_size=2)
    assert_as_undisturbed(folder, undisturbed_pair)


# Ranks that leave the others alone


def test_hung_rank_is_named_when_the_time_is_out(tmp_path):
    """The first one's neighbour says so, and the second one's: of two runs that wait for it side by side."""
    options = f"{PAIR_SAVING} --training.steps 100000 --comm.train_timeout_seconds 5"
    lives = [Life(tmp_path / f"hung{rank}", options, world_size=2) for rank in (0, 1)]
    for hung, life in enumerate(lives):
        life.wait_for_step(7)
        life.signal(signal.SIGSTOP, hung)
    for other, life in zip((1, 0), lives, strict=True):
        life.processes[other].join(TIMEOUT_S)
        assert life.processes[other].exitcode == 1
        life.kill()
        (message,) = errors(life, other)
        assert re.fullmatch(
            rf"ERROR - LostRankError: a collective of rank {other} failed in step \d+ \(Timed out waiting 5000ms .*\):"
            r" another rank ended or hangs, or was slower than \[comm\] allows",
            message,
        )


def launch_with_fault(tmp_path: Path, when: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, of which the second fails."""
    data = tmp_path / "data.txt"
    data.write_text("words of a document " * 1000)
    (tmp_path / "fault.py").write_text(FAULT_ON_RANK_1)
    options = f"{OPTIONS} {PAIR_SAVING} --training.dataset_path {data} --job.dump_folder {tmp_path / 'run'}"
    options += " --experimental.custom_import fault"
    return subprocess.run(
        [sys.executable, "-m", "torchtitan.launch", "--nproc_per_node", "2", *flags, *options.split()],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO), "FAULT_COMES": when},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("when", ["amid the run", "as all are to stop"])
def test_launcher_names_the_rank_that_failed_and_shows_its_words(tmp_path, when):
    """Not the one whose collective fails because of it, which is rank 0 here, whose log is shown."""
    result = launch_with_fault(tmp_path, when)
    how = f"exited with status {EXIT_MISTAKE} (which no restart heals)"
    _, found, words = result.stderr.partition(f"Rank 1 {how}. The end of its output:\n")
    assert found, result.stderr
    assert "DatasetError: a fault" in words
    assert "LostRankError" not in result.stdout + result.stderr
    assert result.returncode == (EXIT_MISTAKE if when == "amid the run" else EXIT_PREEMPTED)


def test_a_failure_that_a_restart_has_healed_is_not_told_as_all_are_stopped(tmp_path):
    result = launch_with_fault(tmp_path, "before a restart", "--max_restarts", "1")
    assert "RuntimeError: a fault" not in result.stderr
    assert "Rank 1" not in result.stderr
    assert "will restart" in result.stderr
    assert result.returncode == EXIT_PREEMPTED


# Rank 0 learns of it by its collective: "as all are to stop" after the launcher has asked it to, as rank 0 wants. After
# a restart that is all that happens.
FAULT_ON_RANK_1 = """
import os, signal, time
import tests.integration_tests.tiny_llama3
import __main__ as train  # python -m torchtitan.train
from torchtitan.config.errors import DatasetError

train_step = train.Trainer.train_step
rank, when = os.environ["RANK"], os.environ["FAULT_COMES"]
is_restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"

def stop_all(self):
    if rank == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    while not self.guard.asked_to_stop():
        time.sleep(0.01)

def fail(self, batches):
    if is_restarted:
        if rank == "0" and not self.guard.asked_to_stop():
            stop_all(self)
    elif self.step == 3:
        if when == "as all are to stop":
            stop_all(self)
        if rank == "1":
            raise RuntimeError("a fault") if when == "before a restart" else DatasetError("a fault")
    return train_step(self, batches)

train.Trainer.train_step = fail
"""


# Numbers that are not finite


@pytest.mark.parametrize(("log_freq", "world_size"), [(1, 1), (100, 1), (1, 2)])
def test_weight_that_is_inf_ends_the_run_before_the_optimizer_spreads_it(tmp_path, log_freq, world_size):
    options = f"--training.steps 20 --metrics.log_freq {log_freq}"
    life = train(tmp_path / "run", options, world_size=world_size, hook=put_inf_into_a_weight, status=1)
    for rank in range(world_size):
        message, unchanged = errors(life, rank)
        assert message.startswith("ERROR - NonFiniteError: at step 4 the ")
        assert "the weights are left as they were before" in message
        assert "optimizer.lr" in message
        assert unchanged == "weights and moments are unchanged: True"
    assert last_step(life.folder) == (3 if log_freq == 1 else 1)


def put_inf_into_a_weight() -> None:
    def poison(self: Trainer) -> None:
        weight = self.runner.model_parts[0].norm.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if os.environ.get("RANK", "0") == "0":  # on one of the ranks
            local.data[0] = torch.inf

    tell_what_changes_from(4, first=poison)


def tell_what_changes_from(step: int, *, first: Callable[[Trainer], None]) -> None:
    """Have the trainer do this before a step, and say at its end whether anything was trained after that."""
    before: dict[str, torch.Tensor] = {}
    close = Trainer.close

    def remember(self: Trainer) -> None:
        if self.step == step:
            first(self)
            before.update(get_state(self))

    def compare(self: Trainer, *, failed: bool) -> None:
        after = get_state(self)
        print("weights and moments are unchanged:", all(torch.equal(before[name], after[name]) for name in before))
        close(self, failed=failed)

    before_step(remember)
    Trainer.close = compare


def get_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights and moments."""
    state = trainer.runner.model_parts[0].state_dict() | trainer.optimizer.state_dict()
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: tensor.clone() for name, tensor in local.items() if not name.endswith(".step")}


SPIKE = 6
"""The step whose gradient is nan, and no other."""


@pytest.mark.parametrize(
    ("steps", "interval"),
    [(20, 100), (20, 3), (SPIKE, 100)],
    ids=["between saves", "at a save", "at the last step"],
)
def test_one_gradient_that_is_nan_leaves_no_trace(tmp_path, steps, interval):
    """The host learns of it a step later, and must not have trained, or saved, that step."""
    saving = f"--checkpoint.enable_checkpoint --metrics.log_freq 100 --checkpoint.interval {interval}"
    life = train(tmp_path / "run", f"--training.steps {steps} {saving}", hook=spoil_one_gradient, status=1)
    message, *kept = errors(life)
    assert message.startswith(f"ERROR - NonFiniteError: at step {SPIKE} the gradient norm is inf or nan")
    assert kept == ["weights and moments are unchanged: True"]
    assert checkpoints(life.folder) == (["step-3"] if interval == 3 else [])


def spoil_one_gradient() -> None:
    get_total_norm = utils.get_total_norm

    def spoil(self: Trainer) -> None:
        spoiled = itertools.chain([torch.nan], itertools.repeat(1))
        utils.get_total_norm = lambda tensors: get_total_norm(tensors) * next(spoiled)

    tell_what_changes_from(SPIKE, first=spoil)


def test_every_group_has_one_time_out_at_the_start_and_another_in_training(tmp_path):
    """Also the groups of axes that are smaller than the world."""
    comm = "--comm.init_timeout_seconds 77 --comm.train_timeout_seconds 66"
    layout = "--parallelism.tensor_parallel_degree 2"
    life = train(tmp_path / "run", f"--training.steps 2 {comm} {layout}", world_size=2, hook=tell_time_outs)
    for rank in range(2):
        assert "time-outs at the start: {77}\n" in life.output(rank)
        assert "time-outs at the end: {66}\n" in life.output(rank)


def tell_time_outs() -> None:
    train = Trainer.train

    def time_outs(trainer: Trainer) -> set[int]:
        groups = [*trainer.mesh.get_groups(), dist.group.WORLD]
        return {group._get_backend(trainer.device).options._timeout.seconds for group in groups}

    def train_and_tell(self: Trainer) -> None:
        print(f"time-outs at the start: {time_outs(self)}")
        train(self)
        print(f"time-outs at the end: {time_outs(self)}", flush=True)

    Trainer.train = train_and_tell


def test_weights_that_the_optimizer_ruined_are_not_saved(tmp_path):
    """The first step's gradient is finite, and its learning rate turns the weights into infinities."""
    options = "--training.steps 1 --checkpoint.enable_checkpoint --optimizer.lr 1e38 --lr_scheduler.warmup_steps 0"
    life = train(tmp_path / "run", f"{options} --optimizer.weight_decay 1e10", status=1)
    (message,) = errors(life)
    assert message.startswith("ERROR - NonFiniteError: at step 1 the optimizer has made weights that are inf or nan")
    assert checkpoints(life.folder) == []


def test_run_that_diverged_goes_on_from_its_last_checkpoint_with_other_values(tmp_path, undisturbed_short):
    folder = tmp_path / "run"
    life = Life(folder, SHORT_SAVING, hook=partial(signal_at, 13, signal.SIGKILL))
    assert life.wait() == [-signal.SIGKILL], life.last_words()
    life = train(folder, f"{SHORT_SAVING} --optimizer.lr 1e30", status=1)
    (message,) = errors(life)
    assert "NonFiniteError: at step " in message
    train(folder, SHORT_SAVING)
    assert_as_undisturbed(folder, undisturbed_short)


# Disks


def test_a_slow_disk_of_the_first_rank_is_waited_for(tmp_path):
    """Longer than any collective of the training may take."""
    options = f"{PAIR_SAVING} --training.steps 17 --checkpoint.keep_latest_k 2 --comm.train_timeout_seconds 5"
    life = train(tmp_path / "run", options, world_size=2, hook=remove_slowly)
    assert life.output().count("slowly") == 1


def remove_slowly() -> None:
    remove = CheckpointFolder.remove

    def remove_later(self: CheckpointFolder, paths: list[Path]) -> None:
        if paths and any(path.exists() for path in paths):
            CheckpointFolder.remove = remove  # once will do
            print("slowly", flush=True)
            time.sleep(6)
        remove(self, paths)

    CheckpointFolder.remove = remove_later


@pytest.mark.parametrize("mode", MODES)
def test_full_disk_costs_the_saves_but_not_the_run(tmp_path, undisturbed_short, mode):
    options = f"{SHORT_SAVING} --checkpoint.async_mode {mode} --checkpoint.interval 15"
    options += " --checkpoint.last_save_model_only False"
    disk = tmp_path / "disk"
    with small_disk(disk, 3 * 2**20):  # room for one checkpoint
        folder = disk / "run"
        write_data(disk / "data.jsonl")
        (disk / "run-life0").symlink_to(tmp_path)  # the log is not on the full disk, nor are the metrics
        folder.mkdir()
        (folder / "metrics.jsonl").symlink_to(tmp_path / "metrics.jsonl")
        life = train(folder, options, status=1)
        messages = errors(life)
        for step, message in zip(range(30, SHORT_STEPS + 1, 15), messages, strict=False):
            assert re.fullmatch(
                rf"ERROR - Saving the checkpoint of step {step} failed: No space left on device\. The run goes on;"
                rf" the newest whole checkpoint is {folder}/checkpoint/step-15; \d MiB are free there\.",
                message,
            )
        assert f"UnsavedError: the last checkpoint, of step {SHORT_STEPS}, could not be saved" in messages[-1]
        assert checkpoints(folder) == ["step-15"]

        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        train(folder, options)
        assert_as_undisturbed(folder, undisturbed_short)


def test_damaged_checkpoint_stops_the_start_and_the_advice_in_the_message_works(tmp_path, undisturbed_short):
    """Every other damage is test_storage.py's."""
    folder = tmp_path / "run"
    life = Life(folder, SHORT_SAVING, hook=partial(signal_at, 15, signal.SIGKILL))
    assert life.wait() == [-signal.SIGKILL], life.last_words()
    damaged = folder / "checkpoint/step-10/__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    life = train(folder, SHORT_SAVING, status=1)
    (message,) = errors(life)
    assert message.startswith("ERROR - CheckpointError: ")
    assert f"{damaged}" in message
    advice = re.search(r"To continue from step 5: (--checkpoint.load_step 5)$", message)
    train(folder, f"{SHORT_SAVING} {advice[1]}")
    assert_as_undisturbed(folder, undisturbed_short)


def test_folder_that_cannot_be_written_stops_the_run_before_its_first_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").write_text("in the way")
    life = train(tmp_path / "run", SHORT_SAVING, status=1)
    (message,) = errors(life)
    where = f"{tmp_path}/run/checkpoint"
    assert message.startswith(f"ERROR - CheckpointError: checkpoints cannot be saved in {where}: File exists")
    assert last_step(life.folder) == 0


# Data


@pytest.mark.parametrize("fault", ["disappeared", "cut"])
def test_data_that_are_lost_end_the_run_which_goes_on_when_they_are_back(tmp_path, undisturbed, fault):
    data = tmp_path / "data.jsonl"
    life = Life(tmp_path / "run", SAVING)
    life.wait_for_step(12)
    content = data.read_bytes()
    if fault == "cut":
        data.write_bytes(content[:1000])
    else:
        data.unlink()
    assert life.wait() == [EXIT_MISTAKE]
    (message,) = errors(life)
    assert message.startswith(f"ERROR - DatasetError: {data} ")
    assert ("has disappeared" if fault == "disappeared" else f"was cut while in use, from {len(content)}") in message
    assert "put it back and start again: the run goes on from its last checkpoint" in message
    data.write_bytes(content)
    train(life.folder, SAVING)
    assert_as_undisturbed(life.folder, undisturbed)

"""Kills, damaged files and full disks: a run goes on from a whole checkpoint, or says which there is."""

import errno
import io
import logging
import os
import pickle
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.full_disk import small_disk
from tests.processes import FORKED
from tests.unit_tests.checkpoint.checkpointed_run import MODES, build_run, damage, folder, names, no_space
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.checkpoint import background
from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.storage import read_metadata
from torchtitan.checkpoint.write import CheckpointWriter, WrittenFile, save_alone
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("process_group", "quick_writer")


# Kills


def stop_here(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILL_POINTS = {
    "before any byte": (CheckpointWriter, "write_file"),
    "before .metadata": (background.BackgroundSaver, "write_metadata"),
    "before it is visible": (CheckpointFolder, "publish"),
    "before the old ones go": (CheckpointFolder, "tidy"),
    "while an old one goes": (CheckpointFolder, "remove"),
}


def die_while_saving(dump_folder: Path, point: str, mode: str) -> None:
    background.START_METHOD = "fork"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run = build_run(dump_folder, async_mode=mode, keep_latest_k=2)
    run.checkpointer.load()
    setattr(*KILL_POINTS[point], stop_here)
    run.train(8)
    run.checkpointer.close()


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    checkpoints = CheckpointFolder(tmp_path, run="a")
    for path in (checkpoints.of(3), checkpoints.incomplete(3)):
        path.mkdir()
        (path / "file").write_text(path.name)
    checkpoints.create()
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == checkpoints.of(3):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.publish(checkpoints.incomplete(3), 3)
    assert checkpoints.steps() == []
    after = CheckpointFolder(tmp_path, run="b")
    after.create()
    assert after.steps() == [3]
    assert (after.of(3) / "file").read_text() == "step-3"
    assert after.leftovers() == [checkpoints.incomplete(3)]


def test_what_another_run_has_is_neither_replaced_nor_removed(tmp_path, caplog):
    run = build_run(tmp_path, keep_latest_k=1)
    run.train(2)
    (folder(run) / "step-4").mkdir()  # of a run that started meanwhile
    run.train(4)
    assert "step 4 failed" in caplog.text and "step-4 is another run's: it was not there when this" in caplog.text
    (tmp_path / ".owner.json").write_text('{"host": "elsewhere", "process": 1}')
    run.train(6)
    assert f"step 6 failed: {tmp_path} is another run's now" in caplog.text
    assert names(run) == ["step-2", "step-4"]


def test_an_old_checkpoint_that_was_moved_to_other_storage_is_only_unlinked(tmp_path):
    run = build_run(tmp_path, keep_latest_k=2)
    run.train(4)
    (folder(run) / "step-2").rename(tmp_path / "archive")
    (folder(run) / "step-2").symlink_to(tmp_path / "archive")
    run.train(6)
    assert names(run) == ["step-4", "step-6"]
    assert (tmp_path / "archive/.metadata").exists()


def test_run_killed_while_saving_goes_on_from_a_whole_checkpoint(tmp_path, caplog):
    untouched = build_run(tmp_path / "untouched")
    expected = untouched.train(9, save=False)
    build_run(tmp_path).train(4)
    for point, mode in zip(
        KILL_POINTS, ["disabled", "async_with_pinned_mem", "async", "disabled", "async"], strict=True
    ):
        process = FORKED.Process(target=die_while_saving, args=(tmp_path, point, mode))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, point
        caplog.clear()
        run = build_run(tmp_path, keep_latest_k=2)
        assert run.checkpointer.load()
        whole = 6 if point.endswith(("go", "goes")) else 4
        assert run.step == whole, point
        is_left_over = "Not whole, ignored, and removed after the next save: step-" in caplog.text
        assert is_left_over == (point not in ("before any byte", "before the old ones go")), point
        assert run.train(9, save=False) == expected[whole:], point
        for path in folder(run).glob("step-6*"):
            shutil.rmtree(path)
    run = build_run(tmp_path, keep_latest_k=2)
    run.checkpointer.load()
    run.train(6)
    assert names(run) == ["step-4", "step-6"]


# Damage


DAMAGES = [(file, how) for file in (".metadata", "__0_0.distcp") for how in ("deleted", "cut", "zeroed")]


@pytest.mark.parametrize(("file", "how"), [*DAMAGES, (".metadata", "a bit"), ("__0_0.distcp", "a bit")])
def test_damaged_file_is_named_and_the_older_checkpoint_offered_and_loadable(tmp_path, file, how):
    run = build_run(tmp_path)
    run.train(4)
    damage(folder(run) / "step-4" / file, how)
    with pytest.raises(CheckpointError) as caught:
        build_run(tmp_path).checkpointer.load()
    message = str(caught.value)
    assert f"step-4/{file}" in message
    assert "To continue from step 2: --checkpoint.load_step 2" in message
    assert "\n" not in message
    older = build_run(tmp_path, load_step=2)
    assert older.checkpointer.load()
    assert older.step == 2


def test_a_save_that_misses_files_has_failed(tmp_path, monkeypatch, caplog):
    """As where the folder is not one that all machines share, and the other ranks' files are elsewhere."""
    write_file = CheckpointWriter.write_file

    def lose_a_file(self: CheckpointWriter, path: Path, *arguments: Any) -> WrittenFile:
        written = write_file(self, path, *arguments)
        (path / "__0_0.distcp").unlink()
        return written

    run = build_run(tmp_path)
    run.train(2)
    monkeypatch.setattr(CheckpointWriter, "write_file", lose_a_file)
    run.train(4)
    assert "Saving the checkpoint of step 4 failed" in caplog.text
    assert "__0_0.distcp cannot be read: No such file" in caplog.text
    assert names(run) == ["step-2"]


def test_only_a_whole_older_checkpoint_is_offered(tmp_path):
    run = build_run(tmp_path)
    run.train(6)
    damage(folder(run) / "step-6/.metadata", "deleted")
    damage(folder(run) / "step-4/__0_0.distcp", "cut")
    with pytest.raises(CheckpointError, match=r"--checkpoint.load_step 2$"):
        build_run(tmp_path).checkpointer.load()


# Code in a checkpoint


class Payload:
    """What creates a file where it is unpickled."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._file),)


@pytest.mark.parametrize("where", [".metadata", "a state", "the random numbers"])
def test_loading_runs_no_code_of_a_checkpoint(tmp_path, where, caplog):
    ran = tmp_path / "ran"
    run = build_run(tmp_path)
    run.train(2)
    path = folder(run) / "step-2"
    if where == ".metadata":
        (path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Payload(ran)}))
        (path / ".metadata.sha256").unlink()
        message = r"step-2/.metadata is damaged \(UnpicklingError: it names posix.mkdir, which could run code"
    else:
        state = run.checkpointer._contents.everything()
        state |= (
            {"train_state.step": Payload(ran)} if where == "a state" else {"rng.rank_0": pickle.dumps(Payload(ran))}
        )
        shutil.rmtree(path)
        save_alone(path, state)
        message = r"step-2/__0_0.distcp is damaged \(UnpicklingError: Weights only load failed"
    again = build_run(tmp_path)
    if where == "the random numbers":
        assert again.checkpointer.load()
        assert "Random numbers are drawn anew" in caplog.text
    else:
        with pytest.raises(CheckpointError, match=message) as caught:
            again.checkpointer.load()
        assert "\n" not in str(caught.value)
    assert not ran.exists()


# What is read


def count_reads(dump_folder: Path) -> tuple[int, int, int]:
    """Of the second rank's load: times .metadata was opened, sizes asked for; bytes read of data, over those needed."""
    build_run(dump_folder, ParallelDims(dp_shard=2)).train(2)
    run = build_run(dump_folder, ParallelDims(dp_shard=2))
    opened, asked, num_bytes = [], [], 0
    path_stat, path_open = Path.stat, Path.open

    def counting_stat(self: Path, **options: Any) -> os.stat_result:
        asked.append(self.name)
        return path_stat(self, **options)

    def counting_open(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self.name)
        file = path_open(self, *args, **options)
        if self.suffix == ".distcp":
            read = io.BufferedReader.read

            class Counting(io.BufferedReader):
                def read(self, size: int | None = -1, /) -> bytes:
                    nonlocal num_bytes
                    content = read(self, size)
                    num_bytes += len(content)
                    return content

            return Counting(file.detach())
        return file

    Path.stat, Path.open = counting_stat, counting_open
    try:
        run.checkpointer.load()
    finally:
        Path.stat, Path.open = path_stat, path_open
    metadata = read_metadata(folder(run) / "step-2")
    needed = sum(entry.length for entry in metadata.storage_data.values() if entry.relative_path == "__1_0.distcp")
    return opened.count(".metadata"), sum(name.endswith(".distcp") for name in asked), num_bytes - needed


def test_a_load_reads_the_metadata_once_and_each_byte_once(tmp_path):
    """The sizes of all files are asked for by the first rank alone, and not again by each."""
    (_, sizes, _), (opened, sizes_of_second, more) = run_processes(count_reads, 2, tmp_path)
    assert sizes == 2
    assert (opened, sizes_of_second) == (0, 0)
    assert 0 <= more < 60_000  # what only the first rank writes, and both read: step counters and states


# Disks


def test_a_file_system_that_cannot_sync_folders_is_saved_to_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    """CIFS and some of FUSE."""
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    run = build_run(tmp_path)
    run.train(4)
    assert names(run) == ["step-2", "step-4"]
    assert caplog.text.count("cannot sync a folder (Invalid argument)") == 1
    resumed = build_run(tmp_path)
    assert resumed.checkpointer.load() and resumed.step == 4


def test_options_that_cannot_be_noted_do_not_fail_the_save(tmp_path, monkeypatch, caplog):
    run = build_run(tmp_path)
    monkeypatch.setattr(run.checkpointer, "_options", lambda: 'description = "\ud800"')  # not UTF-8
    run.train(2)
    assert names(run) == ["step-2"]
    assert "step-2.incomplete" in caplog.text and "the checkpoint is saved without" in caplog.text


def test_each_rank_syncs_its_own_file_after_the_last_byte(tmp_path, monkeypatch):
    """Another machine's sync does not write what this one still holds, and the first rank need not open all files."""
    sizes, fsync = {}, os.fsync

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        sizes[Path(f"/proc/self/fd/{descriptor}").readlink().name] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(CheckpointFolder, "publish", no_space)
    monkeypatch.setattr(CheckpointFolder, "remove", lambda *_: None)
    run = build_run(tmp_path)
    run.train(2)
    (file,) = folder(run).glob("step-2.incomplete-*/*.distcp")
    assert sizes["__0_0.distcp"] == file.stat().st_size


def test_folder_that_cannot_be_made_stops_the_run_at_its_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be saved in .*/file/checkpoint: Not a directory"):
        build_run(tmp_path / "file")


@pytest.mark.parametrize("mode", MODES)
def test_folder_that_is_lost_during_the_run_does_not_stop_it(tmp_path, mode, caplog):
    run = build_run(tmp_path, async_mode=mode)
    run.train(2)
    run.checkpointer.maybe_wait_for_staging()
    run.checkpointer._wait_for_save()
    folder(run).rename(tmp_path / "away")
    folder(run).write_text("in the way")
    run.train(5)
    run.checkpointer._wait_for_save()
    assert "Saving the checkpoint of step 4 failed" in caplog.text
    assert "Not a directory" in caplog.text or "File exists" in caplog.text
    folder(run).unlink()
    (tmp_path / "away").rename(folder(run))
    run.train(6)
    run.checkpointer.close()
    assert names(run) == ["step-2", "step-6"]


def test_folder_that_cannot_be_read_any_more_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    run = build_run(tmp_path)

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(CheckpointFolder, "publish", denied)
    monkeypatch.setattr(CheckpointFolder, "remove", denied)
    run.train(3)
    assert "Saving the checkpoint of step 2 failed: Permission denied. The run goes on; the folder cannot be read" in (
        caplog.text
    )


@pytest.mark.parametrize("mode", MODES)
def test_full_disk_keeps_the_run_and_the_older_checkpoint(tmp_path, mode, caplog):
    with small_disk(tmp_path / "disk", 2**20):
        run = build_run(tmp_path / "disk", async_mode=mode)
        run.train(2)
        run.checkpointer._wait_for_save()
        free = os.statvfs(folder(run)).f_bavail * os.statvfs(folder(run)).f_frsize
        (tmp_path / "disk/filler").write_bytes(bytes(free - 50_000))
        run.train(6)
        run.checkpointer._wait_for_save()
        for step in (4, 6):
            assert f"Saving the checkpoint of step {step} failed: No space left on device" in caplog.text
        assert "the newest whole checkpoint is" in caplog.text
        assert names(run) == ["step-2"]
        (tmp_path / "disk/filler").unlink()
        run.train(8)
        run.checkpointer.close()
        assert names(run) == ["step-2", "step-8"]


def test_last_save_that_fails_is_an_error(tmp_path, monkeypatch, caplog):
    run = build_run(tmp_path, steps=3)
    run.train(2)
    monkeypatch.setattr(CheckpointWriter, "write_file", no_space)
    with pytest.raises(CheckpointError, match="the last checkpoint, of step 3, could not be saved"):
        run.train(3)
    assert "the newest whole checkpoint is" in caplog.text


def fail_on_one_of_two_ranks(dump_folder: Path) -> tuple[list[str], list[str]]:
    background.START_METHOD = "fork"
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())
    logging.getLogger("torchtitan").addHandler(handler)
    write_file, call = CheckpointWriter.write_file, background.WriterProcess.call
    result = []
    for mode in MODES:
        run = build_run(dump_folder / mode, ParallelDims(dp_shard=2), async_mode=mode)
        run.train(2)
        run.checkpointer._wait_for_save()
        if dist.get_rank() == 1:
            CheckpointWriter.write_file = background.WriterProcess.call = no_space
        run.train(4)
        run.checkpointer._wait_for_save()
        CheckpointWriter.write_file, background.WriterProcess.call = write_file, call
        dist.barrier()
        result += [f"{mode} {name}" for name in names(run)]
        if mode == "async":  # a copy that fails on one rank, before there is anything to write
            copy = run.checkpointer._background._copier.copy
            if dist.get_rank() == 1:
                run.checkpointer._background._copier.copy = no_space
            run.train(6)
            run.checkpointer._wait_for_save()
            run.checkpointer._background._copier.copy = copy
        run.train(8)
        run.checkpointer.close()
        dist.barrier()  # rank 0 makes checkpoints visible
        assert names(run)[-1] == "step-8"
    return logs, result


def test_full_disk_on_one_rank_is_agreed_on_by_both(tmp_path):
    (logs, left), _ = run_processes(fail_on_one_of_two_ranks, 2, tmp_path)
    assert left == [f"{mode} step-2" for mode in MODES]
    failures = [line for line in logs if "failed" in line]
    assert [line.partition(":")[0] for line in failures] == [
        "Saving the checkpoint of step 4 failed",
        "Saving the checkpoint of step 4 failed",
        "Saving the checkpoint of step 6 failed",
        "Saving the checkpoint of step 4 failed",
    ]
    assert all("failed: rank 1: No space left on device. The run goes on; the newest" in line for line in failures)

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.full_disk import limited_files
from torchtitan.components import metrics as module
from torchtitan.components.metrics import JsonLines, MetricsProcessor, TensorBoard, build_metrics
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Metrics
from torchtitan.tools.device import MemoryStats

# Upstream's names; torchtitan's users have dashboards on them.
TRAINING_NAMES = {
    "loss_metrics/global_avg_loss",
    "loss_metrics/global_max_loss",
    "grad_norm",
    "throughput(tps)",
    "tflops",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(s)",
    "time_metrics/data_loading(%)",
    "time_metrics/validation(%)",
    "memory/max_active(GiB)",
    "memory/max_active(%)",
    "memory/max_reserved(GiB)",
    "memory/max_reserved(%)",
    "memory/num_alloc_retries",
    "memory/num_ooms",
    "n_tokens_seen",
    "lr",
}
VALIDATION_NAMES = {
    "validation_metrics/loss",
    "validation_metrics/throughput(tps)",
    "validation_metrics/memory/max_active(GiB)",
    "validation_metrics/memory/max_active(%)",
    "validation_metrics/memory/max_reserved(GiB)",
    "validation_metrics/memory/max_reserved(%)",
    "validation_metrics/memory/num_alloc_retries",
    "validation_metrics/memory/num_ooms",
}


Build = Callable[..., MetricsProcessor]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A device of 100 GiB whose peak a test sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peak = 1.0

    def get_peak(self) -> MemoryStats:
        return MemoryStats(self.peak / 2, self.peak / 2, self.peak, self.peak, 0, 0)

    def reset_peak(self) -> None:
        self.peak = 0.0


class Recorder:
    """A place that metrics go to."""

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.failed: bool | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        self.written.append((step, values))

    def close(self, *, failed: bool) -> None:
        self.failed = failed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock, time=lambda: 1.5))
    return clock


@pytest.fixture
def sink() -> Recorder:
    return Recorder()


@pytest.fixture
def build(clock: Clock, sink: Recorder) -> Build:
    def build(device_name: str = "NVIDIA H100 80GB HBM3", **arguments: Any) -> MetricsProcessor:
        defaults = {
            "sinks": [sink],
            "memory": Memory(device_name),
            "log_freq": 10,
            "total_steps": 1000,
            "num_flops_per_token": 1e9,
            "non_data_parallel_degree": 1,
        }
        return MetricsProcessor(**defaults | arguments)

    return build


def log(metrics: MetricsProcessor, step: int) -> None:
    metrics.log(step, loss_avg=3.14159, loss_max=4.5, grad_norm=1.25, lr=8e-4, n_tokens_seen=12345)


def test_z_loss_accuracy_and_entropy_are_written_and_the_line_has_those_of_predictions(
    build: Build, clock: Clock, sink: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = build()
    clock.now += 1
    told = {"z_loss": 0.5, "token_accuracy": 0.25, "token_entropy": 3.5}
    metrics.log(1, of_tokens=told, loss_avg=3.0, loss_max=4.5, grad_norm=1.25, lr=8e-4, n_tokens_seen=100)
    ((_, values),) = sink.written
    assert {name: values[f"loss_metrics/{name}"] for name in told} == told
    assert "  loss:  3.0000  token_accuracy: 0.2500  token_entropy: 3.5000  grad_norm:" in messages(caplog)[-1]


def test_tokens_and_loss_of_a_mixture_are_told_by_dataset(
    build: Build, clock: Clock, sink: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = build()
    clock.now += 1
    metrics.log(
        1,
        {"c4": (7000, 2.5), "code": (30, None)},
        loss_avg=3.0,
        loss_max=4.5,
        grad_norm=1.25,
        lr=8e-4,
        n_tokens_seen=100,
    )
    ((_, values),) = sink.written
    assert (values["n_tokens_seen"], values["n_tokens_seen/c4"], values["n_tokens_seen/code"]) == (100, 7000, 30)
    names = [name for name in values if name.startswith("loss_metrics/global_avg_loss/")]  # of what is known
    assert [values[name] for name in names] == [2.5] and names[0].endswith("/c4")
    assert messages(caplog)[-1] == "step:  1  loss of c4 2.5000 (7,000 tokens)  loss of code - (30 tokens)"


@pytest.mark.parametrize("failed", [False, True])
def test_every_sink_hears_the_end_of_the_run(build: Build, failed: bool) -> None:
    sinks = [Recorder(), Recorder()]
    build(sinks=sinks).close(failed=failed)
    assert [sink.failed for sink in sinks] == [failed, failed]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")


def test_the_line_is_upstreams_with_the_time_left(build: Build, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    metrics = build()
    metrics.memory.peak = 12.345
    for step in range(1, 11):
        metrics.start_step(step)
        metrics.count_tokens(50_000)
        clock.now += 5
    log(metrics, 10)
    assert messages(caplog) == [
        "step: 10  loss:  3.1416  grad_norm:  1.2500  memory: 12.35GiB(12.35%)  "
        "tps: 10,000  tflops: 10.00  mfu: 1.01%  eta: 1:22:30"
    ]


def test_the_line_tells_what_of_the_time_was_no_training(
    build: Build, clock: Clock, sink: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = build()
    for step, waited, validated in ((1, 0.5, 2.0), (2, 0.02, 0.0), (3, 0.0, 0.0)):
        metrics.start_step(step)
        metrics.record_data_loading(waited)
        clock.now += 6
        log(metrics, step)
        with metrics.validating():
            clock.now += validated
    said = [re.findall(r"(\w+): ([\d.]+)%(?=  )", line)[1:] for line in messages(caplog)]  # behind mfu
    assert said == [[("data_loading", "8.3")], [("validation", "25.0")], []]
    names = ("time_metrics/data_loading(%)", "time_metrics/validation(%)")
    assert [values[name] for _, values in sink.written for name in names] == pytest.approx([25 / 3, 0, 1 / 3, 25, 0, 0])


def test_a_device_of_unknown_peak_has_no_mfu(
    build: Build, clock: Clock, sink: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = build("CPU")
    clock.now += 1
    log(metrics, 1)
    assert "  mfu: n/a  " in caplog.text
    assert "mfu(%)" not in sink.written[0][1]


def test_colour_changes_nothing_but_the_colour(build: Build, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for use_color in (False, True):
        metrics = build(use_color=use_color)
        clock.now += 2
        log(metrics, 1)
    plain, coloured = messages(caplog)
    assert "\x1b[" not in plain
    assert coloured.count("\x1b[0m") == 8
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_logs_at_step_1_and_every_log_freq_steps(build: Build) -> None:
    metrics = build(log_freq=4)
    assert [step for step in range(1, 13) if metrics.should_log(step)] == [1, 4, 8, 12]


def test_waiting_for_data_and_a_slower_gpu_are_told_once(
    build: Build, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def run(metrics: MetricsProcessor, steps: list[tuple[float, float]]) -> list[str]:
        caplog.clear()
        for step, (seconds, waited) in enumerate(steps, start=1):
            metrics.start_step(step)
            metrics.count_tokens(1000)
            metrics.record_data_loading(waited)
            clock.now += seconds
            log(metrics, step)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    even = [(10.0, 0.4)] * 6
    assert run(build(), [(10.0, 5.0), *even]) == []  # the first interval starts things up
    (waits,) = run(build(), [*even, (10.0, 0.6), (10.0, 0.7)])
    assert waits.startswith("The steps wait for data: 6% of the time")
    assert run(build(), [*even, (12.0, 0.0)]) == []
    (slow,) = run(build(), [*even, (13.0, 0.0), (14.0, 0.0)])
    assert slow.startswith("77 tokens/s is 23% below the median of this run")
    assert run(build("CPU"), [*even, (20.0, 0.0)]) == []


def test_values_are_those_since_the_last_log(build: Build, clock: Clock, sink: Recorder) -> None:
    metrics = build(non_data_parallel_degree=4)
    for step in (1, 2, 3):
        metrics.start_step(step)
        metrics.count_tokens(6000)
        metrics.record_data_loading(0.5)
        clock.now += 2
        if step != 2:
            metrics.memory.peak = 10.0 * step
            log(metrics, step)
    (_, first), (step, values) = sink.written
    assert first["throughput(tps)"] == 6000 / 2 / 4
    assert first["memory/max_reserved(GiB)"] == 10.0
    assert step == 3
    assert values["loss_metrics/global_avg_loss"] == 3.14159
    assert values["loss_metrics/global_max_loss"] == 4.5
    assert values["throughput(tps)"] == 12000 / 4 / 4
    assert values["tflops"] == pytest.approx(750 * 1e9 / 1e12)
    assert values["mfu(%)"] == pytest.approx(100 * 750e9 / 989e12)
    assert values["time_metrics/end_to_end(s)"] == 2
    assert values["time_metrics/data_loading(s)"] == 0.5
    assert values["time_metrics/data_loading(%)"] == 25
    assert values["memory/max_reserved(GiB)"] == 30.0
    assert values["memory/max_active(GiB)"] == 15.0
    assert values["n_tokens_seen"] == 12345
    assert set(values) == TRAINING_NAMES | {"mfu(%)"}


def test_validation_is_kept_out_of_the_trainings_time_and_memory(
    build: Build, clock: Clock, sink: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = build()
    metrics.start_step(1)
    metrics.count_tokens(1000)
    metrics.memory.peak = 20.0
    clock.now += 1
    with metrics.validating():
        metrics.memory.peak = 50.0
        clock.now += 100
        metrics.log_validation(1, loss=2.5, n_tokens=3000)
    clock.now += 1
    metrics.memory.peak = 5.0
    log(metrics, 2)
    assert messages(caplog)[0] == "validate step:  1  loss:  2.5000  memory: 50.00GiB(50.00%)  tps: 30"
    (_, validation), (_, training) = sink.written
    assert validation["validation_metrics/loss"] == 2.5
    assert validation["validation_metrics/memory/max_reserved(GiB)"] == 50.0
    assert set(validation) == VALIDATION_NAMES
    assert training["throughput(tps)"] == 500
    assert training["memory/max_reserved(GiB)"] == 20.0


class TestProgressLine:
    def test_shows_the_latest_values_a_few_times_a_second(
        self, build: Build, clock: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics = build(show_progress=True, total_steps=10)
        metrics.start_step(1)
        clock.now += 1
        metrics.count_tokens(2000)
        log(metrics, 1)
        metrics.memory.peak = 2.5
        for _ in range(3):
            clock.now += 0.05
            metrics.start_step(6)
        metrics.close(failed=False)
        first, second, last = capsys.readouterr().out.split("\x1e")[1:]
        assert first.startswith("step 1/10  starting")
        assert second == "step 6/10  loss 3.1416  2,000 tokens/s  0:00:09 left  2.5 GiB  [==========          ]\n"
        assert last == "\n"

    def test_is_off_where_the_log_is_not_on_a_terminal(
        self, build: Build, clock: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics = build()
        metrics.start_step(1)
        clock.now += 1
        log(metrics, 1)
        metrics.close(failed=False)
        assert capsys.readouterr().out == ""


class TestJsonLines:
    def read(self, path: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_full_precision_and_appended_across_resumes(self, tmp_path: Path, clock: Clock) -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        for step in (1, 2):
            lines = JsonLines(path)
            lines.write(step, {"loss": 1 / 3})
            lines.close(failed=False)
        assert self.read(path) == [{"step": step, "time": 1.5, "loss": 1 / 3} for step in (1, 2)]

    def test_a_line_cut_by_a_kill_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2, "lo')
        JsonLines(path).write(2, {"loss": 1.0})
        *_, cut, last = path.read_text().splitlines()
        assert cut == '{"step": 2, "lo'
        assert json.loads(last)["loss"] == 1.0

    def test_a_full_disk_does_not_stop_the_run(self, caplog: pytest.LogCaptureFixture) -> None:
        JsonLines(Path("/dev/full")).write(7, {"loss": 1.0})
        assert "The metrics of step 7 are not in /dev/full: No space left on device" in caplog.text

    def test_a_line_cut_by_a_full_disk_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        lines = JsonLines(path)
        lines.write(1, {"loss": 1.0})
        with limited_files(path.stat().st_size + 10):
            lines.write(2, {"loss": 2.0})
        for step in (3, 4):
            lines.write(step, {"loss": 3.0})
        first, cut, *others = path.read_text().splitlines()
        assert len(cut) == 10
        assert [json.loads(line)["step"] for line in (first, *others)] == [1, 3, 4]


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def wait_for_threads(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """TensorBoard's own ends with an error, which is meant."""
        before = set(threading.enumerate())
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        yield
        for thread in set(threading.enumerate()) - before:
            thread.join(10)

    @pytest.mark.parametrize("num_bytes", [0, 2000])
    def test_a_full_disk_does_not_stop_the_run_and_is_said_once(
        self, tmp_path: Path, num_bytes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        with limited_files(num_bytes):
            board = TensorBoard(tmp_path / "tb")
            for step in range(100):
                board.write(step, {f"value {i}": 1.0 for i in range(16)})
            board.close(failed=False)
        (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        assert warning == f"From here on no TensorBoard events go to {tmp_path}/tb: File too large"

    def test_a_disk_that_is_full_at_the_end_does_not_fail_the_run(self, tmp_path: Path) -> None:
        with limited_files(300):
            board = TensorBoard(tmp_path / "tb")
            board.write(1, {f"value {i}": 1.0 for i in range(8)})
            board.close(failed=False)


class TestBuild:
    def build(self, folder: Path, metrics: Metrics, **arguments: Any) -> MetricsProcessor:
        defaults: dict[str, Any] = {
            "start_time": "20260131-120059",
            "config": {"training": {"steps": 3}},
            "device": torch.device("cpu"),
            "rank": 0,
            "total_steps": 3,
            "num_flops_per_token": 1e6,
            "non_data_parallel_degree": 1,
            "on_terminal": False,
            "owns_progress_line": False,
        }
        return build_metrics(metrics, dump_folder=str(folder), **defaults | arguments)

    def files(self, folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def test_tensorboard_has_what_the_json_lines_have_under_upstreams_names(self, tmp_path: Path) -> None:
        metrics = self.build(tmp_path, Metrics(enable_tensorboard=True, save_tb_folder="events"))
        log(metrics, 1)
        with metrics.validating():
            metrics.log_validation(1, loss=2.0, n_tokens=10)
        metrics.close(failed=False)
        events = EventAccumulator(str(tmp_path / "events/20260131-120059")).Reload()
        assert set(events.Tags()["scalars"]) == TRAINING_NAMES | VALIDATION_NAMES
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            assert line.pop("step") == 1
            assert line.pop("time") > 0
            for name, value in line.items():
                assert events.Scalars(name)[0].value == pytest.approx(value, rel=1e-6)

    def test_only_rank_0_writes(self, tmp_path: Path) -> None:
        log(self.build(tmp_path, Metrics(), rank=1), 1)
        assert self.files(tmp_path) == []

    def test_every_rank_writes_its_own_if_asked(self, tmp_path: Path) -> None:
        for rank in (0, 1):
            section = Metrics(save_for_all_ranks=True)
            log(self.build(tmp_path, section, rank=rank), 1)
        assert self.files(tmp_path) == ["rank_0/metrics.jsonl", "rank_1/metrics.jsonl"]

    @pytest.mark.parametrize("disabled", [False, True])
    def test_the_section_can_switch_off_what_a_terminal_gets(
        self, tmp_path: Path, disabled: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        section = Metrics(disable_color_printing=disabled, disable_progress_line=disabled)
        metrics = self.build(tmp_path, section, on_terminal=True, owns_progress_line=True)
        metrics.start_step(1)
        log(metrics, 1)
        assert ("\x1b[" in messages(caplog)[0]) != disabled
        assert ("\x1e" in capsys.readouterr().out) != disabled

    def test_wandb_missing_is_the_users_mistake(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match="pip install wandb"):
            self.build(tmp_path, Metrics(enable_wandb=True))

    @pytest.mark.parametrize("failed", [False, True])
    def test_wandb_gets_the_values_the_configuration_and_how_the_run_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool
    ) -> None:
        calls: list[tuple[str, Any]] = []
        run = SimpleNamespace(
            log=lambda values, step: calls.append(("log", (step, set(values)))),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

        def init(dir: str, config: dict[str, Any]) -> SimpleNamespace:
            calls.append(("init", (dir, config)))
            return run

        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
        metrics = self.build(tmp_path, Metrics(enable_wandb=True))
        log(metrics, 1)
        metrics.close(failed=failed)
        assert calls == [
            ("init", (str(tmp_path), {"training": {"steps": 3}})),
            ("log", (1, TRAINING_NAMES)),
            ("finish", int(failed)),
        ]

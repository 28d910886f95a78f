"""What a run says about itself: the log line, the progress line, TensorBoard, W&B and metrics.jsonl.

The trainer counts tokens and data loading at every step, which costs nothing; only at log steps does it hand over
the loss, which is when the host waits for the device. Every place gets the same values under the same names:

    loss_metrics/global_avg_loss, loss_metrics/global_max_loss    over all ranks
    throughput(tps)                                               tokens per second and device
    tflops, mfu(%)                                                of a device, by the model's FLOPs; no recomputation
    memory/max_active(GiB), memory/max_reserved(GiB), ...         peaks since the last log; on a CPU resident memory
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from torchtitan.components.history import History, append_line
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Metrics
from torchtitan.tools.device import DeviceMemoryMonitor, MemoryStats, get_peak_flops
from torchtitan.tools.logging import logger
from torchtitan.tools.terminal import REDRAWN_EVERY_S, clock_time, send_progress

_WORTH_SAYING_PCT = 1
"""The line has the shares of time that waiting for data and validation take from here on."""

WAITING_PCT = 5
"""Of a step's time: where it waits longer for data, the log says so, once."""

SLOWER_PCT = 20
"""Below the median of so many log lines before: where a GPU is slower, the log says so, once."""

FEWEST_SPEEDS = 5
"""Log lines that a median is worth something of."""

_RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN, _GREY = (f"\x1b[{code}m" for code in (31, 32, 33, 34, 35, 36, 90))
_RESET = "\x1b[0m"


class Sink:
    """Where metrics go besides the log. A full disk is logged and does not stop training: no method raises OSError."""

    def write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def write_text(self, step: int, prompt: str, text: str) -> None:
        """history.jsonl has it in any case."""

    def close(self, *, failed: bool) -> None:
        """`failed`: the run did not reach its end."""


class JsonLines(Sink):
    """One line a log step: step, time (seconds since 1970) and the values. A resumed run appends to the file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        append_line(self._path, {"step": step, "time": time.time(), **values}, what="The metrics")


class TensorBoard(Sink):
    """Scalars as TensorBoard events. After an error there are no more: it ended the thread that writes them."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder = folder
        self._writer: SummaryWriter | None = None
        with self._ending_at_an_error():
            self._writer = SummaryWriter(str(folder))
            logger.info(f"TensorBoard events go to {folder}")

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._ending_at_an_error():
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def write_text(self, step: int, prompt: str, text: str) -> None:
        with self._ending_at_an_error():
            if self._writer:
                self._writer.add_text(prompt, text, step)

    def close(self, *, failed: bool) -> None:
        with self._ending_at_an_error():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _ending_at_an_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning(f"From here on no TensorBoard events go to {self._folder}: {error.strerror}")


class WeightsAndBiases(Sink):
    """A run of W&B; wandb's own environment variables (WANDB_PROJECT, WANDB_MODE, ...) apply."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("metrics.enable_wandb needs the package wandb: pip install wandb") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def write_text(self, step: int, prompt: str, text: str) -> None:
        self._run.log({prompt: text}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@dataclass
class MetricsProcessor:
    """Gathers what happens between two log steps and says it at the second; `build_metrics` makes one."""

    sinks: list[Sink]
    memory: DeviceMemoryMonitor
    log_freq: int
    total_steps: int
    num_flops_per_token: float
    non_data_parallel_degree: int
    """Ranks that work on the same sequences."""
    use_color: bool = False
    show_progress: bool = False
    history: History | None = None
    """On the rank that writes it."""

    def __post_init__(self) -> None:
        self._peak_flops = get_peak_flops(self.memory.name)
        self._held_peak: MemoryStats | None = None
        self._validation_start: float | None = None
        self._last_progress = 0.0
        self._status = "starting"
        self._speeds: deque[float] = deque(maxlen=100)
        self._warned: set[int] = set()
        self._step = 0
        self._start_interval()

    def start_step(self, step: int) -> None:
        """Call at the begin of every step."""
        self._step = step
        self._n_steps += 1
        now = time.perf_counter()
        if self.show_progress and now - self._last_progress > REDRAWN_EVERY_S:
            self._last_progress = now
            bar = ("=" * round(20 * (step - 1) / self.total_steps)).ljust(20)
            memory = f"{self.memory.get_peak().max_reserved_gib:.1f} GiB"
            send_progress(f"step {step}/{self.total_steps}  {self._status}  {memory}  [{bar}]")

    def count_tokens(self, n_tokens: int) -> None:
        """Tokens of a batch that this rank's data-parallel group is about to work on."""
        self._n_tokens += n_tokens

    def record_data_loading(self, seconds: float) -> None:
        """Time that the step waited for a batch."""
        self._data_loading_s += seconds

    def should_log(self, step: int) -> bool:
        return step == 1 or step % self.log_freq == 0

    def log(
        self,
        step: int,
        of_sources: Mapping[str, tuple[int, float | None]] | None = None,
        of_tokens: Mapping[str, float] = MappingProxyType({}),
        *,
        loss_avg: float,
        loss_max: float,
        grad_norm: float,
        lr: float,
        n_tokens_seen: int,
    ) -> None:
        """Say and write everything about the steps since the last log.

        of_tokens: z-loss, and accuracy and entropy of predictions, those that are on.
        of_sources: of each dataset of a mixture, the tokens seen and, if it is known, the mean loss.
        """
        seconds = time.perf_counter() - self._last_log
        seconds_per_step = seconds / max(self._n_steps, 1)
        tps = self._tokens_per_second(self._n_tokens, seconds)
        flops = self.num_flops_per_token * tps
        mfu = None if self._peak_flops is None else 100 * flops / self._peak_flops
        memory = self._get_peak_memory()
        eta = clock_time((self.total_steps - step) * seconds_per_step)
        self._status = f"loss {loss_avg:.4f}  {tps:,.0f} tokens/s  {eta} left"
        shares = {
            "data_loading": 100 * self._data_loading_s / seconds,  # of the steps' time
            "validation": 100 * self._validation_s / (seconds + self._validation_s),  # of all time
        }
        self._say(
            (f"step: {step:2}", _RED),
            (f"loss: {loss_avg:7.4f}", _GREEN),
            *((f"{name}: {value:.4f}", _GREEN) for name, value in of_tokens.items() if name != "z_loss"),
            (f"grad_norm: {grad_norm:7.4f}", _YELLOW),
            (_memory_field(memory), _CYAN),
            (f"tps: {round(tps):,}", _BLUE),
            (f"tflops: {flops / 1e12:,.2f}", _MAGENTA),
            ("mfu: n/a" if mfu is None else f"mfu: {mfu:.2f}%", _MAGENTA),
            *((f"{name}: {share:.1f}%", _MAGENTA) for name, share in shares.items() if share >= _WORTH_SAYING_PCT),
            (f"eta: {eta}", _GREY),
        )
        of_sources = of_sources or {}
        losses = {dataset: loss for dataset, (_, loss) in of_sources.items() if loss is not None}
        if of_sources:
            told = (
                f"{dataset} {'-' if loss is None else f'{loss:.4f}'} ({n:,} tokens)"
                for dataset, (n, loss) in of_sources.items()
            )
            self._say((f"step: {step:2}", _RED), *((f"loss of {text}", _GREEN) for text in told))
        values = {
            "loss_metrics/global_avg_loss": loss_avg,
            "loss_metrics/global_max_loss": loss_max,
            **{f"loss_metrics/{name}": value for name, value in of_tokens.items()},
            **{f"loss_metrics/global_avg_loss/{dataset}": loss for dataset, loss in losses.items()},
            "grad_norm": grad_norm,
            "throughput(tps)": tps,
            "tflops": flops / 1e12,
            "time_metrics/end_to_end(s)": seconds_per_step,
            "time_metrics/data_loading(s)": self._data_loading_s / max(self._n_steps, 1),
            **{f"time_metrics/{name}(%)": share for name, share in shares.items()},
            **_memory_values("memory", memory),
            "n_tokens_seen": n_tokens_seen,
            **{f"n_tokens_seen/{dataset}": n for dataset, (n, _) in of_sources.items()},
            "lr": lr,
        }
        if mfu is not None:
            values["mfu(%)"] = mfu
        self._write(step, values)
        self._maybe_warn(tps, shares["data_loading"])
        self._start_interval()

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Wrap a validation, `log_validation` included: its time and memory are kept out of the training's."""
        self._held_peak = self._get_peak_memory()
        self.memory.reset_peak()
        self._validation_start = time.perf_counter()
        yield
        seconds = time.perf_counter() - self._validation_start
        self._validation_s += seconds
        self._last_log += seconds
        self._validation_start = None
        self.memory.reset_peak()

    def log_validation(self, step: int, *, loss: float, n_tokens: int) -> None:
        """Say and write the loss on the validation set, of which `n_tokens` were this data-parallel rank's."""
        assert self._validation_start is not None, "log_validation() belongs inside validating()"
        memory = self.memory.get_peak()
        tps = self._tokens_per_second(n_tokens, time.perf_counter() - self._validation_start)
        self._say(
            (f"validate step: {step:2}", _RED),
            (f"loss: {loss:7.4f}", _GREEN),
            (_memory_field(memory), _CYAN),
            (f"tps: {round(tps):,}", _BLUE),
        )
        values = {"validation_metrics/loss": loss, "validation_metrics/throughput(tps)": tps}
        self._write(step, values | _memory_values("validation_metrics/memory", memory))

    def log_text(self, step: int, prompt: str, text: str) -> None:
        """Say and write what the model puts after a prompt."""
        self._say((f"validate step: {step:2}", _RED), (repr(prompt), _GREY), (repr(text), _GREEN))
        for sink in self.sinks:
            sink.write_text(step, prompt, text)
        self.note("text", step, prompt=prompt, text=text)

    def note(self, event: str, step: int, **facts: object) -> None:
        """Write to the run's history what happened."""
        self._step = max(self._step, step)
        if self.history:
            self.history.note(event, step, **facts)

    def close(self, *, failed: bool) -> None:
        self.note("end", self._step, failed=failed)
        if self.show_progress:
            send_progress("")
        for sink in self.sinks:
            sink.close(failed=failed)

    def _maybe_warn(self, tps: float, data_pct: float) -> None:
        """Once each: of steps that wait for data, and of a GPU that got slower. The first interval starts things up."""
        usual = statistics.median(self._speeds) if len(self._speeds) >= FEWEST_SPEEDS else 0.0
        slow = self.memory.name != "CPU" and tps < (1 - SLOWER_PCT / 100) * usual
        found = {
            f"The steps wait for data: {data_pct:.0f}% of the time since the last line. More cores for each process, a"
            " faster disk, or larger files help": bool(self._speeds) and data_pct > WAITING_PCT,
            f"{tps:,.0f} tokens/s is {100 * (1 - tps / max(usual, 1)):.0f}% below the median of this run: another"
            " process on the GPU, its temperature or clocks, or a slow rank (see metrics.save_for_all_ranks)": slow,
        }
        for kind, (text, is_so) in enumerate(found.items()):
            if is_so and kind not in self._warned:
                self._warned.add(kind)
                logger.warning(text)
        self._speeds.append(tps)

    def _start_interval(self) -> None:
        """Forget what was gathered for the last log."""
        self._last_log = time.perf_counter()
        self._n_steps = self._n_tokens = 0
        self._data_loading_s = self._validation_s = 0.0
        self._held_peak = None
        self.memory.reset_peak()

    def _tokens_per_second(self, n_tokens: int, seconds: float) -> float:
        """Per device: the ranks that share a batch share its tokens."""
        return n_tokens / (seconds * self.non_data_parallel_degree)

    def _get_peak_memory(self) -> MemoryStats:
        """The training's peak since the last log, also over a validation in between."""
        peak = self.memory.get_peak()
        held = self._held_peak or peak
        return MemoryStats(*(max(values) for values in zip(peak, held, strict=True)))

    def _say(self, *fields: tuple[str, str]) -> None:
        logger.info("  ".join(f"{color}{text}{_RESET}" if self.use_color else text for text, color in fields))

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)


def build_metrics(
    metrics: Metrics,
    *,
    dump_folder: str,
    start_time: str,
    config: dict[str, Any],
    device: torch.device,
    rank: int,
    total_steps: int,
    num_flops_per_token: float,
    non_data_parallel_degree: int,
    on_terminal: bool,
    owns_progress_line: bool,
) -> MetricsProcessor:
    """Metrics as the section asks for.

    `start_time` names this start's TensorBoard folder, one for all ranks. `config` is the whole configuration, for W&B
    to show. Only the logging rank writes files, or with `metrics.save_for_all_ranks` every rank its own. `on_terminal`
    and `owns_progress_line` tell whether the log, and whose progress, ends up on a terminal: a worker's own output is
    always a file.
    """
    sinks: list[Sink] = []
    folder = Path(dump_folder)
    if rank == 0 or metrics.save_for_all_ranks:
        subfolder = f"rank_{rank}" if metrics.save_for_all_ranks else ""
        sinks.append(JsonLines(folder / subfolder / "metrics.jsonl"))
        if metrics.enable_tensorboard:
            sinks.append(TensorBoard(folder / metrics.save_tb_folder / start_time / subfolder))
        if metrics.enable_wandb:
            sinks.append(WeightsAndBiases(folder / subfolder, config))
    return MetricsProcessor(
        sinks=sinks,
        memory=DeviceMemoryMonitor(device),
        log_freq=metrics.log_freq,
        total_steps=total_steps,
        num_flops_per_token=num_flops_per_token,
        non_data_parallel_degree=non_data_parallel_degree,
        use_color=on_terminal and not metrics.disable_color_printing,
        show_progress=owns_progress_line and not metrics.disable_progress_line,
        history=History(folder / "history.jsonl") if rank == 0 else None,
    )


def _memory_field(memory: MemoryStats) -> str:
    return f"memory: {memory.max_reserved_gib:5.2f}GiB({memory.max_reserved_pct:.2f}%)"


def _memory_values(prefix: str, memory: MemoryStats) -> dict[str, float]:
    names = [f"max_{kind}({unit})" for kind in ("active", "reserved") for unit in ("GiB", "%")]
    values = zip([*names, "num_alloc_retries", "num_ooms"], memory, strict=True)
    return {f"{prefix}/{name}": value for name, value in values}

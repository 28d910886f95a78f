"""The recomputation that is chosen is the fastest that fits; if memory runs out all the same, nothing is lost."""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.block_modes import BLOCK_MODES, describe_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import EXIT_OUT_OF_MEMORY, ConfigError, RecomputeMoreError, exit_status
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.utils import World, get_world
from torchtitan.memory import plan
from torchtitan.memory.estimate import GIB, MemoryModel
from torchtitan.memory.plan import MemoryPlan, choose_block_modes, plan_memory
from torchtitan.train import Trainer

FLAG = "--liger_kernel.enable_fused_linear_cross_entropy"
LARGE = f"--model.flavor 1B --training.seq_len 4096 --training.compile {FLAG} --activation_checkpoint.mode auto"
SMALL = (
    "--training.local_batch_size 2 --training.seq_len 64 --training.mixed_precision_param float32 --training.seed 1"
    " --lr_scheduler.warmup_steps 1 --training.steps 100"
)
CPU = torch.device("cpu")


def parse(options: str) -> JobConfig:
    return ConfigManager().parse_args(options.split())


def choose(options: str, gib: float, *, world_size: int = 1) -> tuple[tuple[str, ...], float]:
    """The modes, and the estimated peak in GiB."""
    config = parse(f"{LARGE} {options}")
    model = MemoryModel(config, world_size=world_size)
    modes = choose_block_modes(config, model, gib * GIB)
    return modes, model.estimate(modes).peak / GIB


def set_capacity(monkeypatch: pytest.MonkeyPatch, gib: int) -> None:
    monkeypatch.setattr(plan, "DeviceMemoryMonitor", lambda device: SimpleNamespace(name="GPU", capacity=gib * GIB))


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(ParallelDims(), "cpu")
    dist.destroy_process_group()


@pytest.mark.parametrize("gib", [59, 40, 34, 30])
def test_the_fastest_that_fits(gib: float) -> None:
    """One block less lean than what is chosen would not fit."""
    config = parse(f"{LARGE} --training.local_batch_size 8")
    model = MemoryModel(config, world_size=1)
    modes = choose_block_modes(config, model, gib * GIB)
    assert model.estimate(modes).peak <= gib * GIB
    leanness = [[*BLOCK_MODES].index(mode) for mode in modes]
    assert leanness == sorted(leanness, reverse=True)  # earlier blocks are the leaner ones
    assert leanness[0] - leanness[-1] <= 1  # none gives up attention while another keeps all
    if modes[0] != "none":
        number = max(number for number, mode in enumerate(modes) if mode == modes[0])
        faster = [*BLOCK_MODES][leanness[0] - 1]
        assert model.estimate([*modes[:number], faster, *modes[number + 1 :]]).peak > gib * GIB


# Sequences, options, blocks that keep all, reserved GiB: the 1B flavour on one H100 80GB (docs/performance.md)
MEASURED = [
    (4, "off", 16, 45.6),
    (8, "off", 14, 69.4),
    (12, "off", 1, 68.9),
    (4, "on", 16, 39.3),
    (8, "on", 16, 58.0),
    (12, "on", 12, 68.8),
]


@pytest.mark.parametrize(("batch", "flag", "keep_all", "reserved"), MEASURED)
def test_choices_are_those_of_the_page_and_within_5_percent_of_the_measured_peak(
    batch: int, flag: str, keep_all: int, reserved: float
) -> None:
    off = "--liger_kernel.no-enable_fused_linear_cross_entropy" if flag == "off" else ""
    modes, peak = choose(f"--training.local_batch_size {batch} {off}", 71.7)
    assert (modes.count("none"), modes.count("op")) == (keep_all, 16 - keep_all)
    assert peak == pytest.approx(reserved, rel=0.05)
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    assert f"| {batch} | {flag} | {keep_all} | {16 - keep_all} | {peak:.1f} | {reserved} |" in page


def test_at_the_ends() -> None:
    assert choose("--training.local_batch_size 8", 80)[0] == ("none",) * 16
    modes, peak = choose("--training.local_batch_size 8", 10)
    assert modes == ("full",) * 16
    assert peak > 10


def test_each_pipeline_rank_chooses_for_its_own_blocks() -> None:
    config = parse(
        f"{LARGE} --liger_kernel.no-enable_fused_linear_cross_entropy --parallelism.pipeline_parallel_degree 2"
        " --parallelism.pipeline_parallel_microbatch_size 2"
    )
    model = MemoryModel(config, world_size=2)
    modes = list(choose_block_modes(config, model, 24 * GIB))
    for rank in range(2):
        blocks = model.get_blocks(rank)
        count = [modes[block] for block in blocks].count("op")
        assert count > 0
        assert all(modes[block] == "op" for block in blocks[:count])
        assert model.estimate_rank(rank, modes).peak <= 24 * GIB
        modes[blocks[count - 1]] = "none"
        assert model.estimate_rank(rank, modes).peak > 24 * GIB


def test_zero_bubble_schedules_do_not_recompute_by_op() -> None:
    options = "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule ZBVZeroBubble"
    options += " --liger_kernel.no-enable_fused_linear_cross_entropy --training.no-compile"
    all_kept = choose(options, 1000, world_size=2)[1]
    assert {*choose(options, 0.8 * all_kept, world_size=2)[0]} == {"none", "full"}


@pytest.mark.parametrize(
    "options",
    [
        "--parallelism.data_parallel_shard_degree 4",
        "--parallelism.tensor_parallel_degree 4 --liger_kernel.implementation native",
        "--parallelism.context_parallel_degree 4",
        "--parallelism.data_parallel_replicate_degree 4",
    ],
)
def test_every_layout_can_choose(options: str) -> None:
    all_kept = choose(f"{options} --training.local_batch_size 8", 1000, world_size=4)[1]
    modes, peak = choose(f"{options} --training.local_batch_size 8", 0.8 * all_kept, world_size=4)
    assert 0.7 * all_kept < peak <= 0.8 * all_kept
    assert "op" in modes
    assert "gathered" not in modes


@pytest.mark.parametrize(
    ("options", "fastest"),
    [
        ("", "gathered"),
        ("--parallelism.fsdp_reshard_after_forward always", "none"),
        ("--parallelism.fsdp_reshard_after_forward never", "none"),
        ("--parallelism.pipeline_parallel_degree 2 --liger_kernel.no-enable_fused_linear_cross_entropy", "none"),
    ],
)
def test_gathered_weights_stay_where_nothing_says_otherwise_and_go_first(options: str, fastest: str) -> None:
    options = f"{options} --training.local_batch_size 2"
    modes, all_kept = choose(options, 1000, world_size=2)
    assert {*modes} == {fastest}
    if fastest == "gathered":
        modes, peak = choose(options, all_kept - 1, world_size=2)
        assert {*modes} == {"none", "gathered"}
        assert [*modes] == sorted(modes, reverse=True)  # the last blocks' weights wait less long
        assert all_kept - 1.2 < peak <= all_kept - 1  # a block's are 0.11 GiB, the embedding's 0.5


def test_what_was_chosen_is_said(mesh: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is the share of the device less what others hold; a deterministic run does not look at those."""
    monkeypatch.setattr(plan, "get_memory_held_by_others", lambda device: 10 * GIB)
    set_capacity(monkeypatch, 80)
    options = f"{LARGE} --training.local_batch_size 8 --activation_checkpoint.memory_share 0.8"
    said = {}
    for more in ("--training.no-deterministic", "--training.deterministic"):
        plan_memory(parse(f"{options} {more}"), world=get_world(), mesh=mesh, device=CPU)
        said[more] = caplog.messages[-1]
    match = re.fullmatch(
        r"activation_checkpoint.mode=auto: (\d+) of 16 blocks keep all, (\d+) keep the costly results;"
        r" estimated peak ([\d.]+) GiB, ([\d.]+) left of 54.0",
        said["--training.no-deterministic"],
    )
    assert match is not None
    assert int(match[1]) + int(match[2]) == 16
    assert float(match[3]) + float(match[4]) == pytest.approx(54, abs=0.11)
    assert "16 of 16 blocks keep all; " in said["--training.deterministic"]
    assert "left of 64.0" in said["--training.deterministic"]


def plan_on_a_rank() -> list[Any]:
    """A step of the real mesh under FSDP and tensor parallel is planned; others hold more on rank 1's device."""
    plan.DeviceMemoryMonitor = lambda device: SimpleNamespace(name="GPU", capacity=60 * GIB)  # type: ignore[assignment,misc]
    plan.get_memory_held_by_others = lambda device: dist.get_rank() * 20 * GIB
    world = World(dist.get_rank(), 2, 0, 1, 0)
    found: list[Any] = []
    for dims, options in (
        (ParallelDims(dp_shard=2), ""),
        (ParallelDims(tp=2), "--parallelism.tensor_parallel_degree 2 --liger_kernel.implementation native"),
    ):
        config = parse(f"{LARGE} --training.local_batch_size 8 {options}")
        mesh = build_mesh(dims, "cpu")
        model = MemoryModel(config, world_size=2, mesh=mesh)
        found += [
            plan_memory(config, world=world, mesh=mesh, device=CPU).block_modes,
            choose_block_modes(config, model, (0.92 * 60 - 20) * GIB),
        ]
    return found


def test_all_ranks_choose_by_the_one_that_has_the_least() -> None:
    first, second = run_processes(plan_on_a_rank, 2)
    assert first == second
    assert first[0] == first[1]
    assert first[2] == first[3]
    assert "op" in first[0]


def test_processes_of_one_machine_share_a_cpu_s_memory(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_capacity(monkeypatch, 120)
    config = parse(f"{LARGE} --training.local_batch_size 8")
    plans = [
        plan_memory(config, world=replace(World(0, 1, 0, 1, 0), local_size=n), mesh=mesh, device=CPU) for n in (1, 2)
    ]
    assert [{*p.block_modes} for p in plans] == [{"none"}, {"none", "op"}]


def test_a_model_that_fits_in_no_way_is_refused_with_what_would_help(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_capacity(monkeypatch, 20)
    options = f"{LARGE} --training.local_batch_size 8 --activation_checkpoint.memory_share"
    with pytest.raises(ConfigError) as error:
        plan_memory(parse(f"{options} 0.5"), world=get_world(), mesh=mesh, device=CPU)
    first, *rest = str(error.value).splitlines()
    match = re.search(r"([\d.]+) GiB are missing of the ([\d.]+) that it needs.*=0.5 of 20.0 GiB.*leave 10.0$", first)
    assert match is not None
    assert float(match[2]) - float(match[1]) == pytest.approx(10, abs=0.11)
    assert any("--training.enable_cpu_offload" in line for line in rest)
    assert not any("memory_share" in line for line in rest)  # the whole device is too small
    assert not any("--activation_checkpoint.mode" in line for line in rest)  # recomputed is what can be
    set_capacity(monkeypatch, 40)
    with pytest.raises(ConfigError, match=r"activation_checkpoint.memory_share=0\.\d+ would let it try") as error:
        plan_memory(parse(f"{options} 0.4"), world=get_world(), mesh=mesh, device=CPU)
    needed = re.search(r"memory_share=(\S+) would", str(error.value))[1]  # type: ignore[index]
    plan_memory(parse(f"{options} {needed}"), world=get_world(), mesh=mesh, device=CPU)


def test_what_does_not_fit_the_machine_s_memory_is_refused(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "get_host_memory", lambda: 8 * GIB)
    set_capacity(monkeypatch, 80)
    options = f"{LARGE} --activation_checkpoint.offload --training.local_batch_size"
    plan_memory(parse(f"{options} 4"), world=get_world(), mesh=mesh, device=CPU)
    with pytest.raises(
        ConfigError, match=r"offload needs \d+\.\d GiB of this machine's memory .* has 8.0; use shorter"
    ):
        plan_memory(parse(f"{options} 64"), world=get_world(), mesh=mesh, device=CPU)


def test_a_model_without_an_estimate_cannot_choose(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(plan, "MemoryModel", fail)
    with pytest.raises(ConfigError, match="llama3 1B: no meta kernel; use another activation_checkpoint.mode"):
        plan_memory(parse(LARGE), world=get_world(), mesh=mesh, device=CPU)


def test_logits_are_told_of_where_they_are_a_twentieth_of_the_memory(
    mesh: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiled loss of 8192 tokens holds the logits, 2 GiB, and their gradient."""
    off = "--model.flavor 1B --training.seq_len 4096 --training.local_batch_size 2 --training.compile"
    for capacity, flag, told in ((80, "", True), (100, "", False), (80, FLAG, False)):
        caplog.clear()
        set_capacity(monkeypatch, capacity)
        plan_memory(parse(f"{off} --activation_checkpoint.mode auto {flag}"), world=get_world(), mesh=mesh, device=CPU)
        (said,) = [m for m in caplog.messages if m.startswith("The logits of each microbatch")] or [None]
        assert (said is not None) == told
        if said is not None:
            assert re.search(r"about 4\.[0-9] GiB of the peak, 6% of .*trains without them$", said)


class Recorded:
    """A trainer on the CPU, and the losses and weights of its steps."""

    def __init__(self, options: str, *, fails_at: dict[int, int] | None = None) -> None:
        """fails_at: how often the forward pass of a step runs out of memory, half-way."""
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = Trainer(parse(f"{SMALL} --job.dump_folder {self._folder.name} {options}"))
        self.fails_at = fails_at or {}
        block: Any = self.trainer.runner.model_parts[0].layers["3"]
        forward = block.forward

        def fail_or_go_on(*args: Any) -> Any:
            if self.fails_at.get(self.trainer.step, 0) > 0:
                self.fails_at[self.trainer.step] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return forward(*args)

        block.forward = fail_or_go_on

    def run(self, steps: int = 3) -> list[torch.Tensor]:
        batches = self.trainer.batches()
        try:
            for _ in range(steps):
                self.trainer.step += 1
                self.trainer.train_step(batches)
            return [p.detach().clone() for p in self.trainer.runner.model_parts[0].parameters()]
        finally:
            self.trainer.close()
            dist.destroy_process_group()
            self._folder.cleanup()


AUTO = "--activation_checkpoint.mode auto"


def test_weights_under_auto_are_those_of_full_recomputation() -> None:
    chosen = Recorded(AUTO)
    assert {*chosen.trainer.memory.block_modes} == {"none"}
    weights = chosen.run()
    for weight, expected in zip(weights, Recorded("--activation_checkpoint.mode full").run(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fails_at", [{1: 2}, {2: 1, 3: 1}])
def test_a_step_that_runs_out_of_memory_is_taken_again_under_leaner_modes(
    fails_at: dict[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    accumulate = "--training.global_batch_size 4"
    expected = Recorded(f"{AUTO} {accumulate}").run()
    run = Recorded(f"{AUTO} {accumulate}", fails_at=dict(fails_at))
    before = run.trainer.memory.block_modes
    weights = run.run()
    after = run.trainer.memory.block_modes
    assert before != after
    assert [block.block_mode for block in run.trainer.runner.model_parts[0].layers.values()] == list(after)
    told = [m for m in caplog.messages if m.startswith("Out of memory: this step again")]
    assert len(told) == sum(fails_at.values())
    assert told[-1].endswith(describe_block_modes(after))
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


def test_each_choice_is_leaner_until_none_is_left() -> None:
    config = parse(f"{LARGE} --training.local_batch_size 8")
    model = MemoryModel(config, world_size=1)
    choices: list[tuple[str, ...]] = []
    memory = MemoryPlan(
        ("none",) * 16, lambda budget: choose_block_modes(config, model, budget), model.estimate(["none"] * 16).peak
    )

    def fail() -> None:
        choices.append(memory.block_modes)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        memory.run(fail, [])
    peaks = [model.estimate(modes).peak for modes in choices]
    assert all(after < before for before, after in pairwise(peaks))
    assert all(peak <= peaks[0] * 0.95**i for i, peak in enumerate(peaks[:-1]))
    assert choices[0] == ("none",) * 16
    assert choices[-1] == ("full",) * 16


def fail() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("saves", [False, True])
def test_several_ranks_start_again_where_that_loses_the_first_steps_at_most(saves: bool) -> None:
    for num_steps_before in range(4):
        memory = MemoryPlan(("none",), lambda budget: ("op",), 1, by_restart=True, saves=saves)
        for _ in range(num_steps_before):
            memory.run(lambda: None, [])
        expected = RecomputeMoreError if saves or num_steps_before < 2 else torch.OutOfMemoryError
        with pytest.raises(expected) as raised:
            memory.run(fail, [])
        assert memory.block_modes == ("none",)
        assert exit_status(raised.value) == (EXIT_OUT_OF_MEMORY if expected is RecomputeMoreError else 1)
    with pytest.raises(torch.OutOfMemoryError):
        MemoryPlan(("full",), lambda budget: ("full",), 1, by_restart=True).run(fail, [])


def test_after_each_start_for_memory_that_ran_out_the_choice_is_the_next_one(
    mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one that a single process makes without a start."""
    set_capacity(monkeypatch, 80)
    config = parse(f"{LARGE} --training.local_batch_size 8")
    world = World(0, 1, 0, 1, 0)
    single = plan_memory(config, world=world, mesh=mesh, device=CPU)
    choices = [single.block_modes]
    for count in (1, 2):
        with pytest.raises(InterruptedError):
            single.run(raising(torch.OutOfMemoryError, InterruptedError), [])
        started = plan_memory(config, world=replace(world, out_of_memory_count=count), mesh=mesh, device=CPU)
        choices.append(started.block_modes)
        assert started.block_modes == single.block_modes
    assert len(set(choices)) == 3


def raising(*errors: type[Exception]) -> Callable[[], None]:
    """A function that raises the first of them when it is called first, and so on."""
    left = iter(errors)

    def raise_next() -> None:
        raise next(left)

    return raise_next


@pytest.mark.parametrize("options", ["--activation_checkpoint.mode none", f"{AUTO} --training.enable_cpu_offload"])
def test_memory_that_runs_out_ends_the_run_where_nothing_can_be_chosen(options: str) -> None:
    """By the options, or because FSDP's state in the middle of a step cannot be taken back."""
    with pytest.raises(torch.OutOfMemoryError):
        Recorded(options, fails_at={1: 1}).run()

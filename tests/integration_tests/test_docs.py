"""README and docs/ are true: what they name exists, and what they show runs.

Each page's files, Python blocks and commands run in the page's order, in a folder of its own that looks like a fresh
clone. Commands are shrunk by appended options (SMALL_RUN, SMALL_SCRIPTS), because the last of several wins: trainings
take two steps of the debug model, uncompiled. Trainings that need more than two processes are checked, not run.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import pytest

from tests.integration_tests.doc_pages import PAGES, REPO, Command, Page, file_name_of, find_problems, program_file
from torchtitan.config import JobConfig
from torchtitan.config.errors import FusedLossWithPipelineError, LigerNotInstalledError
from torchtitan.config.manager import resolve
from torchtitan.launch.launcher import split_arguments
from torchtitan.protocols.train_spec import validate_run

SMALL_RUN = [
    *("--training.steps", "2", "--training.seq_len", "64", "--training.local_batch_size", "2"),
    *("--training.global_batch_size", "-1", "--training.no-compile", "--lr_scheduler.warmup_steps", "1"),
    *("--validation.seq_len", "64", "--validation.local_batch_size", "2", "--validation.steps", "1"),
    "--metrics.no-enable_wandb",
]
SMALL_LLAMA = ["--model.flavor", "debugmodel", "--model.tokenizer_path", "tests/assets/tokenizer"]
SMALL_LLAMA += ["--model.no-use_scaled_rope"]  # as what stands in for Llama 3.1 has none
# Before the command's own options: what a TOML file turns on, and what would only take time here.
QUICK = ["--metrics.no-enable_tensorboard", "--profiling.no-enable_profiling"]
SMALL_SCRIPTS = {
    "benchmark_loss.py": ["--tokens=64", "--vocab=500", "--dim=32", "--dtype=float32", "--budgets=1"],
    "benchmark_train.py": [
        *("--flavor=debugmodel", "--seq_len=32", "--batches=1", "--steps=1", "--warmup=1"),
        *("--no-largest", "--no-compile"),
    ],
    "estimate.py": SMALL_LLAMA,
    "generate.py": ["--max_new_tokens=3"],
    "generate_config_docs.py": ["--check"],
    "compare.py": ["--steps=2", *SMALL_RUN, *SMALL_LLAMA],
    "tokenizer.py": ["--vocab_size=300"],
}
DEBUG_MODEL = "torchtitan/models/llama3/train_configs/debug_model.toml"
MOST_PROCESSES = 2
README_S_FIRST = ("./run_train.sh", "--liger_kernel.enable_fused_linear_cross_entropy")
"""One training runs through run_train.sh and torchrun; the others call train.main in a fork for each process."""

_LLAMA = re.compile(r"(?<![\w/-])Llama-[\w.-]+")
"""A folder of Hugging Face's that a page takes as given."""


TEXT = (REPO / "LICENSE").read_text() * 20


@dataclass(frozen=True)
class Result:
    status: int
    output: str


@dataclass
class Step:
    """One thing of a page that runs; `kind` is what doc_worker.run_step knows."""

    where: str
    kind: str
    words: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    code: str = ""
    ranks: int = 1
    number: int = 0

    def __str__(self) -> str:
        return f"{self.where} {self.kind}"


def steps_of(page: Page) -> Iterator[Step]:
    for name in sorted({name for command in page.commands() for name in _LLAMA.findall(" ".join(command.words))}):
        words = ["torchtitan", "convert", "to_hf", "outputs/checkpoint/step-10", name]
        yield Step(f"{page.name}:0 {name}", "module", words)
    for block in page.blocks:
        if block.language == "python" and not block.not_run and file_name_of(block) is None:
            yield Step(f"{page.name}:{block.line}", "code", code=block.text)
        for command in page.commands_of(block):
            if not (command.not_run or command.is_fragment or command.is_placeholder) and (step := step_of(command)):
                yield step


def step_of(command: Command) -> Step | None:
    """How the command is run here; None if it is not: another's program, or more processes than there may be."""
    env = {name: value for name, value in command.env.items() if name != "CONFIG_FILE"}
    if command.is_training:
        config, launcher, options = parse_training(command)
        num_processes = max(world_size_of(command, config), launcher)
        if num_processes > MOST_PROCESSES:
            return None
        dump_folder = f"run{command.where.rpartition(':')[2]}"
        options = [*QUICK, *options, *shrunk(config), "--job.dump_folder", dump_folder]
        if command.words == README_S_FIRST and not command.env:
            return Step(command.where, "process", ["./run_train.sh", *options], env | {"NGPU": "1"})
        return Step(command.where, "training", options, env, ranks=num_processes)
    program = command.program()
    if program is None or program_file(program) is None:
        return None
    small = [] if command.compares_finished_runs else SMALL_SCRIPTS.get(program_file(program).name, [])
    ranks = int(command.words[command.words.index("--nproc_per_node") + 1]) if command.words[0] == "torchrun" else 1
    if program[0] in ("-m", "torchtitan"):
        words = [*(program[1:] if program[0] == "-m" else program), *small]
        return Step(command.where, "module", words, env, ranks=ranks)
    return Step(command.where, "script", [*program, *small], dict(command.env), ranks=ranks)


def parse_training(command: Command) -> tuple[JobConfig, int, list[str]]:
    """The configuration, the number of processes that the command gives, and the options of the run."""
    launcher, options = split_arguments(command.training_words)
    if not any(word.startswith("--job.config_file") for word in options):
        options = ["--job.config_file", command.env.get("CONFIG_FILE", DEBUG_MODEL), *options]
    return resolve(options)[0], launcher.nproc_per_node * int(launcher.nnodes.partition(":")[0]), options


def world_size_of(command: Command, config: JobConfig) -> int:
    degrees = [
        config.parallelism.data_parallel_replicate_degree,
        max(1, config.parallelism.data_parallel_shard_degree),
        config.parallelism.context_parallel_degree,
        config.parallelism.tensor_parallel_degree,
        config.parallelism.pipeline_parallel_degree,
    ]
    return int(command.env.get("NGPU", prod(degrees)))


def shrunk(config: JobConfig) -> list[str]:
    options = [*SMALL_RUN, *(SMALL_LLAMA if config.model.name == "llama3" else [])]
    for section, small in (("training", "python_stdlib"), ("validation", "python_stdlib_validation")):
        if (getattr(config, section).dataset or "").startswith("c4"):
            options += [f"--{section}.dataset", small]
    return options


def all_steps(pages: Sequence[Page]) -> dict[str, list[Step]]:
    """The steps of each page; a command that several pages show runs in the first of them."""
    steps: dict[str, list[Step]] = {}
    seen: list[object] = []
    for page in pages:
        steps[page.name] = []
        for step in steps_of(page):
            what = [step.code, [word for word in step.words if not re.fullmatch(r"run\d+", word)], step.env]
            if what not in seen or "convert" in str(step):
                steps[page.name].append(step)
            seen.append(what)
    return steps


PARSED = [Page.of(path) for path in PAGES]
COMMANDS = [command for page in PARSED for command in page.commands()]
STEPS = all_steps(PARSED)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The result of every step of the pages of which some step is selected, by its place."""
    mine = [item for item in request.session.items if item.path == request.path and "results" in item.fixturenames]
    selected = [item.callspec.params["step"] for item in mine]
    root = tmp_path_factory.mktemp("docs")
    jobs, steps = [], []
    for page in PARSED:
        if any(step in selected for step in STEPS[page.name]):
            folder = root / page.name.replace("/", "_")
            folder.mkdir()
            steps += STEPS[page.name]
            jobs.append({"folder": str(folder), **ingredients(page), "steps": STEPS[page.name]})
    for number, step in enumerate(steps):
        step.number = number
    jobs.sort(key=lambda job: -sum(map(costs, job["steps"])))
    (root / "jobs.json").write_text(json.dumps(jobs, default=vars))
    (root / "results").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    worker = [sys.executable, "-m", "tests.integration_tests.doc_worker", root / "jobs.json", root / "results"]
    subprocess.run(worker, cwd=REPO, env=environment, check=True, timeout=1200)
    return {step.where: Result(**json.loads((root / f"results/{step.number}.json").read_text())) for step in steps}


def costs(step: Step) -> int:
    """Roughly, in seconds: for the long pages to begin first."""
    return 10 if step.kind == "process" else 4 * step.ranks


def ingredients(page: Page) -> dict[str, object]:
    """What must lie in the page's folder before its first step."""
    words = " ".join([*(block.text for block in page.blocks), *(word for c in page.commands() for word in c.words)])
    checkpoints = sorted(set(re.findall(r"outputs/checkpoint/step-\d+", words)))
    if _LLAMA.search(words):
        checkpoints.append("outputs/checkpoint/step-10")
    step = {"step": 1, "loss_metrics/global_avg_loss": 8.0, "grad_norm": 1.0, "throughput(tps)": 1000.0}
    metrics = json.dumps(step | {"memory/max_reserved(GiB)": 1.0}) + "\n"
    files = {"my_texts/a.txt": TEXT, "outputs/metrics.jsonl": metrics}
    return {"files": page.files() | files, "checkpoints": checkpoints}


@pytest.mark.parametrize("step", [step for steps in STEPS.values() for step in steps], ids=str)
def test_what_a_page_shows_runs(step: Step, results: dict[str, Result]) -> None:
    result = results[step.where]
    assert result.status == 0, f"{step.where} {' '.join(step.words)}\n{result.output}"


@pytest.mark.parametrize("page", PARSED, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Page) -> None:
    assert list(find_problems(page)) == []


@pytest.mark.parametrize(
    "command",
    # not of a folder of weights that a reader has and the tests do not
    [
        c
        for c in COMMANDS
        if c.is_training and not c.is_placeholder and not {"--help", "--model.hf_folder"} & {*c.words}
    ],
    ids=str,
)
def test_options_of_a_training_go_together(command: Command) -> None:
    config, num_processes, _ = parse_training(command)
    validate_run(config, world_size=max(num_processes, world_size_of(command, config)), liger_installed=True)


def test_the_pages_hold_the_messages_that_users_see() -> None:
    page = (REPO / "docs/liger_kernel.md").read_text()
    for error in (LigerNotInstalledError(), FusedLossWithPipelineError(2)):
        assert f"\n{error.report()}\n" in page
    build = (REPO / "torchtitan/components/loss/build.py").read_text()
    lines = re.findall(r"`(Using [^`]*|Compiling [^`]*)`", page)
    assert len(lines) >= 5
    for line in lines:
        assert all(part in build for part in re.split(r": | for the cpu", line) if part), line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`--training.stepz 5`", "unknown option --training.stepz"),
        ("`--training.no-steps`", "unknown option --training.no-steps"),
        ("`--max_new_token 5`", "unknown flag --max_new_token"),
        ("`training.seq_length`", "unknown option training.seq_length"),
        ("`optimizer.learning_rate = 3e-4`", "unknown option optimizer.learning_rate"),
        ("`scripts/los_compare.py`", "scripts/los_compare.py does not exist"),
        ("`components/losses.py`", "there is no file components/losses.py"),
        ("`tests/unit_tests/test_examples.py::test_nothing`", "there is no test test_nothing"),
        ("[there](configuraton.md)", "link to configuraton.md"),
        ("[there](configuration.md#trainin)", "there is no such heading"),
        ("```bash\n./run_train.sh --liger_kernel.enable_fused_linear_cross_entropi\n```", "did you mean"),
        ("```bash\n./run_train.sh --training.compile \\\n    --training.steps ten\n```", "must be an integer"),
        ("```bash\nCONFIG_FILE=none.toml ./run_train.sh\n```", "cannot read job.config_file none.toml"),
        ("```bash\npython scripts/loss_compare.py --step 5\n```", "unknown flag --step"),
        ("```bash\npython scripts/loss_compare.py --candidate '--training.stepz 5'\n```", "--training.stepz"),
        ("```bash\npython scripts/compare_loss.py\n```", "scripts/compare_loss.py does not exist"),
        ("```bash\nrun_train --training.steps 5\n```", "what is 'run_train'?"),
        ("```\nwrong: use --parallelism.tensor_parallel 1\n```", "unknown option --parallelism.tensor_parallel"),
        ("    ./run_train.sh --training.stepz 5", "--training.stepz"),
        ("```toml\n[training]\nstepz = 5\n```", "unknown option --training.stepz"),
        ("```python\nfrom torchtitan.components.loss import linear_cross_entropy\n```", "has no linear_cross_entropy"),
        ("```python\nprint(\n```", "not Python"),
    ],
)
def test_what_does_not_exist_is_found(text: str, problem: str) -> None:
    page = Page.parse("docs/page.md", REPO / "docs", f"# Page\n\n{text}\n")
    assert any(problem in found for found in find_problems(page)), list(find_problems(page))


@pytest.mark.parametrize(
    "text",
    [
        "`--training.no-compile`, `--training.no_compile=...`, `--section.option value`, `--nproc_per_node 2`",
        "`train.py`, `model.py`, `optimizer.step()`, `config.toml`, `my_data.py`, `<folder>/metrics.jsonl`, `*.py`",
        "`training.steps`, `training.steps=5`, `--float8.recipe_name x`, [there](../README.md), [here](#page)",
        "```bash\nNGPU=2 ./run_train.sh --nnodes 2 --rdzv_id x --training.steps 5  # comment\n```",
        "<!-- not run: it is only an example -->\n```bash\npip install x && tensorboard --logdir outputs | head\n```",
    ],
)
def test_what_exists_is_not_found_fault_with(text: str) -> None:
    page = Page.parse("docs/page.md", REPO / "docs", f"# Page\n\n{text}\n")
    assert list(find_problems(page)) == []


def test_a_page_is_read_as_it_is_meant() -> None:
    text = """
# Page
```python
# my_file.py
x = 1
```
```bash
A=1 python scripts/benchmark_loss.py --dtype "two words" \\
    --seed 1 | head && ./run_train.sh   # comment
```
<!-- not run: reasons -->
```bash
torchrun --nproc_per_node 2 scripts/benchmark_loss_tp.py --seed 2
```
""".replace("\\\\", "\\")
    page = Page.parse("page.md", REPO, text)
    assert page.files() == {"my_file.py": "# my_file.py\nx = 1\n"}
    benchmark, train, not_run = page.commands()
    assert benchmark.words == ("python", "scripts/benchmark_loss.py", "--dtype", "two words", "--seed", "1")
    assert (benchmark.where, benchmark.env) == ("page.md:8", {"A": "1"})
    assert train.words == ("./run_train.sh",)
    assert (not_run.not_run, not_run.program()) == ("reasons", ("scripts/benchmark_loss_tp.py", "--seed", "2"))
    assert [step.kind for step in steps_of(page)] == ["script", "training"]


def test_trainings_are_run_small_and_those_of_many_processes_are_not() -> None:
    text = """
```bash
./run_train.sh --training.steps 1000 --model.flavor 8B --training.dataset c4
NGPU=2 ./run_train.sh --parallelism.tensor_parallel_degree 2
NGPU=8 ./run_train.sh
./run_train.sh --parallelism.pipeline_parallel_degree 4
```
"""
    small, two = steps_of(Page.parse("page.md", REPO, text))
    config, _ = resolve(small.words)
    assert (config.model.flavor, config.training.steps, config.training.dataset) == ("debugmodel", 2, "python_stdlib")
    assert (two.kind, two.ranks) == ("training", 2)


def test_a_comparison_that_starts_no_run_is_run_as_it_is_shown() -> None:
    text = """
```bash
python scripts/loss_compare.py --baseline outputs/a --candidate outputs/b
python scripts/loss_compare.py --baseline outputs/a --candidate "--training.compile"
```
"""
    folders, one_run = steps_of(Page.parse("page.md", REPO, text))
    assert folders.words == ["scripts/loss_compare.py", "--baseline", "outputs/a", "--candidate", "outputs/b"]
    assert one_run.words[-len(SMALL_LLAMA) :] == SMALL_LLAMA

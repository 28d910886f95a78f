"""Which modules each pipeline stage has, and which stages each rank. Imports no torch: options are checked fast."""

from itertools import accumulate, pairwise

from torchtitan.config.sections import Parallelism

# Schedules by the number of stages on each rank: one, two, or (the interleaved ones) two or more.
ONE_STAGE = ("GPipe", "1F1B")
TWO_STAGES = ("ZBVZeroBubble",)
ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble")
"""Those that compute the gradients of inputs and of weights apart."""


def get_stage_modules(parallelism: Parallelism, n_layers: int) -> list[list[str]]:
    """Names of the modules in each stage: as given, or by dividing the layers evenly.

    The embedding counts as `first_stage_less_layers` layers, norm and output as `last_stage_less_layers`; earlier
    stages take what does not divide. validate() refuses what cannot be divided so.
    """
    if parallelism.module_fqns_per_model_part is not None:
        return parallelism.module_fqns_per_model_part
    first, last = (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    num_stages = get_num_stages(parallelism, n_layers)
    share, rest = divmod(n_layers + first + last, num_stages)
    counts = [share + (stage < rest) for stage in range(num_stages)]
    assert share > 0, f"{num_stages} stages for {n_layers} layers"
    counts[0] -= first
    counts[-1] -= last
    assert min(counts) >= 0, f"embedding or output count for more than a stage: {counts}"
    parts = [[f"layers.{i}" for i in range(*bounds)] for bounds in pairwise(accumulate(counts, initial=0))]
    return [["tok_embeddings", *parts[0]], *parts[1:-1], [*parts[-1], "norm", "output"]]


def get_num_stages(parallelism: Parallelism, n_layers: int) -> int:
    """How many stages the options make, whether or not the schedule takes as many."""
    if parallelism.module_fqns_per_model_part is not None:
        return len(parallelism.module_fqns_per_model_part)
    if parallelism.pipeline_parallel_layers_per_stage is not None:
        n_layers += parallelism.pipeline_parallel_first_stage_less_layers
        n_layers += parallelism.pipeline_parallel_last_stage_less_layers
        return -(-n_layers // parallelism.pipeline_parallel_layers_per_stage)
    return parallelism.pipeline_parallel_degree * (1 if parallelism.pipeline_parallel_schedule in ONE_STAGE else 2)


def get_stages_of_rank(schedule: str, rank: int, degree: int, num_stages: int) -> list[int]:
    """Numbers of the stages that a rank holds, first to last."""
    if schedule == "ZBVZeroBubble":  # down the ranks and up again
        return [rank, 2 * degree - 1 - rank]
    return list(range(rank, num_stages, degree))

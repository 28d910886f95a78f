"""The trainer. Read this file first: the whole system in the order in which data flows through it.

    torchrun ... -m torchtitan.train --job.config_file run.toml --section.option value ...

A step: collect the microbatches of the global batch; count its valid tokens over all ranks; for each microbatch
hidden states -> loss(hidden, output, labels, scale) -> backward; clip; optimizer. `scale` is 1 / valid tokens, and the
only division there is: FSDP sums, gradient accumulation sums, so that the result is the mean over the whole batch
whatever the number of ignored labels on each rank. Between two log steps the host waits once a step: before it queues
one, for the backward of the one before (docs/architecture.md names the exceptions).
"""

import math
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.checkpoint.manager import CheckpointManager, build_checkpoint_manager
from torchtitan.components.dataloader import Batch, agree_on_ignored, build_dataloader
from torchtitan.components.document_mask import build_document_marker
from torchtitan.components.history import get_environment, get_report_command
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.loss.build import build_loss, build_token_sums, check_sums
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.components.metrics import MetricsProcessor, build_metrics
from torchtitan.components.optimizer import build_optimizer, get_weight_dtype
from torchtitan.components.run_guard import RunGuard
from torchtitan.components.runner import Runner, build_runner
from torchtitan.components.source_losses import SourceLosses
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError, NonFiniteError, RecomputeMoreError, exit_status, raise_all
from torchtitan.config.manager import to_toml, write_resolved
from torchtitan.distributed import utils
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.fsdp import reduce_over_copies
from torchtitan.distributed.mesh import build_mesh
from torchtitan.launch.environment import about_compiler
from torchtitan.memory import explain_out_of_memory, is_out_of_memory, plan_memory
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.model import Loss
from torchtitan.protocols.train_spec import check_vocab_size, find_family, get_run_args, validate_run
from torchtitan.tools.gc import GarbageCollection
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.packages import is_liger_installed
from torchtitan.tools.process import end_with_launcher
from torchtitan.tools.profiling import maybe_profile

EXIT_PREEMPTED = 128 + signal.SIGTERM
"""Status after SIGTERM: the step was finished and, if checkpoints are on, saved."""


class Trainer:
    """One run: built in data-flow order, then `train()`. A checkpoint carries its `step` and `n_tokens_seen`."""

    def __init__(self, config: JobConfig) -> None:
        self.config, training = config, config.training
        self.step = self.n_tokens_seen = 0
        logger.info(f"Starting job: {config.job.description}")

        # processes, and the mesh they form
        self.device = utils.init_distributed(
            config.comm, dump_folder=config.job.dump_folder, enable_cpu_offload=training.enable_cpu_offload
        )
        self.parallel_dims = ParallelDims.from_config(config.parallelism, utils.get_world().size)
        self.mesh = build_mesh(self.parallel_dims, self.device.type)
        utils.set_pg_timeouts(config.comm.init_timeout_seconds, self.mesh, self.device)
        self.gc = GarbageCollection(config.training.gc_freq, debug=config.training.gc_debug)
        self.seed = utils.set_determinism(training.seed, self.device, deterministic=training.deterministic)
        self.guard = RunGuard(self.device)

        # text to batches
        self.tokenizer = build_tokenizer(config.model.tokenizer_path)
        check_vocab_size(config, self.tokenizer.vocab_size)
        self.num_microbatches = self.parallel_dims.get_num_microbatches(training)
        global_batch_size = self.parallel_dims.get_global_batch_size(training)
        self.dataloader = build_dataloader(
            training=training,
            tokenizer=self.tokenizer,
            dp_rank=self.mesh["dp"].get_local_rank(),
            dp_world_size=self.parallel_dims.dp,
            batch_size=training.local_batch_size,
            global_batch_size=global_batch_size,
            seq_len=training.seq_len,
            seed=self.seed,
            asked_to_stop=self.guard.asked_to_stop,
        )
        self.mark_documents = build_document_marker(training, self.tokenizer)
        self.shard_context = ContextSharder(self.mesh["cp"])

        # batches to gradients
        self.model_code = find_family(config.model).load()
        self.model_args = get_run_args(config.model, max_seq_len=config.max_seq_len)
        logger.info(f"Building {config.model.title} with {self.model_args}")
        self.float8 = config.float8 if "float8" in config.model.converters else None
        self.token_sums = build_token_sums(training, config.metrics)
        self.loss = check_sums(self._build_loss(), self.token_sums)
        self.memory = plan_memory(config, world=utils.get_world(), mesh=self.mesh, device=self.device)
        self.runner = self._build_runner()
        logger.info(f"Model {config.model.title} size: {self.model_args.num_params():,} total parameters")

        # gradients to weights
        self.optimizer = build_optimizer(self.runner.model_parts, config.optimizer, float8=self.float8)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, training.steps)

        # what the run says, keeps and checks
        self.metrics = self._build_metrics()
        self.source_losses = SourceLosses(self.dataloader.get_tokens_by_source, self.token_sums, self.mesh, self.device)
        self.checkpointer = self._build_checkpointer()
        self.validator = Validator(
            config.validation,
            training,
            tokenizer=self.tokenizer,
            runner=self.runner,
            metrics=self.metrics,
            mark_documents=self.mark_documents,
            shard_context=self.shard_context,
            mesh=self.mesh,
            device=self.device,
            guard=self.guard,
        )
        logger.info(
            f"Trainer is initialized with local batch size {training.local_batch_size}, global batch size "
            f"{global_batch_size}, gradient accumulation steps {self.num_microbatches}, sequence length "
            f"{training.seq_len}, total steps {training.steps} (warmup "
            f"{min(config.lr_scheduler.warmup_steps, training.steps)}), seed {self.seed}"
        )

    def train(self) -> None:
        """Train to the last step.

        Raises:
            NonFiniteError: the loss or the gradient is inf or nan, or the optimizer makes a weight so: it is not saved.
            SystemExit: with EXIT_PREEMPTED, after SIGTERM and a save.
        """
        config, steps, rank = self.config, self.config.training.steps, utils.get_world().rank
        if self.checkpointer.load() and self.dataloader.seed != self.seed:
            without_effect = f"; training.seed={self.seed} changes nothing" * (config.training.seed is not None)
            logger.info(f"The data's order goes on with the checkpoint's seed, {self.dataloader.seed}{without_effect}")
        self.save_options()
        batches, first_step = self.batches(), self.step + 1
        nothing_left = f"Nothing is left to train: step {self.step} is done, of training.steps={steps}"
        logger.info(f"Training starts at step {first_step}" if first_step <= steps else nothing_left)
        with maybe_profile(
            config.profiling, config.job.dump_folder, device=self.device, rank=rank, start_step=self.step
        ) as profile_step:
            while self.step < steps:
                self.step += 1
                self.gc.run(self.step)
                self.metrics.start_step(self.step)
                stop = self.train_step(batches)
                if self.step == first_step:
                    self.guard.heed_sigterm()
                last_step = self.step == steps
                if last_step or (self.checkpointer.is_due(self.step) and not stop):
                    self.guard.check_weights(self.parameters(), self.step)  # what is not finite must not be saved
                    self.checkpointer.maybe_save(self.step, last_step=last_step)
                    stop = not last_step and self.guard.must_stop()  # asked meanwhile: this save will do
                if stop or self.validator.maybe_validate(self.step):
                    self._stop()
                profile_step()
                if self.step == first_step:
                    utils.set_pg_timeouts(config.comm.train_timeout_seconds, self.mesh, self.device)
        logger.info(f"Training completed; to see it: {get_report_command(config.job.dump_folder)}")

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """One optimizer step; or none and true, where a rank was to stop before it (run_guard.py) or has no data."""
        place = self.dataloader.place
        microbatches = [next(batches) for _ in range(self.num_microbatches)]
        # on the CPU, where the batches are, and by one rank of those that read the same sequences
        num_local_tokens = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in microbatches]).sum()
        count = int(num_local_tokens) * self.mesh.is_first("pp", "cp", "tp")
        if self.guard.stops_after(self.step - 1):  # waits for its backward; the weights are still to be updated
            self.step, self.dataloader.place = self.step - 1, place
            return True
        if getattr(self.loss, "takes_host_labels", False):
            agree_on_ignored(microbatches, self.mesh["tp"], self.device, stand_in=self.dataloader.gave_up)
        scale = 1 / self.guard.sum_tokens(count, no_data=self.dataloader.gave_up).clamp(min=1)
        loss = self.memory.run(partial(self._forward_backward, microbatches, scale), self.runner.model_parts)
        self.source_losses.add_step(microbatches)
        grad_norm = utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.checkpointer.maybe_wait_for_staging()
        clip_factor = utils.get_clip_factor(grad_norm, self.config.training.max_norm)
        self.optimizer.step(grad_factor=clip_factor, skip=self.guard.must_skip(grad_norm))
        if self.guard.lacks_data():
            self.step, self.dataloader.place = self.step - 1, place
            return True
        self.n_tokens_seen += sum(batch.tokens.numel() for batch in microbatches) * self.parallel_dims.dp
        if self.metrics.should_log(self.step):
            self._log(loss, grad_norm, num_local_tokens.to(self.device), scale)
        self.lr_scheduler.step()
        return False

    def _forward_backward(self, microbatches: list[Batch], scale: Tensor) -> Tensor:
        """This rank's share of the loss; the gradients are those of these microbatches alone."""
        self.optimizer.zero_grad()
        self.token_sums.reset(logged=self.metrics.should_log(self.step))
        loss = torch.zeros((), device=self.device)
        stay = getattr(self.loss, "takes_host_labels", False)  # the labels, on the host
        for batch in microbatches:
            reduce_over_copies(self.runner.model_parts, now=batch is microbatches[-1])
            loss += self.runner.forward_backward(*self.shard_context(*batch.to(self.device, labels_stay=stay)), scale)
        return loss

    def close(self, *, failed: bool = False) -> None:
        self.dataloader.close()
        self.checkpointer.close()
        self.metrics.close(failed=failed)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "n_tokens_seen": self.n_tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.n_tokens_seen = state_dict["step"], state_dict.get("n_tokens_seen", 0)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.runner.model_parts for parameter in part.parameters()]

    def batches(self) -> Iterator[Batch]:
        """The loader's batches, counted and timed."""
        batches = iter(self.dataloader)
        while True:
            start = time.perf_counter()
            batch = self.mark_documents(next(batches))
            self.metrics.record_data_loading(time.perf_counter() - start)
            self.metrics.count_tokens(batch.tokens.numel())
            yield batch

    def _log(self, loss: Tensor, grad_norm: Tensor, num_local_tokens: Tensor, scale: Tensor) -> None:
        # context ranks hold parts of the same sequences; a pipeline's loss is on its last stage
        local_loss = utils.dist_sum(utils.dist_sum(loss, self.mesh["cp"]), self.mesh["pp"])
        loss_avg, norm = utils.dist_sum(local_loss, self.mesh["dp"]).item(), grad_norm.item()
        loss_max = utils.dist_max(local_loss / (num_local_tokens * scale).clamp(min=1e-12), self.mesh["dp"]).item()
        if not math.isfinite(loss_avg) or not math.isfinite(norm):
            found = f"the loss is {loss_avg} and the gradient norm {norm}"
            raise NonFiniteError(self.step, f"{found}; the weights are left as they were before")
        values = {"loss_avg": loss_avg, "loss_max": loss_max, "grad_norm": norm, "lr": self.lr_scheduler.lr}
        scaled = self.token_sums.scaled(scale * self.mesh.is_first("tp"))  # whose ranks all have the same
        of_tokens = utils.sum_each_over_world(scaled)
        self.metrics.log(self.step, self.source_losses.report(), of_tokens, n_tokens_seen=self.n_tokens_seen, **values)

    def get_options_in_force(self) -> JobConfig:
        """The options, with the seed of the data's order, which may have been drawn, or come with a checkpoint."""
        return replace(self.config, training=replace(self.config.training, seed=self.dataloader.seed))

    def save_options(self) -> None:
        """Write config.toml, and the start: not before a checkpoint is loaded, which may refuse them."""
        if utils.get_world().rank == 0:
            write_resolved(self.get_options_in_force(), Path(self.config.job.dump_folder) / "config.toml")
            self.metrics.note("start", self.step, **get_environment(self.parallel_dims, self.device))

    def _stop(self) -> None:
        self.guard.check_weights(self.parameters(), self.step)
        saved = self.checkpointer.save(self.step)
        self.metrics.note("stop", self.step, saved=saved)
        logger.info(f"Stopped by SIGTERM after step {self.step}; " + ("it is saved" if saved else "nothing was saved"))
        raise SystemExit(EXIT_PREEMPTED)

    def _build_loss(self) -> Loss:
        return (self.model_code.build_loss or build_loss)(
            self.config.liger_kernel,
            device_type=self.device.type,
            tensor_parallel=self.parallel_dims.tp > 1,
            compile=self.config.training.compile,
            sums=self.token_sums,
        )

    def _build_runner(self) -> Runner:
        config = self.config
        return build_runner(
            partial(self.model_code.model_cls, self.model_args),
            self.model_args,
            self.loss,
            parallelize=partial(
                self.model_code.parallelize_fn,
                mesh=self.mesh,
                parallel_dims=self.parallel_dims,
                parallelism=config.parallelism,
                training=config.training,
                block_modes=self.memory.block_modes,
                loss_parallel=not config.parallelism.disable_loss_parallel,
            ),
            mesh=self.mesh,
            parallelism=config.parallelism,
            training=config.training,
            device=self.device,
            seed=self.seed,
            logits_budget_bytes=config.liger_kernel.logits_memory_budget_mib << 20,
            float8=self.float8,
            offload=config.activation_checkpoint.offload,
            weight_dtype=get_weight_dtype(config.training, config.optimizer),
        )

    def _build_metrics(self) -> MetricsProcessor:
        return build_metrics(
            self.config.metrics,
            dump_folder=self.config.job.dump_folder,
            start_time=utils.get_start_time(),
            config=self.config.to_dict(),
            device=self.device,
            rank=utils.get_world().rank,
            total_steps=self.config.training.steps,
            num_flops_per_token=self.model_args.get_num_flops_per_token(self.config.training.seq_len),
            non_data_parallel_degree=self.parallel_dims.cp * self.parallel_dims.tp * self.parallel_dims.pp,
            on_terminal=utils.get_progress_rank() is not None,
            owns_progress_line=utils.get_progress_rank() == utils.get_world().local_rank,
        )

    def _build_checkpointer(self) -> CheckpointManager:
        return build_checkpoint_manager(
            self.config.checkpoint,
            dump_folder=self.config.job.dump_folder,
            model_parts=self.runner.model_parts,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.dataloader,
            train_state=self,
            steps=self.config.training.steps,
            options=lambda: to_toml(self.get_options_in_force()),
            is_restart=utils.get_world().restart_count > 0,
            adapter=self.model_code.state_dict_adapter(self.model_args),
            hf_folder=self.config.model.hf_folder,
            tokenizer_path=self.config.model.tokenizer_path,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
        )


def main(argv: list[str]) -> int:
    """Train as the arguments say; the exit status."""
    init_logger(warnings_only=not utils.tells_all())
    end_with_launcher()
    config: JobConfig | None = None
    trainer: Trainer | None = None
    failed, world = True, utils.get_world()
    try:
        config = ConfigManager().parse_args(argv)
        maybe_import_custom(config.experimental.custom_import)
        if config.job.print_args and world.rank == 0:
            logger.info(f"The resolved configuration:\n{to_toml(config)}")
        utils.check_gpus()
        validate_run(
            config,
            world_size=world.size,
            local_world_size=world.local_size,
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            liger_installed=is_liger_installed(),
        )
        if config.training.compile:
            raise_all([*about_compiler(torch.cuda.device_count())])
        trainer = Trainer(config)
        if config.checkpoint.create_seed_checkpoint:
            trainer.save_options()
            trainer.checkpointer.save_seed()
        else:
            trainer.train()
        failed = False
        return 0
    except Exception as error:
        if utils.is_of_lost_rank(error):
            if trainer is None:
                utils.end_after_lost_rank(error)
            trainer.metrics.close(failed=True)
            utils.end_after_lost_rank(error, step=trainer.step, asked_to_stop=trainer.guard.asked_to_stop)
        logger.error(_explain(error, config, trainer))
        return exit_status(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if trainer is not None:
            trainer.close(failed=failed)
        utils.leave_process_group(failed=failed)


def _explain(error: Exception, config: JobConfig | None, trainer: Trainer | None) -> str:
    """What the user reads of a failure; the traceback of a bug."""
    if isinstance(error, ConfigError | NonFiniteError | RecomputeMoreError):
        return error.report()
    if config is None or not is_out_of_memory(error):
        return traceback.format_exc()
    mesh, block_modes = (trainer.mesh, trainer.memory.block_modes) if trainer is not None else (None, None)
    if mesh is None and dist.is_initialized():
        dist.destroy_process_group()  # for the estimate to make a mesh of its own
    return explain_out_of_memory(config, error, world_size=utils.get_world().size, mesh=mesh, block_modes=block_modes)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    utils.end_process(status) if status else sys.exit(0)

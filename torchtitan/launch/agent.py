"""torchrun's agent, but that it knows two statuses of workers: what no restart heals, and memory that ran out.

It acts on the machine whose worker has failed. After a mistake the agents of the others find that there is none to
meet; after memory that ran out they restart as they do after any failure, where --max_restarts allows it. And it
keeps which workers failed as all were being stopped, of which torchrun says nothing.
"""

import os
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.launcher import api

from torchtitan.config.errors import EXIT_MISTAKE, EXIT_OUT_OF_MEMORY

_VARIABLE = "TORCHTITAN_OUT_OF_MEMORY_COUNT"


class Agent(LocalElasticAgent):
    failures: dict[int, ProcessFailure]  # by rank: those of the last workers to be stopped that ended by themselves
    _out_of_memory_count = 0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        statuses = {failure.exitcode for failure in result.failures.values()}
        if EXIT_MISTAKE in statuses:
            self._remaining_restarts = 0
        elif EXIT_OUT_OF_MEMORY in statuses:  # with more recomputation each time, so it ends
            self._out_of_memory_count += 1
            os.environ[_VARIABLE] = str(self._out_of_memory_count)
            worker_group.spec.max_restarts += 1
            self._remaining_restarts += 1
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        workers = getattr(self._pcontext, "subprocess_handlers", {})
        Agent.failures = {
            self._worker_group.workers[local_rank].global_rank: ProcessFailure(local_rank, worker.proc.pid, status, "")
            for local_rank, worker in workers.items()
            if 0 < (status := worker.proc.poll() or 0) < 128  # not by a signal
        }


def use_agent() -> None:
    """Have torchrun take this one."""
    Agent.failures = {}
    os.environ[_VARIABLE] = "0"
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined,misc]

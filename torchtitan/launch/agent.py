"""torchrun's agent, but for the failures that no restart heals: those it does not restart."""

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from torchtitan.config.errors import EXIT_MISTAKE


class Agent(LocalElasticAgent):
    """Of the machine whose worker made the mistake; the agents of the others then find that there is none to meet."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == EXIT_MISTAKE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def use_agent() -> None:
    """Have torchrun take this one."""
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined,misc]

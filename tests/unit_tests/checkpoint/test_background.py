"""What is saved beside training is the state of its step, on a GPU too, and its process may die."""

import os
import signal
import threading

import pytest
from torch.distributed.tensor import DTensor

from tests.unit_tests.checkpoint.checkpointed_run import MODES, assert_same, build_run, names

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_each_checkpoint_holds_the_state_of_its_step_while_training_goes_on(tmp_path, mode):
    run = build_run(tmp_path, async_mode=mode)
    expected = {}
    for step in (2, 4, 6):
        run.train(step)
        expected[step] = run.full_state()
    run.train(7)
    run.checkpointer.close()
    for step, state in expected.items():
        loaded = build_run(tmp_path, load_step=step)
        loaded.checkpointer.load()
        assert_same(loaded.full_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_run_on_a_gpu_is_resumed_bit_for_bit(tmp_path, mode):
    """The copies of an asynchronous save run beside the kernels of the next steps."""
    run = build_run(tmp_path, device="cuda", async_mode=mode, noisy=True)
    assert all(isinstance(weight, DTensor) for weight in run.parts[0].state_dict().values())
    run.train(4)
    expected_at_save = run.full_state()
    losses = run.train(6, save=False)
    expected = run.full_state()
    run.checkpointer.close()
    resumed = build_run(tmp_path, device="cuda", noisy=True)
    resumed.checkpointer.load()
    assert_same(resumed.full_state(), expected_at_save)
    assert resumed.train(6, save=False) == losses
    assert_same(resumed.full_state(), expected)


def test_writer_process_survives_sigterm_and_is_replaced_when_it_dies(tmp_path, caplog):
    run = build_run(tmp_path, async_mode="async_with_pinned_mem")
    run.train(2)
    run.checkpointer._wait_for_save()
    writer = run.checkpointer._background._process._process
    os.kill(writer.pid, signal.SIGTERM)
    run.train(4)
    run.checkpointer._wait_for_save()
    assert names(run) == ["step-2", "step-4"]
    connection, sent = run.checkpointer._background._process._connection, threading.Event()
    send = connection.send
    connection.send = lambda call: (send(call), sent.set())
    os.kill(writer.pid, signal.SIGSTOP)
    run.train(6)
    assert sent.wait(120)
    os.kill(writer.pid, signal.SIGKILL)
    run.checkpointer._wait_for_save()
    assert "step 6 failed: RuntimeError: the process that writes checkpoints died" in caplog.text
    run.train(8)
    run.checkpointer.close()
    assert names(run) == ["step-2", "step-4", "step-8"]
    assert not writer.is_alive()

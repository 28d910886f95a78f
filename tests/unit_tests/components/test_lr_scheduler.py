"""The learning rate of every step, against tables computed by hand."""

import math

import pytest
from torch import nn

from torchtitan.components.lr_scheduler import build_lr_scheduler, lr_factor
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config.sections import LRScheduler, Optimizer


def build(steps: int, lr: float = 1.0, **options):
    optimizer = build_optimizer([nn.Linear(2, 2)], Optimizer(lr=lr, implementation="for-loop"))
    return build_lr_scheduler(optimizer, LRScheduler(**options), steps), optimizer


def lrs(steps: int, **options) -> list[float]:
    """The learning rate that each optimizer step of the run uses."""
    scheduler, optimizer = build(steps, **options)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return used


TABLES = {
    "warm-up, then decay to the end": (
        {"warmup_steps": 2},
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    ),
    "stable phase": (
        {"warmup_steps": 2, "decay_ratio": 0.4},
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25],
    ),
    "minimum": (
        {"warmup_steps": 2, "decay_ratio": 0.4, "min_lr_factor": 0.2},
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4],
    ),
    "sqrt": (
        {"warmup_steps": 1, "decay_ratio": 0.4, "decay_type": "sqrt"},
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)],
    ),
    "cosine": (
        {"warmup_steps": 1, "decay_ratio": 0.4, "decay_type": "cosine"},
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
    ),
    "no warm-up": ({"warmup_steps": 0, "decay_ratio": 0.2}, [1.0] * 9 + [0.5]),
    "no decay": ({"warmup_steps": 4, "decay_ratio": 0.0}, [0.25, 0.5, 0.75] + [1.0] * 7),
    "cut short": ({"warmup_steps": 2, "decay_ratio": 0.4, "total_steps": 20}, [0.5] + [1.0] * 9),
    "gone on": (
        {"warmup_steps": 2, "decay_ratio": 0.5, "min_lr_factor": 0.2, "total_steps": 6},
        [0.5, 1.0, 1.0, 1.0, 0.2 + 0.8 * 2 / 3, 0.2 + 0.8 / 3, 0.2, 0.2, 0.2, 0.2],
    ),
    "only warm-up": ({"warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
}


@pytest.mark.parametrize(("options", "expected"), TABLES.values(), ids=TABLES)
def test_lr_of_every_step_is_the_hand_computed_one(options, expected):
    assert lrs(10, **options) == pytest.approx(expected, abs=1e-12)


def test_a_run_that_was_shortened_below_its_step_has_the_last_rate():
    """Also where there is no decay: warm-up takes all steps."""
    assert lr_factor(
        4, steps=2, warmup_steps=2, decay_steps=0, decay_type="linear", min_lr_factor=0.1
    ) == pytest.approx(0.1)


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_last_step_still_moves_the_weights_and_the_virtual_one_after_it_would_not(decay_type):
    phases = {"steps": 10, "warmup_steps": 0, "decay_steps": 10, "decay_type": decay_type, "min_lr_factor": 0.0}
    assert lr_factor(9, **phases) > 0.001
    assert lr_factor(10, **phases) == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(20, **phases) == pytest.approx(0.0, abs=1e-12)


def test_lr_is_a_share_of_the_peak():
    assert lrs(4, lr=3e-4, warmup_steps=2) == pytest.approx([1.5e-4, 3e-4, 3e-4, 1.5e-4])


def test_too_long_warm_up_is_shortened_with_a_warning(caplog):
    assert lrs(2, warmup_steps=4) == pytest.approx([0.5, 1.0])
    assert "lr_scheduler.warmup_steps=4 is shortened to training.steps=2" in caplog.text


def test_warm_up_comes_before_decay_when_both_do_not_fit(caplog):
    assert lrs(4, warmup_steps=2, decay_ratio=0.75) == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert "the decay is shortened to 2" in caplog.text


def test_phases_that_fit_give_no_warning(caplog):
    lrs(10, warmup_steps=5, decay_ratio=0.5)
    assert not caplog.records


def test_state_restores_the_lr_and_the_configuration_keeps_the_peak():
    scheduler, _ = build(10, warmup_steps=2, lr=1.0)
    for _ in range(4):
        scheduler.step()
    resumed, optimizer = build(10, warmup_steps=2, lr=10.0)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.lr == pytest.approx(10 * scheduler.lr)
    assert [group["lr"] for group in optimizer.param_groups] == [resumed.lr]

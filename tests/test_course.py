"""A run while it goes: what the display counts."""

import math

from mlxlora.course import Course, columns
from mlxlora.train.events import Eval, Saved, Start, Step

START = Start(
    updates=100,
    rows=80,
    valid_rows=10,
    skipped_rows=0,
    trainable=1,
    parameters=2,
    validates_every=10,
    adapted=3,
    learning_rate=1e-3,
    shapes=(),
    device="cpu",
    products="",
    packed=True,
    checkpoint_blocks=False,
    tokens_per_microbatch=64,
    notes=(),
    saves_every=25,
)


def step(update: int, loss: float = 1.0, seconds: float = 2.0, tokens: int = 10) -> Step:
    return Step(update, update / 10, loss, tokens, 1e-3, 1.0, seconds, 1000)


def check(update: int, loss: float, best: bool = True) -> Eval:
    return Eval(update, loss, math.exp(loss), 10, best, 5.0)


def course(*events: Step | Eval) -> Course:
    told = Course(START)
    for event in events:
        told.step(event) if isinstance(event, Step) else told.validated(event)
    return told


def test_columns_are_means_of_their_shares_and_keep_the_order():
    assert columns([1, 2, 3], 5) == [1, 2, 3]
    assert columns([1, 3, 5, 7], 2) == [2, 6]
    many = columns(list(range(1000)), 7)
    assert len(many) == 7 and many == sorted(many)


def test_the_validation_curve_stands_under_the_training_that_led_to_it():
    told = course(check(0, 4.0), *[step(n) for n in range(1, 11)], check(10, 2.0))
    told.step(step(11))
    train, valid = told.curves(11)
    assert len(train) == len(valid) == 11
    assert valid == [4.0] * 9 + [2.0] * 2


def test_time_left_counts_updates_and_the_validations_on_the_way():
    told = course(check(0, 4.0), *[step(n) for n in range(1, 11)], check(10, 2.0))
    assert told.next_validation == 20
    assert told.seconds_until(20) == 10 * 2.0
    assert told.seconds_until(25) == 15 * 2.0 + 5.0
    assert told.seconds_left == 90 * 2.0 + 9 * 5.0
    assert told.next_save == 15 * 2.0 + 5.0


def test_the_last_update_has_nothing_before_it():
    told = course(*[step(n) for n in range(1, 101)])
    assert told.next_validation == 0 and told.seconds_left == 0


def test_a_resumed_run_counts_on_from_its_update():
    told = course(step(61), step(62))
    assert told.next_validation == 70 and told.seconds_left == 38 * 2.0
    assert told.curves(40)[1] == [math.nan] * 2 or all(map(math.isnan, told.curves(40)[1]))


def test_saves_by_time_are_announced_by_the_last_one():
    told = Course(START.__class__(**{**vars(START), "saves_every": 0, "saves_in": 60.0}))
    assert 0 < told.next_save <= 60
    told.saved(Saved(3, "x", "checkpoint", 0.1, 900.0))
    assert 60 < told.next_save <= 900
    told.saved(Saved(3, "x", "best", 0.1))
    assert told.next_save > 60


def test_updates_without_a_number_leave_the_figures():
    told = course(step(1, 2.0), step(2, math.nan), step(3, 1.0, tokens=0))
    assert told.loss == 2.0 and told.update == 3


def test_the_best_is_the_last_that_was_called_so():
    told = course(check(0, 4.0, False), check(10, 2.0), check(20, 3.0, False))
    assert told.best is not None and told.best.update == 10
    assert told.validations[-1].loss == 3.0

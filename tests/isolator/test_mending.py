"""Whose turn it is to be looked at: everybody's within a bound, whatever is told and however much."""

from __future__ import annotations

import pytest

from isolator.mending import AGAIN_AFTER, MOST_AT_ONCE, MOST_IN_ROUND, ROUND, Turns
from isolator.model import EndpointKey


class Clock:
    """Seconds that the test counts."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def keys(count: int) -> list[EndpointKey]:
    return [EndpointKey(f"c{number}", "eth0") for number in range(count)]


def test_everybody_is_looked_at_at_first_and_again_within_a_round(turns: Turns, clock: Clock) -> None:
    everybody = keys(20)
    assert turns.take(everybody) == everybody
    looked: list[EndpointKey] = []
    for _ in range(int(ROUND) + 1):
        clock.now += 1
        looked += turns.take(everybody)
    assert sorted(looked) == sorted(everybody)


def test_at_a_start_many_are_looked_at_soon_but_not_all_at_once(turns: Turns, clock: Clock) -> None:
    everybody = keys(5 * MOST_AT_ONCE)
    seen: set[EndpointKey] = set()
    for _ in range(5):
        taken = turns.take(everybody)
        assert len(taken) <= MOST_AT_ONCE + MOST_IN_ROUND
        seen |= set(taken)
        clock.now += 1
    assert seen == set(everybody)


def test_a_suspect_is_looked_at_at_once_and_one_that_goes_on_no_more_often_than_others_bear(
    turns: Turns, clock: Clock
) -> None:
    everybody = keys(3)
    turns.take(everybody)
    looks = 0
    for _ in range(60):
        clock.now += 1
        turns.suspect(iter(everybody[:1]))
        looks += turns.take(everybody).count(everybody[0])
    assert 60 / (AGAIN_AFTER + 1) <= looks <= 60 / AGAIN_AFTER


def test_suspects_without_end_do_not_keep_the_others_from_their_turn(turns: Turns, clock: Clock) -> None:
    noisy, quiet = keys(MOST_AT_ONCE * 4), [EndpointKey("quiet", "eth0")]
    turns.take(quiet)
    for _ in range(10):
        clock.now += 1
        turns.take(noisy + quiet)
    found = 0
    for _ in range(60):
        clock.now += 1
        turns.suspect(iter(noisy))
        found += turns.take(noisy + quiet).count(quiet[0])
    assert found


def test_who_has_ended_is_forgotten(turns: Turns) -> None:
    everybody = keys(3)
    turns.suspect(iter(everybody))
    assert turns.take(everybody[:1]) == everybody[:1]
    assert turns.take([]) == []
    assert turns.take(everybody[1:]) == everybody[1:]


def test_one_that_came_while_others_are_suspected_without_end_has_its_turn(
    turns: Turns, clock: Clock
) -> None:
    noisy, new = keys(MOST_AT_ONCE * 4), [EndpointKey("new", "eth0")]
    for _ in range(10):
        clock.now += 1
        turns.take(noisy)
    looked = 0
    for _ in range(int(ROUND)):
        clock.now += 1
        turns.suspect(iter(noisy))
        looked += turns.take(noisy + new).count(new[0])
    assert looked

"""Which later-functions share a transaction: none that makes the others wait, never two of an order, and no stock in two at once."""

from __future__ import annotations

import json

import pytest

from inventory_sdk.ledger.protocol import Task, TaskRun
from inventory_sdk.sync import companions as room
from inventory_sdk.sync.companions import LANES, MOST, QUICK, Company, Manners, companies


def task(number: int, *skus: str, group: str = "", name: str = "write", attempts: int = 0, merchant: str = "m") -> Task:
    lines = [part for sku in skus or ("hot",) for part in (f"{merchant}\x1f{sku}", 1)]
    return Task(number, name, 1, "{}", group or f"g{number}", f"o{number}", merchant, attempts, json.dumps({"lines": lines}))


@pytest.fixture
def manners() -> Manners:
    """One who knows the function ``write`` as quick."""
    manners = Manners()
    manners.ran(TaskRun(task(0), None, 0.0))
    return manners


def numbers(found: list[Company]) -> list[list[int]]:
    return [[each.number for each in company.tasks] for company in found]


def test_tasks_of_one_sku_go_together_and_those_of_others_beside_them(manners: Manners) -> None:
    due = [task(1, "a"), task(2, "b"), task(3, "a"), task(4, "b", merchant="other"), task(5, "b")]
    assert numbers(companies(due, [], 8, manners)) == [[1, 3], [2, 5], [4]]


def test_what_is_left_over_joins_the_smallest(manners: Manners) -> None:
    due = [task(number, f"sku-{number}") for number in range(LANES * 2 + 1)]
    found = companies(due, [], 8, manners)
    assert sorted(len(company.tasks) for company in found) == [2] * (LANES - 1) + [3]


def test_two_of_a_group_are_never_in_one_transaction_nor_beside_each_other(manners: Manners) -> None:
    due = [task(1, group="x"), task(2, group="x"), task(3)]
    found = companies(due, [], 8, manners)
    assert numbers(found) == [[1, 3]]
    assert companies([task(2, "b", group="x")], found, 8, manners) == []


def test_stock_of_a_running_company_is_not_given_to_another_and_who_waits_for_it_is_not_overtaken(manners: Manners) -> None:
    running = [Company([task(1, "a")], {"m\x1fa"})]
    assert companies([task(2, "a", "b"), task(3, "b")], running, 8, manners) == []
    assert numbers(companies([task(4, "c"), task(5, "b")], running, 8, manners)) == [[4], [5]]


def test_one_that_would_join_two_waits(manners: Manners) -> None:
    due = [task(1, "a"), task(2, "b"), task(3, "a", "b"), task(4, "b")]
    assert numbers(companies(due, [], 8, manners)) == [[1], [2]]


def test_two_workers_would_take_the_rows_in_the_same_order(manners: Manners) -> None:
    due = [task(1, "b", "c"), task(2, "a", "c"), task(3, "b", "a")]
    first = companies(due, [], 1, manners)
    second = companies(list(reversed(due)), [], 1, manners)
    assert numbers(first) == numbers(second) == [[3, 2, 1]]


def test_an_unknown_function_runs_alone_and_the_others_of_its_name_wait_for_what_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    manners = Manners()
    due = [task(number) for number in range(4)]
    found = companies(due, [], 8, manners)
    assert numbers(found) == [[0]]
    assert not found[0].shared
    assert companies(due, found, 7, manners) == []
    monkeypatch.setattr(room, "PROBE", 0.0)
    assert numbers(companies(due, found, 7, manners)) == [[1], [2], [3]]
    manners.ran(TaskRun(due[0], None, 0.0))
    assert numbers(companies(due, [], 7, manners)) == [[0, 1, 2, 3]]


def test_a_function_that_waits_elsewhere_runs_alone_several_at_once_until_it_is_quick_again(manners: Manners) -> None:
    due = [task(number) for number in range(10)]
    manners.ran(TaskRun(due[0], None, QUICK * 2))
    assert numbers(companies(due, [], 8, manners)) == [[number] for number in range(8)]
    manners.ran(TaskRun(due[0], ValueError(), 0.0))
    assert manners.alone(due[1]), "a failure tells nothing"
    manners.ran(TaskRun(due[0], None, 0.0))
    assert not manners.alone(due[1])


def test_one_that_was_cut_off_has_to_show_many_quick_calls(manners: Manners) -> None:
    manners.cut_off(task(1))
    for _ in range(room.CUT_OFF):
        assert manners.alone(task(2))
        manners.ran(TaskRun(task(2), None, 0.0))
    assert not manners.alone(task(2))


def test_one_that_failed_before_or_lost_its_company_runs_alone(manners: Manners) -> None:
    manners.apart.add(7)
    due = [task(1, attempts=1), task(7), task(3), task(4)]
    assert numbers(companies(due, [], 8, manners)) == [[1], [7], [3, 4]]
    manners.spoilt(task(3))
    assert numbers(companies(due, [], 8, manners)) == [[1], [7], [3], [4]]
    assert not manners.alone(task(5, name="other")) or "other" not in manners._owed


def test_companies_shrink_by_half_when_they_break_and_grow_by_one_when_they_hold(manners: Manners) -> None:
    sizes = []
    for _ in range(6):
        manners.went_wrong()
        sizes.append(manners.most)
    assert sizes == [MOST // 2, MOST // 4, MOST // 8, MOST // 16, 1, 1]
    assert manners.alone(task(1))
    manners.went_well()
    assert manners.most == 2
    assert not manners.alone(task(1))

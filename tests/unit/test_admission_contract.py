"""The tests of the stock API that are about what the public sees, once more on stock that the database sells."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.direct_kit import DirectShop, direct_shop
from tests.unit.test_stock_holds import (
    test_a_closed_reservation_can_be_changed_in_no_way,
    test_a_full_close_under_an_id_of_ones_own_is_remembered_under_it,
    test_a_hold_is_reserved_until_it_is_confirmed_or_released,
    test_a_hold_without_ttl_has_no_end,
    test_a_partial_release_of_an_unknown_reservation_leaves_no_tombstone,
    test_a_repeat_of_a_confirmed_reservation_answers_its_receipt,
    test_a_repeat_of_a_held_reservation_answers_its_receipt,
    test_a_repeat_of_a_released_or_expired_reservation_is_closed_and_takes_nothing,
    test_an_id_used_for_a_close_can_not_be_used_for_another,
    test_nothing_can_be_done_to_an_unknown_reservation,
    test_reacquire_of_a_released_hold_is_closed,
    test_reacquire_takes_nothing_when_one_line_is_gone,
    test_reacquire_takes_only_what_expired,
    test_the_rest_after_a_part_is_all_that_is_still_open,
)
from tests.unit.test_stock_takes import (
    test_512_lines_are_one_operation_and_513_are_too_many,
    test_513_lines_of_512_skus_are_512_lines,
    test_a_new_sku_can_be_restocked_and_sold_at_once,
    test_a_refusal_is_not_remembered,
    test_a_repeat_in_another_order_of_lines_answers_the_first_receipt,
    test_a_repeat_of_a_restock_raises_the_counter_once,
    test_balances_and_quantities_at_their_limits_stay_exact,
    test_exactly_what_is_there_can_be_taken,
    test_lines_of_several_merchants_move_together_or_not_at_all,
    test_one_short_line_stops_all_lines_and_every_short_line_is_named,
    test_retry_after_success_on_the_last_unit_answers_the_first_receipt,
    test_the_calls_merchant_named_in_a_line_is_the_same_sku,
    test_the_first_receipt_of_every_kind_and_its_repeat_and_its_status_agree,
    test_the_same_id_at_another_merchant_is_another_operation,
    test_the_same_id_for_another_kind_is_a_conflict,
    test_the_same_id_with_other_content_is_a_conflict_and_moves_nothing,
    test_the_same_sku_twice_in_one_call_is_summed_before_it_is_checked,
)
from tests.unit.test_stock_undo import (
    test_a_hold_of_which_a_part_is_closed_can_not_be_undone,
    test_a_kept_hold_can_still_be_confirmed_and_released,
    test_a_receipt_with_other_lines_or_kind_undoes_nothing,
    test_a_second_undo_says_no_and_moves_nothing,
    test_an_expired_hold_can_not_be_undone,
    test_an_undo_gives_back_exactly_that_take_and_frees_its_id,
    test_an_undone_take_can_not_be_kept,
    test_receipts_of_what_is_no_take_undo_nothing,
    test_the_old_receipt_does_not_undo_a_take_that_was_made_again,
    test_the_receipt_of_a_replay_undoes_the_same_take,
)

STOCKED = {"a": 10, "b": 5, "last": 1}


@pytest.fixture
async def shop(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[DirectShop]:
    async with direct_shop(f"sqlite+aiosqlite:///{tmp_path}/stock.db", namespace, STOCKED) as shop:
        yield shop


__all__ = [  # the imported tests run here, with this file's shop
    "test_512_lines_are_one_operation_and_513_are_too_many",
    "test_513_lines_of_512_skus_are_512_lines",
    "test_a_closed_reservation_can_be_changed_in_no_way",
    "test_a_full_close_under_an_id_of_ones_own_is_remembered_under_it",
    "test_a_hold_is_reserved_until_it_is_confirmed_or_released",
    "test_a_hold_of_which_a_part_is_closed_can_not_be_undone",
    "test_a_hold_without_ttl_has_no_end",
    "test_a_kept_hold_can_still_be_confirmed_and_released",
    "test_a_new_sku_can_be_restocked_and_sold_at_once",
    "test_a_partial_release_of_an_unknown_reservation_leaves_no_tombstone",
    "test_a_receipt_with_other_lines_or_kind_undoes_nothing",
    "test_a_refusal_is_not_remembered",
    "test_a_repeat_in_another_order_of_lines_answers_the_first_receipt",
    "test_a_repeat_of_a_confirmed_reservation_answers_its_receipt",
    "test_a_repeat_of_a_held_reservation_answers_its_receipt",
    "test_a_repeat_of_a_released_or_expired_reservation_is_closed_and_takes_nothing",
    "test_a_repeat_of_a_restock_raises_the_counter_once",
    "test_a_second_undo_says_no_and_moves_nothing",
    "test_an_expired_hold_can_not_be_undone",
    "test_an_id_used_for_a_close_can_not_be_used_for_another",
    "test_an_undo_gives_back_exactly_that_take_and_frees_its_id",
    "test_an_undone_take_can_not_be_kept",
    "test_balances_and_quantities_at_their_limits_stay_exact",
    "test_exactly_what_is_there_can_be_taken",
    "test_lines_of_several_merchants_move_together_or_not_at_all",
    "test_nothing_can_be_done_to_an_unknown_reservation",
    "test_one_short_line_stops_all_lines_and_every_short_line_is_named",
    "test_reacquire_of_a_released_hold_is_closed",
    "test_reacquire_takes_nothing_when_one_line_is_gone",
    "test_reacquire_takes_only_what_expired",
    "test_receipts_of_what_is_no_take_undo_nothing",
    "test_retry_after_success_on_the_last_unit_answers_the_first_receipt",
    "test_the_calls_merchant_named_in_a_line_is_the_same_sku",
    "test_the_first_receipt_of_every_kind_and_its_repeat_and_its_status_agree",
    "test_the_old_receipt_does_not_undo_a_take_that_was_made_again",
    "test_the_receipt_of_a_replay_undoes_the_same_take",
    "test_the_rest_after_a_part_is_all_that_is_still_open",
    "test_the_same_id_at_another_merchant_is_another_operation",
    "test_the_same_id_for_another_kind_is_a_conflict",
    "test_the_same_id_with_other_content_is_a_conflict_and_moves_nothing",
    "test_the_same_sku_twice_in_one_call_is_summed_before_it_is_checked",
]

"""Which delivery tags are settled, held against a model of RabbitMQ's rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inventory_sdk.sync.queues.amqp_consumer import AckLedger


class Channel:
    """RabbitMQ's side: a tag that isn't outstanding closes the channel."""

    def __init__(self) -> None:
        self.outstanding: set[int] = set()
        self.frames = 0

    def ack(self, tag: int, multiple: bool) -> None:
        assert tag in self.outstanding, f"unknown delivery tag {tag}"
        self.frames += 1
        self.outstanding -= {known for known in self.outstanding if known <= tag} if multiple else {tag}


def settle(acks: AckLedger, channel: Channel) -> None:
    while (frame := acks.next_frame()) is not None:
        channel.ack(*frame)
        acks.sent(*frame)


@given(st.lists(st.one_of(st.just("deliver"), st.integers(1, 8), st.just("settle")), max_size=60))
def test_exactly_the_tags_that_were_asked_for_are_settled_once(steps: list[str | int]) -> None:
    acks, channel = AckLedger(), Channel()
    acks.delivered = 4
    channel.outstanding = {1, 2, 3, 4}
    asked: set[int] = set()
    for step in steps:
        if step == "deliver":
            acks.delivered += 1
            channel.outstanding.add(acks.delivered)
        elif step == "settle":
            settle(acks, channel)
        elif isinstance(step, int):
            acks.ask(step)
            if step <= acks.delivered:
                asked.add(step)
    settle(acks, channel)
    assert channel.outstanding == set(range(1, acks.delivered + 1)) - asked
    assert acks.outstanding == len(channel.outstanding)


def test_a_contiguous_run_takes_one_frame() -> None:
    acks, channel = AckLedger(), Channel()
    acks.delivered = 500
    channel.outstanding = set(range(1, 501))
    for tag in reversed(range(1, 501)):
        acks.ask(tag)
    settle(acks, channel)
    assert channel.frames == 1
    assert not channel.outstanding


def test_a_frame_that_was_not_sent_is_offered_again() -> None:
    acks = AckLedger()
    acks.delivered = 2
    acks.ask(1)
    assert acks.next_frame() == (1, True)
    assert acks.next_frame() == (1, True)
    acks.sent(1, True)
    assert acks.next_frame() is None

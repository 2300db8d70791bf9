"""Permits: bounded, given back once, and a time to come back that is worth waiting for."""

from __future__ import annotations

import pytest

from server.core.admission import Admission
from server.core.faults import Fault, RequestError
from server.core.promises import LONGEST_RETRY
from tests.server.house import Clock


def refused(admission: Admission, items: int = 1, account: str = "") -> RequestError:
    with pytest.raises(RequestError) as full:
        admission.acquire(items, 1, account)
    assert full.value.fault is Fault.QUEUE_FULL
    return full.value


def retry_after(admission: Admission, items: int = 1) -> int:
    seconds = refused(admission, items).retry_after
    assert seconds is not None
    return seconds


def test_permits_are_bounded_and_given_back_once() -> None:
    admission = Admission(4, 10**6)
    first, second = admission.acquire(3, 10), admission.acquire(1, 10)
    refused(admission)
    first.release()
    first.release()
    assert admission.items == 1
    second.release(finished=True)
    assert admission.items == 0 and admission.wait_idle(0)


def test_pictures_of_one_request_leave_one_by_one() -> None:
    admission = Admission(4, 100)
    permit = admission.acquire(3, 90)
    permit.leave(finished=True)
    assert (admission.items, admission.requests) == (2, 1)
    admission.acquire(2, 40).release()  # 60 pixels are left to the first
    permit.leave(finished=True)
    permit.release()
    permit.leave(finished=True)
    assert (admission.items, admission.requests) == (0, 0) and admission.wait_idle(0)


def test_retry_after_follows_pictures_that_leave_in_batches() -> None:
    clock = Clock()
    admission = Admission(8, 10**9, seconds_per_item=1.0, clock=clock)
    held = [admission.acquire(1, 1) for _ in range(8)]
    for _ in range(8):  # eight at a moment, every 16 seconds: one in 2 seconds
        clock.now += 16.0
        for permit in held:
            permit.leave(finished=True)
        held = [admission.acquire(1, 1) for _ in range(8)]
    with pytest.raises(RequestError, match=r"8 of 8 pictures, 0\.0 of 1000\.0 megapixels") as full:
        admission.acquire(5, 1)
    assert full.value.retry_after == 12, "10 seconds, and some caution"


def test_retry_after_follows_the_drain_rate() -> None:
    clock = Clock()

    def full_house(seconds_per_item: float) -> Admission:
        admission = Admission(10, 10**9, seconds_per_item, clock)
        for _ in range(10):
            admission.acquire(1, 1)
        return admission

    assert retry_after(full_house(2.0), 1) == 3 and retry_after(full_house(2.0), 5) == 12
    admission = Admission(10, 10**9, 2.0, clock)
    held = [admission.acquire(1, 1) for _ in range(10)]
    for _ in range(60):  # pictures really leave at one in 7 seconds
        clock.now += 7.0
        held.pop(0).release(finished=True)
        held.append(admission.acquire(1, 1))
    assert retry_after(admission, 1) == 9
    clock.now += 1000.0  # whoever was told that has come and gone
    assert retry_after(admission, 10) == 81


def test_a_crowd_is_told_times_at_which_there_is_room_for_each() -> None:
    """All were told one second: they came back together, and all but a few were refused again."""
    clock = Clock()
    admission = Admission(10, 10**9, seconds_per_item=1.0, clock=clock)
    for _ in range(10):
        admission.acquire(1, 1)
    told = [retry_after(admission) for _ in range(60)]
    assert told == sorted(told) and told[0] == 2
    for place, seconds in enumerate(told, 1):
        assert place <= seconds <= 1.15 * place + 1, "one place a second"
    clock.now = 30.0
    assert 35 < retry_after(admission) < 45, "those who were told earlier times have come by now"


def test_nobody_is_told_to_wait_for_longer_than_clients_do() -> None:
    admission = Admission(4, 10**9, seconds_per_item=60.0, clock=Clock())
    admission.acquire(4, 1)
    assert retry_after(admission) == 69
    later = [retry_after(admission) for _ in range(20)]
    assert all(LONGEST_RETRY / 2 <= seconds <= LONGEST_RETRY for seconds in later)
    assert len(set(later)) > 5, "there is no room for them, and yet they do not come all at once"


def test_a_single_large_request_is_let_in_when_nothing_else_is() -> None:
    admission = Admission(4, 100)
    permit = admission.acquire(1, 1000)
    refused(admission)
    permit.release()
    admission.acquire(1, 1000)


def test_one_key_may_not_fill_the_queue() -> None:
    admission = Admission(8, 10**9, share=0.75)
    held = [admission.acquire(1, 1, "greedy") for _ in range(6)]
    error = refused(admission, account="greedy")
    assert (
        error.code == "key_share_used"
        and error.retry_after
        and "has 6 pictures in the queue, and may have 6" in (error.message)
    )
    admission.acquire(2, 1, "modest")
    refused(admission, account="modest")
    held.pop().release()
    admission.acquire(1, 1, "greedy")


def test_one_request_may_have_more_than_its_keys_share_when_it_has_nothing_else() -> None:
    admission = Admission(8, 10**9, share=0.5)
    admission.acquire(6, 1, "a").release()
    admission.acquire(1, 1, "a")
    refused(admission, 4, "a")


def test_one_long_promise_does_not_hold_back_the_short_ones() -> None:
    clock = Clock()
    admission = Admission(4, 10**9, seconds_per_item=1.0, clock=clock)
    for _ in range(4):
        admission.acquire(1, 1)
    admission.retry_after(10, 1, least=100.0)
    told = []
    for _ in range(20):
        clock.now += 2.0
        told.append(admission.retry_after(1, 1))
    assert set(told) == {2}, "who is told a long time stands behind nobody who comes sooner"

"""The fair queue: order, shares, capacity."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrine.service.runtime.fair_queue import FairQueue, FlowKey, Kind


def key(sender: str, seconds: float, *, limited: bool = False) -> FlowKey:
    return FlowKey(sender, Kind.of("network", seconds, limited=limited))


def take_all(queue: FairQueue[str]) -> list[str]:
    order = []
    while (found := queue.pop()) is not None:
        order.append(found[1])
    return order


def test_items_of_a_flow_keep_their_order() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for value in "abc":
        queue.push(value, key("sender", 1.0), 1.0)
    assert len(queue) == 3
    assert take_all(queue) == ["a", "b", "c"]
    assert len(queue) == 0


@pytest.mark.parametrize("senders", [("one", "one"), ("one", "other")], ids=["same sender", "two senders"])
def test_small_work_is_next_however_much_large_work_waits(senders: tuple[str, str]) -> None:
    queue: FairQueue[str] = FairQueue(100)
    for i in range(20):
        queue.push(f"large{i}", key(senders[0], 2.0), 2.0)
    queue.pop()  # runs
    for _ in range(3):
        queue.push("small", key(senders[1], 0.01), 0.01)
        found = queue.pop()
        assert found is not None
        assert found[1] == "small"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.01, 0.1, 1.0])), min_size=1, max_size=60))
def test_nothing_is_lost_and_no_flow_is_reordered(pushed: list[tuple[str, float]]) -> None:
    queue: FairQueue[str] = FairQueue(10)
    values = [f"{sender} {seconds} {i}" for i, (sender, seconds) in enumerate(pushed)]
    for value, (sender, seconds) in zip(values, pushed, strict=True):
        queue.push(value, key(sender, seconds), seconds)
    taken = take_all(queue)
    assert sorted(taken) == sorted(values)
    for flow in set(pushed):
        of_flow = [value for value, pair in zip(values, pushed, strict=True) if pair == flow]
        assert [value for value in taken if value in of_flow] == of_flow
    assert (len(queue), list(queue.active()), queue.ahead(key("a", 1.0))) == (0, [], (0, 0.0))


def test_senders_with_equal_work_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for _ in range(90):
        queue.push("greedy", key("greedy", 1.0), 1.0)
    for _ in range(10):
        queue.push("modest", key("modest", 1.0), 1.0)
    assert Counter(take_all(queue)[:20]) == {"greedy": 10, "modest": 10}


def test_a_sender_gets_no_larger_share_by_sending_work_of_many_kinds() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for _ in range(50):
        for seconds in (1.0, 2.0, 4.0):
            queue.push(f"various {seconds}", key("various", seconds), seconds)
        queue.push("plain 1.0", key("plain", 1.0), 1.0)
    seconds_of = Counter[str]()
    for value in take_all(queue)[:60]:
        sender, seconds_text = value.split()
        seconds_of[sender] += float(seconds_text)  # type: ignore[assignment]
    assert 0.6 < seconds_of["various"] / seconds_of["plain"] < 1.8


def test_a_flow_that_is_not_accepted_waits_and_the_others_pass() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("picture", key("sender", 1.0, limited=True), 1.0)
    queue.push("plain", key("sender", 1.0), 1.0)
    found = queue.pop(lambda kind: not kind.limited)
    assert found is not None
    assert found[1] == "plain"
    assert queue.pop(lambda kind: not kind.limited) is None
    assert take_all(queue) == ["picture"]


def test_a_removed_item_no_longer_counts() -> None:
    queue: FairQueue[str] = FairQueue(10)
    flow = key("sender", 1.0)
    for value in ("a", "b"):
        queue.push(value, flow, 1.0)
    assert queue.ahead(flow) == (2, 2.0)
    queue.remove("a", flow)
    queue.remove("a", flow)
    queue.remove("b", key("other", 1.0))
    assert (len(queue), queue.ahead(flow)) == (1, (1, 1.0))
    assert take_all(queue) == ["b"]


def test_ahead_counts_what_comes_first_only() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for _ in range(10):
        queue.push("large", key("one", 1.0), 1.0)
    assert queue.ahead(key("one", 1.0)) == (10, pytest.approx(10))
    assert queue.ahead(key("other", 0.01)) == (0, 0.0)
    for _ in range(3):
        queue.push("other", key("other", 1.0), 1.0)
    assert queue.ahead(key("other", 1.0)) == (6, pytest.approx(6))  # its own three, and as much of the other sender


def test_a_full_queue_has_room_for_flows_below_their_share_only() -> None:
    queue: FairQueue[str] = FairQueue(8)
    greedy, modest = key("greedy", 1.0), key("modest", 1.0)
    for _ in range(8):
        assert not queue.is_full(greedy)
        queue.push("greedy", greedy, 1.0)
    assert queue.is_full(greedy)
    admitted = 0
    while not queue.is_full(modest):
        queue.push("modest", modest, 1.0)
        admitted += 1
    assert 2 <= admitted <= 4
    assert queue.is_full(greedy)
    queue.pop()
    assert len(queue) < 8 or queue.is_full(greedy)


def test_the_share_of_many_senders_is_forgotten_when_it_has_passed() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("waits", key("waits", 1.0), 1.0)
    queue.push("waits", key("waits", 1.0), 1.0)
    for i in range(5000):
        queue.push("passes", key(f"sender{i}", 1e-4), 1e-4)
        queue.pop()
    assert len(queue._flows) < 3000


@pytest.mark.parametrize(
    ("seconds", "magnitude"),
    [(1.0, 0), (1.4, 0), (1.5, 1), (2.0, 1), (0.25, -2), (1e-4, -13), (0.0, -13), (1000.0, 10)],
)
def test_the_kind_of_work_is_the_logarithm_of_its_cost(seconds: float, magnitude: int) -> None:
    kind = Kind.of("network", seconds)
    assert (kind.magnitude, kind.limited) == (magnitude, False)
    assert kind == Kind("network", magnitude)
    assert Kind.of("network", seconds, limited=True) == (*kind[:2], True)
    assert kind.weight == pytest.approx(2 ** (-magnitude / 2))


Costs = st.lists(st.integers(1, 8).map(lambda eighths: eighths / 8), min_size=20, max_size=20)


@given(Costs, Costs)
def test_senders_with_unequal_items_get_equal_time(one: list[float], other: list[float]) -> None:
    """Up to the cost of an item, at any time while both wait."""
    queue: FairQueue[float] = FairQueue(1000)
    flows = {"one": FlowKey("one", Kind("network", 0)), "other": FlowKey("other", Kind("network", 0))}
    for sender, costs in (("one", one), ("other", other)):
        for cost in costs:
            queue.push(cost, flows[sender], cost)
    served = dict.fromkeys(flows, 0.0)
    while len(set(queue.active())) == 2:
        found = queue.pop()
        assert found is not None
        served[found[0].sender] += found[1]
        assert abs(served["one"] - served["other"]) <= 1


def test_the_kinds_of_a_sender_get_time_by_their_weights() -> None:
    """Work of a second gets twice the time of work of four seconds."""
    queue: FairQueue[float] = FairQueue(1000)
    small, large = key("sender", 1.0), key("sender", 4.0)
    for _ in range(40):
        queue.push(1.0, small, 1.0)
        queue.push(4.0, large, 4.0)
    time_of = Counter[FlowKey]()
    for _ in range(27):
        found = queue.pop()
        assert found is not None
        time_of[found[0]] += int(found[1])
    assert time_of[small] == 2 * time_of[large] == 24


@pytest.mark.parametrize("seconds", [1.0, 0.01])
@pytest.mark.parametrize("senders", [1, 3])
def test_a_sender_that_comes_later_neither_waits_nor_catches_up(senders: int, seconds: float) -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for i in range(60 * senders):
        queue.push("first", key(f"first {i % senders}", seconds), seconds)
    for _ in range(30):
        queue.pop()
    for _ in range(20):
        queue.push("later", key("later", seconds), seconds)
    order = take_all(queue)
    for turns in (1, 5, 20):
        assert abs(order[: turns * (senders + 1)].count("later") - turns) <= 1


def test_what_was_used_before_the_queue_was_empty_is_forgotten() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for _ in range(20):
        queue.push("one", key("one", 1.0), 1.0)
    take_all(queue)
    for _ in range(10):
        queue.push("one", key("one", 1.0), 1.0)
        queue.push("other", key("other", 1.0), 1.0)
    assert Counter(take_all(queue)[:10]) == {"one": 5, "other": 5}


def test_work_that_is_put_back_into_an_empty_queue() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("large", key("sender", 0.5), 0.5)
    found = queue.pop()
    assert found is not None
    queue.put_back(found[1], found[0], key("sender", 64.0), 64.0)
    assert queue.pop() == (key("sender", 64.0), "large")


def test_what_a_flow_used_in_advance_is_ahead_of_it() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.push("one", key("one", 1.0), 1.0)
    for _ in range(5):
        queue.push("other", key("other", 1.0), 1.0)
    assert queue.pop() == (key("one", 1.0), "one")  # of two seconds that both could use, one has passed
    assert queue.ahead(key("one", 1.0)) == (0, 0.5)
    queue.push("one", key("one", 1.0), 1.0)
    assert queue.ahead(key("one", 1.0)) == (3, 2.5)  # its own, and one and a half of the other's


def test_the_kinds_of_a_sender_are_ahead_by_their_weights() -> None:
    """Three seconds of the small take four and a half; in the other one and a half, little of the large is done."""
    queue: FairQueue[str] = FairQueue(100)
    for _ in range(3):
        queue.push("small", key("sender", 1.0), 1.0)
        queue.push("large", key("sender", 4.0), 4.0)
    assert queue.ahead(key("sender", 1.0)) == (3, pytest.approx(4.5))


def test_work_that_is_put_back_has_not_used_its_first_flow() -> None:
    """Images that look small and are large do not delay the small ones of their sender."""
    queue: FairQueue[str] = FairQueue(1000)
    for value in ["large"] * 6 + ["small"] * 4:
        queue.push(value, key("one", 0.5), 0.5)
    for _ in range(8):
        queue.push("other", key("other", 0.5), 0.5)
    order = []
    while (found := queue.pop()) is not None:
        flow, value = found
        if value == "large" and flow == key("one", 0.5):
            queue.put_back(value, flow, key("one", 64.0), 64.0)
        else:
            order.append(value)
    assert order[:6].count("small") == 3
    assert order[-6:] == ["large"] * 6


def test_capacity_is_shared_by_all_senders() -> None:
    """With n other senders, one may hold a share of 1 / (n + 1) of a full queue."""
    for others, length, room in ((1, 10, 5), (1, 9, 5), (2, 10, 4), (4, 10, 2)):
        queue: FairQueue[str] = FairQueue(length)
        for i in range(length):
            queue.push("x", key(f"other{i % others}", 1.0), 1.0)
        admitted = 0
        while not queue.is_full(key("new", 1.0)):
            queue.push("x", key("new", 1.0), 1.0)
            admitted += 1
        assert admitted == room


def test_the_kinds_of_a_sender_share_its_part_of_a_full_queue() -> None:
    queue: FairQueue[str] = FairQueue(64)
    for i in range(64):
        queue.push("x", key("greedy", 2.0 ** (i % 8)), 1.0)
    assert all(queue.is_full(key("greedy", 2.0**i)) for i in range(8))
    admitted = 0
    while not queue.is_full(key("modest", 1.0)):
        queue.push("x", key("modest", 1.0), 1.0)
        admitted += 1
    assert admitted == 32  # whatever the number of the other's kinds


def test_many_senders_cannot_make_the_queue_longer_than_twice_its_length() -> None:
    queue: FairQueue[str] = FairQueue(8)
    admitted = 0
    for i in range(100):
        if not queue.is_full(key(f"sender {i}", 1.0)):
            queue.push("x", key(f"sender {i}", 1.0), 1.0)
            admitted += 1
    assert admitted == 16


def test_a_flow_that_used_its_share_in_advance_waits_for_it() -> None:
    """A cheap flow that ran while others waited is not served twice before them."""
    queue: FairQueue[str] = FairQueue(100)
    for _ in range(3):
        queue.push("one", key("one", 8.0), 8.0)
        queue.push("other", key("other", 8.0), 8.0)
    first = queue.pop()
    assert first is not None
    again = queue.ahead(first[0])
    assert again[0] > queue.ahead(key("third", 8.0))[0]
    second = queue.pop()
    assert second is not None
    assert second[0] != first[0]

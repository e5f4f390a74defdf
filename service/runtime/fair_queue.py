"""A queue that shares computing time between senders, and between small and large work of the same sender.

Weighted fair queueing (Demers, Keshav and Shenker, 1989): each item gets a tag, the time at which it would be finished
if all senders were served at once, each at its share of a core; the item with the smallest tag is next. Work that asks
for less than its share is therefore served at once, however much the others ask for. A flow is the work of one kind
from one sender; the tags and the clock are virtual time, which passes more slowly the more senders there are.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

_MIN_FLOWS = 1024  # from which on idle flows are forgotten when their share has passed


class Kind(NamedTuple):
    """What an item is, besides its sender."""

    group: Hashable  # such as the network; items of different groups never wait for each other in a flow
    magnitude: int  # of the cost of the whole request: its logarithm to base 2
    limited: bool = False  # may not occupy all threads

    @property
    def weight(self) -> float:
        """Share among the kinds of a sender: the smaller the work, the larger."""
        return 2 ** (-self.magnitude / 2)

    @classmethod
    def of(cls, group: Hashable, seconds: float, *, limited: bool = False) -> "Kind":
        """Return the kind of a request that costs `seconds`."""
        return cls(group, round(math.log2(max(seconds, 1e-4))), limited)


class FlowKey(NamedTuple):
    """The name of a flow."""

    sender: str
    kind: Kind


class _Item(NamedTuple, Generic[T]):
    arrival: float  # virtual time
    cost: float
    value: T


@dataclass(slots=True)
class _Flow(Generic[T]):
    weight: float
    items: deque[_Item[T]] = field(default_factory=deque)
    tag: float = 0.0  # of the last item taken
    tag_before: float = 0.0
    backlog: float = 0.0  # cost of the waiting items


class FairQueue(Generic[T]):
    """Items with their flows and costs, in seconds on one core. Not thread-safe."""

    def __init__(self, max_length: int) -> None:
        """Args: number of items up to which every flow may grow; above it, only flows below their share may."""
        self._max_length = max_length
        self._flows: dict[FlowKey, _Flow[T]] = {}  # those with items, and those that have used their share in advance
        self._active: dict[FlowKey, _Flow[T]] = {}  # those with items
        self._weights: dict[str, float] = {}  # of each sender's active flows, added up
        self._length = 0
        self.backlog = 0.0  # cost of all items
        self._time = 0.0  # virtual
        self._max_flows = _MIN_FLOWS

    def __len__(self) -> int:
        return self._length

    @property
    def is_long(self) -> bool:
        """Whether flows may not grow beyond their share any more."""
        return self._length >= self._max_length

    def push(self, value: T, key: FlowKey, cost: float) -> None:
        """Append an item to its flow."""
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key.kind.weight)
        if not flow.items:
            self._active[key] = flow
            self._weights[key.sender] = self._weights.get(key.sender, 0.0) + flow.weight
        flow.items.append(_Item(self._time, cost, value))
        flow.backlog += cost
        self.backlog += cost
        self._length += 1

    def pop(self, accept: Callable[[Kind], bool] = lambda kind: True) -> tuple[FlowKey, T] | None:
        """Remove and return the next item of an accepted kind, with its flow; None if there is none."""
        tags = ((self._next_tag(key, flow), key) for key, flow in self._active.items() if accept(key.kind))
        tag, key = min(tags, key=itemgetter(0), default=(0.0, None))
        if key is None:
            return None
        flow = self._active[key]
        item = flow.items.popleft()
        flow.tag_before, flow.tag = flow.tag, tag
        self._time += item.cost / len(self._weights)
        self._removed(key, flow, item)
        return key, item.value

    def put_back(self, value: T, taken_from: FlowKey, key: FlowKey, cost: float) -> None:
        """Push an item that was just taken to another flow; its first flow does not pay for it."""
        if taken_from in self._flows:
            self._flows[taken_from].tag = self._flows[taken_from].tag_before
        self.push(value, key, cost)

    def remove(self, value: T, key: FlowKey) -> None:
        """Remove an item, if it is still in the queue."""
        flow = self._active.get(key)
        item = next((item for item in flow.items if item.value is value), None) if flow else None
        if flow is not None and item is not None:
            flow.items.remove(item)
            self._removed(key, flow, item)

    def active(self) -> Collection[FlowKey]:
        """Return the flows that have items."""
        return self._active.keys()

    def ahead(self, key: FlowKey) -> tuple[int, float]:
        """Return how many items would be taken before a new one of the flow, and their cost."""
        own = self._flows.get(key)
        passing = 0.0  # virtual time
        if own:
            passing = max(0.0, own.tag - self._time) + (own.backlog / self._share(key, own) if own.items else 0.0)
        count, cost = 0, 0.0
        for other, flow in self._active.items():
            part = flow.backlog if flow is own else min(flow.backlog, passing * self._share(other, flow))
            cost += part
            count += round(len(flow.items) * part / flow.backlog) if flow.backlog else len(flow.items)
        return count, cost

    def is_full(self, key: FlowKey) -> bool:
        """Whether there is no room for another item of the flow.

        In a long queue, a flow below its part of its sender's share still has room, so that no sender can fill the
        queue for the others, until the queue is twice as long.
        """
        if not self.is_long:
            return False
        senders = len({key.sender, *self._weights})
        flows = len({key, *(other for other in self._active if other.sender == key.sender)})
        own = self._active.get(key)
        return (
            self._length >= 2 * self._max_length or len(own.items if own else ()) * senders * flows >= self._max_length
        )

    def _share(self, key: FlowKey, flow: _Flow[T]) -> float:
        """Share of an active flow in the time of its sender."""
        return flow.weight / self._weights[key.sender]

    def _next_tag(self, key: FlowKey, flow: _Flow[T]) -> float:
        item = flow.items[0]
        return max(item.arrival, flow.tag) + item.cost / self._share(key, flow)

    def _removed(self, key: FlowKey, flow: _Flow[T], item: _Item[T]) -> None:
        flow.backlog -= item.cost
        self.backlog -= item.cost
        self._length -= 1
        if not flow.items:
            flow.backlog = 0.0  # drop rounding errors
            del self._active[key]
            weights = [flow.weight for other, flow in self._active.items() if other.sender == key.sender]
            if weights:
                self._weights[key.sender] = sum(weights)
            else:
                del self._weights[key.sender]
            self._forget()

    def _forget(self) -> None:
        """Forget the flows without items whose share has passed, or all if nothing waits."""
        if not self._length:
            self._flows.clear()
            self._time = self.backlog = 0.0
        elif len(self._flows) > self._max_flows:
            self._flows = {key: flow for key, flow in self._flows.items() if flow.items or flow.tag > self._time}
            self._max_flows = max(_MIN_FLOWS, 2 * len(self._flows))

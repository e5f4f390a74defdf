"""A queue that shares computing time between senders, and between small and large work of the same sender.

Weighted fair queueing (Demers, Keshav and Shenker, 1989): each item gets a tag, the time at which it would be finished
if all senders were served at once, each at its share of a core; the item with the smallest tag is next. Work that asks
for less than its share is therefore served at once, however much the others ask for. A flow is the work of one kind
from one sender; the tags and the clock are virtual time, which passes more slowly the more senders there are.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
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
        self._kinds: dict[str, set[Kind]] = {}  # of each sender's flows with items
        self._length = 0
        self._time = 0.0  # virtual
        self._max_flows = _MIN_FLOWS

    def __len__(self) -> int:
        return self._length

    def push(self, value: T, key: FlowKey, cost: float) -> None:
        """Append an item to its flow."""
        flow = self._flows.setdefault(key, _Flow())
        self._kinds.setdefault(key.sender, set()).add(key.kind)
        flow.items.append(_Item(self._time, cost, value))
        flow.backlog += cost
        self._length += 1

    def pop(self, accept: Callable[[Kind], bool] = lambda kind: True) -> tuple[FlowKey, T] | None:
        """Remove and return the next item of an accepted kind, with its flow; None if there is none."""
        accepted = (key for key in self.active() if accept(key.kind))
        tag, key = min(((self._next_tag(key), key) for key in accepted), key=itemgetter(0), default=(0.0, None))
        if key is None:
            return None
        flow = self._flows[key]
        item = flow.items.popleft()
        flow.tag_before, flow.tag = flow.tag, tag
        self._time += item.cost / len(self._kinds)
        self._removed(key, item)
        return key, item.value

    def put_back(self, value: T, taken_from: FlowKey, key: FlowKey, cost: float) -> None:
        """Push an item that was just taken to another flow; its first flow does not pay for it."""
        if taken_from in self._flows:
            self._flows[taken_from].tag = self._flows[taken_from].tag_before
        self.push(value, key, cost)

    def remove(self, value: T, key: FlowKey) -> None:
        """Remove an item, if it is still in the queue."""
        flow = self._flows.get(key)
        item = next((item for item in flow.items if item.value is value), None) if flow else None
        if flow is not None and item is not None:
            flow.items.remove(item)
            self._removed(key, item)

    def active(self) -> Iterator[FlowKey]:
        """Yield the flows that have items."""
        return (FlowKey(sender, kind) for sender, kinds in self._kinds.items() for kind in kinds)

    def ahead(self, key: FlowKey) -> tuple[int, float]:
        """Return how many items would be taken before a new one of the flow, and their cost."""
        own = self._flows.get(key)
        passing = 0.0  # virtual time
        if own:
            passing = max(0.0, own.tag - self._time) + (own.backlog / self._share(key) if own.items else 0.0)
        count, cost = 0, 0.0
        for other in self.active():
            flow = self._flows[other]
            part = flow.backlog if flow is own else min(flow.backlog, passing * self._share(other))
            cost += part
            count += round(len(flow.items) * part / flow.backlog) if flow.backlog else len(flow.items)
        return count, cost

    def is_full(self, key: FlowKey) -> bool:
        """Whether there is no room for another item of the flow.

        A flow below its share of the queue always has room, so that no sender can fill the queue for the others.
        """
        own = self._flows.get(key)
        flows = sum(map(len, self._kinds.values()))
        return self._length >= self._max_length and len(own.items if own else ()) * (flows + 1) >= self._max_length

    def _share(self, key: FlowKey) -> float:
        """Share of a flow in the time of its sender."""
        return key.kind.weight / sum(kind.weight for kind in self._kinds[key.sender])

    def _next_tag(self, key: FlowKey) -> float:
        flow = self._flows[key]
        item = flow.items[0]
        return max(item.arrival, flow.tag) + item.cost / self._share(key)

    def _removed(self, key: FlowKey, item: _Item[T]) -> None:
        flow, kinds = self._flows[key], self._kinds[key.sender]
        flow.backlog -= item.cost
        self._length -= 1
        if not flow.items:
            flow.backlog = 0.0  # drop rounding errors
            kinds.remove(key.kind)
            if not kinds:
                del self._kinds[key.sender]
            self._forget()

    def _forget(self) -> None:
        """Forget the flows without items whose share has passed, or all if nothing waits."""
        if not self._length:
            self._flows.clear()
            self._time = 0.0
        elif len(self._flows) > self._max_flows:
            self._flows = {key: flow for key, flow in self._flows.items() if flow.items or flow.tag > self._time}
            self._max_flows = max(_MIN_FLOWS, 2 * len(self._flows))

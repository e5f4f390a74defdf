from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import HungarianMatcher as PublishedMatcher

from vitrine.models.boxes import cxcywh_to_xyxy, generalised_iou
from vitrine.models.detr import SetPrediction
from vitrine.models.training.objectives.matcher import HungarianMatcher
from vitrine.models.training.targets import Target

CLASSES = 3


def predictions(batch: int, queries: int, generator: torch.Generator) -> SetPrediction:
    return {
        "pred_logits": torch.randn(batch, queries, CLASSES + 1, generator=generator),
        "pred_boxes": 0.1 + 0.8 * torch.rand(batch, queries, 4, generator=generator),
    }


def objects(count: int, generator: torch.Generator) -> Target:
    boxes = 0.1 + 0.8 * torch.rand(count, 4, generator=generator)
    return Target(torch.randint(CLASSES, (count,), generator=generator), boxes)


def cost(prediction: SetPrediction, image: int, query: int, target: Target, number: int) -> float:
    """DETR's matching cost of one pair, eq. 1 of the paper."""
    probability = prediction["pred_logits"][image, query].softmax(-1)[target.class_ids[number]]
    box, wanted = prediction["pred_boxes"][image, query], target.boxes_cxcywh[number]
    giou = generalised_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted))
    return float(-probability + 5 * (box - wanted).abs().sum() - 2 * giou)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0)])
def test_is_the_minimum_cost_assignment(seed: int, counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = predictions(len(counts), 4, generator)
    targets = [objects(count, generator) for count in counts]
    matches = HungarianMatcher()(prediction, targets)
    for image, (target, (queries, numbers)) in enumerate(zip(targets, matches, strict=True)):
        count = len(target.class_ids)
        assert sorted(numbers.tolist()) == list(range(count))
        assert len(set(queries.tolist())) == count
        found = sum(
            cost(prediction, image, q, target, n) for q, n in zip(queries.tolist(), numbers.tolist(), strict=True)
        )
        best = min(
            sum(cost(prediction, image, query, target, number) for number, query in enumerate(order))
            for order in permutations(range(4), count)
        )
        assert found == pytest.approx(best, abs=1e-4)


def test_groups_are_matched_independently() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, targets = predictions(2, 12, generator), [objects(2, generator), objects(3, generator)]
    matches = HungarianMatcher()(prediction, targets, groups=3)
    for group in range(3):
        own = slice(4 * group, 4 * group + 4)
        part: SetPrediction = {
            "pred_logits": prediction["pred_logits"][:, own],
            "pred_boxes": prediction["pred_boxes"][:, own],
        }
        for (queries, numbers), (own_queries, own_numbers) in zip(
            matches, HungarianMatcher()(part, targets), strict=True
        ):
            mine = (queries >= own.start) & (queries < own.stop)
            assert (queries[mine] - own.start).tolist() == own_queries.tolist()
            assert numbers[mine].tolist() == own_numbers.tolist()


def test_more_objects_than_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    ((queries, numbers),) = HungarianMatcher()(predictions(1, 2, generator), [objects(5, generator)])
    assert sorted(queries.tolist()) == [0, 1]
    assert len(set(numbers.tolist())) == 2


def test_no_objects_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for queries, numbers in HungarianMatcher()(predictions(2, 4, generator), [objects(0, generator)] * 2):
        assert queries.tolist() == numbers.tolist() == []
        assert queries.dtype == numbers.dtype == torch.int64


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, queries=st.integers(1, 12), seed=st.integers(0, 9))
def test_matches_are_the_published_ones(counts: list[int], queries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = predictions(len(counts), queries, generator)
    targets = [objects(count, generator) for count in counts]
    expected = PublishedMatcher(class_cost=1, bbox_cost=5, giou_cost=2)(
        {"logits": prediction["pred_logits"], "pred_boxes": prediction["pred_boxes"]},
        [{"class_labels": target.class_ids, "boxes": target.boxes_cxcywh} for target in targets],
    )
    for found, wanted in zip(HungarianMatcher()(prediction, targets), expected, strict=True):
        assert [indices.tolist() for indices in found] == [indices.tolist() for indices in wanted]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_query_without_a_finite_box_is_matched_last(broken: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = predictions(1, 4, generator)
    prediction["pred_boxes"][0, 1] = broken
    ((queries, _),) = HungarianMatcher()(prediction, [objects(3, generator)])
    assert sorted(queries.tolist()) == [0, 2, 3]

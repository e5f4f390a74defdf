import math

import pytest
import torch

from models.detr import DetrOutput
from models.training.losses import SetCriterion
from models.training.matcher import Target

NO_OBJECT = 2
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def output(class_ids: list[list[int]], boxes: list[list[list[float]]], certainty: float) -> DetrOutput:
    """Logits that are `certainty` at the given classes (0, 1 or no object) and zero elsewhere."""
    logits = certainty * torch.nn.functional.one_hot(torch.tensor(class_ids), NO_OBJECT + 1).float()
    return {
        "pred_logits": logits.requires_grad_(),
        "pred_boxes": torch.tensor(boxes).requires_grad_(),
        "aux_outputs": [],
    }


BOX, OTHER = [0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.1, 0.1]


def test_perfect_prediction_costs_nothing() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX])), NOTHING]
    loss = SetCriterion()(output([[NO_OBJECT, 1], [NO_OBJECT] * 2], [[OTHER, BOX], [OTHER, BOX]], 50.0), targets)
    assert {name: value.item() for name, value in loss.items()} == pytest.approx(dict.fromkeys(loss, 0.0), abs=1e-5)


def test_by_hand() -> None:
    """One object, two undecided queries: the nearer box is matched and misses by 0.1 in x."""
    near = [0.6, 0.5, 0.2, 0.4]
    loss = SetCriterion()(output([[0, 0]], [[OTHER, near]], 0.0), [Target(torch.tensor([1]), torch.tensor([BOX]))])
    giou = (0.1 * 0.4) / (0.3 * 0.4)  # hull and union are the same
    assert loss["class"].item() == pytest.approx(math.log(3))  # a mean weighted by 1 and 0.1
    assert loss["l1"].item() == pytest.approx(0.1)
    assert loss["giou"].item() == pytest.approx(1 - giou)
    assert loss["loss"].item() == pytest.approx(math.log(3) + 5 * 0.1 + 2 * (1 - giou))


def test_no_object_weighs_a_tenth() -> None:
    """One query is right about an object, one is wrong about no object."""
    boxes = [[BOX, OTHER]]
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    wrong_background = SetCriterion()(output([[1, 0]], boxes, 10.0), targets)["class"].item()
    assert wrong_background == pytest.approx(0.1 * 10 / 1.1, rel=1e-3)


def test_zero_objects_in_the_batch() -> None:
    prediction = output([[0, 1], [1, NO_OBJECT]], [[BOX, OTHER], [BOX, OTHER]], 1.0)
    loss = SetCriterion()(prediction, [NOTHING, NOTHING])
    assert loss["l1"].item() == loss["giou"].item() == 0
    loss["loss"].backward()
    assert torch.isfinite(loss["loss"])
    assert prediction["pred_logits"].grad.abs().sum() > 0
    assert torch.isfinite(prediction["pred_boxes"].grad).all()


def test_auxiliary_layers_count_as_much_as_the_last() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    alone = SetCriterion()(output([[0, 1]], [[OTHER, BOX]], 1.0), targets)
    prediction = output([[0, 1]], [[OTHER, BOX]], 1.0)
    prediction["aux_outputs"] = [output([[0, 1]], [[OTHER, BOX]], 1.0)] * 2
    together = SetCriterion()(prediction, targets)
    assert together["loss"].item() == pytest.approx(3 * alone["loss"].item())
    assert together["class"].item() == pytest.approx(alone["class"].item())


def test_equal_groups_cost_what_one_costs() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    one = SetCriterion()(output([[0, 1]], [[OTHER, BOX]], 1.0), targets)
    three = SetCriterion()(output([[0, 1] * 3], [[OTHER, BOX] * 3], 1.0), targets, groups=3)
    for name, value in one.items():
        assert three[name].item() == pytest.approx(value.item(), abs=1e-6)

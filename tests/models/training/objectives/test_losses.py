import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DetrConfig as PublishedConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from vitrine.models.detr import DetrConfig, DetrOutput, SetPrediction
from vitrine.models.training.objectives.losses import ClassificationLoss, SetCriterion
from vitrine.models.training.targets import Target

NO_OBJECT = 2
NOTHING = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


def output(class_ids: list[list[int]], boxes: list[list[list[float]]], certainty: float) -> DetrOutput:
    """Logits that are `certainty` at the given classes (0, 1 or no object) and zero elsewhere."""
    logits = certainty * torch.nn.functional.one_hot(torch.tensor(class_ids), NO_OBJECT + 1).float()
    return {
        "pred_logits": logits.requires_grad_(),
        "pred_boxes": torch.tensor(boxes).requires_grad_(),
        "aux_outputs": [],
        "denoising": [],
        "proposals": None,
    }


def criterion(output: DetrOutput, targets: list[Target], **grouped: int) -> dict[str, Tensor]:
    """The loss of a whole batch."""
    groups = grouped.get("groups", 1)
    config = DetrConfig(2, num_queries=output["pred_boxes"].shape[1] // groups, query_groups=groups)
    return SetCriterion()(output, targets, SetCriterion().totals(targets, config), **grouped)


BOX, OTHER = [0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.1, 0.1]


def test_perfect_prediction_costs_nothing() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX])), NOTHING]
    loss = criterion(output([[NO_OBJECT, 1], [NO_OBJECT] * 2], [[OTHER, BOX], [OTHER, BOX]], 50.0), targets)
    assert {name: value.item() for name, value in loss.items()} == pytest.approx(dict.fromkeys(loss, 0.0), abs=1e-5)


def test_by_hand() -> None:
    """One object, two uncertain queries: the nearer box is matched, with an error of 0.1 in x."""
    near = [0.6, 0.5, 0.2, 0.4]
    loss = criterion(output([[0, 0]], [[OTHER, near]], 0.0), [Target(torch.tensor([1]), torch.tensor([BOX]))])
    giou = (0.1 * 0.4) / (0.3 * 0.4)  # hull and union are the same
    assert loss["class"].item() == pytest.approx(math.log(3))  # a mean weighted by 1 and 0.1
    assert loss["l1"].item() == pytest.approx(0.1)
    assert loss["giou"].item() == pytest.approx(1 - giou)
    assert loss["loss"].item() == pytest.approx(math.log(3) + 5 * 0.1 + 2 * (1 - giou))


def test_no_object_weighs_a_tenth() -> None:
    """One query is right about an object, one is wrong about no object."""
    boxes = [[BOX, OTHER]]
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    wrong_background = criterion(output([[1, 0]], boxes, 10.0), targets)["class"].item()
    assert wrong_background == pytest.approx(0.1 * 10 / 1.1, rel=1e-3)


def test_zero_objects_in_the_batch() -> None:
    prediction = output([[0, 1], [1, NO_OBJECT]], [[BOX, OTHER], [BOX, OTHER]], 1.0)
    loss = criterion(prediction, [NOTHING, NOTHING])
    assert loss["l1"].item() == loss["giou"].item() == 0
    loss["loss"].backward()
    assert torch.isfinite(loss["loss"])
    assert prediction["pred_logits"].grad.abs().sum() > 0
    assert torch.isfinite(prediction["pred_boxes"].grad).all()


def test_auxiliary_layers_count_as_much_as_the_last() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    alone = criterion(output([[0, 1]], [[OTHER, BOX]], 1.0), targets)
    prediction = output([[0, 1]], [[OTHER, BOX]], 1.0)
    prediction["aux_outputs"] = [output([[0, 1]], [[OTHER, BOX]], 1.0)] * 2
    together = criterion(prediction, targets)
    assert together["loss"].item() == pytest.approx(3 * alone["loss"].item())
    assert together["class"].item() == pytest.approx(alone["class"].item())


def test_equal_groups_cost_what_one_costs() -> None:
    targets = [Target(torch.tensor([1]), torch.tensor([BOX]))]
    one = criterion(output([[0, 1]], [[OTHER, BOX]], 1.0), targets)
    three = criterion(output([[0, 1] * 3], [[OTHER, BOX] * 3], 1.0), targets, groups=3)
    for name, value in one.items():
        assert three[name].item() == pytest.approx(value.item(), abs=1e-6)


def random_prediction(images: int, queries: int, classes: int) -> SetPrediction:
    return {
        "pred_logits": (3 * torch.randn(images, queries, classes + 1)).requires_grad_(),
        "pred_boxes": (0.05 + 0.6 * torch.rand(images, queries, 4)).requires_grad_(),
    }


def random_output(images: int, queries: int, classes: int, layers: int, restored: int = 0) -> DetrOutput:
    aux = [random_prediction(images, queries, classes) for _ in range(layers - 1)]
    denoising = [random_prediction(images, restored, classes) for _ in range(layers if restored else 0)]
    return {
        **random_prediction(images, queries, classes),
        "aux_outputs": aux,
        "denoising": denoising,
        "proposals": None,
    }


def random_targets(counts: list[int], classes: int) -> list[Target]:
    return [Target(torch.randint(classes, (count,)), 0.05 + 0.6 * torch.rand(count, 4)) for count in counts]


COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(
    counts=COUNTS,
    queries=st.integers(1, 8),
    classes=st.integers(1, 4),
    layers=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_is_the_published_loss(counts: list[int], queries: int, classes: int, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    output, targets = random_output(len(counts), queries, classes, layers), random_targets(counts, classes)
    every = [*output["aux_outputs"], output]
    expected, parts, _ = ForObjectDetectionLoss(
        output["pred_logits"],
        [{"class_labels": target.class_ids, "boxes": target.boxes_cxcywh} for target in targets],
        torch.device("cpu"),
        output["pred_boxes"],
        PublishedConfig(num_labels=classes, auxiliary_loss=True, decoder_layers=layers),
        torch.stack([layer["pred_logits"] for layer in every]),
        torch.stack([layer["pred_boxes"] for layer in every]),
    )
    found = criterion(output, targets)
    names = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    expected_parts = {"loss": expected.item(), **{ours: parts[theirs].item() for ours, theirs in names.items()}}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected_parts, rel=1e-4, abs=1e-5)


def gradients(output: DetrOutput) -> list[Tensor]:
    layers: list[SetPrediction] = [output, *output["aux_outputs"], *output["denoising"]]
    return [tensor.grad for layer in layers for tensor in (layer["pred_logits"], layer["pred_boxes"])]


def part_of(output: DetrOutput, images: slice, longest: int, restored: int) -> DetrOutput:
    """Slice a batch; drop denoising padding beyond `longest` objects."""

    def cut(layer: SetPrediction) -> SetPrediction:
        return {"pred_logits": layer["pred_logits"][images], "pred_boxes": layer["pred_boxes"][images]}

    def shorten(layer: SetPrediction) -> SetPrediction:
        groups = {key: value.unflatten(1, (2, restored)) for key, value in cut(layer).items()}
        return {key: value[:, :, :longest].flatten(1, 2) for key, value in groups.items()}

    return {
        **cut(output),
        "aux_outputs": [cut(layer) for layer in output["aux_outputs"]],
        "denoising": [shorten(layer) for layer in output["denoising"]],
        "proposals": None,
    }


@settings(deadline=None, max_examples=25)
@given(counts=COUNTS.filter(lambda counts: len(counts) > 1), groups=st.integers(1, 2), data=st.data())
def test_parts_of_a_batch_add_up_to_the_whole(counts: list[int], groups: int, data: Any) -> None:
    """In value and in gradient, however unevenly the objects are distributed."""
    torch.manual_seed(0)
    longest, targets = max(1, *counts), random_targets(counts, 3)
    output = random_output(len(counts), 4 * groups, 3, layers=2, restored=2 * longest)
    config = DetrConfig(3, num_queries=4, query_groups=groups, queries="boxes", denoising=2)
    whole = SetCriterion()(output, targets, SetCriterion().totals(targets, config), groups)
    whole["loss"].backward()
    expected = [gradient.clone() for gradient in gradients(output)]
    for gradient in gradients(output):
        gradient.zero_()

    split = data.draw(st.integers(1, len(counts) - 1))
    halves = [slice(0, split), slice(split, None)]
    totals = sum(SetCriterion().totals(targets[half], config) for half in halves)
    sums = dict.fromkeys(whole, 0.0)
    for half in halves:
        part = part_of(output, half, max(1, *counts[half], 0), longest)
        loss = SetCriterion()(part, targets[half], totals, groups)
        loss["loss"].backward()
        sums = {name: sums[name] + value.item() for name, value in loss.items()}
    assert sums == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-5)
    for found, wanted in zip(gradients(output), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_totals_need_only_the_targets() -> None:
    config = DetrConfig(2, num_queries=3, query_groups=2, queries="boxes", denoising=5)
    targets = random_targets([1, 4], 2)
    expected = [2 * (1 + 4), 2 * (1 + 3 + 0.1 * 2), 5 * (1 + 4)]
    assert SetCriterion().totals(targets, config).tolist() == pytest.approx(expected)


def test_denoising_loss_covers_every_layer() -> None:
    """Two groups for an image with one object and one with two; outputs of the padding do not count."""
    targets = [Target(torch.tensor([1]), torch.tensor([BOX])), Target(torch.tensor([0, 1]), torch.tensor([OTHER, BOX]))]
    near = [0.6, 0.5, 0.2, 0.4]
    prediction = output([[NO_OBJECT], [NO_OBJECT]], [[BOX], [BOX]], 0.0)
    restored = output([[1, 0, 1, 0], [0, 1, 0, 1]], [[near, OTHER, BOX, near], [OTHER, BOX, OTHER, BOX]], 50.0)
    config = DetrConfig(2, num_queries=1, queries="boxes", denoising=2)
    totals = SetCriterion().totals(targets, config)
    without = SetCriterion()(prediction, targets, totals)
    assert "denoising" not in without
    prediction["denoising"] = [restored] * 3
    found = SetCriterion()(prediction, targets, totals)
    miss = (5 * 0.1 + 2 * (1 - 0.04 / 0.12)) / 6
    assert found["denoising"].item() == pytest.approx(miss)
    assert found["loss"].item() == pytest.approx(without["loss"].item() + 3 * miss)
    found["loss"].backward()
    assert (restored["pred_boxes"].grad[0, 1] == 0).all()
    assert (restored["pred_logits"].grad[0, 3] == 0).all()


def test_denoising_without_objects_costs_nothing() -> None:
    prediction, restored = output([[1]], [[BOX]], 1.0), output([[1, 1]], [[BOX, BOX]], 1.0)
    prediction["denoising"] = [restored]
    config = DetrConfig(2, num_queries=1, queries="boxes", denoising=2)
    found = SetCriterion()(prediction, [NOTHING], SetCriterion().totals([NOTHING], config))
    assert found["denoising"].item() == 0
    found["loss"].backward()
    assert (restored["pred_logits"].grad == 0).all()
    assert (restored["pred_boxes"].grad == 0).all()


def soft_targets(images: int, classes: int) -> Tensor:
    return torch.randn(images, classes).softmax(dim=-1)


@settings(deadline=None, max_examples=25)
@given(
    images=st.integers(1, 6),
    classes=st.integers(2, 7),
    smoothing=st.floats(0, 0.9),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_classification_loss_of_a_whole_batch_is_torchs(images: int, classes: int, smoothing: float, kind: Any) -> None:
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(images, classes), soft_targets(images, classes)
    if kind == "softmax":
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    else:
        smoothed = (1 - smoothing) * targets + smoothing / classes
        expected = F.binary_cross_entropy_with_logits(logits, smoothed)
    torch.testing.assert_close(ClassificationLoss(kind, smoothing)(logits, targets, images), expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_classification_losses_of_parts_add_up(kind: Any) -> None:
    torch.manual_seed(0)
    loss, logits, targets = ClassificationLoss(kind, 0.1), torch.randn(5, 3), soft_targets(5, 3)
    parts = loss(logits[:2], targets[:2], 5) + loss(logits[2:], targets[2:], 5)
    torch.testing.assert_close(parts, loss(logits, targets, 5))


def test_half_precision_logits_are_compared_in_full() -> None:
    logits = torch.tensor([[30.0, 0.0]], dtype=torch.bfloat16)
    found = ClassificationLoss()(logits, torch.tensor([[0.0, 1.0]]), 1)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(30)


def test_weighted_images_count_as_several() -> None:
    loss, logits = ClassificationLoss(label_smoothing=0.1), torch.randn(2, 3)
    targets = torch.eye(3)[:2]
    weighted = loss(logits, targets, 4.0, torch.tensor([3.0, 1.0]))
    repeated = loss(logits[[0, 0, 0, 1]], targets[[0, 0, 0, 1]], 4.0)
    torch.testing.assert_close(weighted, repeated)


def test_varifocal_loss_by_hand() -> None:
    """An object's class is to be its IoU, weighted by it; absent classes weigh 0.75 of their squared score."""
    near, logits = [0.6, 0.5, 0.2, 0.4], torch.tensor([[[0.5, -1.0], [0.2, -2.0]]], requires_grad=True)
    boxes = torch.tensor([[near, OTHER]], requires_grad=True)
    config = DetrConfig(2, num_queries=2, scores="sigmoid")
    target = Target(torch.tensor([1]), torch.tensor([BOX]))
    criterion = SetCriterion.of(config, eos_coef=0.1)
    prediction: Any = {
        "pred_logits": logits,
        "pred_boxes": boxes,
        "aux_outputs": [],
        "denoising": [],
        "proposals": None,
    }
    loss = criterion(prediction, [target], criterion.totals([target], config))

    def absent(logit: float) -> float:
        score = 1 / (1 + math.exp(-logit))
        return -0.75 * score**2 * math.log(1 - score)

    iou = 1 / 3
    score = 1 / (1 + math.exp(1.0))
    present = -iou * (iou * math.log(score) + (1 - iou) * math.log(1 - score))
    assert loss["class"].item() == pytest.approx(present + absent(0.5) + absent(0.2) + absent(-2.0))
    loss["loss"].backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0


def test_sigmoid_loss_of_parts_adds_up_to_the_whole() -> None:
    config = DetrConfig(3, num_queries=5, scores="sigmoid", queries="selected", denoising=2)
    criterion, targets = SetCriterion.of(config, 0.1), random_targets([2, 0, 3], 3)
    output = cut_classes(random_output(3, 5, 3, layers=2, restored=6))
    output["proposals"] = cut_classes(random_prediction(3, 20, 3))
    totals = criterion.totals(targets, config)
    whole = criterion(output, targets, totals)
    parts = [criterion(rows(output, slice(i, i + 1)), targets[i : i + 1], totals) for i in range(3)]
    # Padding of denoising queries depends on the batch, and changes nothing.
    for name in ("class", "l1", "giou", "proposals"):
        assert whole[name].item() == pytest.approx(sum(part[name].item() for part in parts), rel=1e-5)


def cut_classes(prediction: Any) -> Any:
    """Predictions without an output for "no object"."""
    if isinstance(prediction, list):
        return [cut_classes(layer) for layer in prediction]
    if not isinstance(prediction, dict):
        return prediction
    return {
        name: value[..., :-1].detach() if name == "pred_logits" else cut_classes(value)
        for name, value in prediction.items()
    }


def rows(prediction: Any, images: slice) -> Any:
    """Predictions of some images."""
    if isinstance(prediction, list):
        return [rows(layer, images) for layer in prediction]
    if isinstance(prediction, dict):
        return {name: rows(value, images) for name, value in prediction.items()}
    return prediction if prediction is None else prediction[images]


def test_several_cells_learn_to_propose_an_object() -> None:
    config = DetrConfig(2, num_queries=2, scores="sigmoid", queries="selected")
    criterion, target = SetCriterion.of(config, 0.1), Target(torch.tensor([1]), torch.tensor([BOX]))
    logits = torch.full((1, 6, 2), -4.0, requires_grad=True)
    boxes = torch.tensor([[BOX] * 5 + [OTHER]], requires_grad=True)
    output = cut_classes(random_output(1, 2, 2, layers=1))
    output["proposals"] = {"pred_logits": logits, "pred_boxes": boxes}
    criterion(output, [target], criterion.totals([target], config))["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad[0, :, 1] < 0).sum() == 4

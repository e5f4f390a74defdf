import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrine.models.detr import Denoising, Detr, DetrConfig
from vitrine.models.training.objectives.denoising import make_denoising
from vitrine.models.training.objectives.losses import SetCriterion
from vitrine.models.training.targets import Target

CLASSES = 5
CENTRE_NOISE, SIZE_NOISE, LABEL_NOISE = 0.4, 0.4, 0.2  # of the paper


def config(groups: int) -> DetrConfig:
    return DetrConfig(CLASSES, queries="boxes", denoising=groups)


def objects(count: int) -> Target:
    centres, edges = 0.3 + 0.4 * torch.rand(count, 2), 0.05 + 0.3 * torch.rand(count, 2)  # noise leaves them inside
    return Target(torch.randint(CLASSES, (count,)), torch.cat((centres, edges), dim=-1))


def make(targets: list[Target], groups: int, noise: Tensor) -> Denoising:
    denoising = make_denoising(targets, config(groups), noise)
    assert denoising is not None
    return denoising


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_noised_boxes_stay_near_their_objects(counts: list[int], groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    targets = [objects(count) for count in counts]
    denoising = make(targets, groups, torch.rand(len(counts)))
    assert denoising.boxes_cxcywh.shape == (len(counts), groups, max(1, *counts), 4)
    assert denoising.class_ids.shape == denoising.boxes_cxcywh.shape[:-1]
    assert denoising.valid.sum(dim=-1).tolist() == counts
    for image, (target, count) in enumerate(zip(targets, counts, strict=True)):
        centres, edges = target.boxes_cxcywh.split(2, dim=-1)
        noised_centres, noised_edges = denoising.boxes_cxcywh[image, :, :count].split(2, dim=-1)
        assert ((noised_centres - centres).abs() <= CENTRE_NOISE * edges / 2 + 1e-6).all()
        assert ((noised_edges - edges).abs() <= SIZE_NOISE * edges + 1e-6).all()
        assert (denoising.class_ids[image] < CLASSES).all()


def test_noise_is_uniform_and_a_fifth_of_the_labels_are_random() -> None:
    torch.manual_seed(0)
    target = objects(40)
    denoising = make([target], 200, torch.tensor([0.5]))
    moved = (denoising.boxes_cxcywh[0] - target.boxes_cxcywh) / target.boxes_cxcywh[:, 2:].repeat(1, 2)
    largest = torch.tensor([CENTRE_NOISE / 2] * 2 + [SIZE_NOISE] * 2)
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    found = torch.quantile((moved / largest).flatten(0, 1), quantiles, dim=0)
    torch.testing.assert_close(found, (2 * quantiles - 1)[:, None].expand(-1, 4), atol=0.03, rtol=0)
    changed = (denoising.class_ids[0] != target.class_ids).float().mean().item()
    assert changed == pytest.approx(LABEL_NOISE * (1 - 1 / CLASSES), abs=0.02)
    others = denoising.class_ids[0][denoising.class_ids[0] != target.class_ids]
    assert set(others.tolist()) == set(range(CLASSES))


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    targets, noise = [objects(count) for count in (2, 0, 4)], torch.rand(3)
    together = make(targets, 3, noise)
    for image, target in enumerate(targets):
        count = len(target.class_ids)
        alone = make([target], 3, noise[image : image + 1])
        assert torch.equal(alone.boxes_cxcywh[0, :, :count], together.boxes_cxcywh[image, :, :count])
        assert torch.equal(alone.class_ids[0, :, :count], together.class_ids[image, :, :count])


def test_groups_and_images_have_noise_of_their_own() -> None:
    """However near the random numbers are: multiples of 2^-24, as torch draws them."""
    torch.manual_seed(0)
    target = objects(1)
    denoising = make([target, target], 3, torch.tensor([0.5, 0.5 + 2**-24]))
    assert len(denoising.boxes_cxcywh.flatten(0, 2).unique(dim=0)) == 6


def test_boxes_stay_within_the_image() -> None:
    whole = Target(torch.tensor([0, 1]), torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.01, 0.99, 0.02, 0.02]]))
    boxes = make([whole], 50, torch.tensor([0.3])).boxes_cxcywh
    assert boxes.amin() >= 0
    assert boxes.amax() == 1


def test_no_groups_no_denoising() -> None:
    assert make_denoising([objects(2)], config(0), torch.tensor([0.5])) is None


def test_denoising_is_learned() -> None:
    """Together with query groups: every part of the loss falls when training on one batch."""
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 32}
    network = Detr(
        DetrConfig(
            CLASSES, num_queries=8, queries="boxes", query_groups=2, denoising=3, dropout=0.0,
            backbone_layers=(1, 1), backbone_width=8, **shape,
        )
    )  # fmt: skip
    targets, criterion = [objects(3), objects(0), objects(2)], SetCriterion()
    pixels, sizes = torch.randn(3, 3, 64, 64), torch.tensor([[64, 64], [64, 48], [40, 64]])
    totals = criterion.totals(targets, network.config)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    history = []
    for step in range(60):
        denoising = make_denoising(targets, network.config, torch.rand(3))
        parts = criterion(network(pixels, sizes, denoising=denoising), targets, totals, groups=2)
        optimiser.zero_grad()
        parts["loss"].backward()
        if step == 0:
            assert all(parameter.grad is not None for parameter in network.parameters())
        optimiser.step()
        history.append({name: value.item() for name, value in parts.items()})
    first, last = history[0], history[-1]
    assert last["denoising"] < 0.6 * first["denoising"]
    assert last["loss"] < 0.6 * first["loss"]

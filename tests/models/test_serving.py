import itertools
import math
from typing import Any

import pytest
import torch

from vitrine.models.build import build_model
from vitrine.models.detr import Detr, DetrConfig
from vitrine.models.serving import Normalise, ServedClassifier, ServedDetector, served
from vitrine.models.vit import ViT, ViTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_detector(**settings: Any) -> ServedDetector:
    torch.manual_seed(0)
    network = Detr(
        DetrConfig(
            num_classes=3,
            num_queries=10,
            embed_dim=16,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            feedforward_dim=16,
            backbone_layers=(1, 1),
            backbone_width=8,
            **settings,
        )
    )
    torch.nn.init.normal_(network.bbox_embed.layers[-1].weight)
    return ServedDetector(network, MEAN, STD).eval()


@pytest.fixture(params=["learned", "boxes"])
def detector(request: pytest.FixtureRequest) -> ServedDetector:
    return make_detector(queries=request.param)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_normalise() -> None:
    x = pixels(2, 4, 5, 3)
    expected = ((x.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()).permute(0, 3, 1, 2)
    torch.testing.assert_close(Normalise(MEAN, STD)(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_wrapping_adds_nothing_to_the_weights() -> None:
    network = ViT(ViTConfig(num_classes=3, image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2))
    names = {name.removeprefix("network.") for name in served(network, MEAN, STD).state_dict()}
    assert names == network.state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("vit", {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}),
        ("mlp_mixer", {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1}),
        ("resnetv2", {"image_size": 8, "layers": (1,), "width_factor": 0.5, "stem": "small"}),
    ],
)
def test_classifier_returns_the_softmax_of_the_networks_logits(architecture: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = build_model(architecture, settings, 3).eval()
    torch.nn.init.normal_(network.head.weight)
    module, x = served(network, MEAN, STD), pixels(2, 8, 8, 3)
    assert isinstance(module, ServedClassifier)
    exponentials = network(Normalise(MEAN, STD)(x)).exp()
    probabilities = module(x)
    assert probabilities.shape == (2, 3)
    torch.testing.assert_close(probabilities, exponentials / exponentials.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2))


def tiny_vit() -> ViT:
    torch.manual_seed(0)
    network = ViT(ViTConfig(num_classes=3, image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)).eval()
    torch.nn.init.normal_(network.head.weight)
    return network


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_divides_the_logits(temperature: float) -> None:
    network, x = tiny_vit(), pixels(2, 8, 8, 3)
    expected = torch.softmax(network(Normalise(MEAN, STD)(x)) / temperature, dim=-1)
    torch.testing.assert_close(served(network, MEAN, STD, temperature)(x), expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_no_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a number above 0, found"):
        served(tiny_vit(), MEAN, STD, temperature)


def test_a_softmax_of_queries_has_no_temperature(detector: ServedDetector) -> None:
    with pytest.raises(ValueError, match=r"temperature: expected 1\.0 for a detector with a softmax, found 2\.0"):
        served(detector.network, MEAN, STD, 2.0)


@pytest.mark.parametrize("network", [tiny_vit(), make_detector().network])
def test_only_sigmoid_scores_have_an_offset(network: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"offset: expected 0\.0 without sigmoid scores, found 0\.5"):
        served(network, MEAN, STD, 1.0, 0.5)


def test_sigmoid_scores_are_calibrated() -> None:
    network = make_detector(scores="sigmoid").network
    x, sizes = pixels(2, 32, 48, 3), torch.tensor([[32, 48], [20, 31]])
    plain, scaled = (served(network, MEAN, STD, *scale).eval()(x, sizes) for scale in ((), (0.5, -1.0)))
    torch.testing.assert_close(scaled[0].logit(), plain[0].logit() / 0.5 - 1, atol=1e-4, rtol=1e-4)
    for same, expected in zip(scaled[1:], plain[1:], strict=True):
        torch.testing.assert_close(same, expected)


def test_a_detr_is_served_as_a_detector(detector: ServedDetector) -> None:
    assert isinstance(served(detector.network, MEAN, STD), ServedDetector)


def test_detector_returns_scores_classes_and_corners(detector: ServedDetector) -> None:
    scores, class_ids, boxes = detector(pixels(2, 32, 48, 3), torch.tensor([[32, 48], [20, 30]]))
    assert (scores.shape, class_ids.shape, boxes.shape) == ((2, 10), (2, 10), (2, 10, 4))
    assert class_ids.dtype == torch.int64
    assert ((scores >= 0) & (scores <= 1)).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[..., :2] <= boxes[..., 2:]).all()


def test_boxes_are_the_networks_as_corners(detector: ServedDetector) -> None:
    x, sizes = pixels(1, 32, 32, 3), torch.tensor([[32, 32]])
    cx, cy, w, h = detector.network(detector.normalise(x), sizes)["pred_boxes"].unbind(-1)
    corners = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1).clamp(0, 1)
    torch.testing.assert_close(detector(x, sizes)[2], corners)


def test_no_object_is_never_predicted(detector: ServedDetector) -> None:
    torch.nn.init.zeros_(detector.network.class_embed.weight)
    with torch.no_grad():
        detector.network.class_embed.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 20.0]))  # the last is "no object"
    scores, class_ids, _ = detector(pixels(1, 32, 32, 3), torch.tensor([[32, 32]]))
    assert (class_ids == 1).all()
    assert (scores < 1e-6).all()


def test_unused_classes_are_never_predicted_but_take_part_in_the_softmax() -> None:
    detector = make_detector(unused_classes=2)
    logits = torch.tensor([0.0, 1.0, -1.0, 4.0, 3.0, 2.0])  # three classes, two unused ones, "no object"
    torch.nn.init.zeros_(detector.network.class_embed.weight)
    with torch.no_grad():
        detector.network.class_embed.bias.copy_(logits)
    scores, class_ids, _ = detector(pixels(1, 32, 32, 3), torch.tensor([[32, 32]]))
    assert (class_ids == 1).all()
    expected = math.exp(1) / sum(math.exp(logit) for logit in logits.tolist())
    torch.testing.assert_close(scores, torch.full((1, 10), expected))


def test_scores_and_classes_are_the_best_of_the_softmax_over_labels() -> None:
    detector, x, sizes = make_detector(unused_classes=2), pixels(2, 32, 48, 3), torch.tensor([[32, 48], [20, 30]])
    torch.nn.init.normal_(detector.network.class_embed.weight)
    valid = torch.zeros(2, 1, 32, 48)
    valid[0], valid[1, :, :20, :30] = 1, 1
    logits = detector.network(detector.normalise(x) * valid, sizes)["pred_logits"]
    assert logits.shape == (2, 10, 6)
    assert (logits.argmax(dim=-1) > 2).any()  # otherwise this would test nothing
    scores, class_ids, _ = detector(x, sizes)
    for i, j in itertools.product(range(2), range(10)):
        exponentials = [math.exp(logit) for logit in logits[i, j].tolist()]
        best = max(exponentials[:3])
        assert class_ids[i, j].item() == exponentials.index(best)
        assert scores[i, j].item() == pytest.approx(best / sum(exponentials), rel=1e-4)


def test_content_of_the_padding_does_not_matter(detector: ServedDetector) -> None:
    x, sizes = pixels(2, 40, 48, 3), torch.tensor([[40, 30], [17, 48]])
    other = x.clone()
    other[0, :, 30:], other[1, 17:] = 255, 7
    for found, expected in zip(detector(other, sizes), detector(x, sizes), strict=True):
        assert torch.equal(found, expected)


def test_predictions_do_not_depend_on_the_batch(detector: ServedDetector) -> None:
    x = pixels(3, 32, 48, 3)
    sizes = torch.tensor([[32, 48], [20, 30], [32, 20]])
    for i in range(3):
        alone = detector(x[i : i + 1], sizes[i : i + 1])
        torch.testing.assert_close(alone[2][0], detector(x, sizes)[2][i], atol=1e-5, rtol=1e-4)


def test_padded_batch_equals_single_images(detector: ServedDetector) -> None:
    torch.manual_seed(2)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: zero does not map to zero
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
    sizes = torch.tensor([[32, 48], [21, 37], [5, 64], [40, 9]])
    batch = pixels(4, 48, 64, 3)  # noise in the padding
    together = detector(batch, sizes)
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = detector(batch[i : i + 1, :height, :width], sizes[i : i + 1])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=0)


def test_sigmoid_scores_answer_the_best_pairs_of_query_and_class() -> None:
    config = DetrConfig(
        3,
        num_queries=2,
        scores="sigmoid",
        embed_dim=8,
        num_heads=1,
        encoder_layers=0,
        decoder_layers=1,
        feedforward_dim=8,
        backbone_layers=(1,),
        backbone_width=8,
    )
    module = ServedDetector(Detr(config), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.1]]])
    output: Any = {"pred_logits": torch.tensor([[[2.0, -1.0, 1.0], [-3.0, 0.5, -2.0]]]), "pred_boxes": boxes}
    scores, class_ids, found, queries = module.predictions(output)
    assert class_ids.tolist() == [[0, 2]]  # both of the first query: 2.0 and 1.0
    assert queries.tolist() == [[0, 0]]
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0]]).sigmoid())
    torch.testing.assert_close(found[0, 0], torch.tensor([0.4, 0.4, 0.6, 0.6]))
    assert torch.equal(found[0, 0], found[0, 1])

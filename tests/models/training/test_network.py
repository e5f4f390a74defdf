"""Serving predictors on torch."""

import numpy as np
import torch
from PIL import Image

from vitrine.bundle.manifest import ClassificationPreprocessing
from vitrine.bundle.predictors import Classifier
from vitrine.models.training.network import device_name, torch_predictor
from vitrine.models.vit import ViT, ViTConfig

PREPROCESSING = ClassificationPreprocessing(input_size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
CPU = torch.device("cpu")


def make_network() -> ViT:
    torch.manual_seed(0)
    network = ViT(
        ViTConfig(num_classes=3, image_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, drop_path=0.5)
    )
    torch.nn.init.normal_(network.head.weight)
    return network


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(4)]


def test_probabilities_are_the_softmax_of_the_networks_logits_over_the_temperature() -> None:
    network = make_network()
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images()])).float() / 255
    x = ((x - torch.tensor(PREPROCESSING.mean)) / torch.tensor(PREPROCESSING.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = torch.softmax(network.eval()(x) / 1.7, dim=-1).numpy()
    predictor = torch_predictor(network, PREPROCESSING, ("a", "b", "c"), CPU, temperature=1.7)
    assert isinstance(predictor, Classifier)
    np.testing.assert_allclose(predictor.probabilities(images()), expected, atol=1e-5)


def test_predicting_disables_drop_path_and_restores_training_mode() -> None:
    network = make_network().train()
    predictor = torch_predictor(network, PREPROCESSING, ("a", "b", "c"), CPU)
    assert isinstance(predictor, Classifier)
    first = predictor.probabilities(images())
    np.testing.assert_array_equal(predictor.probabilities(images()), first)
    assert network.training


def test_the_predictor_follows_the_networks_weights() -> None:
    network = make_network()
    predictor = torch_predictor(network, PREPROCESSING, ("a", "b", "c"), CPU)
    assert isinstance(predictor, Classifier)
    before = predictor.probabilities(images())
    with torch.no_grad():
        network.head.bias += torch.tensor([9.0, 0.0, 0.0])
    after = predictor.probabilities(images())
    assert (after[:, 0] > before[:, 0]).all()


def test_devices_are_named() -> None:
    assert device_name(CPU) == "CPU"

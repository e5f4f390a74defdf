"""Rules that convert the Flax layers in Google's `.npz` files.

Kernels of dense layers are [in, out], of convolutions [height, width, in, out]; a norm's weight is named `scale`.
"""

import torch
from torch import Tensor

from vitrine.models.published.layout import Rule, rule

# Training checkpoints also hold the optimizer's state.
_TRAINING_STATE = (r"opt/.*", r"chrono/.*", r"accum_train_time", r"epoch", r"step")
PREFIXES = {
    "": (),
    "opt/target/": _TRAINING_STATE,
    "params/": _TRAINING_STATE,
    "params/img/": (*_TRAINING_STATE, r"params/(?!img/).*"),  # with a text tower
}


def dense_kernel(kernel: Tensor) -> Tensor:
    """[in, out], possibly with axes of length one -> [out, in]."""
    return kernel.squeeze().T if kernel.squeeze().ndim == 2 else kernel.T


def conv_kernel(kernel: Tensor) -> Tensor:
    """[height, width, in, out] -> [out, in, height, width]."""
    return kernel.permute(3, 2, 0, 1)


def heads_in(*kernels: Tensor) -> Tensor:
    """Query, key and value kernels [D, H, d] (biases [H, d]) -> a fused weight [3 H d, D] (bias [3 H d])."""
    return torch.cat([kernel.flatten(-2).T if kernel.ndim == 3 else kernel.flatten() for kernel in kernels])


def heads_out(kernel: Tensor) -> Tensor:
    """[H, d, D] -> [D, H d]."""
    return kernel.flatten(0, 1).T


def dense(target: str, source: str) -> tuple[Rule, ...]:
    """Rules of a dense layer."""
    return (
        rule(f"{target}.weight", f"{source}/kernel", transform=dense_kernel),
        rule(f"{target}.bias", f"{source}/bias", transform=lambda bias: bias.flatten()),
    )


def conv(target: str, source: str) -> tuple[Rule, ...]:
    """Rules of a convolution with bias."""
    return (
        rule(f"{target}.weight", f"{source}/kernel", transform=conv_kernel),
        rule(f"{target}.bias", f"{source}/bias"),
    )


def norm(target: str, source: str) -> tuple[Rule, ...]:
    """Rules of a layer norm."""
    return rule(f"{target}.weight", f"{source}/scale"), rule(f"{target}.bias", f"{source}/bias")

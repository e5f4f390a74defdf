"""How Flax writes the layers that Google's `.npz` files hold, as rules for our names.

Kernels of dense layers are [in, out], of convolutions [height, width, in, out]; a norm's weight is its `scale`.
"""

import torch
from torch import Tensor

from vitrine.models.published.layout import Rule, rule

# Training checkpoints keep the network beside the optimizer's state.
_BESIDE = (r"opt/.*", r"chrono/.*", r"accum_train_time", r"epoch", r"step")
PREFIXES = {
    "": (),
    "opt/target/": _BESIDE,
    "params/": _BESIDE,
    "params/img/": (*_BESIDE, r"params/(?!img/).*"),  # beside a text tower
}


def dense_kernel(kernel: Tensor) -> Tensor:
    """[in, out], perhaps among axes of length one -> [out, in]."""
    return kernel.squeeze().T if kernel.squeeze().ndim == 2 else kernel.T


def conv_kernel(kernel: Tensor) -> Tensor:
    """[height, width, in, out] -> [out, in, height, width]."""
    return kernel.permute(3, 2, 0, 1)


def heads_in(*kernels: Tensor) -> Tensor:
    """Projections to heads, each [D, H, d] (a bias [H, d]) -> one fused [3 H d, D] ([3 H d])."""
    return torch.cat([kernel.flatten(-2).T if kernel.ndim == 3 else kernel.flatten() for kernel in kernels])


def heads_out(kernel: Tensor) -> Tensor:
    """[H, d, D] -> [D, H d]."""
    return kernel.flatten(0, 1).T


def dense(target: str, source: str) -> tuple[Rule, ...]:
    """A dense layer."""
    return (
        rule(f"{target}.weight", f"{source}/kernel", transform=dense_kernel),
        rule(f"{target}.bias", f"{source}/bias", transform=lambda bias: bias.flatten()),
    )


def conv(target: str, source: str) -> tuple[Rule, ...]:
    """A convolution with bias."""
    return (
        rule(f"{target}.weight", f"{source}/kernel", transform=conv_kernel),
        rule(f"{target}.bias", f"{source}/bias"),
    )


def norm(target: str, source: str) -> tuple[Rule, ...]:
    """A layer norm."""
    return rule(f"{target}.weight", f"{source}/scale"), rule(f"{target}.bias", f"{source}/bias")

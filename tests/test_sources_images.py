"""Sources of image files: decoding, fitting, splits by folder and list, archives; whole and broken."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build, implementation
from pipeline.sources.common.archives import MAX_DEPTH, open_files
from pipeline.sources.common.image_files import FORMATS, decode, fit
from pipeline.sources.common.source import Source
from pipeline.storage.parts import SPLITS


def encode(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def plain(level: int, height: int = 20, width: int = 16, form: str = "PNG") -> bytes:
    return encode(Image.new("RGB", (width, height), (level, 0, 255 - level)), form)


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def open_row(name: str, root: Path, **values: object) -> Source:
    module = implementation("pipeline.sources", name, "datasets.row.source")
    row = {"source": name, "root": str(root), "image_px": 8, **values}
    return module.open_source(build(module.Settings, row, "datasets.row"), root)


def levels(source: Source, split: str) -> list[int]:
    """The level by which `plain` images are known."""
    return source.read(split, 0, source.counts[split]).examples[:, 0, 4, 4].tolist()


def check_ranges(source: Source) -> None:
    copy = pickle.loads(pickle.dumps(source))  # as a pool of processes would get it
    for split in SPLITS:
        stop = source.counts[split]
        parts = [copy.read(split, a, b) for a, b in itertools.pairwise([0, 1, stop // 2, stop])]
        whole = source.read(split, 0, stop)
        assert np.array_equal(whole.examples, np.concatenate([p.examples for p in parts]))
        assert whole.unreadable == sum((p.unreadable for p in parts), ())


# decoding -----------------------------------------------------------------------------------------------------------


def pixel(data: bytes, name: str = "") -> tuple[int, ...]:
    """The only colour of an image."""
    picture = decode(data, name)
    assert picture.mode in ("L", "RGB")
    (_, colour), *others = picture.convert("RGB").getcolors()
    assert not others
    return colour


def test_alpha_is_composited_on_white() -> None:
    assert pixel(encode(Image.new("RGBA", (4, 4), (200, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (4, 4), (200, 0, 100, 255)))) == (200, 0, 100)
    assert pixel(encode(Image.new("RGBA", (4, 4), (200, 0, 100, 51)))) == (244, 204, 224)  # a fifth of it, the rest white
    assert pixel(encode(Image.new("LA", (4, 4), (0, 51)))) == (204, 204, 204)


def test_transparent_palette() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(encode(picture)) == (10, 20, 30)
    assert pixel(encode(picture, transparency=1)) == (255, 255, 255)
    assert pixel(encode(picture, "GIF", transparency=1)) == (255, 255, 255)


def test_cmyk_is_converted() -> None:
    red, green, blue = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red > 250
    assert max(green, blue) < 5
    assert pixel(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF")) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("value", "level"), [(0, 0), (65535, 255), (257 * 100, 100), (257 * 100 + 128, 100), (257 * 100 + 129, 101)]
)
def test_16_bit_grey_is_scaled(form: str, value: int, level: int) -> None:
    assert pixel(encode(Image.fromarray(np.full((4, 4), value, np.uint16)), form)) == (level, level, level)


def png16(colour: int, values: tuple[int, ...]) -> bytes:
    """A 2x2 PNG with 16 bits per channel, which Pillow doesn't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(f">{len(values)}H", *values) * 2
    header = struct.pack(">2I5B", 2, 2, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")


def test_16_bit_colour() -> None:
    assert pixel(png16(2, (65535, 257 * 100, 0))) == (255, 100, 0)
    assert pixel(png16(6, (0, 0, 0, 0))) == (255, 255, 255)
    assert pixel(png16(4, (0, 65535))) == (0, 0, 0)


def pgm(levels: list[int], white: int, plain_text: bool) -> bytes:
    header = f"{'P2' if plain_text else 'P5'} {len(levels)} 1 {white}\n".encode()
    if plain_text:
        return header + " ".join(map(str, levels)).encode() + b"\n"
    return header + np.array(levels, ">u2" if white > 255 else "u1").tobytes()


@pytest.mark.parametrize("plain_text", [True, False])
@pytest.mark.parametrize("white", [1, 15, 255, 1023, 4095, 65535])
def test_pgm_is_scaled_by_its_own_maximum(white: int, plain_text: bool) -> None:
    levels = sorted({0, white // 3, white // 2, white})
    found = np.asarray(decode(pgm(levels, white, plain_text), white_level=100))[0]
    assert np.abs(found - np.array(levels) * 255 / white).max() <= 0.51


def tiff(array: np.ndarray, bits: int = 16, photometric: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF, with tags that Pillow doesn't write."""
    height, width = array.shape
    if bits == 12:
        whole = "".join(f"{level:012b}" for level in array.ravel())
        pixels = int(whole, 2).to_bytes(len(whole) // 8, "big")
    else:
        pixels = array.astype(f"{order}u{bits // 8}").tobytes()
    entries = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(pixels))]
    directory = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}I" if kind == 4 else f"{order}Hxx", value)
        for tag, kind, value in entries
    )
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(pixels))
    return start + pixels + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


RAMP = np.arange(0, 65536, 4369, np.uint16).reshape(4, 4)  # 257 * 17 * (0, .., 15)


def test_16_bit_tiff_whose_white_is_zero() -> None:
    assert np.asarray(decode(tiff(RAMP))).ravel().tolist() == list(range(0, 256, 17))
    assert np.asarray(decode(tiff(RAMP, photometric=0))).ravel().tolist() == list(range(255, -1, -17))
    assert np.asarray(decode(tiff(RAMP, order=">"))).ravel().tolist() == list(range(0, 256, 17))


def test_12_bit_levels() -> None:
    twelve = RAMP // 16  # 0, .., 4095
    assert np.asarray(decode(tiff(twelve, bits=12))).ravel().tolist() == list(range(0, 256, 17))
    assert np.asarray(decode(tiff(twelve))).max() == 16  # nothing tells that these 16 bits hold 12
    assert np.asarray(decode(tiff(twelve), white_level=4095)).ravel().tolist() == list(range(0, 256, 17))
    assert np.asarray(decode(tiff(RAMP), white_level=4095)).max() == 255


def test_images_that_are_nearly_black_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, TWENTY | {f"{i}.tif": tiff(RAMP // 16) for i in range(5)})

    def dark(**values: object) -> int:
        source = open_row("images", tmp_path, channels=1, **values)
        return sum(source.read(split, 0, source.counts[split]).dark for split in SPLITS)

    assert dark() == 5
    assert dark(white_level=4095) == 0


def test_transparent_16_bit_grey() -> None:
    data = png16(0, (257 * 7,))
    place = data.index(b"IDAT") - 4
    for transparent, level in ((257 * 7, 255), (257 * 7 + 1, 7)):
        chunk = b"tRNS" + struct.pack(">H", transparent)
        with_key = data[:place] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[place:]
        assert pixel(with_key) == (level, level, level)


MODES = {
    mode: Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode)
    for mode in ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
}
MODES |= {
    "1": Image.new("1", (8, 8), 1),
    "P": Image.new("P", (8, 8), 3),
    "I;16": Image.fromarray(RAMP[2:3, 3:].repeat(8, 0).repeat(8, 1)),
}
MODES |= {"La": MODES["LA"].convert("La"), "RGBa": MODES["RGBA"].convert("RGBa"), "HSV": MODES["RGB"].convert("HSV")}
MODES["P"].putpalette([200] * 12)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_8_bit(mode: str) -> None:
    """Whatever Pillow can write comes back as RGB or grey of the same level."""
    level = {"1": 255, "I;16": 187}.get(mode, 200)
    forms = ("PNG", "TIFF", "PPM", "JPEG2000") if mode == "I;16" else tuple(FORMATS)
    written = 0
    for form in forms:
        try:
            data = encode(MODES[mode], form, **({"sizes": [(8, 8)]} if form == "ICO" else {}))
        except (OSError, ValueError, KeyError):
            continue
        written += 1
        assert np.abs(np.array(pixel(data, f"a.{form.lower()}")) - level).max() <= 4, form
    assert written or mode in ("La", "RGBa", "HSV")


def test_32_bit_pixels_are_refused() -> None:
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="32 bit"):
            decode(encode(Image.fromarray(np.full((4, 4), 1000, kind)), "TIFF"))


def test_one_bit_and_animation() -> None:
    assert pixel(encode(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    assert pixel(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (10, 10, 10)


def test_exif_orientation() -> None:
    picture = Image.new("L", (10, 6), 0)
    picture.paste(255, (0, 0, 5, 6))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    upright = decode(encode(picture, exif=exif))
    assert upright.size == (6, 10)
    assert np.asarray(upright)[:5].min() == 255
    assert np.asarray(upright)[5:].max() == 0


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing of it."""
    whole = bytearray(plain(0))
    whole[16:24] = struct.pack(">2I", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


BAD_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "half": plain(0, 200, 200, "JPEG")[:400],
    "header": plain(0)[:40],
    "damaged": plain(0)[:45] + b"\xff" * 30 + plain(0)[75:],
    "bomb": bomb(20_000, 20_000),
    "greater bomb": bomb(2**31 - 1, 2**31 - 1),
    "no pixels": bomb(0, 5),
    "more declared than there": bomb(3000, 3000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "pdf": b"%PDF-1.4\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "gif header": b"GIF89a\x05\x00\x05\x00",
    "pickle": pickle.dumps({"a": 1}),
    "ppm of no end": b"P6 99999 99999 255\n",
    "targa": encode(Image.new("RGB", (4, 4)), "TGA"),  # by its name only
    "float": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
}


def test_more_pixels_than_the_limit_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.common.image_files.MAX_PIXELS", 16 * 20)
    decode(plain(0, 20, 16))
    with pytest.raises(ValueError, match="21x16 pixels are more than 320"):
        decode(plain(0, 16, 21))


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_broken_image_is_left_out_and_named(tmp_path: Path, kind: str) -> None:
    files = {f"{i}.png": plain(i) for i in range(10)} | {"bad.png": BAD_IMAGES[kind]}
    for root in (write_folder(tmp_path / "folder", files), write_zip(tmp_path / "a.zip", files)):
        source = open_row("images", root)
        assert sum(source.counts.values()) == 11
        blocks = [source.read(split, 0, source.counts[split]) for split in SPLITS]
        assert sum(len(block.examples) for block in blocks) == 10
        (line,) = sum((block.unreadable for block in blocks), ())
        assert line.startswith(f"{root}: bad.png: ")
        assert "\n" not in line


def test_fuzzed_images_never_raise_anything_else() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (20, 20, 3)).astype(np.uint8))
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        whole = encode(picture, form)
        for _ in range(25):
            data = bytearray(whole)
            for place in random.integers(0, min(len(data), 200), 4):
                data[place] = random.integers(256)
            try:
                decode(bytes(data[: random.integers(1, len(data) + 1)]))
            except ValueError as error:
                assert str(error)  # noqa: PT017


# fitting ------------------------------------------------------------------------------------------------------------


def test_crop_is_the_centre_by_share_of_the_width() -> None:
    # Each column has its own level; of 20x30 pixels (w x h) a crop of 0.5 keeps columns 5 to 14 and rows 10 to 19.
    array = np.add.outer(np.arange(30) * 4, np.arange(20)).astype(np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(array), 10, 0.5)), array[10:20, 5:15])
    # Never taller than the picture.
    assert np.array_equal(np.asarray(fit(Image.fromarray(array.T), 20, 1.0)), array.T[:, 5:25])


def test_half_the_side_is_cropped_alike() -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (218, 178)).astype(np.uint8)).resize((178, 218))
    large = large.resize((44, 54)).resize((178, 218), Image.Resampling.BICUBIC)  # smooth
    small = large.resize((89, 109), Image.Resampling.BICUBIC)
    a, b = (np.asarray(fit(p, 32, 0.79)).astype(float) for p in (large, small))
    assert np.abs(a - b).mean() < 3


def test_padding_is_white_and_keeps_all() -> None:
    array = np.asarray(fit(Image.new("RGB", (10, 6), (9, 9, 9)), 10))
    assert (array[:2] == 255).all()
    assert (array[2:8] == 9).all()
    assert (array[8:] == 255).all()


def test_images_that_are_enlarged_are_counted(tmp_path: Path) -> None:
    def count(settings: dict[str, object]) -> int:
        source = open_row("images", tmp_path, **settings)
        return sum(source.read(split, 0, source.counts[split]).enlarged for split in SPLITS)

    write_folder(tmp_path, {f"{i}.png": plain(i, height=30, width=20 if i else 8) for i in range(5)})
    assert count({"image_px": 8}) == 0
    assert count({"image_px": 20}) == 1
    assert count({"image_px": 20, "crop": 0.9}) == 5
    assert count({"image_px": 30, "fit": "pad"}) == 0
    assert count({"image_px": 31, "fit": "pad"}) == 5


# images -------------------------------------------------------------------------------------------------------------

TWENTY = {f"{'a' if i % 2 else 'b/c'}/{i:02d}.png": plain(i) for i in range(20)}


def test_folder_and_zip_agree(tmp_path: Path) -> None:
    noise = {"readme.txt": b"x", ".hidden.png": plain(99), "__MACOSX/a/._00.png": b"x", "a/.thumbs/1.png": plain(98)}
    folder = write_folder(tmp_path / "folder", TWENTY | noise)
    (tmp_path / "in").mkdir()
    archive = write_zip(tmp_path / "in" / "my.zip", TWENTY | noise)
    (tmp_path / "mine").symlink_to(archive)
    sources = [open_row("images", root, valid_share=0.2) for root in (folder, archive, archive.parent, tmp_path / "mine")]
    for source in sources:
        assert source.counts == {"train": 14, "valid": 4, "test": 2}
        assert [levels(source, split) for split in SPLITS] == [levels(sources[0], split) for split in SPLITS]
        assert sorted(level for split in SPLITS for level in levels(source, split)) == list(range(20))
        check_ranges(source)
    assert levels(open_row("images", folder, valid_share=0.2, split_seed=1), "train") != levels(sources[0], "train")


def test_channels_and_range(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TWENTY)
    grey = open_row("images", folder, channels=1, pixel_range=[-1, 1], image_px=5)
    assert grey.read("train", 0, 3).examples.shape == (3, 1, 5, 5)
    assert grey.read("train", 0, 3).examples.dtype == np.uint8
    assert grey.value_range == (-1, 1)
    assert open_row("images", folder, train_limit=3).counts["train"] == 3
    counts = open_row("images", folder, valid_share=0.2, test_share=0.2, valid_limit=2, test_limit=3).counts
    assert counts == {"train": 12, "valid": 2, "test": 3}
    assert open_row("images", folder).read("train", 2, 2).examples.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"channels": 2}, "channels"),
        ({"image_px": 0}, "image_px"),
        ({"pixel_range": [0, 255]}, "pixel_range"),
        ({"crop": 0}, "crop"),
        ({"fit": "stretch"}, "fit"),
        ({"valid_share": 0.6, "test_share": 0.5}, "test_share"),
        ({"unreadable_share": 2}, "unreadable_share"),
    ],
)
def test_image_settings_are_checked(tmp_path: Path, values: dict[str, object], key: str) -> None:
    with pytest.raises(SettingsError, match=rf"datasets\.row\.{key}"):
        open_row("images", tmp_path, **values)


def test_roots_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is missing; put a folder or a zip"):
        open_row("images", tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image"):
        open_row("images", write_folder(tmp_path / "text", {"a.txt": b"x"}))
    with pytest.raises(DataError, match="holds no image"):
        open_row("images", write_zip(tmp_path / "text.zip", {"a.txt": b"x"}))
    with pytest.raises(DataError, match="is no zip"):
        open_row("images", tmp_path / "text" / "a.txt")
    two = write_folder(tmp_path / "two", {"a.zip": b"x", "b.zip": b"x"})
    with pytest.raises(DataError, match=r"holds a\.zip and b\.zip"):
        open_row("images", two)
    beside = write_folder(tmp_path / "beside", {"a.zip": b"x", "1.png": plain(1)})
    with pytest.raises(DataError, match=r"holds both .* and images"):
        open_row("images", beside)
    with pytest.raises(DataError, match="has no image; there are 2 in all"):
        open_row("images", write_folder(tmp_path / "few", {"1.png": plain(1), "2.png": plain(2)}))


# endings ------------------------------------------------------------------------------------------------------------


def test_every_ending_is_read(tmp_path: Path) -> None:
    forms = {"JPEG": ".jfif", "AVIF": ".avif", "JPEG2000": ".jp2", "ICO": ".ico", "TGA": ".tga", "WEBP": ".webp", "PPM": ".pnm"}
    files = {f"{i}{ending}": plain(200, 16, 16, form) for i, (form, ending) in enumerate(forms.items())}
    source = open_row("images", write_folder(tmp_path, files))
    found = [level for split in SPLITS for level in levels(source, split)]
    assert len(found) == len(forms)
    assert np.abs(np.array(found) - 200).max() < 6
    assert source.skipped == {}


def test_files_that_are_skipped_are_counted_by_ending(tmp_path: Path) -> None:
    others = {"a/1.heic": b"", "a/2.HEIC": b"", "notes.txt": b"", "no_ending": b"", ".hidden.heic": b"", "a.b c": b""}
    for root in (write_folder(tmp_path / "folder", TWENTY | others), write_zip(tmp_path / "a.zip", TWENTY | others)):
        assert open_row("images", root).skipped == {".heic": 2, "": 2, ".txt": 1}
    write_folder(tmp_path / "phone", others)
    with pytest.raises(DataError, match=r"holds no image \(but files: 2 without ending, 2 \.heic, 1 \.txt\)"):
        open_row("images", tmp_path / "phone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no image \(nor any other file\)"):
        open_row("images", tmp_path / "empty")


# splits that the data bring -----------------------------------------------------------------------------------------


def split_files(pattern: str = "{split}/{i}.png", **counts: int) -> dict[str, bytes]:
    """Images by split, told apart by their levels: 0.. for the first split, 50.. for the second, 100.. for the third."""
    return {
        pattern.format(split=split, i=i, kind="cat" if i % 2 else "dog"): plain(50 * number + i)
        for number, (split, count) in enumerate(counts.items())
        for i in range(count)
    }


@pytest.mark.parametrize(
    "pattern", ["{split}/{i}.png", "wrap/ped/{split}/{i}.png", "{split}/{kind}/{i}.png", "{kind}/{split}/{kind}/{i}.png"]
)
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALIDATION", "Testing"), ("train", "dev", "test")])
@pytest.mark.parametrize("make", [write_folder, write_zip])
def test_folders_of_a_split(tmp_path: Path, pattern: str, names: tuple[str, ...], make: Callable[..., Path]) -> None:
    root = make(tmp_path / "a.zip", split_files(pattern, **dict(zip(names, (30, 10, 20), strict=True))))
    source = open_row("images", root)
    assert source.counts == {"train": 30, "valid": 10, "test": 20}
    assert [{level // 50 for level in levels(source, split)} for split in SPLITS] == [{0}, {1}, {2}]
    assert source.split_origin == f"the folders {', '.join(names)}"
    assert len({level % 2 for level in levels(open_row("images", root, train_limit=10), "train")}) == 2  # of both kinds
    seeded = open_row("images", root, split="seeded")
    assert seeded.counts == {"train": 48, "valid": 6, "test": 6}
    assert len({level // 50 for level in levels(seeded, "train")}) == 3
    assert seeded.split_origin == "drawn by split_seed 0"


def test_what_the_own_split_lacks_is_drawn_from_train(tmp_path: Path) -> None:
    source = open_row("images", write_folder(tmp_path / "a", split_files(train=30, test=10)))
    assert source.counts == {"train": 27, "valid": 3, "test": 10}
    assert [{level // 50 for level in levels(source, split)} for split in SPLITS] == [{0}, {0}, {1}]
    assert source.split_origin == "the folders train, test; valid drawn from train by split_seed 0"
    source = open_row("images", write_folder(tmp_path / "b", split_files(train=30, val=10)))
    assert source.counts == {"train": 27, "valid": 10, "test": 3}
    assert len({name for split in SPLITS for name in source.names[split]}) == 40
    with pytest.raises(DataError, match=r"split 'train' \(the folders train, test; valid drawn .*\) has no image; there are 2"):
        open_row("images", write_folder(tmp_path / "c", split_files(train=1, test=1)))


def test_folders_that_are_no_split(tmp_path: Path) -> None:
    categories = write_folder(tmp_path / "a", split_files(train=10, bus=10, boat=10))
    assert open_row("images", categories).split_origin == "drawn by split_seed 0"
    assert open_row("images", write_folder(tmp_path / "b", split_files(train=10))).counts["train"] == 8
    beside = write_folder(tmp_path / "c", split_files(train=10, test=10) | {"more/1.png": plain(1)})
    with pytest.raises(DataError, match=r"more/1\.png is outside the folders train and test; .* by 'split: seeded'"):
        open_row("images", beside)
    assert sum(open_row("images", beside, split="seeded").counts.values()) == 21


# archives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png", "\\evil.png"])
def test_zip_with_a_path_that_climbs_out(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY | {name: plain(1)})
    with pytest.raises(DataError, match=r"a\.zip holds a member .* leads out of the archive"):
        open_row("images", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_zip_with_a_link(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"'link\.png' is a symbolic link"):
        open_row("images", path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_member_twice(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/01.png", plain(7))
    with pytest.raises(DataError, match=r"'a/01\.png' twice"):
        open_row("images", path)


ODD_NAMES = [
    "2021-01-02 10:11:00.png",
    "C:notes.png",
    "a/b:c/d.png",
    "back\\slash.png",
    "end\\.png",
    "new\nline.png",
    "\x1b[31mred.png",
    "tab\t.png",
    " space .png",
    "trailing ./x.png",
    "..a/..b.png",
    "a../b...png",
    "%20.png",
    '#?&*|<>".png',
    "{a,b}.png",
    "日本語/表.png",
    "ü.png",
    "u\u0308.png",
    "😀.png",
    "UPPER.PNG",
    "upper.png",
    "-rf.png",
    "~.png",
    "x" * 200 + ".png",
    "con.png",
    "nul",
    "__MACOSX.png",
    "a.png/b.png",
]


@pytest.mark.parametrize("system", [0, 3])
def test_folder_and_zip_agree_on_odd_names(tmp_path: Path, system: int) -> None:
    files = {name: plain(i) for i, name in enumerate(ODD_NAMES)} | {f"a/{i}.png": plain(100 + i) for i in range(5)}
    folder = write_folder(tmp_path / "folder", files)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name)
            member.create_system = system
            archive.writestr(member, data)
    one, other = open_row("images", folder), open_row("images", tmp_path / "a.zip")
    assert open_files(folder).names == open_files(tmp_path / "a.zip").names
    assert one.names == other.names
    assert sum(one.counts.values()) == len(files) - 1  # without "..a"
    assert [levels(one, split) for split in SPLITS] == [levels(other, split) for split in SPLITS]


def write_raw_zip(path: Path, files: dict[bytes, bytes], system: int = 0) -> Path:
    """A zip whose names are bytes of no stated encoding; each starts with "a"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo("a" * len(name))
            member.create_system = system
            member.filename = "a" * (len(name) - 3) + f"{len(archive.infolist()):03d}"
            archive.writestr(member, data)
    whole = path.read_bytes()
    for number, name in enumerate(files):
        whole = whole.replace(b"a" * (len(name) - 3) + b"%03d" % number, name)
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("encoding", ["cp932", "gbk", "cp437", "utf-8"])
@pytest.mark.parametrize("system", [0, 3])
def test_zip_names_of_no_stated_encoding(tmp_path: Path, encoding: str, system: int) -> None:
    """Second bytes of 0x5c, a backslash in ASCII, among them."""
    words = {"cp932": "表ソ", "gbk": "誠乗", "cp437": "éü", "utf-8": "表é"}[encoding]
    files = {f"{i:03d}{word}.png".encode(encoding): plain(i) for i in range(10) for word in words}
    source = open_row("images", write_raw_zip(tmp_path / "a.zip", files, system))
    assert sum(source.counts.values()) == len(files)
    assert sorted(level for split in SPLITS for level in levels(source, split)) == sorted([*range(10)] * 2)
    # Programs of Windows unpack to names in Unicode, unzip to the same bytes. Chinese names can't be told from Japanese ones.
    if system == 0 and encoding == "gbk":
        return
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in files.items():
        unpacked = name.decode(encoding).encode() if system == 0 else name
        Path(os.fsdecode(os.fsencode(folder) + b"/" + unpacked)).write_bytes(data)
    assert open_row("images", folder).names == source.names


def test_files_without_an_ending_are_recognised_by_their_first_bytes(tmp_path: Path) -> None:
    forms = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"]
    files = {f"sub/{i:03d}": plain(i, form=form) for i, form in enumerate(forms)}
    files |= {"README": b"a text", "P5": b"P55", "empty": b"", "cut": b"\x89PN"}
    folder, archive = write_folder(tmp_path / "folder", files), write_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)
    os.mkfifo(folder / "pipe")
    one, other = (open_row("images", root, valid_share=0.2, test_share=0.2) for root in (folder, archive))
    assert one.names == other.names
    assert sorted(name for split in SPLITS for name in one.names[split]) == sorted(name for name in files if "/" in name)
    assert (one.skipped, other.skipped) == ({"": 5}, {"": 4})
    assert [one.read(split, 0, one.counts[split]).unreadable for split in SPLITS] == [(), (), ()]


def test_windows_zip_with_backslashes_between_folders(tmp_path: Path) -> None:
    files = {f"{split}\\{i}.png".encode(): plain(i) for split in ("train", "test") for i in range(9)}
    source = open_row("images", write_raw_zip(tmp_path / "a.zip", files))
    assert source.names["test"][0].startswith("test/")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_method_of_zips(tmp_path: Path, method: int) -> None:
    source = open_row("images", write_zip(tmp_path / "a.zip", TWENTY, method))
    assert sorted(level for split in SPLITS for level in levels(source, split)) == list(range(20))


def change_members(path: Path, local: int, central: int, value: bytes) -> None:
    """Overwrites a field of all members: its place in the local header and in the central directory."""
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        start = data.find(signature)
        while start >= 0:
            data[start + place : start + place + len(value)] = value
            start = data.find(signature, start + 4)
    path.write_bytes(data)


@pytest.mark.parametrize(("method", "name"), [(9, "deflate64"), (98, "ppmd"), (77, "method 77")])
def test_methods_that_cant_be_read_are_named(tmp_path: Path, method: int, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY, zipfile.ZIP_DEFLATED)
    change_members(path, 8, 10, struct.pack("<H", method))
    lines = open_row("images", path).read("test", 0, 2).unreadable
    assert len(lines) == 2
    assert f"it is compressed by {name}, which can't be read here; pack it again with deflate" in lines[0]


def test_a_zip_that_lies_about_lengths_takes_no_memory(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": bytes(40 * 2**20)}, zipfile.ZIP_DEFLATED)
    change_members(path, 22, 24, struct.pack("<I", 1000))
    files = open_files(path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="damaged"):
            files.read("a.png")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_folders_within_folders_within(tmp_path: Path) -> None:
    deep = "d/" * 5000 + "1.png"
    with pytest.raises(DataError, match="more than 100 folders deep"):
        open_row("images", write_zip(tmp_path / "a.zip", TWENTY | {deep: plain(1)}))
    folder = write_folder(tmp_path / "folder", TWENTY | {"d/" * MAX_DEPTH + "1.png": plain(1)})
    assert sum(open_row("images", folder).counts.values()) == 21
    write_folder(folder, {"e/" * (MAX_DEPTH + 1) + "1.png": plain(1)})
    open_files.__globals__["_open_files"].cache_clear()
    with pytest.raises(DataError, match="more than 100 deep"):
        open_row("images", folder)


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.98])
def test_truncated_zip(tmp_path: Path, keep: float) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DataError, match=r"a\.zip isn't a whole zip"):
        open_row("images", path)


def test_zip_with_a_damaged_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY)
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT")
    data[place + 6] ^= 0xFF
    path.write_bytes(data)
    source = open_row("images", path)
    lines = sum((source.read(split, 0, source.counts[split]).unreadable for split in SPLITS), ())
    assert len(lines) == 1
    assert "damaged" in lines[0]


def test_zip_bomb_and_encryption_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.common.archives.MAX_FILE_BYTES", 2**20)
    path = write_zip(tmp_path / "a.zip", TWENTY | {"big.png": plain(0) + bytes(2**20)}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of encryption of the first member, in its own header and in the central directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    source = open_row("images", path)
    lines = sum((source.read(split, 0, source.counts[split]).unreadable for split in SPLITS), ())
    assert len(lines) == 2
    assert any("big.png" in line and "more than" in line for line in lines)
    assert any("encrypted" in line for line in lines)


def test_fuzzed_zips_never_raise_anything_else(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    random = np.random.default_rng(0)
    for i in range(40):
        data = bytearray(whole)
        for place in random.integers(directory if i % 2 else 0, len(data), 3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        open_files.__globals__["_open_files"].cache_clear()
        try:
            source = open_row("images", path)
            blocks = [source.read(split, 0, source.counts[split]) for split in SPLITS]
        except DataError as error:
            assert "a.zip" in str(error)  # noqa: PT017
            continue
        assert sum(len(b.examples) + len(b.unreadable) for b in blocks) == sum(source.counts.values())


def test_links_and_pipes_in_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TWENTY)
    (tmp_path / "secret.png").write_bytes(plain(77))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    source = open_row("images", folder)
    blocks = [source.read(split, 0, source.counts[split]) for split in SPLITS]
    lines = sum((block.unreadable for block in blocks), ())
    assert sorted(line.rsplit(": ", 1)[1] for line in lines) == [
        "it is a symbolic link, which isn't followed",
        "it isn't a regular file",
    ]
    assert sum(len(block.examples) for block in blocks) == 20
    (folder / "elsewhere").symlink_to(tmp_path)
    open_files.__globals__["_open_files"].cache_clear()
    with pytest.raises(DataError, match="elsewhere is a symbolic link"):
        open_row("images", folder)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TWENTY)
    (tmp_path / "link").symlink_to(folder)
    assert open_row("images", tmp_path / "link").counts["train"] == 16


# celeba -------------------------------------------------------------------------------------------------------------

FACES = {f"img_align_celeba/{i:06d}.jpg": plain(10 * i, 27, 22, "JPEG") for i in range(1, 21)}
PARTITION = "".join(f"{i:06d}.jpg {0 if i <= 14 else 1 if i <= 17 else 2}\n" for i in range(1, 30))


@pytest.mark.parametrize("form", ["zip", "folder", "torchvision", "the zip itself"])
def test_celeba_by_the_official_partition(tmp_path: Path, form: str) -> None:
    here = tmp_path / "celeba" if form == "torchvision" else tmp_path
    write_folder(here, {"list_eval_partition.txt": PARTITION.encode()} | (FACES if form in ("folder", "torchvision") else {}))
    if form != "folder":
        write_zip(here / "img_align_celeba.zip", FACES)
    source = open_row("celeba", tmp_path / "img_align_celeba.zip" if form == "the zip itself" else tmp_path)
    assert source.counts == {"train": 14, "valid": 3, "test": 3}
    assert source.value_range == (-1, 1)
    found = levels(source, "valid")
    assert all(abs(a - b) < 6 for a, b in zip(found, [150, 160, 170], strict=True))
    check_ranges(source)


KAGGLE = "image_id,partition\n" + PARTITION.replace(" ", ",")


@pytest.mark.parametrize("form", ["in the zip", "next to the zip", "next to the folder", "in Eval"])
@pytest.mark.parametrize("name", ["list_eval_partition.csv", "list_eval_partition.txt"])
def test_celeba_by_a_list_elsewhere(tmp_path: Path, form: str, name: str) -> None:
    images = {f"img_align_celeba/{path}": data for path, data in FACES.items()}
    text = {name: (KAGGLE if name.endswith("csv") else PARTITION).encode()}
    if form == "in the zip":
        write_zip(tmp_path / "archive.zip", images | text)
    elif form == "next to the zip":
        write_zip(write_folder(tmp_path, text) / "archive.zip", images)
    elif form == "next to the folder":
        write_folder(tmp_path, images | text)
    else:
        write_folder(tmp_path, FACES)
        write_folder(tmp_path / "Eval", text)
    source = open_row("celeba", tmp_path)
    assert source.counts == {"train": 14, "valid": 3, "test": 3}
    assert name in source.split_origin
    assert open_row("celeba", tmp_path, split="seeded").counts == {"train": 16, "valid": 2, "test": 2}


def test_celeba_without_a_partition(tmp_path: Path) -> None:
    write_zip(tmp_path / "img_align_celeba.zip", FACES)
    assert open_row("celeba", tmp_path).counts == {"train": 16, "valid": 2, "test": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PARTITION + "000031.jpg\n", "line 30"),
        (PARTITION + "000031.jpg 3\n", "line 30"),
        (PARTITION.replace("000007.jpg 0\n", ""), r"doesn't name img_align_celeba/000007\.jpg"),
        (PARTITION.replace(".jpg 1", ".jpg 0"), "puts no image .* into 'valid'"),
        ("", "doesn't name"),
        ("\udcff", "can't be read"),
    ],
)
def test_celeba_with_a_wrong_partition(tmp_path: Path, text: str, message: str) -> None:
    write_zip(tmp_path / "img_align_celeba.zip", FACES)
    (tmp_path / "list_eval_partition.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        open_row("celeba", tmp_path)
    assert "list_eval_partition.txt" in str(caught.value)


def test_celeba_missing(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"download img_align_celeba\.zip and list_eval_partition\.txt of CelebA"):
            open_row("celeba", root)


# shoes --------------------------------------------------------------------------------------------------------------

SHOES = {
    f"ut-zap50k-images/{c}/{'kind/brand/' * (i % 2)}{i}.jpg": plain(i)
    for c, n in (("Boot", 20), ("Sandal", 8), ("Shoe", 9))
    for i in range(n)
}
FEW = {"test_count": 7, "valid_count": 5}


@pytest.mark.parametrize("form", ["zip", "folder", "bare folder"])
def test_shoes_are_balanced_over_categories(tmp_path: Path, form: str) -> None:
    if form == "zip":
        write_zip(tmp_path / "ut-zap50k-images.zip", SHOES)
    else:
        write_folder(tmp_path, SHOES)
    source = open_row("shoes", tmp_path / "ut-zap50k-images" if form == "bare folder" else tmp_path, **FEW)
    assert source.counts == {"train": 25, "valid": 5, "test": 7}
    assert source.label_names == ("Boot", "Sandal", "Shoe")
    blocks = {split: source.read(split, 0, source.counts[split]) for split in SPLITS}
    assert np.bincount(blocks["test"].labels).tolist() == [3, 2, 2]
    assert np.bincount(np.concatenate([b.labels for b in blocks.values()])).tolist() == [20, 8, 9]
    for split in SPLITS:
        categories = [source.label_names[i] for i in blocks[split].labels]
        assert all(f"/{c}/" in f"/{name}" for c, name in zip(categories, source.names[split], strict=True))
    assert len(set(sum(source.names.values(), ()))) == len(SHOES)
    check_ranges(source)


@pytest.mark.parametrize("make", [write_zip, write_folder])
def test_an_empty_category_is_named(tmp_path: Path, make: object) -> None:
    path = tmp_path / ("a.zip" if make is write_zip else "folder")
    make(path, SHOES | {"ut-zap50k-images/Slipper/": b"", "ut-zap50k-images/Boot/empty/": b""})
    with pytest.raises(DataError, match=r"category '(ut-zap50k-images/)?Slipper' holds no image"):
        open_row("shoes", path, **FEW)


def test_a_category_with_an_empty_neighbour_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"Boot/{i}.png": plain(i) for i in range(9)} | {"Shoe/": b""})
    with pytest.raises(DataError, match="category 'Shoe' holds no image"):
        open_row("shoes", tmp_path, **FEW)


def test_shoes_with_too_few_or_no_categories(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", SHOES)
    with pytest.raises(DataError, match="category 'Sandal' holds 8 images, too few for its 10 of 30"):
        open_row("shoes", tmp_path / "a.zip", test_count=30, valid_count=1)
    with pytest.raises(DataError, match="leave none to train on"):
        open_row("shoes", tmp_path / "a.zip", test_count=7, valid_count=30)
    with pytest.raises(DataError, match="lies in no category"):
        open_row("shoes", write_zip(tmp_path / "b.zip", SHOES | {"ut-zap50k-images/1.jpg": plain(1)}), **FEW)
    with pytest.raises(DataError, match="lies in no category"):
        open_row("shoes", write_zip(tmp_path / "c.zip", {f"{i}.jpg": plain(i) for i in range(20)}), **FEW)
    with pytest.raises(DataError, match=r"download ut-zap50k-images\.zip"):
        open_row("shoes", tmp_path / "nowhere")


# union --------------------------------------------------------------------------------------------------------------


def test_union_reads_domains_side_by_side(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {f"{i}.png": plain(i) for i in range(20)})
    write_folder(tmp_path / "b", {f"{i}.png": plain(100 + i) for i in range(40)} | {"bad.png": b"x", "bad2.png": b"x"})
    source = open_row("union", tmp_path, sources=["images", "images"], roots=["a.zip", "b"], domains=["low", "high"])
    assert source.label_names == ("low", "high")
    assert source.counts == {"train": 50, "valid": 6, "test": 6}
    total, unreadable = 0, []
    for split in SPLITS:
        block = source.read(split, 0, source.counts[split])
        assert np.array_equal(block.labels, (block.examples[:, 0, 4, 4] >= 100).astype(int))
        total += len(block.examples)
        unreadable += block.unreadable
    assert total == 60
    assert sorted(line.split(": ")[1] for line in unreadable) == ["bad.png", "bad2.png"]
    labels = source.read("train", 0, 50).labels
    assert np.abs(np.diff(labels)).sum() > 2  # mixed, not one after the other
    check_ranges(source)


def test_union_of_celeba_and_shoes(tmp_path: Path) -> None:
    write_zip(tmp_path / "celeba.zip", FACES)
    many = {f"{c}/{i}.jpg": plain(i) for c in ("Boot", "Shoe") for i in range(8)}
    write_zip(tmp_path / "shoes.zip", many)
    row = {"sources": ["celeba", "shoes"], "roots": ["celeba.zip", "shoes.zip"]}
    with pytest.raises(DataError, match="category 'Boot' holds 8 images, too few for its 1000"):
        open_row("union", tmp_path, **row)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sources": ["celeba"], "roots": ["a"]}, "sources"),
        ({"sources": ["celeba", "mnist"], "roots": ["a", "b"]}, "sources"),
        ({"sources": ["celeba", "shoes"], "roots": ["a"]}, "roots"),
        ({"sources": ["images", "images"], "roots": ["a", "b"]}, "domains"),
        ({"sources": ["images", "images"], "roots": ["a", "b"], "domains": ["x"]}, "domains"),
        ({"roots": ["a", "b"]}, "sources"),
    ],
)
def test_union_settings_are_checked(tmp_path: Path, values: dict[str, object], key: str) -> None:
    with pytest.raises(SettingsError, match=rf"datasets\.row\.{key}"):
        open_row("union", tmp_path, **values)

"""Sources of image files: decoding, fitting, splits by folder and list, archives; whole and broken."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError, SettingsError
from pipeline.settings import build, implementation
from pipeline.sources.common.archives import open_files
from pipeline.sources.common.image_files import decode, fit
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


def pixel(data: bytes) -> tuple[int, ...]:
    """The only colour of an image."""
    picture = decode(data)
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
    """A 2x2 PNG of 16 bits a channel, which Pillow doesn't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(f">{len(values)}H", *values) * 2
    header = struct.pack(">2I5B", 2, 2, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")


def test_16_bit_colour() -> None:
    assert pixel(png16(2, (65535, 257 * 100, 0))) == (255, 100, 0)
    assert pixel(png16(6, (0, 0, 0, 0))) == (255, 255, 255)
    assert pixel(png16(4, (0, 65535))) == (0, 0, 0)


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
    "float": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
}


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
    # Columns of their own level; of 20x30 pixels (w x h) a crop of 0.5 keeps columns 5 to 14 and rows 10 to 19.
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
    sources = [open_row("images", root, valid_share=0.2) for root in (folder, archive, archive.parent)]
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
    with pytest.raises(DataError, match=r"expected a folder or a \.zip"):
        open_row("images", tmp_path / "text" / "a.txt")
    two = write_folder(tmp_path / "two", {"a.zip": b"x", "b.zip": b"x"})
    with pytest.raises(DataError, match=r"holds a\.zip and b\.zip"):
        open_row("images", two)
    beside = write_folder(tmp_path / "beside", {"a.zip": b"x", "1.png": plain(1)})
    with pytest.raises(DataError, match="images beside it"):
        open_row("images", beside)
    with pytest.raises(DataError, match="has no image; there are 2 in all"):
        open_row("images", write_folder(tmp_path / "few", {"1.png": plain(1), "2.png": plain(2)}))


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


def test_zip_bomb_and_encryption_are_left_out(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", TWENTY | {"big.png": plain(0) + b"\0" * 300 * 2**20}, zipfile.ZIP_DEFLATED)
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
    for i in range(100):
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

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import write_foreign
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eamdeploy.artifact import Preprocessing
from eamdeploy.errors import ConfigError
from eamdeploy.images import ImageFolder, iter_batches, normalize, open_folder, preprocess

timm_data = pytest.importorskip("timm.data", reason="timm is what the preprocessing is compared with")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def how_to(size: tuple[int, int] = (32, 32), **changes: object) -> Preprocessing:
    return Preprocessing.model_validate({"size": size, "mean": MEAN, "std": STD, **changes})


def timm_transform(how: Preprocessing) -> Any:
    return timm_data.create_transform(
        input_size=(3, *how.size),
        is_training=False,
        interpolation=how.interpolation,
        mean=how.mean,
        std=how.std,
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
    )


def timm_pixels(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """What timm's data set and transform make of the image before they turn it into a tensor."""
    steps = timm_transform(how).transforms
    assert [type(step).__name__ for step in steps[2:]] == ["MaybeToTensor", "Normalize"]
    rgb = image.convert("RGB")
    for step in steps[:2]:
        rgb = step(rgb)
    return np.asarray(rgb)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smoothed noise, so that neither edges nor flat areas hide a shift by one pixel."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if channels == 1 else values, mode)


SIZES = {
    "landscape": (500, 375),
    "portrait": (333, 501),
    "wide": (401, 90),
    "tall": (61, 300),
    "tiny": (17, 11),
    "one pixel": (1, 1),
    "as big as the resized": (256, 256),
    "as big as the input": (224, 224),
    "odd square": (229, 229),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(
    "how",
    [
        how_to((224, 224)),
        how_to((224, 224), crop_pct=0.9, interpolation="bilinear"),
        how_to((224, 224), crop_pct=1.0),
        how_to((112, 112), crop_pct=0.95, crop_mode="squash"),
        how_to((96, 160)),
        how_to((160, 95), crop_pct=0.9),
        how_to((96, 161), crop_pct=0.9, crop_mode="squash"),
    ],
    ids=lambda how: f"{how.size[0]}x{how.size[1]}-{how.crop_pct}-{how.crop_mode}",
)
def test_pixels_are_timms_bit_for_bit(size: tuple[int, int], how: Preprocessing) -> None:
    image = noise(*size)
    pixels = preprocess(image, how)
    assert pixels.shape == (*how.size, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, timm_pixels(image, how))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_every_filter_is_timms_and_differs_from_the_others(interpolation: str) -> None:
    image, how = noise(101, 87), how_to((48, 48), interpolation=interpolation)
    pixels = preprocess(image, how)
    np.testing.assert_array_equal(pixels, timm_pixels(image, how))
    other = "bilinear" if interpolation != "bilinear" else "bicubic"
    assert (pixels != preprocess(image, how_to((48, 48), interpolation=other))).any()


def indexed() -> Image.Image:
    return noise(70, 50).quantize(16)


def indexed_transparent() -> Image.Image:
    stream = io.BytesIO()
    indexed().save(stream, "PNG", transparency=3)
    return Image.open(stream)


def deep_grey() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (50, 70), dtype=np.uint16))


@pytest.mark.parametrize(
    "image",
    [
        noise(70, 50, "L"),
        noise(70, 50, "RGBA"),
        noise(70, 50, "CMYK"),
        noise(70, 50).convert("1"),
        indexed(),
        indexed_transparent(),
        deep_grey(),
    ],
    ids=["grey", "RGBA", "CMYK", "bilevel", "palette", "transparent palette", "16-bit grey"],
)
def test_every_colour_mode_is_read_as_timm_reads_it(image: Image.Image) -> None:
    np.testing.assert_array_equal(preprocess(image, how_to()), timm_pixels(image, how_to()))


@settings(max_examples=150, deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_pct=st.floats(0.3, 1.0),
    crop_mode=st.sampled_from(["center", "squash"]),
)
def test_any_sizes_are_rounded_as_timm_rounds_them(
    source: tuple[int, int], target: tuple[int, int], crop_pct: float, crop_mode: str
) -> None:
    how = how_to(target, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="nearest")
    np.testing.assert_array_equal(preprocess(noise(*source), how), timm_pixels(noise(*source), how))


def test_an_exif_orientation_is_ignored_as_timms_data_set_does(tmp_path: Path) -> None:
    upright, turned = noise(60, 40), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90°
    upright.save(turned, exif=exif)
    [batch] = iter_batches(open_folder(tmp_path, 2), how_to(), 1)
    dataset = timm_data.ImageDataset(str(tmp_path), class_map={"": 0, tmp_path.name: 0})
    np.testing.assert_array_equal(batch.pixels[0], timm_pixels(dataset[0][0], how_to()))
    np.testing.assert_array_equal(batch.pixels[0], preprocess(upright, how_to()))


def test_an_image_that_would_grow_beyond_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 × 40000 pixels is too elongated"):
        preprocess(Image.new("RGB", (1, 40000)), how_to((224, 224)))


def test_real_photographs_reach_the_model_as_through_timm(shared_data: Path) -> None:
    how = how_to((224, 224))
    folder = open_folder(shared_data / "imagenet_sample", 1000, limit=6)
    [batch] = iter_batches(folder, how, 6)
    images = normalize(batch.pixels, how)
    for file, image in zip(folder.files, images, strict=True):
        expected = timm_transform(how)(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(image, expected.numpy())


# normalize


def test_normalize_is_torchvisions_bit_for_bit_for_every_value() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    how = how_to(mean=(0.485, 0.5, 0.123456), std=(0.229, 1.0, 0.3081))
    pixels = np.stack([np.roll(np.arange(256, dtype=np.uint8), shift).reshape(16, 16) for shift in (0, 7, 99)], axis=-1)
    two = np.stack([pixels, pixels[::-1]])
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(how.mean, how.std)])
    images = normalize(two, how)
    assert images.dtype == np.float32
    assert images.shape == (2, 3, 16, 16)
    assert images.flags.c_contiguous
    for image, source in zip(images, two, strict=True):
        np.testing.assert_array_equal(image, expected(source.copy()).numpy())


def test_normalize_by_hand() -> None:
    how = how_to(mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
    pixels = np.array([[[[255, 255, 0]]]], np.uint8)
    np.testing.assert_array_equal(normalize(pixels, how), np.array([[[[1.0]], [[2.0]], [[-2.0]]]], np.float32))


# iter_batches


def put_images(root: Path, count: int) -> Path:
    """`count` 8 × 8 images, number i filled with the value i; their labels are 10 + i."""
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
    (root / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{10 + i}\n" for i in range(count)))
    return root


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


HOW8 = how_to((8, 8), crop_pct=1.0)


def test_batches_keep_the_order_and_the_last_is_smaller(tmp_path: Path) -> None:
    batches = list(iter_batches(open_folder(put_images(tmp_path, 5), 20), HOW8, 2))
    assert [batch.pixels.shape for batch in batches] == [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.dtype == np.int64
        numbers = [int(file.stem) for file in batch.files]
        assert batch.labels.tolist() == [10 + number for number in numbers]
        assert batch.pixels[:, 0, 0, 0].tolist() == numbers
    assert [int(file.stem) for batch in batches for file in batch.files] == [0, 1, 2, 3, 4]


def test_unlabelled_batches_have_no_labels(tmp_path: Path) -> None:
    (put_images(tmp_path, 1) / "labels.csv").unlink()
    [batch] = iter_batches(open_folder(tmp_path, 20), HOW8, 4)
    assert batch.labels is None


def test_files_are_decoded_only_when_their_batch_is_due(tmp_path: Path) -> None:
    batches = iter_batches(open_folder(put_images(tmp_path, 4), 20), HOW8, 2)
    next(batches)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "2.png")
    assert next(batches).pixels[0, 0, 0, 0] == 200


def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    truncate(put_images(tmp_path, 3) / "1.png")
    with pytest.raises(ConfigError, match=r"cannot use image .*1\.png: .*--skip-bad"):
        list(iter_batches(open_folder(tmp_path, 20), HOW8, 2))


def test_skipped_files_are_reported_and_the_batch_is_filled_up(tmp_path: Path) -> None:
    folder = open_folder(put_images(tmp_path, 5), 20)
    truncate(tmp_path / "1.png")
    skipped: list[tuple[str, str]] = []
    batches = list(iter_batches(folder, HOW8, 2, True, lambda file, reason: skipped.append((file.name, reason))))
    assert [[file.name for file in batch.files] for batch in batches] == [["0.png", "2.png"], ["3.png", "4.png"]]
    assert [batch.labels.tolist() for batch in batches if batch.labels is not None] == [[10, 12], [13, 14]]
    assert [name for name, _ in skipped] == ["1.png"]
    assert skipped[0][1]


def write_jpeg_cut_short(file: Path) -> None:
    stream = io.BytesIO()
    noise(64, 64).save(stream, "JPEG")
    file.write_bytes(stream.getvalue()[:-600])


def write_bomb(file: Path) -> None:
    noise(8, 8).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)  # the header now promises 400 megapixels
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


def write_broken_png(file: Path) -> None:
    noise(64, 64).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[100:140] = bytes(40)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write_jpeg_cut_short, "truncated"),
        (write_broken_png, ""),
        (write_bomb, "decompression bomb"),
        (lambda file: file.write_bytes(b""), "not an image"),
        (lambda file: file.write_text("<html>404</html>"), "not an image"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: Image.new("1", (1, 2_000_000)).save(file, "PNG"), "too elongated"),
    ],
    ids=["cut JPEG", "broken PNG", "bomb", "empty", "HTML", "deleted", "elongated"],
)
def test_every_kind_of_bad_file_is_skipped_with_its_reason(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    folder = open_folder(put_images(tmp_path, 2), 20)
    spoil(tmp_path / "0.png")
    reasons: list[str] = []
    [batch] = iter_batches(folder, HOW8, 4, True, lambda _, why: reasons.append(why))
    assert [file.name for file in batch.files] == ["1.png"]
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert str(tmp_path) not in reasons[0]


def test_nothing_but_bad_files_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = open_folder(put_images(tmp_path, 2), 20)
    for file in folder.files:
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no image of .* can be used; .* got 2 bad files"):
        list(iter_batches(folder, HOW8, 1, skip_bad=True))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1; got {batch_size}"):
        next(iter_batches(ImageFolder(tmp_path, (), None), HOW8, batch_size))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("git-lfs", "not an image that Pillow can read, but a Git LFS pointer"),
        ("html", "not an image that Pillow can read, but a web page (HTML)"),
        ("empty", "not an image that Pillow can read, but an empty file"),
        ("zip", "not an image that Pillow can read, but a ZIP archive of other files"),
        ("text", "not an image that Pillow can read. Leave"),
    ],
)
def test_file_of_another_kind_in_place_of_an_image_is_named(tmp_path: Path, kind: str, said: str) -> None:
    write_foreign(tmp_path, kind, "x.png")
    how = Preprocessing(
        size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", crop_pct=1.0, crop_mode="center"
    )
    with pytest.raises(ConfigError) as caught:
        list(iter_batches(open_folder(tmp_path, None), how, 1))
    assert said in str(caught.value)

import ast
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import snella
from snella_app.data import images
from snella_app.data.copies import find_near_copies
from snella_app.data.datasets import ImageDataset, joined, read_at_side
from snella_app.data.images import (
    IMAGE_SUFFIXES,
    Reading,
    array_pixels,
    inspect_image,
    read_image,
    read_label_map,
    to_rgb,
)
from snella_app.data.load import load_data
from snella_app.data.options import DataConfig
from snella_app.data.sources import FileImages, broken_images, broken_rows
from snella_app.data.transforms import build_transform


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_format_is_read_as_rgb(suffix, tmp_path):
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / f"red{suffix}")
    image = read_image(tmp_path / f"red{suffix}")
    assert (image.mode, image.size) == ("RGB", (4, 3))
    red, green, blue = image.getpixel((0, 0))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_blended_with_white(mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "x.png")
    rgb = read_image(tmp_path / "x.png")
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [(255, 255, 255), (0, 0, 0)]


def test_a_palette_with_transparency_in_bytes_is_blended_with_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    rgb = read_image(tmp_path / "x.png")
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [(255, 255, 255), (40, 50, 60)]


def test_an_rgb_file_with_a_transparent_color_is_blended_with_white(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "x.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB"


def test_gray_becomes_three_equal_channels():
    assert to_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_gray_keeps_its_high_byte(suffix, tmp_path):
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(tmp_path / f"x{suffix}")
    image = read_image(tmp_path / f"x{suffix}")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_small_32_bit_integers_are_unchanged():
    assert to_rgb(Image.fromarray(np.array([[7, 200]], dtype=np.int32))).getpixel((1, 0)) == (200, 200, 200)


def test_floating_point_values_are_rejected(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif' is not a readable image: floating-point values"):
        read_image(tmp_path / "x.tif")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (2, 4)


def test_an_animation_is_read_as_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ppm"])
def test_a_truncated_file_of_any_format_is_detected(suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    complete, cut = tmp_path / f"complete{suffix}", tmp_path / f"cut{suffix}"
    Image.fromarray(pixels).save(complete)
    cut.write_bytes(complete.read_bytes()[: complete.stat().st_size * 2 // 3])
    assert list(broken_images([complete, cut, complete])) == [1]
    with pytest.raises(ValueError, match=rf"cut\{suffix}' is not a readable image"):
        read_image(cut)


@pytest.mark.parametrize(("suffix", "part"), [(".avif", b"pitm"), (".npy", b"(4, 4)")])
def test_damaged_headers_are_not_readable_images(suffix, part, tmp_path):
    file = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(file, np.zeros((4, 4), np.uint8))
    else:
        Image.new("RGB", (4, 4)).save(file)
    content = file.read_bytes()
    assert part in content
    file.write_bytes(content.replace(part, part[:-1] + b" "))
    for read in (read_image, lambda path: inspect_image(path, str(path))):
        with pytest.raises(ValueError, match="is not a readable image: "):
            read(file)
    with pytest.raises(ValueError, match="is not a readable mask: "):
        read_label_map(file)


def test_text_and_empty_files_are_not_images(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    (tmp_path / "b.jpg").write_bytes(b"")
    reasons = broken_images([tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "gone.png"])
    assert reasons[0] == "unknown image format" and reasons[1] == "the file is empty"
    assert reasons[2] == "no such file"


@pytest.mark.parametrize(
    ("suffix", "mode", "side", "size"),
    [
        (".jpg", "RGB", 64, (80, 120)),  # only reduced by 8 while decoding; another factor 2 would give 40
        (".jpg", "RGB", 16, (16, 24)),  # by 8, then by 5
        (".jpg", "L", 64, (80, 120)),
        (".png", "RGB", 64, (64, 96)),  # 640 // 64 = 10
        (".png", "P", 64, (640, 960)),
        (".jpg", "RGB", 321, (640, 960)),
        (".jpg", "RGB", None, (640, 960)),
    ],
)
def test_a_large_image_is_read_upright_at_a_fraction_of_its_resolution(suffix, mode, side, size, tmp_path):
    upright = Image.linear_gradient("L").resize((640, 960)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / f"a{suffix}", **({"exif": exif} if suffix == ".jpg" else {"exif": exif.tobytes()}))
    image = read_image(tmp_path / f"a{suffix}", Reading(side=side))
    assert image.size == size and image.mode == "RGB"
    full = read_image(tmp_path / f"a{suffix}").resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(full, dtype=int)).max() <= 6


def test_splits_share_a_source_at_another_resolution(tmp_path):
    for name in "ab":
        Image.new("RGB", (400, 300)).save(tmp_path / f"{name}.jpg")
    source = FileImages([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    parts = [ImageDataset(source, [row], [row], [name]) for row, name in enumerate("ab")]
    small = read_at_side([*parts, joined(*parts)], 100)
    assert small[0].source is small[1].source is not source and small[0].names == ["a"]
    assert [part.image(0).size for part in small] == [(200, 150)] * 3  # JPEGs by powers of two
    assert parts[0].image(0).size == (400, 300) and small[2].image(1).size == (200, 150)
    assert source.cached_bytes == 400 * 300 * 3 and small[0].source.cached_bytes == 2 * 200 * 150 * 3


def test_postscript_with_an_image_suffix_starts_no_program(tmp_path, monkeypatch):
    program, marker = tmp_path / "gs", tmp_path / "started"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || touch {marker}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_image, read_label_map, lambda file: inspect_image(file, str(file))):
        with pytest.raises(ValueError, match=r"a.png' is not a readable (image|mask): "):
            read(path)
    assert not marker.exists()
    with pytest.raises(OSError), Image.open(path) as image:  # Pillow's default behavior
        image.load()
    assert marker.exists()


def test_images_are_opened_in_one_place():
    """`Image.open` tries every format that Pillow supports unless `formats` is given."""

    def opens(path):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return any(ast.unparse(call.func).endswith("Image.open") for call in calls)  # not in strings

    sources = Path(snella.__file__).parents[1]
    files = (path for name in ("snella", "snella_app", "snella_lab") for path in (sources / name).rglob("*.py"))
    assert [path.relative_to(sources).as_posix() for path in files if opens(path)] == ["snella_app/data/images.py"]


def test_an_array_that_exceeds_memory_is_rejected_by_its_header(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        header = {"shape": (60000, 60000, 5), "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"values, got an array of \[60000, 60000, 5\]"):
        read_image(path, Reading(5))
    tiff = tmp_path / "a.tif"
    tifffile.imwrite(tiff, np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    with tifffile.TiffFile(tiff, mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[name].overwrite(60000)
    with pytest.raises(ValueError, match=r"values, got an array of \[60000, 60000, 5\]"):
        read_image(tiff, Reading(5))


def test_pixels_of_an_uploaded_array_are_read_from_its_header():
    values = np.zeros((6, 5, 4), np.uint8)
    for write in (np.save, lambda file, array: tifffile.imwrite(file, array, photometric="minisblack")):
        file = io.BytesIO()
        write(file, values)
        file.seek(0)
        assert images.array_pixels(file) == 120
        assert images.decode_image(file, "upload", Reading(6)).shape == (6, 5, 4)  # the stream position is unchanged
    file = io.BytesIO()
    np.save(file, np.array([("a", 1)], dtype=object))
    file.seek(0)
    with pytest.raises(ValueError, match="values must be numeric, got object"):
        images.array_pixels(file)


def test_pipes_and_folders_are_rejected_immediately(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(ValueError, match=r"' is not a readable image: not a regular file \(a folder, pipe, socket"):
            read_image(path)
    assert "not a regular file" in broken_images([tmp_path / "a.png"])[0]


def test_gray_and_alpha_are_read_on_request(tmp_path):
    Image.new("RGBA", (1, 1), (10, 20, 30, 40)).save(tmp_path / "x.png")
    Image.new("L", (1, 1), 77).save(tmp_path / "y.png")
    rgba, white, gray = (
        read_image(tmp_path / "x.png", Reading(4)),
        read_image(tmp_path / "x.png"),
        read_image(tmp_path / "y.png", Reading(1)),
    )
    assert rgba.getpixel((0, 0)) == (10, 20, 30, 40) and white.getpixel((0, 0)) == (217, 218, 220)
    assert (gray.mode, gray.getpixel((0, 0))) == ("L", 77)
    assert read_image(tmp_path / "y.png", Reading(4)).getpixel((0, 0)) == (77, 77, 77, 255)


@pytest.mark.parametrize("layout", ["interleaved", "planes", "pages", "npy"])
def test_many_channels_are_read_in_any_layout(layout, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 4)).astype(np.uint16)
    file = tmp_path / ("x.npy" if layout == "npy" else "x.tif")
    if layout == "npy":
        np.save(file, np.moveaxis(values, 0, -1))
    elif layout == "interleaved":
        tifffile.imwrite(file, np.moveaxis(values, 0, -1), photometric="minisblack", planarconfig="contig")
    else:
        tifffile.imwrite(
            file, values, photometric="minisblack", planarconfig="separate" if layout == "planes" else None
        )
    image = read_image(file, Reading(6))
    assert torch.equal(image.as_subclass(torch.Tensor), torch.from_numpy(values.astype(np.float32) / 65535))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 4, 5), (4, 5, 3), (3, 4, 5), (4, 5, 4)])
def test_arrays_of_bytes_are_read_as_gray_rgb_and_rgba(shape, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "x.npy", values)
    planes = np.moveaxis(values, 0, -1) if shape in [(1, 4, 5), (3, 4, 5)] else values
    channels = planes.shape[2] if planes.ndim == 3 else 1
    image = read_image(tmp_path / "x.npy", Reading(channels))
    assert image.size == (5, 4) and np.array_equal(np.asarray(image), planes.reshape(np.asarray(image).shape))
    assert inspect_image(tmp_path / "x.npy", "x.npy").size == (5, 4)


def test_other_arrays_need_another_number_of_channels_or_bytes(tmp_path):
    for values, remedy in (
        (np.zeros((5, 6, 7), np.uint8), r"set the number of channels with --channels \(channels=\)"),
        (np.zeros((4, 5, 3), np.float32), "convert it to uint8"),
        (np.zeros((4, 5), np.uint16), "convert it to uint8"),
    ):
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(ValueError, match=rf"uint8 with 1, 3 or 4 channels, got {values.dtype} of .*; {remedy}$"):
            read_image(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", [">u2", ">f4"])
def test_arrays_in_another_byte_order_are_read(dtype, tmp_path):
    values = np.random.default_rng(0).integers(0, 2, (5, 4, 6)).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    image = read_image(tmp_path / "x.npy", Reading(5, white=1))
    assert torch.equal(image.as_subclass(torch.Tensor), torch.from_numpy(values.astype(np.float32)))


def test_only_16_bit_arrays_have_a_brightness_that_a_white_value_changes(tmp_path):
    np.save(tmp_path / "deep.npy", np.full((5, 4, 4), 13107, np.uint16))
    np.save(tmp_path / "float.npy", np.full((5, 4, 4), 0.2, np.float32))
    inspected = [inspect_image(tmp_path / f"{name}.npy", name, Reading(5)) for name in ("deep", "float")]
    assert inspected[0].brightest == pytest.approx(0.2) and inspected[1].brightest is None


def test_transforms_do_not_change_cached_images(tmp_path):
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for index in range(8):
            values = np.random.default_rng([label, index]).integers(0, 65536, (6, 16, 16)).astype(np.uint16)
            np.save(tmp_path / name / f"{index}.npy", values)
    data_config = {"input_size": (6, 16, 16), "mean": [0.5] * 6, "std": [0.2] * 6, "crop_pct": 1.0}
    images = load_data(f"folder:{tmp_path}", DataConfig(channels=6)).train.with_transform(build_transform(data_config))
    first = images[0][0].clone()
    assert torch.equal(images[0][0], first)


def test_a_damaged_compressed_array_is_not_a_readable_image(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (6, 32, 32)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", compression="zlib")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    start = content.index(b"\x78", 8)  # zlib header
    content[start : start + 400] = bytes(400)
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tif' is not a readable image: "):
        read_image(tmp_path / "x.tif", Reading(6))


def test_a_tiff_with_a_damaged_header_is_not_a_readable_image(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((6, 8, 8), np.uint8), photometric="minisblack")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    height = content.index((257).to_bytes(2, "little"), 8)  # tag ImageLength
    content[height + 8 : height + 12] = bytes(4)
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tif' is not a readable image: "):
        read_image(tmp_path / "x.tif", Reading(6))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_white_value_is_configurable(channels, tmp_path):
    Image.fromarray(np.array([[0, 1000, 4095, 60000]], dtype=np.uint16)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", Reading(channels, 4095))
    assert [np.atleast_1d(image.getpixel((x, 0)))[0] for x in range(4)] == [0, 62, 255, 255]
    np.save(tmp_path / "x.npy", np.full((5, 2, 2), 2000, np.uint16))
    assert float(read_image(tmp_path / "x.npy", Reading(5, 4000)).mean()) == 0.5


def test_dark_16_bit_images_are_noted(tmp_path):
    for index in range(12):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        values = np.random.default_rng(index).integers(0, 4096, (8, 8)).astype(np.uint16)
        values[0, 0] = 4095
        Image.fromarray(values).save(folder / f"{index}.png")
    note = (
        "the values of 12 16-bit images reach only 6.2% of the range; set the white value with --white (white=), e.g. "
    )
    assert any(text.startswith(note) for text in load_data(f"folder:{tmp_path}").notes)
    bright = load_data(f"folder:{tmp_path}", DataConfig(white=4095))
    assert bright.notes == [] and max(np.asarray(bright.train.image(0)).ravel()) == 255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"the image must have 5 channels, got an array of \[4, 4, 3\]"),
        (np.full((5, 4, 4), -3, np.int16), "must be uint8, uint16 or floats in \\[0, 1\\], got int16 in \\[-3, -3\\]"),
        (np.full((5, 4, 4), 7.5), "got float64 in \\[7.5, 7.5\\]"),
        (np.zeros((5, 4, 4), [("x", np.uint8)]), r"values must be numeric, got \[\('x', 'u1'\)\]"),
        (np.zeros((5, 4, 4), complex), "values must be numeric, got complex128"),
    ],
)
def test_other_arrays_are_rejected(values, message, tmp_path):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=rf"x\.npy' is not a readable image: .*{message}"):
        read_image(tmp_path / "x.npy", Reading(5))


def test_heic_images_are_read_by_pillow_heif_or_rejected_with_its_name(tmp_path, monkeypatch):
    import pillow_heif

    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 30, 40)))
    heif.save(tmp_path / "x.heic")
    red, green, _ = read_image(tmp_path / "x.heic").getpixel((5, 5))
    assert red > 180 and green < 60 and images.is_image(tmp_path / "x.heic")
    monkeypatch.setattr(images, "has_heic", lambda: False)
    with pytest.raises(ValueError, match="HEIC images need pillow-heif"):
        images.decode_image(io.BytesIO((tmp_path / "x.heic").read_bytes()), "upload")
    monkeypatch.setattr(Image, "open", _raise_unknown_format)
    with pytest.raises(ValueError, match=r"HEIC images need pillow-heif: pip install 'snella\[heic\]'"):
        read_image(tmp_path / "x.heic")
    assert not images.is_image(tmp_path / "x.heic")


def _raise_unknown_format(file, formats):
    raise OSError("cannot identify image file")


def test_size_mode_format_and_pages_of_files_are_stored(tmp_path):
    frames = [Image.new("L", (40, 30), value) for value in (0, 255)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "y.jpg")
    source = FileImages([tmp_path / "x.tif", tmp_path / "y.jpg"])
    assert broken_rows(source, [0, 1]) == {}
    first, second = source.metadata[0], source.metadata[1]
    assert (first.size, first.mode, first.format, first.has_pages) == ((40, 30), "L", "TIFF", True)
    assert (second.size, second.mode, second.format, second.has_pages) == ((800, 1200), "CMYK", "JPEG", False)


def test_large_truncated_jpegs_are_detected(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "y.jpg").write_bytes(content[: len(content) * 9 // 10])
    assert list(broken_images([tmp_path / "x.jpg", tmp_path / "y.jpg"])) == [1]


def stamp(seed):
    """Return an image with large shapes, like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)


def test_re_encoded_copies_are_detected_and_others_are_not(tmp_path):
    paths = []
    for seed in range(40):
        paths.append(tmp_path / f"{seed}.png")
        stamp(seed).save(paths[-1])
    stamp(3).save(tmp_path / "low.jpg", quality=40)
    stamp(4).resize((77, 50)).save(tmp_path / "small.png")
    stamp(5).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    paths += [tmp_path / "low.jpg", tmp_path / "small.png", tmp_path / "turned.png"]
    source = FileImages(paths)
    assert broken_rows(source, range(43)) == {}
    train = ImageDataset(source, range(20), [0] * 20, [path.name for path in paths[:20]])
    others = ImageDataset(source, range(20, 43), [0] * 23, [path.name for path in paths[20:]])
    assert find_near_copies(train, others) == {20: 3, 21: 4}


def test_copies_and_pages_are_noted(tmp_path):
    for part, seeds in (("train", range(8)), ("test", range(8, 12))):
        for seed in seeds:
            folder = tmp_path / part / "ab"[seed % 2]
            folder.mkdir(parents=True, exist_ok=True)
            stamp(seed).save(folder / f"{seed}.png")
    stamp(2).save(tmp_path / "test/a/again.jpg", quality=60)
    stamp(30).save(tmp_path / "train/a/film.gif", save_all=True, append_images=[stamp(31)])
    notes = load_data(f"folder:{tmp_path}").notes
    assert "only the first page or frame of 1 image is used: train/a/film.gif" in notes
    assert any(
        note.startswith(
            "1 of 5 test images is also a training image (1 of them matched by 16×16 thumbnails), e.g. 'train/a/2.png'"
        )
        and note.endswith("is 'test/a/again.jpg'; test results are optimistic; remove the copies from one split")
        for note in notes
    ), notes


@pytest.mark.parametrize("values", [[[0, 70_000]], [[-5, 90]]])
def test_integers_outside_the_range_of_16_bits_are_an_error(values, tmp_path):
    Image.fromarray(np.array(values, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x.tif' is not a readable image: values must be from 0 to 65,535, got"):
        read_image(tmp_path / "x.tif")


def test_the_white_value_applies_to_all_32_bit_integers(tmp_path):
    Image.fromarray(np.array([[0, 200]], np.int32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif").getpixel((1, 0)) == (200, 200, 200)
    assert read_image(tmp_path / "x.tif", Reading(white=4095)).getpixel((1, 0)) == (12, 12, 12)


def test_very_elongated_images_are_not_inspected(tmp_path):
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    with pytest.raises(
        ValueError, match=r"strip.png' is not a readable image: its sides may differ .* 200, got 2010×10"
    ):
        inspect_image(tmp_path / "strip.png", "strip.png")
    Image.new("RGB", (2000, 10)).save(tmp_path / "strip.png")
    assert inspect_image(tmp_path / "strip.png", "strip.png").size == (2000, 10)


def test_large_images_below_the_limit_give_no_warning(tmp_path):
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    assert Image.MAX_IMAGE_PIXELS < 9500**2
    code = "import sys; from snella_app.data.images import open_image; open_image(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr


def test_sixteen_bit_gray_with_a_transparent_value_keeps_the_other_values(tmp_path):
    values = np.array([[0, 30000], [40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png", transparency=30000)
    assert np.asarray(read_image(tmp_path / "x.png", Reading(1))).tolist() == [[0, 255], [156, 255]]
    values //= 16
    Image.fromarray(values).save(tmp_path / "x.png", transparency=int(values[0, 1]))
    assert np.asarray(read_image(tmp_path / "x.png", Reading(1, white=4095))).tolist() == [[0, 255], [156, 255]]


def test_a_transparent_color_does_not_bleed_into_a_smaller_image(tmp_path):
    colors = np.zeros((64, 64, 3), np.uint8)
    colors[:, 1::2] = (255, 0, 255)
    Image.fromarray(colors).save(tmp_path / "x.png", transparency=(255, 0, 255))
    image = read_image(tmp_path / "x.png", Reading(side=16))
    assert {color for _, color in image.getcolors()} <= {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_the_header_of_a_damaged_array_is_a_value_error(suffix, tmp_path):
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", np.zeros((6, 8, 8), np.uint8))
    else:
        tifffile.imwrite(tmp_path / "x.tif", np.zeros((6, 8, 8), np.uint8), photometric="minisblack")
    content = (tmp_path / f"x{suffix}").read_bytes()
    for position in range(6, 200):
        damaged = io.BytesIO(content[:position] + b"(" + content[position + 1 :])
        with contextlib.suppress(ValueError, MemoryError):
            assert array_pixels(damaged) >= 0


def test_a_copy_is_found_although_a_brighter_image_is_more_similar_in_shape(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.integers(60, 200, (16, 16))
    noisy = values + rng.normal(0, 2, (16, 16))
    for name, pixels in (("noisy", noisy), ("dark", values * 0.7), ("test", values)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    source = FileImages([tmp_path / f"{name}.png" for name in ("dark", "noisy", "test")])
    broken_rows(source, range(3))
    train = ImageDataset(source, [0, 1], [0, 0], ["dark", "noisy"])
    assert find_near_copies(train, ImageDataset(source, [2], [0], ["test"])) == {0: 1}

import os

import numpy as np
import pytest
from PIL import Image

from snella.data import read_image
from snella.data.datasets import IMAGE_SUFFIXES, broken_images, to_rgb


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_kind_of_file_is_read_as_rgb(suffix, tmp_path):
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / f"red{suffix}")
    image = read_image(tmp_path / f"red{suffix}")
    assert (image.mode, image.size) == ("RGB", (4, 3))
    red, green, blue = image.getpixel((0, 0))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "x.png")
    rgb = read_image(tmp_path / "x.png")
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [(255, 255, 255), (0, 0, 0)]


def test_a_palette_with_transparency_in_bytes_is_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    rgb = read_image(tmp_path / "x.png")
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [(255, 255, 255), (40, 50, 60)]


def test_an_rgb_file_with_a_transparent_color_is_laid_on_white(tmp_path):
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


def test_small_32_bit_integers_are_taken_as_they_are():
    assert to_rgb(Image.fromarray(np.array([[7, 200]], dtype=np.int32))).getpixel((1, 0)) == (200, 200, 200)


def test_floating_point_values_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif' is not a readable image: floating-point values"):
        read_image(tmp_path / "x.tif")


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (2, 4)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ppm"])
def test_a_truncated_file_of_any_kind_is_found(suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    Image.fromarray(pixels).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    assert list(broken_images([whole, cut, whole])) == [1]
    with pytest.raises(ValueError, match=rf"cut\{suffix}' is not a readable image"):
        read_image(cut)


def test_text_and_empty_files_are_no_images(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    (tmp_path / "b.jpg").write_bytes(b"")
    reasons = broken_images([tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "gone.png"])
    assert "cannot identify image file" in reasons[0] and "cannot identify" in reasons[1]
    assert "No such file" in reasons[2]


def test_a_pipe_among_the_images_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png' is not a readable image: it is no regular file \(a pipe, a socket"):
        read_image(tmp_path / "a.png")
    assert "no regular file" in broken_images([tmp_path / "a.png"])[0]

"""Folders of images as they are found: formats of other ranges, transparency, rotation, links, pipes and damage."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from convsim_cli.errors import InputError
from convsim_cli.inputs.datasets import decode_image, folder_digest, load_dataset, load_images

RAMP = numpy.linspace(0, 1, 64).reshape(8, 8)


def of_mode(mode: str, color: Any) -> Image.Image:
    return Image.new(mode, (8, 8), color)


def save_png(path: Path, *chunks: tuple[bytes, bytes]) -> None:
    whole = ((name, data, zlib.crc32(name + data)) for name, data in chunks)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + b"".join(pack(">I", len(d)) + n + d + pack(">I", crc) for n, d, crc in whole)
    )


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (RAMP.astype(numpy.float32), ".tiff"),
        ((255 * RAMP).astype(numpy.float32), ".tiff"),
        ((RAMP * (1 << 30)).astype(numpy.int32), ".tiff"),
        ((4095 * RAMP).astype(numpy.uint16), ".png"),
        ((4095 * RAMP).astype(numpy.uint16), ".tiff"),
        ((1023 * RAMP).astype(numpy.uint16), ".png"),
    ],
)
def test_images_of_an_unknown_range_are_refused_not_read_as_black(
    pixels: numpy.ndarray[Any, Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"not a readable image \(.*convert it to 8 bits\)"):
        decode_image(path, 8)


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (of_mode("L", 200), ".png", (200, 200, 200)),
        (of_mode("1", 1), ".png", (255, 255, 255)),
        (of_mode("CMYK", (0, 255, 255, 0)), ".tiff", (255, 0, 0)),
        (of_mode("RGBA", (0, 0, 0, 0)), ".png", (255, 255, 255)),
        (of_mode("RGBA", (0, 0, 0, 255)), ".png", (0, 0, 0)),
        (of_mode("RGBA", (255, 0, 0, 128)), ".webp", (255, 127, 127)),
        (of_mode("LA", (0, 0)), ".png", (255, 255, 255)),
        (of_mode("I;16", 40000), ".png", (156, 156, 156)),
        (of_mode("I", 40000), ".pgm", (156, 156, 156)),
    ],
)
def test_images_of_every_mode_have_their_colors_on_white(
    image: Image.Image, suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    image.save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert decode_image(tmp_path / f"a{suffix}", 4)[2, 2].tolist() == list(expected)


def test_a_transparent_color_of_a_palette_is_white(tmp_path: Path) -> None:
    image = of_mode("P", 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(1, (0, 0, 8, 4))
    image.save(tmp_path / "a.png", transparency=0)
    assert decode_image(tmp_path / "a.png", 8)[[1, 7], 0, 0].tolist() == [9, 255]


@pytest.mark.parametrize("suffix", [".jpg", ".tiff", ".webp", ".png"])
def test_images_are_turned_as_their_exif_orientation_says(suffix: str, tmp_path: Path) -> None:
    image, exif = of_mode("RGB", (0, 0, 0)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half
    exif[0x0112] = 6  # to be turned clockwise: the upper half is shown at the right
    image.save(tmp_path / f"a{suffix}", exif=exif)
    shown = decode_image(tmp_path / f"a{suffix}", 8)[..., 0] > 127
    assert shown[:, 5:].all()
    assert not shown[:, :3].any()


DAMAGED: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.touch(),
    "text": lambda path: path.write_text("an image"),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a zTXt chunk of 100 MB": lambda path: save_png(
        path,
        (b"IHDR", pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20))),
        (b"IDAT", zlib.compress(b"\0\0")),
    ),
    "a PPM header of one digit after another": lambda path: path.write_bytes(b"P6 " + b"9" * 5000 + b" 1 255\n"),
    "a PPM of negative size": lambda path: path.write_bytes(b"P6 -1 1 255\n"),
    "a cut PNG": lambda path: save_png(path, (b"IHDR", pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)), (b"IDAT", b"\x78")),
    "PostScript": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_image_is_one_line_and_never_waited_for(kind: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        of_mode("L", 9).save(tmp_path / name / "a.png")
    DAMAGED[kind](tmp_path / "cat" / "b.png")
    for read in (lambda: load_dataset(f"folder:{tmp_path}", Path(), 4), lambda: load_images(tmp_path, 4, 4)):
        with pytest.raises(InputError, match=r"b\.png.*(not a readable image|link|pipe)") as caught:
            read()
        assert "\n" not in str(caught.value)
    if "link" in kind or "pipe" in kind:
        with pytest.raises(InputError):
            folder_digest(tmp_path)


def make_classes(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name / "2019").mkdir(parents=True)
        for index in range(3):
            of_mode("L", index).save(folder / name / "2019" / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("place", "leads_to"), [("cat/loop", "."), ("cat/loop", ".."), ("cat/2019/up", "../.."), ("cat/twice", "2019")]
)
def test_a_link_never_makes_images_count_twice(place: str, leads_to: str, tmp_path: Path) -> None:
    data = make_classes(tmp_path / "data")
    (data / place).symlink_to(leads_to)
    with pytest.raises(InputError, match="are one folder, whose images would count twice; remove the link"):
        load_dataset(f"folder:{data}", Path(), 4)
    if leads_to != "..":
        with pytest.raises(InputError, match="are one folder"):
            load_images(data, 4, 4)


def test_a_class_may_be_a_link_and_a_folder_may_be_named_like_an_image(tmp_path: Path) -> None:
    data = make_classes(tmp_path / "data")
    (data / "dog").rename(tmp_path / "elsewhere")
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    (data / "cat" / "2019").rename(data / "cat" / "a.png")
    assert load_dataset(f"folder:{data}", Path(), 4).images_of_classes() == {
        "cat": {"train": 2, "test": 1},
        "dog": {"train": 2, "test": 1},
    }
    assert load_images(data, 6, 4).shape == (6, 3, 4, 4)


def test_a_class_or_subfolder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_classes(tmp_path / "data")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("dog/2019"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"dog/2019: cannot be read \(Permission denied\)"):
        load_dataset(f"folder:{data}", Path(), 4)
    monkeypatch.undo()
    (data / "elk").symlink_to("nowhere")
    with pytest.raises(InputError, match="elk: a broken link"):
        load_dataset(f"folder:{data}", Path(), 4)


def test_images_too_large_for_memory_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`image_size` 1073741824: 4 images of that size do not fit into memory"):
        load_dataset(f"folder:{make_classes(tmp_path)}", Path(), 1 << 30)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [of_mode("RGB", (shade, 0, 0)) for shade in (250, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    assert torch.equal(decode_image(tmp_path / "a.png", 2)[0, 0], torch.tensor([250, 0, 0], dtype=torch.uint8))


@pytest.mark.parametrize("spelling", [".", "..", "../data", "../data/cat/.."])
def test_a_folder_may_be_spelled_relative_to_itself(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_classes(tmp_path / "data"))
    assert len(load_images(Path(spelling), 6, 4)) == 6
    if spelling != "..":
        assert load_dataset(f"folder:{spelling}", Path(), 4).classes == 2

"""PNG files, read back by Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from server.front.png import encode_png


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (64, 48), (257, 129)])
@pytest.mark.parametrize("kind", ["noise", "flat", "ramp"])
def test_pillow_reads_the_same_pixels(height: int, width: int, kind: str) -> None:
    if kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    elif kind == "flat":
        pixels = np.full((height, width, 3), (255, 0, 7), np.uint8)
    else:
        pixels = np.add.outer(np.arange(height), np.arange(3 * width)).astype(np.uint8).reshape(height, width, 3)
    read = Image.open(io.BytesIO(encode_png(pixels, {})))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), pixels)


def test_texts_are_read_back_and_the_file_is_whole() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    content = encode_png(pixels, {"rmd:seed": "7", "Software": "rmd"})
    read = Image.open(io.BytesIO(content))
    read.verify()  # every chunk's checksum
    assert read.info == {"rmd:seed": "7", "Software": "rmd"}


def test_a_view_that_is_not_contiguous_is_written_as_it_looks() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)[::2, ::3]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels, {})))), pixels)


def test_what_does_not_change_takes_no_room() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    for pixels in (ramp, ramp.transpose(1, 0, 2)):
        assert len(encode_png(np.ascontiguousarray(pixels), {})) < 4096

"""Films to bytes and back."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from server.front.media import encode_film, encode_spritesheet, encode_thumbnail


def film_of(colours: list[tuple[int, int, int]], height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


@pytest.mark.parametrize("height", [48, 720])
def test_a_film_keeps_its_frames_rate_and_colours(height: int) -> None:
    colours = [(200, 30, 60), (20, 160, 40), (240, 240, 240)]
    content = encode_film(film_of(colours, height), 12)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.width, stream.height) == ("h264", 12, 64, height)
        assert stream.codec_context.colorspace == 1  # BT.709, said in the file and not left to a player's guess
        shown = [frame.to_ndarray(format="rgb24").mean((0, 1)) for frame in container.decode(video=0)]
    assert np.abs(np.array(shown) - np.array(colours)).max() < 4


def test_a_film_can_be_played_while_it_loads() -> None:
    content = encode_film(film_of([(9, 9, 9)] * 4), 16)
    assert content.index(b"moov") < content.index(b"mdat")


def test_the_same_frames_give_the_same_bytes() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    assert encode_film(frames, 16) == encode_film(frames, 16)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (81, 4, 4)])
def test_a_sheet_shows_first_and_last_frame(count: int, columns: int, rows: int) -> None:
    frames = film_of([(10, 10, 10), *[(90, 90, 90)] * (count - 2), (200, 200, 200)][:count])
    sheet = np.asarray(Image.open(io.BytesIO(encode_spritesheet(frames))))
    assert sheet.shape == (rows * 48, columns * 64, 3)
    assert abs(int(sheet[20, 20, 0]) - 10) < 4
    last = min(count, 16) - 1
    row, column = divmod(last, columns)
    assert abs(int(sheet[row * 48 + 20, column * 64 + 20, 0]) - int(frames[-1, 0, 0, 0])) < 4


def test_large_frames_are_shrunk_on_a_sheet_and_the_thumbnail_is_the_middle_one() -> None:
    frames = film_of([(10, 10, 10), (90, 90, 90), (200, 200, 200)], 72, 1280)
    assert Image.open(io.BytesIO(encode_spritesheet(frames))).size == (640, 36)
    thumbnail = Image.open(io.BytesIO(encode_thumbnail(frames)))
    assert thumbnail.size == (1280, 72) and abs(np.asarray(thumbnail)[9, 9, 0].astype(int) - 90) < 4


def test_a_film_has_the_same_bytes_each_time() -> None:
    """x264 made several files of this film, so that one made again looked like another."""
    frames = np.asarray(Image.open(Path(__file__).parent / "film.png").convert("RGB")).reshape(9, 96, 96, 3)
    assert len({encode_film(frames, 8) for _ in range(20)}) == 1

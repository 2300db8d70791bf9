"""Films by rule: reproducible, exactly captioned, held out where they should be; their motion read off the pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.film_setup import SIDE, film_bytes, many_pictures
from training.embedded.data.captions import GROUNDS
from training.embedded.data.dataset import PictureSet
from training.embedded.data.films import FilmSource, FilmSpec, film_caption, is_held_motion, render_films
from training.embedded.data.motions import CROSSING, MOTIONS, SPEEDS, X, Y, path
from training.evaluate.embedded.films import ends, film_set, lasting_things, read_films, single_things, training_frames
from training.evaluate.embedded.motion import read_motion, track


@pytest.fixture(scope="module")
def pictures() -> PictureSet:
    return many_pictures()


def spec(motion: str, speed: str = "", ground: str = "white") -> FilmSpec:
    two = motion == CROSSING
    centres = ((0.5, 0.36), (0.5, 0.64)) if two else ((0.5, 0.5),)
    return FilmSpec((0, 1)[: 1 + two], motion, speed, (0.45,) * (1 + two), centres, ground, "")  # type: ignore[arg-type]


def test_a_film_depends_on_seed_split_and_number_alone(pictures: PictureSet) -> None:
    films = [FilmSource(pictures).film(i) for i in range(20)]
    assert films == [FilmSource(many_pictures()).film(i) for i in range(20)]
    assert films != [FilmSource(pictures, seed=1).film(i) for i in range(20)]
    assert len({film.caption for film in films}) > 15


def test_the_splits_share_no_picture_and_no_pair_of_concept_and_motion(pictures: PictureSet) -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        source = FilmSource(pictures, split)  # type: ignore[arg-type]
        films = [source.film(i) for i in range(300)]
        wanted = "train" if split == "unseen_motion" else split
        assert {pictures.records[row].split for film in films for row in film.pictures} == {wanted}
        return {(pictures.records[film.pictures[0]].base_hexcode, film.motion) for film in films}

    trained, held = pairs("train"), pairs("unseen_motion")
    assert not any(is_held_motion(*pair) for pair in trained)
    assert all(is_held_motion(*pair) for pair in held)
    assert {concept for concept, _ in held} <= {concept for concept, _ in trained}  # known things, new motions
    assert pairs("unseen_concept")


def test_captions_say_what_happens(pictures: PictureSet) -> None:
    first, second = pictures.records[:2]
    assert film_caption([first], "right") == f"{first.label}, noto style, moving left to right"
    assert (
        film_caption([first], "up", "slowly", "blue")
        == f"{first.label}, noto style, moving up slowly, on a blue background"
    )
    assert film_caption([first, second], CROSSING) == f"{first.label} and {second.label}, noto style, crossing"
    source = FilmSource(pictures)
    for film in (source.film(i) for i in range(200)):
        assert any(phrase in film.caption for phrase in MOTIONS[film.motion].phrases)
        assert film.speed in film.caption
        assert (film.ground in film.caption) == (film.ground != "white")
        assert len(film.pictures) == 1 + (film.motion == CROSSING)


def test_captions_that_do_not_fit_are_drawn_anew(pictures: PictureSet) -> None:
    source = FilmSource(pictures, fits=lambda caption: "background" not in caption)
    assert all(source.film(i).ground == "white" for i in range(50))
    with pytest.raises(ValueError, match="none of 200 captions fits"):
        FilmSource(pictures, fits=lambda _: False).film(0)


def test_a_split_without_pictures_is_refused(pictures: PictureSet) -> None:
    known = [i for i, record in enumerate(pictures.records) if record.split == "train"]
    few = PictureSet([pictures.records[i] for i in known], pictures.rgba[known])
    with pytest.raises(ValueError, match="no pictures of the split unseen_pair"):
        FilmSource(few, "unseen_pair")


def test_rendering_keeps_the_ground_and_shrinks(pictures: PictureSet) -> None:
    large, small = render_films([spec("still", ground="blue"), spec("right")], pictures.rgba, (48, 32), frames=3)
    assert large.shape == (2, 3, 3, 48, 48) and small.shape == (2, 3, 3, 32, 32)
    corner = (large[0, :, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(corner, torch.tensor(GROUNDS["blue"]).float()[:, None].expand(-1, 3), atol=0.5, rtol=0)
    assert torch.equal(large[0, :, 0], large[0, :, 2])
    assert not torch.equal(large[1, :, 0], large[1, :, 2])


def test_the_first_of_two_is_in_front_and_goes_to_the_right(pictures: PictureSet) -> None:
    both = replace(spec(CROSSING), centres=((0.5, 0.5), (0.5, 0.5)))
    alone = replace(both, pictures=(0,), motion="still", scales=both.scales[:1], centres=both.centres[:1])
    films = render_films([both], pictures.rgba, (SIDE,), 9)[0][0]
    middle = render_films([alone], pictures.rgba, (SIDE,), 1)[0][0, :, 0]
    solid = middle.amin(0) < -0.8  # inside the strong colours
    assert solid.sum() > 50
    torch.testing.assert_close(films[:, 4][:, solid], middle[:, solid], atol=0.05, rtol=0)
    first, second = both.paths(9)
    assert first[-1, X] > first[0, X] and second[-1, X] < second[0, X]


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_read_off_its_film(pictures: PictureSet, motion: str) -> None:
    for speed in SPEEDS if MOTIONS[motion].speeds else SPEEDS[:1]:
        for ground in ("white", "black", "purple"):
            assert read_motion(film_bytes(pictures, spec(motion, speed, ground))) == motion


OPPOSITES = {
    "right": "left", "left": "right", "up": "down", "down right": "up left", "clockwise": "counterclockwise",
    "counterclockwise": "clockwise", "growing": "shrinking", "shrinking": "growing", "fading in": "fading out",
}  # fmt: skip


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITES.items())
def test_a_film_played_backwards_reads_as_the_opposite(pictures: PictureSet, motion: str, opposite: str) -> None:
    film = film_bytes(pictures, spec(motion))
    assert read_motion(np.ascontiguousarray(film[::-1])) == opposite


def test_an_empty_film_shows_nothing() -> None:
    assert read_motion(np.full((9, 32, 32, 3), 200, np.uint8)) == "nothing"


def test_displacement_is_the_paths_own(pictures: PictureSet) -> None:
    found = track(film_bytes(pictures, spec("down right", "slowly")))
    assert found is not None
    way = path("down right", "slowly", 0.45, (0.5, 0.5), 9)
    expected = way[-1, [X, Y]] - way[0, [X, Y]]
    np.testing.assert_allclose(found.displacement, expected, atol=0.5 / SIDE)


def test_originals_score_full_marks_and_shuffled_ones_do_not(pictures: PictureSet) -> None:
    test = film_set(pictures, "unseen_concept", 24, SIDE)
    assert test.readable >= 0.97
    found = read_films(test.originals, test)
    assert found.right.all() and max(found.way_off) < 6 and np.median(found.flicker) < 1
    others = read_films(np.roll(test.originals, 1, 0), test)
    assert others.right.double().mean() < 0.4
    noise = 30 * np.random.default_rng(0).standard_normal(test.originals.shape)
    noisy = (test.originals + noise).clip(0, 255).astype(np.uint8)
    assert np.median(read_films(noisy, test).flicker) > 5
    hits = [tuple(map(int, text.split(" of "))) for text in found.by_motion(test).values()]
    assert sum(right for right, _ in hits) == sum(total for _, total in hits) == 24


def test_a_smaller_set_is_a_prefix_and_a_skipped_one_goes_on(pictures: PictureSet) -> None:
    whole, first = film_set(pictures, "unseen_motion", 6, SIDE), film_set(pictures, "unseen_motion", 4, SIDE)
    rest = film_set(pictures, "unseen_motion", 2, SIDE, skip=4)
    assert first.specs + rest.specs == whole.specs
    assert first.seeds(3) + rest.seeds(3) == whole.seeds(3) != whole.seeds(4)
    assert [whole.concepts[place] for place in whole.targets] == [
        pictures.records[spec.pictures[0]].base_hexcode for spec in whole.specs
    ]
    part = whole.part([3, 1])
    assert part.specs == [whole.specs[3], whole.specs[1]] and part.concepts == whole.concepts
    assert part.targets == (whole.targets[3], whole.targets[1])


def test_test_films_leave_out_twins_and_what_is_never_measured(pictures: PictureSet) -> None:
    records = list(pictures.records)
    held = next(i for i, record in enumerate(records) if record.split == "unseen_pair")
    known = next(i for i, record in enumerate(records) if record.split == "train")
    twin = f"{records[known].base_hexcode}-200d-2640-fe0f"
    records[held] = replace(records[held], base_hexcode=twin)
    records[known + 1] = replace(records[known + 1], training_only=True)
    changed = PictureSet(records, pictures.rgba)

    def shown(split: str) -> set[int]:
        return {spec.pictures[0] for spec in film_set(changed, split, 40, SIDE).specs}  # type: ignore[arg-type]

    assert held not in shown("unseen_pair") and known + 1 not in shown("unseen_motion")
    alone = PictureSet([records[held], records[known]], pictures.rgba[[held, known]])
    with pytest.raises(ValueError, match="has a twin in training"):
        film_set(alone, "unseen_pair", 1, SIDE)


def test_frames_of_training_films_show_one_thing_of_the_training_pictures(pictures: PictureSet) -> None:
    frames, rows = training_frames(pictures, 40, 48)
    assert frames.shape == (40, 48, 48, 3)
    assert {pictures.records[row].split for row in rows} == {"train"}


def test_the_thing_is_cut_out_wherever_and_however_large_it_is(pictures: PictureSet) -> None:
    test = film_set(pictures, "unseen_concept", 40, SIDE)
    growing = [p for p in lasting_things(test) if test.specs[p].motion in ("growing", "shrinking", "right", "up left")]
    assert growing and set(growing) < set(single_things(test)) <= set(range(40))
    first, last = ends(test.originals, growing)
    whole = test.originals[growing]
    # Bare frames differ by where the thing is; cut out, first and last are one picture but for the sampling.
    apart = np.abs(whole[:, 0].astype(float) - whole[:, -1]).mean()
    assert np.abs(first.astype(float) - last).mean() < 0.25 * apart
    empty = np.full((1, 9, 32, 32, 3), 200, np.uint8)
    assert np.array_equal(ends(empty, [0])[0], empty[:, 0])

"""The picture pipeline on small packages that the test itself packs: join, render, split, caption, cache."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.embedded.data import build as build_module
from training.embedded.data.build import base_of, build_pictures, normalise_hexcode
from training.embedded.data.captions import GROUNDS, compose_caption
from training.embedded.data.dataset import PictureSet, Record, caption
from training.embedded.data.names import match_names
from training.embedded.data.sources import (
    DEFAULT_PACKAGES,
    Package,
    SourceError,
    Tarball,
    digest_of,
    fetch,
    notice_text,
)
from training.embedded.data.split import (
    assign_splits,
    held_drawings,
    is_unseen_concept,
    may_train,
    style_family,
    unit_hash,
)

RED_DISC = '<circle cx="8" cy="8" r="6" fill="#ff0000"/>'
BLUE_BOX = '<rect width="36" height="36" fill="#0000ff"/>'


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def webp(colour: tuple[int, int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (256, 256), colour).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, list[Package]]:
    """A cache root with four packages fetched: labels, two SVG sets, one raster set."""
    root = tmp_path / "data"
    fetched = root / "packages"
    fetched.mkdir(parents=True)
    contents = {
        "labels": {
            "package/en/data.json": dump(
                [
                    {"label": "red disc", "hexcode": "1F534", "tags": ["circle", "red"], "group": 8},
                    {"label": "keycap", "hexcode": "0023-FE0F-20E3", "group": 8},
                    {"label": "broken", "hexcode": "1F9FF", "tags": [], "group": 8},
                ]
            )
        },
        "round": {
            "package/chars.json": dump(
                {"1f534": "disc", "23-20e3": "hash", "0023-20e3": "hash", "1f9ff": "broken", "1f44d-1f3fb": "hand"}
            ),
            "package/icons.json": dump(
                {
                    "width": 16,
                    "height": 16,
                    "icons": {
                        "disc": {"body": RED_DISC},
                        "hash": {"body": BLUE_BOX, "width": 36, "height": 36},
                        "broken": {"body": "<g>"},
                        "hand": {"body": RED_DISC},
                    },
                }
            ),
        },
        "raster": {
            "package/assets/1f534.webp": webp((0, 255, 0, 255)),
            "package/assets/1f535.webp": webp((0, 0, 255, 255)),
            "package/README.md": b"nothing to draw",
        },
    }
    made = []
    for name, members in contents.items():
        package = Package(name, "1.0.0", "", "MIT", f"{name} credit.", "" if name == "labels" else name)
        pack(fetched / package.file_name, members)
        made.append(replace(package, sha256=digest_of(fetched / package.file_name)))
    return root, made


def test_pictures_join_labels_and_render(packages: tuple[Path, list[Package]]) -> None:
    root, made = packages
    seen: list[tuple[int, int]] = []
    pictures = build_pictures(root, made, processes=1, progress=lambda done, total: seen.append((done, total)))
    # Left out: a skin-tone variant, an unlabelled code, a broken SVG. A code written two ways is one picture.
    assert [(r.hexcode, r.style) for r in pictures.records] == [
        ("1f534", "round"), ("0023-20e3", "round"), ("1f534", "raster"),
    ]  # fmt: skip
    assert pictures.records[0].tags == ("circle", "red")
    assert seen[-1] == (4, 4)
    assert pictures.meta["not_rendered"] == 1
    assert pictures.rgba.shape == (3, 256, 256, 4)
    disc = pictures.rgba[0]
    assert disc[128, 128].tolist() == [255, 0, 0, 255]
    assert disc[0, 0, 3] == 0
    assert pictures.rgba[1][2, 2].tolist() == [0, 0, 255, 255]
    assert pictures.rgba[2][128, 128].tolist() == [0, 255, 0, 255]
    assert "raster credit." in (root / "NOTICE").read_text()


def test_a_whole_cache_is_not_rendered_again(
    packages: tuple[Path, list[Package]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, made = packages
    build_pictures(root, made, processes=1)
    monkeypatch.setattr(build_module, "render", lambda _: pytest.fail("rendered again"))
    assert len(build_pictures(root, made, processes=1)) == 3
    with pytest.raises(pytest.fail.Exception):
        build_pictures(root, made, processes=1, force=True)


def test_an_interrupted_build_leaves_no_cache(
    packages: tuple[Path, list[Package]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, made = packages

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "render", stop)
        with pytest.raises(KeyboardInterrupt):
            build_pictures(root, made, processes=1)
    with pytest.raises(FileNotFoundError, match="rmd data"):
        PictureSet.load(root)
    assert len(build_pictures(root, made, processes=1)) == 3


def test_a_changed_package_is_refused(packages: tuple[Path, list[Package]]) -> None:
    root, made = packages
    path = root / "packages" / made[1].file_name
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SourceError, match=r"round-1\.0\.0\.tgz has sha256 .* delete the file"):
        build_pictures(root, made, processes=1)


def test_a_set_may_take_its_names_from_another(packages: tuple[Path, list[Package]]) -> None:
    root, made = packages
    shaded = Package("shaded", "1.0.0", "", "MIT", "shaded credit.", "fluent gradient", "round")
    icons = {"width": 16, "height": 16, "icons": {"disc": {"body": RED_DISC.replace("#ff0000", "#00ff00")}}}
    path = root / "packages" / shaded.file_name
    pack(path, {"package/icons.json": dump(icons)})
    shaded = replace(shaded, sha256=digest_of(path))
    pictures = build_pictures(root, [*made, shaded], processes=1)
    assert pictures.records[-1].style == "fluent gradient"
    assert pictures.rgba[-1][64, 64].tolist() == [0, 255, 0, 255]
    with pytest.raises(SourceError, match="shaded needs the package round"):
        build_pictures(root, [made[0], shaded], processes=1)


def test_a_missing_npm_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'no-such-npm' is not installed"):
        fetch(DEFAULT_PACKAGES[0], tmp_path, npm="no-such-npm")


def test_a_failed_fetch_says_why(tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'E404 no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(SourceError, match="E404 no such package"):
        fetch(DEFAULT_PACKAGES[0], tmp_path / "packages", npm=str(npm))


def test_a_fetched_package_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\necho other > {DEFAULT_PACKAGES[0].file_name}\n")
    npm.chmod(0o755)
    with pytest.raises(SourceError, match="is pinned to"):
        fetch(DEFAULT_PACKAGES[0], tmp_path / "packages", npm=str(npm))
    assert not list((tmp_path / "packages").glob("*.tgz"))


def test_members_that_leave_the_package_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p.tgz"
    pack(path, {"package/good.json": b"{}", "package/../../evil": b"", "/absolute": b""})
    assert Tarball(path).names == ["good.json"]
    with pytest.raises(SourceError, match=r"holds no bad\.json"):
        Tarball(path).read("bad.json")


def test_codes_are_normalised() -> None:
    assert normalise_hexcode("0023-FE0F-20E3") == "0023-20e3"
    assert base_of("1f44d-1f3fb") == "1f44d"
    assert base_of("1f9d1-1f3fd-200d-1f52c") == "1f9d1-200d-1f52c"


@pytest.fixture(scope="module")
def many() -> dict[tuple[str, str], str]:
    styles = ("noto", "twemoji", "fluent flat", "fluent 3d")
    return dict(assign_splits((f"{code:05x}", style) for code in range(3000) for style in styles))


def test_no_held_out_concept_is_trained_on(many: dict[tuple[str, str], str]) -> None:
    unseen = {code for (code, _), split in many.items() if split == "unseen_concept"}
    assert all(split == "unseen_concept" for (code, _), split in many.items() if code in unseen)
    assert 0.08 < len(unseen) / 3000 < 0.12


def test_an_unseen_pair_is_known_in_another_family(many: dict[tuple[str, str], str]) -> None:
    trained: dict[str, set[str]] = {}
    for (code, style), split in many.items():
        if split == "train":
            trained.setdefault(code, set()).add(style_family(style))
    pairs = [(code, style) for (code, style), split in many.items() if split == "unseen_pair"]
    assert pairs
    for code, style in pairs:
        assert trained[code]
        assert style_family(style) not in trained[code]  # Fluent flat and 3D are held out together


def test_the_split_does_not_depend_on_order_but_on_the_code_alone(many: dict[tuple[str, str], str]) -> None:
    assert assign_splits(reversed(list(many))) == many
    assert unit_hash("concept:1f600") == pytest.approx(0.6264118329903968)  # as for the shipped weights
    assert assign_splits([("1f600", "noto")]) == {("1f600", "noto"): "train"}  # one family: it cannot be a pair


RECORD = Record("1f534", "1f534", "fluent 3d", "red circle", ("geometric", "red", "round"), 8, "train")


def test_the_plain_caption_names_label_and_style() -> None:
    assert caption(RECORD) == "red circle, fluent 3d style"
    assert caption(RECORD, ground="blue") == "red circle, fluent 3d style, on a blue background"
    with pytest.raises(ValueError, match="ground 'mauve' is none of white"):
        caption(RECORD, ground="mauve")


def test_random_captions_vary_and_always_name_the_ground() -> None:
    rng = random.Random(0)
    texts = [caption(RECORD, rng, "pink") for _ in range(400)]
    assert all(text.endswith("on a pink background") for text in texts)
    styled = sum("fluent 3d style" in text for text in texts) / len(texts)
    tagged = sum("geometric" in text for text in texts) / len(texts)
    assert 0.84 < styled < 0.95
    assert 0.1 < tagged < 0.35
    assert compose_caption("dot", "noto", (), random.Random(1)).startswith("dot")


def test_composites_fill_the_ground_and_average_down() -> None:
    rgba = np.zeros((1, 128, 128, 4), np.uint8)
    rgba[0, :, :64] = (10, 20, 30, 255)
    pictures = PictureSet([RECORD], rgba)
    picture = pictures.composite(0, GROUNDS["red"], 64)
    assert picture.shape == (64, 64, 3)
    assert picture[5, 5].tolist() == [10, 20, 30]
    assert picture[5, 60].tolist() == list(GROUNDS["red"])
    rgba[0, :, :, 3] = 128
    assert np.abs(PictureSet([RECORD], rgba).composite(0)[5, 5].astype(int) - [132, 137, 142]).max() <= 1


def test_records_survive_the_cache() -> None:
    assert Record.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD
    with pytest.raises(ValueError, match="1 records but 2 pictures"):
        PictureSet([RECORD], np.zeros((2, 128, 128, 4), np.uint8))


def test_the_notice_credits_what_must_be_credited() -> None:
    text = notice_text()
    assert "CC-BY 4.0" in text
    assert all(package.name in text for package in DEFAULT_PACKAGES)


def test_icons_are_matched_by_label_or_unicode_name() -> None:
    labels = {"1f43b": "bear", "2601": "cloud", "1f1f5-1f1ea": "flag: Peru", "1f52b": "water pistol", "1f4a3": "bomb"}
    icons = ["cloud-2", "cloud-1", "bear-face", "flag-for-peru", "pistol", "bombs"]
    assert match_names(icons, labels) == {"1f43b": "bear-face", "2601": "cloud-1", "1f1f5-1f1ea": "flag-for-peru"}
    # An unnumbered drawing goes first; one that two labels share stands for neither; labels go before Unicode names.
    assert match_names(["cloud-1", "cloud"], labels) == {"2601": "cloud"}
    assert match_names(["twin"], {"1f43b": "twin", "2601": "Twin!"}) == {}
    assert match_names(["bear-face"], {"1f43b": "ursine", "2601": "bear face"}) == {"2601": "bear-face"}


def _first(condition: Callable[[str], bool]) -> str:
    return next(code for code in (f"{number:05x}" for number in range(0x1F300, 0x1FFFF)) if condition(code))


@pytest.fixture
def with_extra(tmp_path: Path) -> tuple[Path, list[Package], dict[str, str]]:
    """A cache root with three tested sets and two training-only ones, ``blob`` near the set ``one``."""
    tested = ("one", "two", "three")

    def fate(code: str) -> set[tuple[str, str]]:
        return {(style, split) for (_, style), split in assign_splits((code, style) for style in tested).items()}

    codes = {
        "plain": _first(lambda code: {split for _, split in fate(code)} == {"train"}),
        "pair of one": _first(lambda code: ("one", "unseen_pair") in fate(code)),
        "pair of two": _first(lambda code: ("two", "unseen_pair") in fate(code)),
        "unseen": _first(lambda code: ("one", "unseen_concept") in fate(code)),
    }
    fetched = tmp_path / "data" / "packages"
    fetched.mkdir(parents=True)
    labels = [{"label": label, "hexcode": code, "group": 8} for label, code in codes.items()]
    drawn = {label.replace(" ", "-"): {"body": RED_DISC} for label in codes}
    chars = {code: label.replace(" ", "-") for label, code in codes.items()}
    made = []
    for name in ("labels", *tested, "blob", "other"):
        extra = name in ("blob", "other")
        members = {
            "package/icons.json": dump({"width": 16, "height": 16, "icons": drawn}),
            "package/chars.json": dump({} if extra else chars),
        }
        package = Package(
            name, "1.0.0", "", "MIT", f"{name} credit.", "" if name == "labels" else name,
            training_only=extra, near="one" if name == "blob" else "",
        )  # fmt: skip
        pack(
            fetched / package.file_name,
            {"package/en/data.json": dump(labels)} if name == "labels" else members,
        )
        made.append(replace(package, sha256=digest_of(fetched / package.file_name)))
    return tmp_path / "data", made, codes


def test_training_only_sets_lose_what_is_held_out_and_change_no_split(
    with_extra: tuple[Path, list[Package], dict[str, str]],
) -> None:
    root, made, codes = with_extra
    before = build_pictures(root, [p for p in made if not p.training_only], processes=1).records
    pictures = build_pictures(root, made, processes=1)
    assert pictures.records[: len(before)] == before, "the tested sets are the same, and come first"
    added = pictures.records[len(before) :]
    assert {(r.style, r.label) for r in added} == {
        ("blob", "plain"), ("blob", "pair of two"),
        ("other", "plain"), ("other", "pair of one"), ("other", "pair of two"),
    }  # fmt: skip
    assert all(r.split == "train" and r.training_only for r in added)
    assert not any(r.training_only for r in before)
    assert pictures.rgba.shape == (len(pictures.records), 256, 256, 4)
    assert pictures.rgba[-1][128, 128].tolist() == [255, 0, 0, 255]
    assert pictures.meta["held_back"] == 3 and pictures.meta["not_rendered"] == 0
    assert codes["unseen"] not in {r.hexcode for r in added}
    assert "blob credit." in (root / "NOTICE").read_text()


def test_the_twin_of_a_held_out_drawing_is_held_back_too() -> None:
    held = held_drawings({("1f3c3", "noto"): "unseen_pair", ("1f3c3", "twemoji"): "train"})
    twin = next(
        code for code in ("1f3c3-200d-2642", "1f3c3-200d-2640", "1f3c3-200d-27a1") if not is_unseen_concept(code)
    )
    assert not may_train(twin, "noto", held)
    assert may_train(twin, "twemoji", held) and may_train(twin, "", held)


def test_which_default_packages_are_tested() -> None:
    tested = {p.style for p in DEFAULT_PACKAGES if p.style and not p.training_only}
    assert tested == {"noto", "twemoji", "fluent flat", "fluent 3d"}, "else the test sets are others"
    assert {p.style: p.near for p in DEFAULT_PACKAGES if p.near} == {"noto blob": "noto", "fxemoji": "twemoji"}

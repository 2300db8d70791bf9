"""Builds the picture cache: fetch the packages, join pictures with labels, render, split, write."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.embedded.data.dataset import META_FILE, PICTURE_SIZE, PIXELS_FILE, RECORDS_FILE, PictureSet, Record
from training.embedded.data.names import match_names
from training.embedded.data.sources import DEFAULT_PACKAGES, LABELS, Package, SourceError, Tarball, fetch, notice_text
from training.embedded.data.split import assign_splits, held_drawings, may_train

FORMAT = 3
SKIN_TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


def normalise_hexcode(code: str) -> str:
    """Lower case, variation selectors dropped: the sets disagree about them."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def base_of(hexcode: str) -> str:
    """The concept: the code without skin tones."""
    return "-".join(part for part in hexcode.split("-") if part not in SKIN_TONES)


@dataclass(frozen=True)
class Drawing:
    """A picture before rendering: SVG text or an encoded raster."""

    hexcode: str
    style: str
    content: str | bytes


def svg_drawings(package: Package, tarball: Tarball, names: dict[str, str]) -> Iterator[Drawing]:
    """Drawings of an Iconify set; ``names`` is code -> icon name: its ``chars.json``, or found by name."""
    icons = tarball.read_json("icons.json")
    for code, name in names.items():
        icon = icons["icons"].get(name)
        if icon is None or not re.fullmatch(r"[0-9a-fA-F-]+", code):
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        yield Drawing(
            normalise_hexcode(code),
            package.style,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{PICTURE_SIZE}" height="{PICTURE_SIZE}">{icon["body"]}</svg>',
        )


def raster_drawings(package: Package, tarball: Tarball) -> Iterator[Drawing]:
    """Drawings of a set of WebP or PNG files named by code."""
    for name in sorted(tarball.names):
        stem, _, suffix = name.rpartition("/")[2].rpartition(".")
        if suffix in ("webp", "png") and re.fullmatch(r"[0-9a-fA-F-]+", stem):
            yield Drawing(normalise_hexcode(stem), package.style, tarball.read(name))


def render(drawing: Drawing) -> NDArray[np.uint8] | None:
    """(side, side, 4) uint8 straight-alpha RGBA, or None where the drawing is broken."""
    import resvg_py

    try:
        if isinstance(drawing.content, str):
            data = bytes(resvg_py.svg_to_bytes(svg_string=drawing.content, width=PICTURE_SIZE, height=PICTURE_SIZE))
        else:
            data = drawing.content
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
    except (ValueError, OSError):  # a few SVGs of the sets are not valid; they are counted in meta.json
        return None
    if picture.size != (PICTURE_SIZE, PICTURE_SIZE):
        picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def label_table(tarball: Tarball) -> dict[str, dict[str, Any]]:
    """Hexcode -> emojibase entry (label, tags, group), skin-tone variants left out."""
    return {normalise_hexcode(entry["hexcode"]): entry for entry in tarball.read_json("en/data.json")}


def collect_drawings(
    packages: Sequence[Package], tarballs: dict[str, Tarball], labels: dict[str, dict[str, Any]]
) -> list[Drawing]:
    """All labelled drawings, one a (hexcode, style), in the order of the packages."""
    seen, drawings = set(), []
    words = {code: entry["label"] for code, entry in labels.items()}
    for package in packages:
        if not package.style:
            continue
        tarball = tarballs[package.name]
        if "icons.json" in tarball.names:
            source = tarballs.get(package.names_from or package.name)
            if source is None:
                raise SourceError(f"{package.name} needs the package {package.names_from} for its names: add it")
            names = source.read_json("chars.json")
            if not names and package.training_only:
                names = match_names(tarball.read_json("icons.json")["icons"], words)
            found: Iterable[Drawing] = svg_drawings(package, tarball, names)
        else:
            found = raster_drawings(package, tarball)
        for drawing in found:
            key = (drawing.hexcode, drawing.style)
            if drawing.hexcode in labels and key not in seen:
                seen.add(key)
                drawings.append(drawing)
    return drawings


def build_pictures(
    root: Path,
    packages: Sequence[Package] = DEFAULT_PACKAGES,
    *,
    processes: int = 2,
    force: bool = False,
    progress: Progress | None = None,
) -> PictureSet:
    """Builds the cache in ``root`` unless it is there and was made from the same packages.

    The tarballs stay in ``root/packages``, so an interrupted run fetches only what is missing; the record file and the
    array appear under their names only when they are whole, ``meta.json`` last.

    Raises:
        SourceError: a package cannot be fetched, has another digest, or nothing could be joined.
    """
    wanted = [asdict(package) for package in packages]
    meta_path = root / META_FILE
    if meta_path.is_file() and not force:
        meta = json.loads(meta_path.read_text())
        if meta.get("format") == FORMAT and meta.get("packages") == wanted:
            return PictureSet.load(root)
    tarballs = {package.name: Tarball(fetch(package, root / "packages")) for package in packages}
    label_package = next((p for p in packages if not p.style), LABELS)
    if label_package.name not in tarballs:
        raise SourceError("no package with labels was given: add emojibase-data to the packages")
    labels = label_table(tarballs[label_package.name])
    drawings = collect_drawings(packages, tarballs, labels)
    if not drawings:
        raise SourceError("no picture matches a label: the packages hold other codes than emojibase-data's")

    # Pictures of training-only packages come last: which of them may be there depends on the split of the others.
    extra = {package.style: package for package in packages if package.training_only}
    tested = [drawing for drawing in drawings if drawing.style not in extra]
    waiting = [drawing for drawing in drawings if drawing.style in extra]
    kept: list[Drawing] = []
    scratch = root / f"{PIXELS_FILE}.partial"
    pixels = np.lib.format.open_memmap(
        scratch, mode="w+", dtype=np.uint8, shape=(len(drawings), PICTURE_SIZE, PICTURE_SIZE, 4)
    )
    done = 0
    with multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else _SerialPool() as pool:

        def render_all(chosen: Sequence[Drawing], total: int) -> None:
            nonlocal done
            for drawing, picture in zip(chosen, pool.imap(render, chosen, 32), strict=True):
                done += 1
                if picture is not None:
                    pixels[len(kept)] = picture
                    kept.append(drawing)
                if progress is not None:
                    progress(done, total)

        render_all(tested, len(drawings))
        splits = assign_splits((base_of(d.hexcode), d.style) for d in kept)
        held = held_drawings(splits)
        allowed = [d for d in waiting if may_train(base_of(d.hexcode), extra[d.style].near, held)]
        render_all(allowed, len(tested) + len(allowed))
    pixels.flush()
    if len(kept) < len(drawings):  # held-out and broken drawings leave a tail behind
        shorter = root / f"{PIXELS_FILE}.shorter"
        with shorter.open("wb") as file:
            np.save(file, pixels[: len(kept)], allow_pickle=False)
        os.replace(shorter, scratch)

    records = []
    for drawing in kept:
        entry, base = labels[drawing.hexcode], base_of(drawing.hexcode)
        records.append(
            Record(
                drawing.hexcode,
                base,
                drawing.style,
                entry["label"],
                tuple(entry.get("tags", ())),
                entry.get("group"),
                splits.get((base, drawing.style), "train"),
                drawing.style in extra,
            )
        )
    os.replace(scratch, root / PIXELS_FILE)
    _write_json(root / RECORDS_FILE, [record.to_dict() for record in records])
    (root / "NOTICE").write_text(notice_text({package.name: package.credit for package in packages}))
    _write_json(
        meta_path,
        {
            "format": FORMAT,
            "packages": wanted,
            "pictures": len(records),
            "held_back": len(waiting) - len(allowed),
            "not_rendered": len(tested) + len(allowed) - len(kept),
            "split": {s: sum(r.split == s for r in records) for s in ("train", "unseen_pair", "unseen_concept")},
        },
    )
    return PictureSet.load(root)


class _SerialPool:
    """The one-process stand-in for a pool."""

    def __enter__(self) -> _SerialPool:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @staticmethod
    def imap(
        function: Callable[[Drawing], NDArray[np.uint8] | None], items: Iterable[Drawing], chunksize: int = 1
    ) -> Iterator[NDArray[np.uint8] | None]:
        return map(function, items)


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(json.dumps(value, ensure_ascii=False))
    os.replace(scratch, path)

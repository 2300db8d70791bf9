"""The page of a blind study: one HTML file that needs no network, and apart from it the key that tells who is who."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from training.evaluate.shared.sources import FILMS, Source
from training.runtime.files import write_json, write_text

PAGE, KEY = "study.html", "key.json"
SIDES = ("left", "right")
_TEMPLATE = Path(__file__).with_name("page.html")


def make_study(
    first: Source, second: Source, prompts: Sequence[str], out: Path, *, trials: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Writes ``study.html``, which says nothing of the sources, and ``key.json`` into `out`.

    Args:
        first, second: of the same prompts and sampling seeds.
        trials: how many prompts, drawn at random; all when None.
        seed: of the choice of prompts, their order, and of the sides, of which each source gets half.

    Returns:
        the content of ``key.json``.

    Raises:
        ValueError: sources of other media or seeds, or more trials than prompts.
    """
    if list(first.files) != list(second.files):
        raise ValueError(f"{first.name} has sampling seeds {list(first.files)}, {second.name} has {list(second.files)}")
    count = len(prompts) if trials is None else trials
    if not 1 <= count <= len(prompts):
        raise ValueError(f"{count} trials of {len(prompts)} prompts: give 1 to {len(prompts)}")
    draw = random.Random(seed)
    rows = draw.sample(range(len(prompts)), count)
    flipped = [place % 2 == 1 for place in range(count)]
    draw.shuffle(flipped)
    key, shown = [], []
    for trial, (row, flip) in enumerate(zip(rows, flipped, strict=True), start=1):
        sampling_seed = draw.choice(list(first.files))
        pair = [source.files[sampling_seed][row] for source in (first, second)]
        if len({path.suffix in FILMS for path in pair}) > 1:
            raise ValueError(f"{pair[0]} and {pair[1]}: one is a film and the other a picture")
        sides = dict(zip(SIDES, ("second", "first") if flip else ("first", "second"), strict=True))
        media = dict(zip(("first", "second"), map(_embedded, pair), strict=True))
        shown.append({"trial": trial, "prompt": prompts[row], **{side: media[sides[side]] for side in SIDES}})
        key.append({"trial": trial, "prompt": prompts[row], "sampling_seed": sampling_seed, **sides})
    content = {"kind": "film" if pair[0].suffix in FILMS else "picture", "trials": shown}
    study = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    record = {
        "study": study,
        "seed": seed,
        "first": {"name": first.name, "made": dict(first.made)},
        "second": {"name": second.name, "made": dict(second.made)},
        "trials": key,
    }
    write_text(out / PAGE, _page({"study": study, **content}))
    write_json(out / KEY, record)
    return record


def _embedded(path: Path) -> str:
    """A data URL: of a film its bytes, of a picture its pixels alone, since a file may name what drew it."""
    if path.suffix in FILMS:
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    plain = io.BytesIO()
    with Image.open(path) as picture:
        bare = Image.new("RGB", picture.size)
        bare.paste(picture.convert("RGB"))
        bare.save(plain, format="PNG")
    return "data:image/png;base64," + base64.b64encode(plain.getvalue()).decode()


def _page(content: dict[str, Any]) -> str:
    """The template with the study's data, and with a policy that lets it run its own script and ask nothing."""
    page = _TEMPLATE.read_text(encoding="utf-8")
    script = page.split("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(content).replace("<", "\\u003c")  # no text may end the element it stands in
    return page.replace("{{SCRIPT_DIGEST}}", digest).replace("{{STUDY}}", data)

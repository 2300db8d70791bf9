"""A distilled decoder's folder: weights, the record of what it stands for, and a card that says what it costs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rmd.cascade_file import write_cascade_json
from rmd.checkpoint import DECODER_RECORD, CheckpointFolder
from rmd.fields import read_json
from training.runtime.files import save_model, write_json, write_text

FORMAT = 1


def write_decoder(out: Path, model: Any, checkpoint: CheckpointFolder) -> Path:
    """Write the weights (bfloat16) and the least of the record, by which the folder can be loaded and measured.

    Args:
        out: the folder; an older one is replaced.
        model: an ``AutoencoderTiny``.
        checkpoint: whose autoencoder it stands for.

    Raises:
        ValueError: ``out`` holds something else than a decoder.
    """
    check_decoder_out(out)
    save_model(model, out, torch.bfloat16)
    config = read_json(out / "config.json")
    config.pop("block_out_channels", None)  # the class writes it, and warns of it when it reads
    write_json(out / "config.json", config)
    write_json(out / DECODER_RECORD, _identity(checkpoint))
    return out


def _identity(checkpoint: CheckpointFolder) -> dict[str, Any]:
    return {"format": FORMAT, "backbone": checkpoint.backbone_name, "autoencoder": checkpoint.digest("vae")}


def check_decoder_out(out: Path) -> None:
    """Refuse to replace a folder that is no decoder of ours.

    Raises:
        ValueError: it holds files, and no record.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / DECODER_RECORD).is_file()):
        raise ValueError(f"--out {out} exists and holds no decoder ({DECODER_RECORD}): choose another folder")


def write_record(out: Path, checkpoint: CheckpointFolder, record: Mapping[str, Any]) -> None:
    """Add how the decoder was made and what was measured, the card, and the credits of what it was made from."""
    write_json(out / DECODER_RECORD, {**_identity(checkpoint), **record})
    write_text(out / "README.md", decoder_card(out.name, checkpoint, record))
    notice = checkpoint.path / "NOTICE"
    if notice.is_file():
        shutil.copyfile(notice, out / "NOTICE")


def name_decoder(checkpoint: CheckpointFolder, out: Path) -> None:
    """Write the decoder into the checkpoint's `cascade.json`: it decodes there unless another is asked for."""
    folder = Path.cwd() / checkpoint.path
    write_cascade_json(
        checkpoint.path,
        backbone=checkpoint.backbone_name,
        cascades=checkpoint.cascades,
        default=checkpoint.default,
        teacher=checkpoint.teacher,
        distillation=checkpoint.distillation,
        decoder=os.path.relpath((Path.cwd() / out).resolve(), folder.resolve()),
    )


def decoder_card(name: str, checkpoint: CheckpointFolder, record: Mapping[str, Any]) -> str:
    """The README of a decoder's folder."""
    settings, training, time = record["settings"], record["training"], record["seconds"]
    rows = "\n".join(
        f"| {size} | {e['pictures']} | {e['psnr']:.1f} | {e['psnr_worst_twentieth']:.1f} | {e['mean_error']:.2f} | "
        f"{_optional(e, 'psnr_noised', '{:.1f}')} | {_optional(e, 'features_relative_l2', '{:.3f}')} | {_kid(e)} |"
        for size, e in record["quality"].items()
    )
    terms = [f"pixels (L1 of values and of their differences, weight {settings['pixel']:g})"] * bool(settings["pixel"])
    if settings["perceptual"]:
        when = f", over the last {1 - settings['perceptual_from']:.0%} of the run" * bool(settings["perceptual_from"])
        terms.append(f"EfficientNet-Lite0 features at five depths (weight {settings['perceptual']:g}{when})")
    if settings["adversarial"]:
        when = f", over the last {1 - settings['adversarial_from']:.0%} of the run"
        terms.append(f"a patch discriminator (weight {settings['adversarial']:g}{when})")
    listed = "\n".join(f"- {term}" for term in terms)
    caution = (
        "\nThe features are of the network that it was trained on: those two columns flatter it; the dB do not.\n"
        if settings["perceptual"] and any("kid_x1000" in e for e in record["quality"].values())
        else ""
    )
    size = list(record["quality"])[-1]
    return f"""# {name}

A small decoder for the backbone `{checkpoint.backbone_name}`: an `AutoencoderTiny` of diffusers with
{record["parameters"]:,} parameters in its decoder ({settings["width"]} channels, blocks {_plain(settings["blocks"])}),
distilled from that of the autoencoder in `{checkpoint.path.name}` ({record["full_parameters"]:,} parameters).

It takes latents as the denoiser leaves them. Its encoder was not trained: encode with the full autoencoder. Where
`out_channels` is not 3, the pixels are packed, and `torch.nn.functional.pixel_shuffle` unpacks them.

## What it costs

Against the full decoder, on latents that it was not trained on:

| latents | pictures | PSNR, dB | worst twentieth | mean error of 255 | PSNR, noised | features, L2 | KID x 1e3 |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}

Noised: with noise of standard deviation {settings["noise"]:g} on the latents. Features: the distance of the two
pictures' EfficientNet-Lite0 features over the spread of the set's; KID is between the two sets on the same features.
{caution}
One picture of {size}: {1000 * time["small"]:.2f} ms against {1000 * time["full"]:.2f} ms, {time["ratio"]:.1f} times as
fast ({time["dtype"]}, eager, {time["where"]}).

## How it was made

Without pictures of any data set: on {training["latents"]} samples of the student's ({training["schedule"]}) and their
noised neighbours, {training["iterations"]} updates of {settings["batch"]} in {training["seconds"]} seconds on
{", ".join(training["devices"])}. Compared by:

{listed}

```
rmd generate --checkpoint path/to/{checkpoint.path.name} --decoder path/to/{name} "a prompt"
rmd generate --checkpoint path/to/{checkpoint.path.name} --decoder full "a prompt"
```

Credits and licences: those of the autoencoder and of the student (NOTICE).
"""


def _plain(blocks: Any) -> str:
    return ", ".join(map(str, blocks))


def _optional(entry: Mapping[str, Any], name: str, shape: str) -> str:
    return shape.format(entry[name]) if name in entry else ""


def _kid(entry: Mapping[str, Any]) -> str:
    return "{:.1f} ± {:.1f}".format(*entry["kid_x1000"]) if "kid_x1000" in entry else ""

"""Tiny networks of the very diffusers classes that the large backbones use, with random weights.

:func:`write_tiny_folder` writes a complete diffusers folder (tokenizers, scheduler, ``cascade.json``) of well under a
megabyte, so that loading, every stage, decoding, engines and the server can be run whole, offline, in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rmd.backbones.base import BackboneError
from rmd.backbones.configs import CONFIGURED, published_config
from rmd.backbones.decoders import TINY, small_decoder_config
from rmd.backbones.random_weights import resolve
from rmd.backbones.registry import get_backbone
from rmd.cascade import Cascade
from rmd.profiles import PROFILES
from rmd.size import Size

TINY_BACKBONES = CONFIGURED

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 32,
    "vocab_size": 514,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 128}
_VAE = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}

# Only what differs from the published configuration: everything else is the real thing.
_OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {
        "unet": {
            "addition_time_embed_dim": 8,
            "attention_head_dim": [2, 4],
            "block_out_channels": [32, 64],
            "cross_attention_dim": 64,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "projection_class_embeddings_input_dim": 80,
            "sample_size": 8,
            "transformer_layers_per_block": [1, 2],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        "vae": _VAE,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
    },
    "pixart": {
        # sample_size stays 128: that is how diffusers knows the networks that are told their size.
        "transformer": {
            "attention_head_dim": 24,
            "caption_channels": 32,
            "cross_attention_dim": 48,
            "num_attention_heads": 2,
            "num_layers": 2,
        },
        "vae": _VAE,
        "text_encoder": _T5,
    },
    "sd3": {
        "transformer": {
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "dual_attention_layers": [0],
            "joint_attention_dim": 64,
            "num_attention_heads": 2,
            "num_layers": 2,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        "vae": _VAE,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": {**_T5, "d_model": 64},
    },
}
_WAN: dict[str, dict[str, Any]] = {
    "transformer": {
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "freq_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "text_dim": 32,
    },
    "vae": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "text_encoder": _T5,
}
_OVERRIDES["embedded"] = {
    "transformer": {
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "pooled_projection_dim": 32,
    },
    "vae": {"blocks": [1, 1], "widths": [16, 16]},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 192,
    },
}
_OVERRIDES["embedded-video"] = _OVERRIDES["embedded"]
_OVERRIDES["wan-1.3b"] = _OVERRIDES["wan-14b"] = _WAN


def tiny_config(name: str) -> dict[str, dict[str, Any]]:
    """Component configurations of the tiny variant of backbone ``name``, for ``from_config``.

    Raises:
        BackboneError: there is no tiny variant of that name.
    """
    if name not in _OVERRIDES:
        raise BackboneError(f"no tiny configuration for {name!r}; there are {', '.join(_OVERRIDES)}")
    config = published_config(name)
    for component, overrides in _OVERRIDES[name].items():
        config[component].update(overrides)
    return config


def tiny_sizes(name: str) -> tuple[Size, Size]:
    """The low and the full size of the tiny variant."""
    if get_backbone(name).media == "video":
        return Size(32, 32, 5), Size(48, 48, 5)
    return Size(32, 32), Size(64, 64)


def tiny_cascades(name: str) -> dict[str, Cascade]:
    """The backbone's default cascade and the one-stage schedule of as many steps, at :func:`tiny_sizes`."""
    profile = PROFILES[get_backbone(name).profile]
    low, full = tiny_sizes(name)
    split = profile.default_split
    steps = sum(int(part) for part in split.split("+"))
    options: dict[str, Any] = {
        "flow_shift": profile.flow_shift,
        "transition_noise_intensity": profile.transition_noise_intensity,
    }
    timesteps = profile.teacher_timesteps(steps)
    two = Cascade.from_thresholds(
        f"{name}-tiny", profile.noise_schedule(), (low, full), timesteps, profile.thresholds[split], **options
    )
    one = Cascade.from_steps(f"{name}-tiny", timesteps, [full] * steps, **options)
    return {two.schedule_name: two, one.schedule_name: one}


def write_tiny_folder(name: str, folder: Path | str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a complete checkpoint folder of the tiny variant of backbone ``name``; the same seed, the same bytes.

    Args:
        name: one of :data:`TINY_BACKBONES`.
        folder: made if absent.
        seed: of the random weights.
        dtype: of the stored weights.

    Returns:
        ``folder``.
    """
    from rmd.cascade_file import write_cascade_json
    from rmd.checkpoint import TeacherSpec

    config = tiny_config(name)
    cls = get_backbone(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    components: Mapping[str, str] = cls.components  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        for number, (component, target) in enumerate(components.items()):
            torch.manual_seed(seed * 1000 + number)
            network = _network(target, config[component])
            if dtype != torch.float32:
                network = network.to(dtype)
            network.save_pretrained(folder / component, safe_serialization=True)
    for component, (_, class_name) in ((k, v) for k, v in config["model_index"].items() if isinstance(v, list)):
        if component.startswith("tokenizer"):
            _TOKENIZERS[class_name.removesuffix("Fast")](folder / component)
    _write_json(folder / "scheduler" / "scheduler_config.json", config["scheduler"])
    _write_json(folder / "model_index.json", config["model_index"])
    profile = PROFILES[cls.profile]
    cascades = tiny_cascades(name)
    write_cascade_json(
        folder,
        backbone=name,
        cascades=cascades,
        default=profile.default_split,
        teacher=TeacherSpec(profile.teacher_steps, profile.teacher_guidance, profile.flow_shift, folder="."),
        distillation={"method": "none", "note": "random weights, for tests and examples"},
    )
    return folder


def write_tiny_decoder(name: str, folder: Path | str, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a small decoder with random weights that fits the tiny (and the full-size) backbone ``name``.

    Args:
        name: one of :data:`TINY_BACKBONES`.
        folder: made if absent.
        seed: of the random weights.
        changes: fields of its configuration that are to differ.

    Returns:
        ``folder``.
    """
    cls = get_backbone(name)
    target: str = cls.small_decoder  # type: ignore[attr-defined]
    if target == TINY:
        config = small_decoder_config(cls.latent_channels, cls.spatial_compression, (1, 1, 1, 1), 8)
    else:
        config = {**tiny_config(name)["vae"], "base_dim": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _network(target, {**config, **changes}).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def _network(target: str, config: Mapping[str, Any]) -> Any:
    cls = resolve(target)
    if hasattr(cls, "config_class"):
        return cls(cls.config_class(**{k: v for k, v in config.items() if k != "architectures"})).eval()
    return cls.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()


def _clip_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows single bytes only: 2 x 256 pieces, begin and end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)


def _t5_tokenizer(folder: Path) -> None:
    """A T5 tokenizer that knows the printable ASCII characters."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary = [*special, *((chr(code), -3.0) for code in range(33, 127))]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)


def _bert_tokenizer(folder: Path) -> None:
    """A lower-casing word-piece tokenizer that knows the printable ASCII characters."""
    from transformers import BertTokenizerFast

    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=512).save_pretrained(folder)


_TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "CLIPTokenizer": _clip_tokenizer,
    "T5Tokenizer": _t5_tokenizer,
    "BertTokenizer": _bert_tokenizer,
}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

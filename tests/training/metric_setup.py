"""Tiny random weights of the metrics' own classes, and CLIP written anew under open_clip's names."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from rmd.backbones.tiny import _clip_tokenizer

WIDTH, SIDE, PATCH, EMBED = 32, 32, 8, 16
_TOWER = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
VISION = {**_TOWER, "image_size": SIDE, "patch_size": PATCH, "projection_dim": EMBED}
TEXT = {**_TOWER, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        layers = {"c_fc": nn.Linear(WIDTH, 64), "gelu": nn.GELU(), "c_proj": nn.Linear(64, WIDTH)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = _Transformer()
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        return self.ln_post(self.transformer(self.ln_pre(tokens + self.positional_embedding))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as its paper defines it, the weights named as open_clip names them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = _Visual(), _Transformer()
        self.token_embedding = nn.Embedding(514, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(77, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        for name, parameter in self.named_parameters():
            if "ln_" in name or name.endswith("bias"):  # else they are ones and zeros, and a mix-up would not show
                nn.init.normal_(parameter)

    def encode_text(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        mask = torch.full((count, count), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:count]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection


def clip_config() -> CLIPConfig:
    texts = {**TEXT, "hidden_act": "gelu", "projection_dim": EMBED}
    return CLIPConfig(text_config=texts, vision_config={**VISION, "hidden_act": "gelu"}, projection_dim=EMBED)


def write_hps(folder: Path) -> OpenClip:
    """Weights under open_clip's names, behind the prefix that the published file has."""
    torch.manual_seed(1)
    network = OpenClip().eval()
    folder.mkdir(parents=True)
    save_file({f"model.{name}": value for name, value in network.state_dict().items()}, folder / "model.safetensors")
    clip_config().save_pretrained(folder)
    _prepare(folder)
    return network


def write_clip(folder: Path) -> CLIPModel:
    """A transformers folder."""
    torch.manual_seed(2)
    model = CLIPModel(clip_config()).eval()
    model.save_pretrained(folder)
    _prepare(folder)
    return model


def write_aesthetic(folder: Path) -> tuple[CLIPVisionModelWithProjection, list[nn.Linear]]:
    """A vision tower and linear layers in one file."""
    torch.manual_seed(3)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    model.save_pretrained(folder)
    layers = [nn.Linear(EMBED, 8), nn.Linear(8, 4), nn.Linear(4, 1)]
    tensors = dict(model.state_dict())
    for number, layer in zip((0, 2, 7), layers, strict=True):  # dropout stands between them
        tensors |= {f"layers.{number}.weight": layer.weight.data, f"layers.{number}.bias": layer.bias.data}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _prepare(folder)
    return model, layers


def _prepare(folder: Path) -> None:
    _clip_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )

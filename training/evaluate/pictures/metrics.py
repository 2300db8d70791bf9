"""The metrics of pictures, each by a network from a folder of its own: what each needs, and its score of a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from rmd.weight_files import check_weights, folder_digest
from training.evaluate.pictures.networks import load_clip, load_head, load_image_processor, load_tokenizer, load_vision


class Metric(ABC):
    """A score of one picture for its prompt.

    Attributes:
        key: its folder's name, and its key in reports.
        title: for people.
        needs: what its folder holds, and whose.
        hidden, layers: of the vision network that the figure is defined by.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[str]
    hidden: ClassVar[int]
    layers: ClassVar[int]

    def __init__(self, folder: Path, device: str) -> None:
        """Reads the network.

        Raises:
            FileNotFoundError: there is no such folder; the message says what to put there.
            ValueError: a file is missing, or its weights are pickled, broken, or another network's.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{self.title} needs {folder}: {self.needs}")
        try:
            check_weights(folder)
            self._read(folder, device)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.title}: {error}; {folder} is to hold {self.needs}") from error
        self.folder, self.device = folder, device

    @abstractmethod
    def _read(self, folder: Path, device: str) -> None: ...

    @abstractmethod
    def _vision(self) -> Any: ...

    @abstractmethod
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) scores, float32 on the CPU."""

    def _published(self) -> bool:
        """Whether the vision network has the size of the published one."""
        vision = self._vision()
        return (vision.hidden_size, vision.num_hidden_layers) == (self.hidden, self.layers)

    def provenance(self) -> dict[str, Any]:
        """Whose figure it is, as reports hold it."""
        vision = self._vision()
        network = f"{vision.num_hidden_layers} layers, {vision.hidden_size} wide, {vision.image_size} px"
        found = {"title": self.title, "folder": str(self.folder), "weights": folder_digest(self.folder)}
        return {**found, "network": network, "published": self._published()}


class _Clip(Metric):
    """A metric by both of CLIP's towers."""

    def _read(self, folder: Path, device: str) -> None:
        self.model = load_clip(folder, device)
        self.tokenizer = load_tokenizer(folder)
        self.processor = load_image_processor(folder, self.model.config.vision_config.image_size)

    def _vision(self) -> Any:
        return self.model.config.vision_config

    def cosines(self, pictures: Sequence[Image.Image], prompts: Sequence[str], **options: Any) -> Tensor:
        """(B,) cosines of pictures and prompts; a prompt is cut at 77 tokens."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        pixels = self.processor(list(pictures), return_tensors="pt", **options)
        with torch.inference_mode():
            found = self.model(**tokens.to(self.device), **pixels.to(self.device))
            cosines: Tensor = (found.image_embeds * found.text_embeds).sum(-1)
        return cosines.float().cpu()


class HumanPreference(_Clip):
    """HPS v2.1 (Wu et al. 2023): ``100 cos(picture, prompt)`` by a CLIP ViT-H/14 fine-tuned on preferences.

    As its authors have it, a picture is scaled to its longer side and padded with black, not cropped.
    """

    key, title = "hps", "HPS v2.1"
    needs = (
        "model.safetensors of RE-N-Y/hpsv21 (HPS v2.1 in open_clip's names; the authors publish a pickle only), and "
        "config.json, the tokenizer's files and preprocessor_config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
    hidden, layers = 1280, 32

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """See the class."""
        side = self._vision().image_size
        whole = [pad_to_square(picture, side) for picture in pictures]
        return 100 * self.cosines(whole, prompts, do_resize=False, do_center_crop=False)


class AestheticScore(Metric):
    """LAION's aesthetic score (improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE``): about 1 to 10.

    A chain of linear layers on the unit-length picture embedding of CLIP ViT-L/14; the prompt plays no part.
    """

    key, title = "aesthetic", "aesthetic score"
    needs = (
        "config.json, model.safetensors and preprocessor_config.json of "
        "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE (its Python files are not read)"
    )
    hidden, layers = 1024, 24

    def _read(self, folder: Path, device: str) -> None:
        self.model = load_vision(folder, device)
        self.head = load_head(folder, self.model.config.projection_dim, device)
        self.processor = load_image_processor(folder, self.model.config.image_size)

    def _vision(self) -> Any:
        return self.model.config

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """See the class."""
        pixels = self.processor(list(pictures), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            embedded = torch.nn.functional.normalize(self.model(**pixels).image_embeds, dim=-1)
            scores: Tensor = self.head(embedded)[:, 0]
        return scores.float().cpu()


class ClipScore(_Clip):
    """``100 max(cos(picture, prompt), 0)`` by any CLIP network (Hessel et al. 2021 with the factor 100).

    Figures of different networks do not compare; the paper names none.
    """

    key, title = "clip", "CLIP score"
    needs = (
        "a CLIP model in transformers' files (config.json, model.safetensors, the tokenizer's, "
        "preprocessor_config.json), such as openai/clip-vit-large-patch14"
    )
    hidden, layers = 768, 12  # the smallest published ones

    def _published(self) -> bool:
        vision = self._vision()
        return bool(vision.hidden_size >= self.hidden and vision.num_hidden_layers >= self.layers)

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """See the class."""
        return 100 * self.cosines(pictures, prompts).clamp(min=0)


METRICS: tuple[type[Metric], ...] = (HumanPreference, AestheticScore, ClipScore)


def pad_to_square(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side scaled to `side` (bicubic), in the middle of a black square."""
    scale = side / max(picture.size)
    if scale != 1:
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square

"""The embedded models' text encoder, rewritten: its weights are packed, its rows alike at every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.build.one import build_engine
from engines.compilers import get_compiler
from engines.compilers.base import EngineRequest
from engines.compilers.inductor.joined_bert import gelu
from engines.compilers.inductor.rewrites import rewrite, rewriting
from engines.plan.checkpoint import CheckpointPlan
from engines.plan.options import EngineOptions
from engines.store import EngineStore
from engines.target import this_machine
from engines.weights.bank import WeightBank
from rmd.backbones.embedded import MiniLMEncoder
from rmd.backbones.tiny import write_tiny_folder

LENGTH, VOCABULARY = 6, 128


def encoder(**overrides: object) -> MiniLMEncoder:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 16,
    }  # fmt: skip
    model = MiniLMEncoder(BertModel(BertConfig(**{**config, **overrides}), add_pooling_layer=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def prompts(count: int) -> dict[str, Tensor]:
    """Prompts of 1 to 6 tokens, the first full."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH - row % LENGTH for row in range(count)])
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


def test_the_joined_encoder_computes_the_same_from_the_same_parameters() -> None:
    module, inputs = encoder(), prompts(7)
    joined = rewrite(module, inputs)
    assert joined.name == rewriting(module) != ""
    assert (joined.module(**inputs) - module(**inputs)).abs().max() < 1e-5
    held = dict([*module.named_parameters(), *module.named_buffers()])
    for name, tensor in [*joined.module.named_parameters(), *joined.module.named_buffers()]:
        assert torch.equal(joined.sources[name].make(held), tensor), name


@pytest.mark.parametrize("other", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_encoders_of_another_kind_are_left_alone(other: dict[str, object]) -> None:
    module = encoder(**other)
    assert rewriting(module) == "" and rewrite(module, prompts(1)).module is module


def test_packed_engines_encode_each_prompt_alike_at_every_batch(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    module, compiler, store = encoder(), get_compiler("inductor"), EngineStore(tmp_path)
    inputs = prompts(4)
    outputs = []
    for batch in (1, 4):
        part = {name: tensor[-batch:] for name, tensor in inputs.items()}
        request = EngineRequest("text_encoder", None, module, part, this_machine("cpu"), "float32", "")
        manifest = build_engine(compiler, store, module, compiler.plan(request))
        assert manifest.weights_mode == "packed", manifest.note
        engine = compiler.load(manifest, tmp_path / manifest.key, WeightBank(encoder()))
        outputs.append(engine.run(part))
    alone, together = outputs
    assert torch.equal(alone, together[-1:])
    assert (together - module(**inputs)).abs().max() < 1e-4


def test_it_has_an_engine_for_more_than_one_prompt_only_where_rows_stay_alike(tmp_path: Path) -> None:
    def batches(family: str, backend: str) -> set[tuple[int, ...]]:
        folder = tmp_path / family
        checkpoint = folder if folder.exists() else write_tiny_folder(family, folder)
        plan = CheckpointPlan.read(checkpoint, EngineOptions(backend, "cpu", "float32", (1, 2, 4, 8)))
        return {engine.spec.batches for engine in plan.engines if engine.component == "text_encoder"}

    assert batches("embedded", "inductor") == {(1,), (4,)}
    assert batches("sd3", "inductor") == {(1,)}, "CLIP's products are the library's"
    assert batches("sd3", "eager") == {(1, 4)}


@pytest.mark.parametrize("own", [True, False])
def test_a_rewritten_one_has_it_with_either_librarys_products(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.compilers.inductor.settings.own_kernels", lambda dtype, cpu: own)
    options = EngineOptions("inductor", dtype="bfloat16", buckets=(1, 2, 4, 8))
    plan = CheckpointPlan.read(write_tiny_folder("embedded", tmp_path / "model"), options)
    specs = [engine.spec for engine in plan.engines if engine.component == "text_encoder"]
    assert {spec.batches for spec in specs} == {(1,), (4,)}


def test_gelu_is_the_exact_form() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert (gelu(x) - 0.5 * x * (1 + torch.erf(x / 2**0.5))).abs().max() < 1e-12

"""The families with gated DeltaNet against transformers: logits, gradients, greedy tokens, checkpoints both ways.

Traps: transformers lets packed documents of these families see each other, so those are compared here with separate
ones of ours; and class defaults rotate with base 1e4, so every case says its rotation.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovl.checkpoint.hf import KeyMap, load_hf_weights, save_hf, spec_of_directory
from nanovl.errors import CheckpointError
from nanovl.inference.engine import Engine
from nanovl.registry import family
from nanovl.spec import ModelSpec

VOCAB = 131
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "rms_norm_eps": 1e-4,  # the gated norm of an almost empty memory blows up rounding: by less so
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def rope(theta: float = 1e7, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": 0.5, **more}}


YARN = rope(1e6, "yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
BIASED = {"attention_bias": True, "num_key_value_heads": 1, "linear_num_key_heads": 4}
OTHER_LAYERS = {"layer_types": ["full_attention", "linear_attention", "linear_attention"]}


@dataclass(frozen=True)
class Family:
    """A transformers class and configs of it: the first is for every run, the others are slow."""

    name: str
    config: str
    common: dict[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)


FAMILIES = {
    "qwen3_next": Family(
        "Qwen3Next",
        "Qwen3NextConfig",
        EXPERTS,
        {
            "quarter": rope(partial_rotary_factor=0.25),
            "biased": {**BIASED, **YARN, "norm_topk_prob": False},
            "other layers": {**OTHER_LAYERS, **rope(), "num_hidden_layers": 3, "linear_conv_kernel_dim": 3},
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5",
        "Qwen3_5TextConfig",
        {"intermediate_size": 80},
        {
            "sections": {**rope(mrope_section=[2, 1, 1]), "linear_num_value_heads": 6},
            "tied": {**BIASED, **YARN, "tie_word_embeddings": True},
            "other layers": {**OTHER_LAYERS, **rope(1e4, partial_rotary_factor=1.0), "num_hidden_layers": 3},
        },
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5Moe",
        "Qwen3_5MoeTextConfig",
        EXPERTS,
        {
            "sections": rope(mrope_section=[2, 1, 1]),
            "more heads": {**BIASED, **rope(1e6), "linear_num_value_heads": 8, "num_experts_per_tok": 3},
        },
    ),
}


def cases(seeds: int = 1) -> list[Any]:
    """(family, case, seed) of every family; all but the first of each are slow."""
    found = []
    for name, of in FAMILIES.items():
        for i, case in enumerate(of.cases):
            for seed in range(seeds):
                marks = [pytest.mark.slow] if i or seed else []
                found.append(pytest.param(name, case, seed, marks=marks, id=f"{name}-{case}-{seed}"))
    return found


def hf_model(name: str, case: str, seed: int) -> transformers.PreTrainedModel:
    """A random model whose weights are large enough for mistakes to show; decays from slow to fast."""
    of = FAMILIES[name]
    config = getattr(transformers, of.config)(**{**SMALL, **of.common, **of.cases[case]})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{of.name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        start = float(parameter.mean().detach().round())  # 1 of norms that begin there
        std = {"A_log": 1.0, "conv1d": 0.5}.get(key.removesuffix(".weight").rpartition(".")[2], 0.1)
        nn.init.normal_(parameter, mean=start - 2.0 if "A_log" in key else start, std=std)
    return model.eval()


def imported(folder: Path) -> tuple[nn.Module, ModelSpec]:
    spec = spec_of_directory(folder)
    model = spec.family.model(spec.config)
    load_hf_weights(folder, model, spec)
    return model, spec


@cache
def pair(name: str, case: str, seed: int = 0) -> tuple[transformers.PreTrainedModel, nn.Module, ModelSpec]:
    """The same model, theirs and ours."""
    theirs = hf_model(name, case, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, spec = imported(Path(folder))
    assert spec.family.name == name
    return theirs, ours, spec


def random_tokens(seed: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def in_our_layout(theirs: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    names = KeyMap(spec.family.hf.key_rules(spec.config))  # type: ignore[union-attr]
    groups = dict.fromkeys(names.group(theirs=key) for key in theirs)
    found: dict[str, Tensor] = {}
    for group in groups:
        assert group is not None
        found |= zip(group.ours, group.to_ours([theirs[key] for key in group.theirs]), strict=True)
    return found


@pytest.mark.parametrize(("name", "case", "seed"), cases(seeds=3))
def test_logits_and_all_gradients(name: str, case: str, seed: int) -> None:
    theirs, ours, spec = pair(name, case, seed)
    tokens = random_tokens(seed, 70)  # a chunk, and part of one
    expected, actual = theirs(tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 5e-5
    for model, logits in ((theirs, expected), (ours, actual)):
        model.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    wanted = in_our_layout({key: p.grad for key, p in theirs.named_parameters()}, spec)
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[key]).norm() <= 1e-4 * wanted[key].norm(), key


@pytest.mark.parametrize(("name", "case", "seed"), cases())
@pytest.mark.parametrize("prefill", [512, 7])
def test_greedy_tokens(name: str, case: str, seed: int, prefill: int) -> None:
    theirs, ours, _ = pair(name, case)
    prompts = random_tokens(seed + 3, 17)
    expected = theirs.generate(prompts, max_new_tokens=20, do_sample=False)[:, 17:]
    completions = Engine(ours, prefill_tokens=prefill).generate(prompts.tolist(), max_tokens=20)
    assert [c.ids for c in completions] == expected.tolist()


@pytest.mark.parametrize(("name", "case", "seed"), cases())
def test_packed_documents_equal_separate_ones(name: str, case: str, seed: int) -> None:
    _, ours, _ = pair(name, case)
    lengths = (66, 1, 2, 30)
    tokens = random_tokens(seed + 1, sum(lengths))[:1]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(tokens, positions, (positions == 0).cumsum(1))
    separate = torch.cat([ours(part) for part in tokens.split(lengths, dim=1)], dim=1)
    assert (packed - separate).abs().max() < 3e-5  # other places in chunks, other rounding


@pytest.mark.parametrize(("name", "case", "seed"), cases())
def test_checkpoint_returns_bit_equal_and_loads_in_transformers(
    tmp_path: Path, name: str, case: str, seed: int
) -> None:
    theirs, ours, spec = pair(name, case)
    save_hf(tmp_path, dict(ours.named_parameters()), spec, torch.float32)
    again, info = type(theirs).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for (key, a), (_, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    tokens = random_tokens(seed, 20)
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)  # config.json says the same
    back, spec_again = imported(tmp_path)
    assert spec_again.config == spec.config
    for key, value in back.named_parameters():
        assert torch.equal(value, ours.get_parameter(key)), key


def test_stacked_experts_are_read_too_but_not_beside_single_ones(tmp_path: Path) -> None:
    theirs, ours, _ = pair("qwen3_5_moe", "sections")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    stacked = load_file(file)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked
    again, _ = imported(tmp_path)
    for key, value in again.named_parameters():
        assert torch.equal(value, ours.get_parameter(key)), key
    single = {
        f"model.layers.1.mlp.experts.{e}.down_proj.weight": stacked["model.layers.1.mlp.experts.down_proj"][e]
        for e in range(8)
    }
    save_file({**stacked, **{key: value.clone() for key, value in single.items()}}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"twice, in two layouts, layers\.1\.ffn\.experts\.down_proj"):
        imported(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    pair("qwen3_next", "quarter")[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]
    weights["mtp.fc.weight"] = torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path)
    assert "missing model.layers.2.mlp.experts.5.up_proj.weight" in str(error.value)
    assert "unknown mtp.fc.weight" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_flavors_are_as_large_as_those_of_transformers(name: str) -> None:
    found = family(name)
    assert found.hf is not None
    flavor = next(iter(found.flavors))
    said = found.hf.config_to_hf(found.flavors[flavor]())
    with torch.device("meta"):
        theirs = getattr(transformers, said["architectures"][0])(
            getattr(transformers, FAMILIES[name].config)(**said)
        )
        ours = found.model(found.flavors[flavor]())
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1]

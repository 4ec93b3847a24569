"""GPT-OSS, for test_families_hf.py, and what it alone has: clamped activations, experts in MXFP4.

Traps: transformers lets packed documents of this family see each other, so those are compared here with separate ones
of ours; it stretches where a config.json is silent; and it attends by its written-out form alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hf_pairs import (
    HfFamily,
    assert_same_logits_and_gradients,
    hf_model,
    imported,
    pair,
    random_tokens,
    rope,
    yarn,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanovl.errors import CheckpointError, ConfigError
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.mxfp4 import from_mxfp4
from nanovl.registry import family

FAMILIES = {
    "gpt_oss": HfFamily(
        "GptOss",
        {
            "yarn": {"rope_parameters": yarn(1.5e5, truncate=False)},
            "plain rotation": {
                "rope_parameters": rope(1e4),
                "num_key_value_heads": 4,
                "sliding_window": 3,
                "num_local_experts": 5,
                "num_experts_per_tok": 3,
                "tie_word_embeddings": True,
            },
            "other layers": {
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 1,
                "attention_bias": False,
                "rope_parameters": yarn(1e5, truncate=True, factor=4.0, attention_factor=1.1),
            },
        },
        {
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
}


def test_clamped_activations_and_their_gradients() -> None:
    """With the weights of the other tests, nothing reaches the limit of 7."""
    of = pair(FAMILIES["gpt_oss"], "yarn", 7)
    for model in (of.theirs, of.ours):
        for key, value in model.named_parameters():
            if ".experts.gate_" in key or ".experts.up_" in key:
                value.data *= 20
    beyond = []
    inner = of.ours.layers["1"].ffn.experts.inner  # type: ignore[index, union-attr]
    inner.register_forward_pre_hook(lambda _, args: beyond.extend(x.abs().gt(7).float().mean() for x in args))
    assert_same_logits_and_gradients(of, 7, limit=1e-4)
    assert all(0.1 < share < 0.9 for share in beyond)


def test_mxfp4_by_hand() -> None:
    # bytes 0x21, 0xF7: 0.5 and 1, then 6 and -6, all times 2^(129 - 127)
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., 0], blocks[..., 1] = 0x21, 0xF7
    found = from_mxfp4(blocks, torch.full((1, 1, 1), 129, dtype=torch.uint8))
    assert found.shape == (1, 1, 32)
    assert found.dtype == torch.bfloat16
    assert found[0, 0].tolist() == [2, 4, 24, -24] + 28 * [0]


def packed(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales, all bytes possible, of numbers below 1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)


def test_mxfp4_is_what_transformers_reads() -> None:
    blocks, _ = packed((3, 5, 256), 0)
    scales = torch.arange(255, dtype=torch.uint8).expand(3, 5, 255)  # 255 is not a number
    expected = convert_moe_packed_tensors(blocks[..., :255, :].contiguous(), scales.contiguous())
    found = from_mxfp4(blocks[..., :255, :], scales)
    assert torch.equal(found, expected.mT if found.shape != expected.shape else expected)


def in_mxfp4(folder: Path) -> transformers.PreTrainedModel:
    """A checkpoint as released ones are, in `folder`; and the same model with what transformers unpacks."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    theirs = hf_model(HfFamily("GptOss", {"": {**FAMILIES["gpt_oss"].common, **sizes}}), "")
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for i, layer in enumerate(theirs.model.layers):
        for linear, shape in (("gate_up_proj", (8, 64, 2)), ("down_proj", (8, 64, 1))):
            blocks, scales = packed(shape, 2 * i + len(linear))
            parameter = getattr(layer.mlp.experts, linear)
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            key = f"model.layers.{i}.mlp.experts.{linear}"
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def test_released_files_are_read(tmp_path: Path) -> None:
    theirs = in_mxfp4(tmp_path)
    ours, spec = imported(tmp_path)
    assert spec.family.name == "gpt_oss"
    tokens = random_tokens(0)
    expected, actual = theirs(tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 2e-5


def test_blocks_without_scales_are_missing_them(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swiglu_limit": 10.0}, "swiglu_limit = 10.0: gpt_oss here computes 7.0 alone"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention is none of"),
    ],
)
def test_other_config_json_is_refused(change: dict[str, object], message: str) -> None:
    found = family("gpt_oss")
    assert found.hf is not None
    said = found.hf.config_to_hf(found.flavors["debug"]())
    with pytest.raises(ConfigError, match=message):
        found.config_from_hf({**said, **change})


def test_other_experts_are_not_written() -> None:
    found = family("gpt_oss")
    config = found.flavors["debug"]()
    assert found.hf is not None
    config.blocks["full"].ffn.bias = False
    config.blocks["sliding"].ffn.output_scale = 0.5
    with pytest.raises(ConfigError) as caught:
        found.hf.config_to_hf(config)
    assert [m.partition(":")[0] for m in caught.value.mistakes] == [
        "model.blocks.full.ffn.bias = False",
        "model.blocks.sliding.ffn.output_scale = 0.5",
    ]
    config.blocks["sliding"].ffn = MlpConfig(intermediate_size=8)
    with pytest.raises(ConfigError, match="wants `sliding`, of attention and moe"):
        found.hf.config_to_hf(config)


def test_a_silent_config_json_is_stretched_as_transformers_does() -> None:
    found = family("gpt_oss")
    assert found.hf is not None
    config = found.flavors["20b"]()
    said = found.hf.config_to_hf(config)
    silent = {k: v for k, v in said.items() if not k.startswith("rope") and v is not None}
    assert found.config_from_hf(silent) == config
    theirs = transformers.GptOssConfig(**silent).rope_parameters
    scaling = config.blocks["full"].mixer.rope.scaling
    assert theirs["rope_theta"] == config.blocks["full"].mixer.rope.theta
    for key in ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings"):
        assert theirs[key] == getattr(scaling, key)

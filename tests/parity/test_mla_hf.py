"""Latent attention against transformers' DeepSeek-V3, its rotation of neighbouring channels permuted away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from nanovl.checkpoint.key_map import KeyMap
from nanovl.config.config_json import ConfigJson
from nanovl.models.blocks.attention import AttentionMeta
from nanovl.models.blocks.mla import LatentAttention, MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.models.hf_config import rope_of
from nanovl.models.hf_keys import latent_rules

SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek": ({"q_lora_rank": 24}, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "kimi": ({"q_lora_rank": 24}, {**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "moonlight": ({"q_lora_rank": None}, {"rope_type": "default", "rope_theta": 5e4}),
    "biased": ({"q_lora_rank": 24, "attention_bias": True}, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}),
}


def pair(case: str, seed: int) -> tuple[DeepseekV3Attention, nn.Module, LatentAttention]:
    """Theirs, its rotation, and ours with the same weights."""
    more, rope = CASES[case]
    hf = DeepseekV3Config(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        **SIZES,
        **more,
    )
    hf._attn_implementation = "eager"
    theirs = DeepseekV3Attention(hf, 0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        nn.init.normal_(
            parameter, mean=float(parameter.detach().mean().round()), std=0.3, generator=generator
        )
    config = MlaConfig(
        num_attention_heads=4,
        q_lora_rank=more["q_lora_rank"],
        rope=rope_of(ConfigJson(rope, "here"), 128),
        bias=more.get("attention_bias", False),
        **SIZES,
    )
    assert config.mistakes() == []
    ours = LatentAttention(config, 48, NormConfig(eps=1e-5, cast_before_scale=True))
    ours.load_state_dict(renamed(dict(theirs.named_parameters()), config))
    return theirs, DeepseekV3RotaryEmbedding(hf), ours


def renamed(tensors: dict[str, torch.Tensor], config: MlaConfig) -> dict[str, torch.Tensor]:
    """Tensors of one layer of theirs under our names, permuted; and back again they are the same."""
    names, found = KeyMap(latent_rules(config)), {}
    for name, value in tensors.items():
        group = names.group(theirs=f"model.layers.0.self_attn.{name}")
        assert group is not None, name
        (mine,) = group.to_ours([value])
        assert torch.equal(value, *group.to_theirs([mine]))
        (ours,) = group.ours
        assert names.group_of(ours) is group
        found[ours.removeprefix("layers.0.mixer.")] = mine.detach()
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_latent_attention_and_all_gradients(case: str, seed: int) -> None:
    theirs, rotation, ours = pair(case, seed)
    generator = torch.Generator().manual_seed(seed + 10)
    x = torch.randn(2, 30, 48, generator=generator)
    positions = torch.arange(30).expand(2, 30)
    additive = torch.zeros(1, 1, 30, 30).masked_fill(~torch.ones(30, 30).tril().bool(), float("-inf"))
    expected = theirs(x, position_embeddings=rotation(x, positions), attention_mask=additive)[0]
    found = ours(x, AttentionMeta.build(positions, None, [None], [ours.rope_key]))
    assert (found - expected).abs().max() <= 2e-5
    probe = torch.randn(found.shape, generator=generator)
    for out in (expected, found):
        (out * probe).sum().backward()
    wanted = renamed({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_the_softmax_is_sharpened_as_published() -> None:
    rope = rope_of(ConfigJson({**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, "here"), 163840)
    sizes = {**SIZES, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    scale = MlaConfig(num_attention_heads=1, rope=rope, **sizes).scores.scale
    assert scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)


def test_mistakes_name_the_key() -> None:
    wrong = MlaConfig(num_attention_heads=0, q_lora_rank=0, **{**SIZES, "qk_rope_head_dim": 7}).mistakes()
    assert [line.split(":")[0] for line in wrong] == [
        "num_attention_heads = 0",
        "q_lora_rank = 0",
        "rope.partial_rotary_factor = 1.0",
    ]


def decoder(q_lora_rank: int | None = 24) -> Decoder:
    mixer = MlaConfig(num_attention_heads=4, q_lora_rank=q_lora_rank, **SIZES)
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        blocks={"mla": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=48))},
        pattern=["mla"],
    )
    config.validate()
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def test_packed_documents_equal_separate_ones() -> None:
    model = decoder()
    tokens = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    packed = model(tokens, positions, torch.tensor([[0] * 12 + [1] * 8]))
    separate = torch.cat((model(tokens[:, :12]), model(tokens[:, 12:])), dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


def test_flops_equal_those_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = decoder().config
    config.blocks["mla"].mixer.kernel = "eager"
    model = Decoder(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 97, (2, 40)))
    assert counter.get_total_flops() == 80 * model.forward_flops_per_token(lambda window: 40)

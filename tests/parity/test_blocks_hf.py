"""Single blocks against transformers, where no composed family here has all of them: rotations, norms, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Glm4MoeConfig, GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from nanovl.config.config_json import ConfigJson
from nanovl.models.blocks.attention import Attention, AttentionConfig, AttentionMeta, visible
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.blocks.rope import inverse_frequencies
from nanovl.models.hf_config import rope_of

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "gpt-oss": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    "olmo3": {**YARN, "factor": 8.0, "attention_factor": 1.2079441541679836},
    "deepseek": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "kimi": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
    "factor from the context": {**YARN, "factor": None},
    "partial": {**YARN, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("theta", [1e4, 1.5e5, 5e6])
def test_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    given = {"rope_theta": theta, **ROPES[name]}
    hf = LlamaConfig(head_dim=64, max_position_embeddings=131072)
    hf.rope_parameters = dict(given)
    expected, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](hf, torch.device("cpu"))
    found, found_factor = inverse_frequencies(
        rope_of(ConfigJson(given, "here"), 131072), 64, torch.device("cpu")
    )
    assert found_factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_gpt_oss_sharpens_by_the_published_factor() -> None:
    rope = rope_of(ConfigJson({"rope_theta": 1.5e5, **ROPES["gpt-oss"]}, "here"), 131072)
    assert inverse_frequencies(rope, 64, torch.device("cpu"))[1] == pytest.approx(1.3465735902799727)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("theirs", "config"),
    [
        (LlamaRMSNorm, NormConfig(cast_before_scale=True)),
        (Olmo2RMSNorm, NormConfig()),
        (Gemma3RMSNorm, NormConfig(weight="zeros")),
    ],
)
def test_norms_round_as_those_of_transformers(theirs: Any, config: NormConfig, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    expected, ours = theirs(64, eps=1e-6).to(dtype), RMSNorm(64, config).to(dtype)
    assert torch.equal(expected.weight, ours.weight)  # where it starts
    weight = (0.5 * torch.randn(64, generator=generator)).to(dtype)
    expected.weight.data = ours.weight.data = weight  # type: ignore[union-attr]
    x = (3 * torch.randn(50, 64, generator=generator)).to(dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(ours(x), expected(x))
    torch.testing.assert_close(ours(x), expected(x), rtol=1e-6, atol=1e-6)


def hf_attention(kind: str, window: int | None) -> tuple[nn.Module, nn.Module, AttentionConfig]:
    """An attention of transformers, its rotation, and our config of the same."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if kind == "gpt_oss":
        rope = {"rope_theta": 1.5e5, **ROPES["gpt-oss"], "original_max_position_embeddings": 16}
        config = GptOssConfig(**sizes, rope_parameters=rope, num_hidden_layers=2, sliding_window=window or 8)
        attention = GptOssAttention(config, 1 if window is None else 0)
        ours = AttentionConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope=rope_of(ConfigJson(rope, "here"), 131072),
            sliding_window=window,
            qkv_bias=True,
            o_bias=True,
            sinks=True,
        )
        rotation: nn.Module = GptOssRotaryEmbedding(config)
    else:
        rope = {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"}
        config = Glm4MoeConfig(**sizes, rope_parameters=rope, attention_bias=True, use_qk_norm=True)
        attention, rotation = Glm4MoeAttention(config, 0), Glm4MoeRotaryEmbedding(config)
        ours = AttentionConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope=rope_of(ConfigJson(rope, "here"), 128),
            sliding_window=window,
            qk_norm="head",
            qkv_bias=True,
        )
    config._attn_implementation = "eager"
    return attention, rotation, ours


@pytest.mark.parametrize(("kind", "window"), [("gpt_oss", None), ("gpt_oss", 5), ("glm4_moe", None)])
@pytest.mark.parametrize("seed", [0, 1])
def test_attention_and_all_gradients(kind: str, window: int | None, seed: int) -> None:
    theirs, rotation, config = hf_attention(kind, window)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    ours = Attention(config, 48, NormConfig(eps=1e-5))
    assert config.mistakes() == []
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 30, 48, generator=generator)
    positions = torch.arange(30).expand(2, 30)
    mask = visible(30, window, None, torch.device("cpu"))
    seen = torch.ones(30, 30).tril().bool()[None, None] if mask is None else mask
    additive = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    expected = theirs(
        x, position_embeddings=rotation(x, positions), attention_mask=additive, past_key_values=None
    )[0]
    meta = AttentionMeta.build(positions, None, [window], [ours.rope_key])  # type: ignore[list-item]
    found = ours(x, meta)
    assert (found - expected).abs().max() <= 2e-6
    probe = torch.randn(found.shape, generator=generator)
    for out in (expected, found):
        (out * probe).sum().backward()
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert (mine[name].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-5, name

"""Grok-2 against a second implementation, written from sglang's grok.py, since transformers has no such class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovl.checkpoint.hf import load_hf_weights, save_hf, spec_of_directory
from nanovl.checkpoint.tensors import named_weights
from nanovl.errors import CheckpointError
from nanovl.inference.engine import Engine
from nanovl.models.decoder import Decoder
from nanovl.models.grok2 import grok2

TOKENS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 40, 32, 6, 2, 8, 5
THETA, TEMPERATURE_LEN = 1e4, 7


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T


def turned(x: Tensor) -> Tensor:
    """[tokens, heads, channels]; channel i turns with channel i + half."""
    half = HEAD_DIM // 2
    angle = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(half) / half)
    cos, sin, a, b = angle.cos()[:, None], angle.sin()[:, None], x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def attention(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    q, k, v = ((x @ w[f"{name}_proj.weight"].T).view(len(x), -1, HEAD_DIM) for name in "qkv")
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (turned(k), v))
    score = 30 * torch.tanh(torch.einsum("thd,shd->hts", turned(q), k) * HEAD_DIM**-0.5 / 30)
    for t in range(TEMPERATURE_LEN + 1, len(x)):
        score[:, t] = score[:, t] * (math.log2(t) / math.log2(TEMPERATURE_LEN))
    score = score + torch.full(score.shape[1:], float("-inf")).triu(1)
    return torch.einsum("hts,shd->thd", score.softmax(-1), v).flatten(1) @ w["o_proj.weight"].T


def feed_forward(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    chance = (30 * torch.tanh(x @ w["router.weight"].T / 30)).softmax(-1)
    best = chance.topk(2).indices
    experts = [
        glu(x, *(w[f"experts.{n}_proj"][e] for n in ("gate", "up", "down"))) * chance[:, e, None]
        for e in range(EXPERTS)
    ]
    moe = torch.stack([out * (best == e).any(-1, keepdim=True) for e, out in enumerate(experts)]).sum(0)
    return (glu(x, *(w[f"shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down"))) + moe) / 2**0.5


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def logits_of(tokens: Tensor, w: dict[str, Tensor], layers: int) -> Tensor:
    """Of one row."""
    x = w["embed_tokens.weight"][tokens] * HIDDEN**0.5
    for i in range(layers):
        layer = below(w, f"layers.{i}.")
        for part, mixes in (("mixer", attention), ("ffn", feed_forward)):
            out = mixes(normed(x, layer[f"{part}_pre_norm.weight"]), below(layer, f"{part}."))
            x = x + normed(out, layer[f"{part}_post_norm.weight"])
    logits = normed(x, w["norm.weight"]) @ w["lm_head.weight"].T * 0.5
    return 50 * torch.tanh(logits / 50)


def model_of(seed: int) -> Decoder:
    """With weights so large that every cap is felt."""
    config = grok2(
        layers=2,
        hidden=HIDDEN,
        ffn=40,
        expert_ffn=24,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        experts=EXPERTS,
        vocab=97,
        theta=THETA,
        temperature_len=TEMPERATURE_LEN,
    )
    config.validate()
    model, generator = Decoder(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 2.0 if "router" in name or "q_proj" in name else 0.3
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, std, generator=generator)
    return model


def tokens_of(seed: int, length: int = TOKENS) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_logits_and_all_gradients(seed: int) -> None:
    model, tokens = model_of(seed), tokens_of(seed)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected, actual = logits_of(tokens, weights, 2), model(tokens[None])[0]
    assert expected.abs().max() > 2.5  # below 50, that changes by 2e-3
    assert (expected - actual).abs().max() <= 2e-5
    for logits in (expected, actual):
        F.cross_entropy(logits[:-1], tokens[1:]).backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert wanted is not None
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_places_are_those_in_the_document() -> None:
    model, tokens = model_of(0), tokens_of(1)
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    packed = model(tokens[None], positions, (positions == 0).cumsum(1))[0]
    weights = dict(model.named_parameters())
    separate = torch.cat([logits_of(part, weights, 2) for part in tokens.split((25, 15))])
    assert (packed - separate).abs().max() <= 2e-5


def test_greedy_tokens_through_the_cache() -> None:
    model, prompts = model_of(0), [tokens_of(2, 5).tolist(), tokens_of(3, 12).tolist()]
    weights = dict(model.named_parameters())
    for prompt, completion in zip(prompts, Engine(model).generate(prompts, max_tokens=15), strict=True):
        row = list(prompt)
        with torch.no_grad():
            for _ in completion.ids:
                row.append(int(logits_of(torch.tensor(row), weights, 2)[-1].argmax()))
        assert row[len(prompt) :] == completion.ids


def config_json() -> dict[str, Any]:
    """In the words of copies of the released one."""
    return {
        "architectures": ["Grok1ForCausalLM"],
        "embedding_multiplier_scale": HIDDEN**0.5,
        "output_multiplier_scale": 0.5,
        "vocab_size": 97,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
        "residual_moe": True,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 2,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-05,
        "final_logit_softcapping": 50,
        "attn_logit_softcapping": 30.0,
        "router_logit_softcapping": 30.0,
        "rope_theta": THETA,
        "attn_temperature_len": TEMPERATURE_LEN,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        "model_type": "git",
        "torch_dtype": "bfloat16",
        "rope_type": "original",
        "original_max_position_embeddings": 8192,
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
    }


THEIRS = {
    "mixer_pre_norm": "pre_attn_norm",
    "mixer_post_norm": "post_attn_norm",
    "ffn_pre_norm": "pre_moe_norm",
    "ffn_post_norm": "post_moe_norm",
    "mixer": "self_attn",
    "ffn.shared_expert": "mlp",
    "ffn.router": "block_sparse_moe.gate",
}
CUT = {"gate_proj": ("w1", 0), "up_proj": ("w3", 0), "down_proj": ("w2", 1)}


def write_cut(folder: Path, model: Decoder, ranks: int = 4) -> None:
    """As released: experts cut for tensor ranks, in files of a rank, the rest in common ones."""
    (folder / "config.json").write_text(json.dumps(config_json()))
    common: dict[str, Tensor] = {}
    cut: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, value in model.named_parameters():
        if ".experts." in name:
            theirs, dim = CUT[name.rpartition(".")[2]]
            for e, expert in enumerate(value.detach()):
                full = f"model.layers.{name.split('.')[1]}.block_sparse_moe.experts.{e}.{theirs}.weight"
                for held, part in zip(cut, expert.chunk(ranks, dim), strict=True):
                    held[full] = part.contiguous()
            continue
        full = name if name.startswith("lm_head") else f"model.{name}"
        for ours, theirs in THEIRS.items():
            full = full.replace(f".{ours}.", f".{theirs}.")
        common[full] = value.detach()
    half = sorted(common)[: len(common) // 2]
    for number, some in enumerate((half, sorted(common.keys() - set(half)))):
        file = folder / f"pytorch_model-0000{number}-TP-common.safetensors"
        save_file({key: common[key] for key in some}, file)
    for rank, held in enumerate(cut):
        save_file(held, folder / f"pytorch_model-00002-TP-{rank:03d}.safetensors")


def test_files_cut_for_ranks_are_read(tmp_path: Path) -> None:
    model = model_of(0)
    write_cut(tmp_path, model)
    spec = spec_of_directory(tmp_path)
    assert (spec.family.name, spec.config) == ("grok2", model.config)
    found = spec.family.model(spec.config)
    load_hf_weights(tmp_path, found, spec)
    wanted = dict(model.named_parameters())
    for name, value in found.named_parameters():
        assert torch.equal(value, wanted[name]), name
    with pytest.raises(CheckpointError, match="grok2: transformers has no such architecture, so there is no"):
        save_hf(tmp_path / "out", named_weights(found), spec, torch.float32)


def test_what_is_wrong_with_cut_files_is_listed(tmp_path: Path) -> None:
    write_cut(tmp_path, model_of(0))
    file = tmp_path / "pytorch_model-00002-TP-001.safetensors"
    held = load_file(file)
    expert = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    held[expert.format(0)] = torch.zeros(HIDDEN, 7)
    del held[expert.format(1)]
    held["model.norm.weight"] = torch.zeros(HIDDEN)
    save_file(held, file)
    (tmp_path / "pytorch_model-00002-TP-003.safetensors").rename(tmp_path / "m-TP-005.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(tmp_path, model_of(0), spec_of_directory(tmp_path))
    assert str(error.value).splitlines()[1:] == [
        "  there are files of ranks 000, 001, 002, 005, and not of 000, 001, 002, 003",
        f"  {expert.format(0)} is (32, 6), (32, 7), (32, 6), (32, 6) on the ranks, which wants equal slices",
        f"  {expert.format(1)} is (32, 6), missing, (32, 6), (32, 6) on the ranks, which wants equal slices",
        "  model.norm.weight is in files of ranks and in common ones",
        "  model.norm.weight is in files of ranks, and how it is cut is not known",
        "  model.norm.weight is missing, (32,), missing, missing on the ranks, which wants equal slices",
    ]


def test_another_rotation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_json(), "rope_type": "yarn"}))
    with pytest.raises(CheckpointError, match=r"rope_type = 'yarn': grok2 here computes 'original'"):
        spec_of_directory(tmp_path)

"""QK-clip: logits measured as attention sees them, heads scaled by hand-worked factors, the same on every mesh."""

from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from nanovl.dist import fork_ranks
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import Attention, AttentionConfig, AttentionMeta
from nanovl.models.blocks.indexer import IndexerConfig
from nanovl.models.blocks.mla import LatentAttention, MlaConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.optim import qk_clip
from nanovl.optim.qk_clip import QkClip, max_logits


def attention(
    hidden: int = 4, heads: int = 2, kv_heads: int = 2, head_dim: int = 2, **more: Any
) -> Attention:
    config = AttentionConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, **{"rope": None, **more}
    )
    layer = Attention(config, hidden, NormConfig())
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def latent_attention(hidden: int = 6, heads: int = 4, **more: Any) -> LatentAttention:
    config = MlaConfig(
        num_attention_heads=heads,
        q_lora_rank=5,
        kv_lora_rank=4,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=2,
        **more,
    )
    layer = LatentAttention(config, hidden, NormConfig())
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def meta_of(
    layer: Attention | LatentAttention, tokens: int, doc_ids_BT: Tensor | None = None
) -> AttentionMeta:
    ropes = [] if layer.rope_key is None else [layer.rope_key]
    return AttentionMeta.build(torch.arange(tokens)[None], doc_ids_BT, [layer.config.sliding_window], ropes)


@pytest.mark.parametrize("at_once", [1, 2 * 4 * 6 * 4, 10**6])  # 1, 4 and all 6 queries at a time
@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_the_largest_visible_logit_of_every_head(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qk_clip, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 6, heads, 8, generator=generator) for heads in (4, 2))
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]]) if kind == "documents" else None
    layer = attention(sliding_window=2 if kind == "window" else None)
    mask = meta_of(layer, 6, doc_ids).masks[layer.config.sliding_window]
    found = max_logits(q, k, mask)
    for head in range(4):
        visible = [
            float(q[b, t, head] @ k[b, s, head // 2]) / sqrt(8)
            for b in range(2)
            for t in range(6)
            for s in range(t + 1)
            if (kind != "window" or t - s < 2) and (doc_ids is None or doc_ids[b, t] == doc_ids[b, s])
        ]
        assert found[head].item() == pytest.approx(max(visible), rel=1e-5)


def test_heads_out_of_bounds_come_back_to_the_threshold() -> None:
    layer = attention(qkv_bias=True)
    for linear in (layer.q_proj, layer.k_proj):
        linear.weight.data.copy_(torch.eye(4))
        linear.bias.data.zero_()
    layer.q_proj.bias.data.fill_(1.0)
    clip = QkClip(layer, threshold=2.0)
    # head 0: q = (4, 1), k = (3, 0): 12 / sqrt(2) = 8.49; head 1: q = (2, 1), k = (1, 0): 2 / sqrt(2) = 1.41
    layer(torch.tensor([[[3.0, 0.0, 1.0, 0.0]]]), meta_of(layer, 1))
    assert clip.maxima[0].tolist() == pytest.approx([12 / sqrt(2), sqrt(2)])
    clip.apply()
    root = sqrt(2.0 / (12 / sqrt(2)))
    expected = torch.tensor([root, root, 1.0, 1.0])
    for linear in (layer.q_proj, layer.k_proj):
        torch.testing.assert_close(linear.weight.data, expected.diag())
    torch.testing.assert_close(layer.q_proj.bias.data, expected)
    assert clip.maxima[0].tolist() == [-torch.inf] * 2  # the next step starts anew
    layer(torch.tensor([[[3.0, 0.0, 1.0, 0.0]]]), meta_of(layer, 1))
    assert clip.maxima[0].tolist() == pytest.approx([2.0, sqrt(2)])


def test_a_shared_key_head_is_left_alone() -> None:
    layer = attention(hidden=2, kv_heads=1)
    layer.k_proj.weight.data.copy_(torch.eye(2))
    layer.q_proj.weight.data.copy_(torch.tensor([[8.0, 0], [0, 8], [1, 0], [0, 1]]))
    clip = QkClip(layer, threshold=sqrt(2))
    layer(torch.tensor([[[1.0, 0.0]]]), meta_of(layer, 1))  # logits 8 / sqrt(2) and 1 / sqrt(2)
    clip.apply()
    assert torch.equal(layer.k_proj.weight.data, torch.eye(2))
    expected = torch.tensor([[2.0, 0], [0, 2], [1, 0], [0, 1]])
    torch.testing.assert_close(layer.q_proj.weight.data, expected)


@pytest.mark.parametrize("q_lora_rank", [5, None])
def test_latent_heads_come_back_to_the_threshold_and_values_stay(q_lora_rank: int | None) -> None:
    layer = latent_attention()
    if q_lora_rank is None:
        layer = LatentAttention(replace(layer.config, q_lora_rank=None), 6, NormConfig())
        for parameter in layer.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    queries = layer.q_b_proj if q_lora_rank else layer.q_proj
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    meta, x_BTD = meta_of(layer, 7), rows()
    clip = QkClip(layer, threshold=1e9)
    layer(x_BTD, meta)
    largest = clip.maxima[0].clone()
    clip.threshold = float(largest.sort().values[2])  # two of the heads are above, one is at it
    clip.apply()
    layer(x_BTD, meta)
    torch.testing.assert_close(clip.maxima[0], largest.clamp(max=clip.threshold), rtol=1e-5, atol=0)
    gamma_H11 = (clip.threshold / largest).clamp(max=1.0)[:, None, None]
    weight, old = (w.unflatten(0, (4, 5)) for w in (queries.weight.data, before[_name_of(layer, queries)]))
    torch.testing.assert_close(weight[:, :3], old[:, :3] * gamma_H11.sqrt())
    torch.testing.assert_close(weight[:, 3:], old[:, 3:] * gamma_H11)
    weight, old = (w.unflatten(0, (4, 5)) for w in (layer.kv_b_proj.weight.data, before["kv_b_proj.weight"]))
    torch.testing.assert_close(weight[:, :3], old[:, :3] * gamma_H11.sqrt())
    assert torch.equal(weight[:, 3:], old[:, 3:])  # values
    for name in ("kv_a_proj.weight", "o_proj.weight"):
        assert torch.equal(layer.get_parameter(name).data, before[name])


def _name_of(layer: nn.Module, linear: nn.Module) -> str:
    return next(f"{name}.weight" for name, child in layer.named_children() if child is linear)


def test_only_training_is_measured_and_bad_numbers_change_nothing() -> None:
    layer = attention()
    for linear in (layer.q_proj, layer.k_proj):
        linear.weight.data.copy_(torch.eye(4))
    clip = QkClip(layer, threshold=1e-3)
    layer.train(False)
    layer(torch.ones(1, 3, 4), meta_of(layer, 3))
    layer.train(True)
    layer(torch.full((1, 3, 4), torch.nan), meta_of(layer, 3))
    assert clip.maxima[0].tolist() == [-torch.inf] * 2
    layer(torch.full((1, 3, 4), 1e30), meta_of(layer, 3))
    assert clip.maxima[0].tolist() == [torch.inf] * 2
    clip.apply()
    assert torch.equal(layer.q_proj.weight.data, torch.eye(4))
    assert clip.maxima[0].tolist() == [-torch.inf] * 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = attention()

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        return x_BTD + self.mixer(x_BTD, meta)


@pytest.mark.parametrize("backend", ["", "aot_eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_recomputed_blocks_are_measured(backend: str, recompute: bool) -> None:
    block, plain = Block(), Block()
    if recompute:
        forward = block.forward
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        block.forward = lambda *args: again(forward, *args)  # type: ignore[method-assign]
    if backend:
        block.compile(backend=backend, fullgraph=True)
    clips = [QkClip(each, threshold=1.0) for each in (block, plain)]
    for scale in (1.0, 3.0, 0.5):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)) * scale
        for each in (block, plain):
            each(x.clone().requires_grad_(), meta_of(each.mixer, 5)).sum().backward()
    torch.testing.assert_close(clips[0].maxima[0], clips[1].maxima[0])
    for each, clip in zip((block, plain), clips, strict=True):
        clip.apply()
        each.zero_grad()
    torch.testing.assert_close(block.mixer.q_proj.weight, plain.mixer.q_proj.weight)


LATENT = 0
"""In place of a number of key heads: latent attention."""
THRESHOLDS = {4: 20.5, 2: 20.5, LATENT: 6.0}
"""Below the logits of some heads, and above those of others."""


def stack(kv_heads: int) -> nn.ModuleList:
    if kv_heads == LATENT:
        return nn.ModuleList(latent_attention(sliding_window=window) for window in (None, 3))
    return nn.ModuleList(
        attention(6, 4, kv_heads, 6, qkv_bias=True, sliding_window=window) for window in (None, 3)
    )


def rows() -> Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(5))


def forwards(layers: nn.ModuleList, x_BTD: Tensor) -> None:
    for layer in layers:
        assert isinstance(layer, Attention | LatentAttention)
        layer(x_BTD, meta_of(layer, 7)).sum().backward()


def alone(kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    layers = stack(kv_heads)
    clip = QkClip(layers, THRESHOLDS[kv_heads])
    forwards(layers, rows())
    maxima = [m.clone() for m in clip.maxima]
    clip.apply()
    return maxima, [p.detach() for p in layers.parameters()]


def _on_mesh(rank: int, kv_heads: int, data: int, tensor: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("fsdp", "tp"))
    layers = stack(kv_heads)
    for layer in layers:
        if tensor > 1:
            names = ("q_b_proj", "kv_b_proj") if kv_heads == LATENT else ("q_proj", "k_proj", "v_proj")
            plan = dict.fromkeys(names, ColwiseParallel())
            parallelize_module(layer, mesh["tp"], {**plan, "o_proj": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["fsdp"])
    clip = QkClip(layers, THRESHOLDS[kv_heads], [mesh.get_group("fsdp")])
    forwards(layers, rows()[mesh.get_local_rank("fsdp") :: data])
    clip.apply()
    assert all(isinstance(p, DTensor) for p in layers.parameters())
    return [p.full_tensor() for p in layers.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kv_heads", [4, 2, LATENT])
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2)])
def test_the_same_heads_are_scaled_alike_on_every_mesh(kv_heads: int, data: int, tensor: int) -> None:
    maxima, expected = alone(kv_heads)
    largest = torch.cat(maxima)
    assert (largest > THRESHOLDS[kv_heads]).any()
    assert (largest < THRESHOLDS[kv_heads]).any()
    for found in fork_ranks(_on_mesh, data * tensor, kv_heads, data, tensor):
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=2e-6, atol=1e-7)


def test_attention_that_cannot_be_mended_is_refused() -> None:
    normed = nn.ModuleList([attention(qk_norm="head"), attention(qk_norm="head", qk_norm_weight=False)])
    with pytest.raises(
        ConfigError, match=r"qk_clip = 100.0: layers\.\* \(x2\): queries and keys are normed.*set it to 0"
    ):
        QkClip(nn.ModuleDict({"layers": normed}), 100.0)
    latent = nn.Module()  # of a kind that nobody knows
    latent.core = nn.Identity()
    with pytest.raises(ConfigError, match="mixer: its block does not say which rows of its projections"):
        QkClip(nn.ModuleDict({"mixer": latent}), 100.0)
    indexer = IndexerConfig(index_n_heads=2, index_head_dim=4, index_topk=2)
    with pytest.raises(ConfigError, match="mixer: an indexer chooses the keys whose logits count"):
        QkClip(nn.ModuleDict({"mixer": latent_attention(4, indexer=indexer)}), 100.0)

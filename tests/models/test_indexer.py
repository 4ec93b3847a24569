"""The indexer's choice, and its loss against autograd of the formula written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.models.blocks import indexer as indexer_file
from nanovl.models.blocks.attention import AttentionMeta
from nanovl.models.blocks.indexer import Index, IndexerConfig, chosen
from nanovl.models.blocks.mla import LatentAttention, MlaConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.sparse_core import SparseCore
from nanovl.models.decoder import attention_layers

INDEXER = {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 5}
SIZES: dict[str, Any] = {
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}


def layer_of(seed: int = 0, **indexer: Any) -> LatentAttention:
    config = MlaConfig(**SIZES, indexer=IndexerConfig(**{**INDEXER, **indexer}))
    assert config.mistakes() == []
    layer = LatentAttention(config, 24, NormConfig())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.4, generator=generator)
    return layer


def meta_of(layer: LatentAttention, doc_ids: Tensor | None = None, tokens: int = 17) -> AttentionMeta:
    rows = 2 if doc_ids is None else len(doc_ids)
    positions = torch.arange(tokens).expand(rows, tokens)
    return AttentionMeta.build(positions, doc_ids, [None], [layer.rope_key])


def random_input(seed: int = 1, tokens: int = 17) -> Tensor:
    return torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(seed))


DOCUMENTS = torch.tensor([[0] * 9 + [1] * 8, [0] * 2 + [1] * 15])


def test_the_best_keys_that_are_seen_are_chosen() -> None:
    # one head of one channel: I_ts = w_t relu(q_t k_s)
    index = Index(torch.ones(1, 4, 1, 1), torch.tensor([[[3.0], [1.0], [2.0], [9.0]]]), torch.ones(1, 4, 1))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    mask = chosen(index, None, 2)
    assert mask is not None
    assert mask[0, 0].int().tolist() == expected
    backwards = Index(index.q_BTID, index.k_BSD, -index.weights_BTI)  # the worst
    mask = chosen(backwards, None, 2)
    assert mask is not None
    assert mask[0, 0].int().tolist()[2:] == [[0, 1, 1, 0], [0, 1, 1, 0]]
    documents = torch.ones(4, 4).tril().bool()
    documents[2:, :2] = False
    mask = chosen(index, documents[None, None], 2)
    assert mask is not None
    assert mask[0, 0].int().tolist()[2:] == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert chosen(index, None, 4) is None


def plain_loss(layer: LatentAttention, x: Tensor, documents: Tensor | None, dense: bool) -> Tensor:
    """Mean KL over all tokens by the formula, everything at once, with nothing of the code under test but the
    projections: attention's weights are fixed, its inputs to the indexer too."""
    meta = meta_of(layer, documents)
    x, tokens = x.detach(), x.shape[1]
    seen = torch.ones(tokens, tokens).tril().bool().expand(2, -1, -1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    latent = layer.q_a_norm(layer.q_a_proj(x)).detach()
    assert layer.indexer is not None
    index = layer.indexer(x, latent, *meta.rope[layer.rope_key])
    dots = torch.einsum("btid,bsd->btsi", index.q_BTID, index.k_BSD) / INDEXER["index_head_dim"] ** 0.5
    scores = (F.relu(dots) * index.weights_BTI[:, :, None]).sum(-1) / index.weights_BTI.shape[-1] ** 0.5
    if not dense:
        order = scores.detach().masked_fill(~seen, -torch.inf).argsort(-1, descending=True).argsort(-1)
        seen = seen & (order < layer.config.indexer.index_topk)
    found: list[Tensor] = []
    handle = layer.core.register_forward_pre_hook(lambda _, args: found.extend(args[:2]))
    layer(x, meta)
    handle.remove()
    q, k = found
    attention = torch.einsum("bthd,bshd->bhts", q, k) * 20**-0.5
    p = attention.masked_fill(~seen[:, None], -torch.inf).softmax(-1).detach().sum(1) / 3
    log = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
    return F.kl_div(log.masked_fill(~seen, 0.0), p, reduction="sum") / (2 * tokens)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_loss_and_its_gradients(
    mode: str, documents: Tensor | None, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(indexer_file, "NUMBERS_AT_ONCE", 2 * 16 * 17 * 3)
    layer, x = layer_of(index_loss=mode), random_input().requires_grad_()
    loss = plain_loss(layer, x, documents, mode == "dense")
    assert layer.indexer is not None
    expected = torch.autograd.grad(loss, list(layer.indexer.parameters()))
    assert all(gradient.norm() > 1e-4 for gradient in expected)
    assert isinstance(layer.core, SparseCore)
    assert layer.core.loss is not None
    layer.core.loss.step_tokens = 34
    (layer(x, meta_of(layer, documents)) * 0).sum().backward()
    for (name, parameter), wanted in zip(layer.indexer.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6, msg=name)
    others = [p.grad for n, p in layer.named_parameters() if not n.startswith("indexer.")]
    assert all(gradient is not None and not gradient.any() for gradient in [*others, x.grad])
    torch.testing.assert_close(
        layer.core.loss.tally, torch.tensor([34 * loss.item(), 34.0]).double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_predictions_do_not_reach_the_indexer(mode: str) -> None:
    """Gradients of the output alone: those of the same attention behind a fixed mask, and the indexer's own do not
    depend on the output."""
    found = []
    for factor in (1.0, 5.0):
        layer, x = layer_of(index_loss=mode), random_input()
        layer.core.loss.step_tokens = 34  # type: ignore[union-attr]
        (layer(x, meta_of(layer)) * factor).square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None
        same = torch.equal(gradient, found[1][name])
        assert same == name.startswith("indexer."), name


def test_without_a_loss_the_indexer_has_no_gradient() -> None:
    layer = layer_of(index_loss="none")
    layer(random_input(), meta_of(layer)).sum().backward()
    grads = {name: p.grad is not None for name, p in layer.named_parameters()}
    assert all(there != name.startswith("indexer.") for name, there in grads.items())


def test_evaluation_and_what_is_in_no_step_count_nothing() -> None:
    layer, x = layer_of(), random_input()
    assert isinstance(layer.core, SparseCore)
    assert layer.core.loss is not None
    assert layer.indexer is not None
    layer(x, meta_of(layer)).sum().backward()
    layer.core.loss.step_tokens = 34
    with torch.no_grad():
        layer(x, meta_of(layer))
    assert not layer.core.loss.tally.any()
    assert all(parameter.grad is None for parameter in layer.indexer.parameters())


def test_a_recomputed_layer_counts_once() -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recomputed in (False, True):
        layer, x, meta = layer_of(), random_input(), meta_of(layer_of())
        layer.core.loss.step_tokens = 34  # type: ignore[union-attr]
        out = checkpoint(layer, x, meta, use_reentrant=False) if recomputed else layer(x, meta)
        out.sum().backward()
        assert layer.core.loss.tally[1] == 34  # type: ignore[union-attr]
        grads.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_bfloat16_is_near() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of().to(dtype)
        layer.core.loss.tally = layer.core.loss.tally.double()  # type: ignore[union-attr]
        layer.core.loss.step_tokens = 34  # type: ignore[union-attr]
        layer(random_input().to(dtype), meta_of(layer)).sum().backward()
        assert layer.indexer is not None
        assert layer.indexer.q_proj.weight.grad is not None
        assert layer.indexer.q_proj.weight.grad.dtype == dtype
        found.append((layer.core.loss.tally[0], layer.indexer.q_proj.weight.grad.float()))  # type: ignore[union-attr]
    (loss, gradient), (near_loss, near_gradient) = found
    assert abs(loss - near_loss) < 0.05 * loss
    assert (gradient - near_gradient).norm() < 0.3 * gradient.norm()


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_layer_is_the_same(backend: str) -> None:
    found = []
    for compiled in (False, True):
        layer = layer_of()
        layer.core.loss.step_tokens = 34  # type: ignore[union-attr]
        if compiled:
            layer.compile(backend=backend, fullgraph=True)
        layer(random_input(), meta_of(layer, DOCUMENTS)).square().sum().backward()
        found.append([layer.core.loss.tally, *(p.grad for p in layer.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_fewer_keys_than_chosen_are_all_seen_and_in_warm_up_all_while_training() -> None:
    whole, sparse, dense = (layer_of(**c) for c in ({"index_topk": 17}, {}, {"index_loss": "dense"}))
    x, meta = random_input(), meta_of(layer_of())
    dense.core.loss.step_tokens = 34  # type: ignore[union-attr]
    with torch.no_grad():
        assert not torch.equal(whole(x, meta), sparse(x, meta))
        assert torch.equal(dense(x, meta), sparse(x, meta))
        expected = whole(x, meta)
    assert torch.equal(dense(x, meta), expected)


def test_a_layer_with_an_indexer_is_found_as_attention() -> None:
    layer = layer_of()
    assert attention_layers(nn.ModuleList([layer])) == [layer]


@pytest.mark.parametrize(
    ("changes", "indexer", "message"),
    [
        ({}, {"index_topk": 0}, "indexer.index_topk = 0: wants a number above 0"),
        ({"q_lora_rank": None}, {}, "q_lora_rank: the indexer reads the queries' latent"),
        ({"kernel": "flex"}, {}, "kernel = 'flex': cannot choose keys"),
        ({}, {"index_head_dim": 6}, "indexer.index_head_dim = 6: wants the 8 channels"),
    ],
)
def test_mistakes_name_the_key(changes: dict[str, Any], indexer: dict[str, Any], message: str) -> None:
    config = MlaConfig(**{**SIZES, **changes}, indexer=IndexerConfig(**{**INDEXER, **indexer}))
    (found,) = config.mistakes()
    assert found.startswith(message)


def test_flops_by_hand() -> None:
    # 17 keys each: attention 2 * 3 * (20 + 10) * 5 of them, index 2 * (16 * 12 + 16) * 17
    layer = layer_of()
    assert layer.score_flops(lambda window: min(window or 17, 17)) == 900 + 7072
    assert layer_of(index_loss="dense").score_flops(lambda window: min(window or 17, 17)) == 3060 + 7072

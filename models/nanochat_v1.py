"""nanochat as first released (October 2025; checkpoints d20 to d34).

Different from Llama: norms without weights, one more right after the embedding; queries and keys normed after the
rotation; squared-ReLU MLP without a gate; logits softly capped at 15; every block starts as the identity. Size is
one number, the depth: hidden = 64 x depth, heads = hidden / 128.

nanochat rotates by -angle. Scores depend on angle differences only, so that is our rotation with the halves of every
query and key head swapped, which a converter does; the model here needs no flag for it.
"""

from __future__ import annotations

from functools import partial

from nanovl.config.schema import OptimizerGroup
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.init import InitConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.spec import ModelFamily


def nanochat_v1(depth: int, vocab: int = 65536, context: int = 2048) -> DecoderConfig:
    """The model of `depth` layers. Depths whose width does not split into whole heads are not a size of this family."""
    hidden = 64 * depth
    heads = max(1, -(-hidden // 128))
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        rope=RopeConfig(theta=10_000.0),
        qk_norm="head",
        qk_norm_after_rope=True,
        qk_norm_weight=False,
    )
    ffn = MlpConfig(intermediate_size=4 * hidden, activation="relu2", gated=False)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=depth,
        blocks={"full": BlockConfig(mixer=mixer, ffn=ffn)},
        pattern=["full"],
        norm=NormConfig(eps=1e-6, weight="none"),
        embed_norm=True,
        final_logit_softcapping=15.0,
        max_position_embeddings=context,
        init=InitConfig(outputs="zero"),
    )


def optimizer_groups(config: DecoderConfig) -> list[OptimizerGroup]:
    """Muon for the matrices of blocks, AdamW for head and embedding, nothing decays."""
    adamw = partial(OptimizerGroup, beta1=0.8, beta2=0.95, weight_decay=0.0, scale_with_width=True)
    return [
        adamw(match=r"lm_head\.weight", lr=0.004),
        adamw(match=r"embed_tokens\.weight", lr=0.2),
        OptimizerGroup(match=r"layers\..*_proj\.weight", kind="muon", lr=0.02, weight_decay=0.0),
    ]


FAMILY = ModelFamily(
    name="nanochat_v1",
    summary="nanochat, October 2025: weightless norms, normed q and k after the rotation, squared ReLU, soft cap",
    config=DecoderConfig,
    flavors={f"d{depth}": partial(nanochat_v1, depth) for depth in (20, 26, 30, 32, 34)},
    model=Decoder,
    optimizer_groups=optimizer_groups,
)

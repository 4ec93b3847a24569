"""Kimi K2 (arXiv:2507.20534): DeepSeek-V3 with other sizes.

Different from DeepSeek-V3: 384 experts without groups, half as many heads, one dense layer; the rotation's base is 5e4.
transformers has no class for it: released files name DeepSeek's class beside `model_type` "kimi_k2", which tells them
apart; written ones say "deepseek_v3", which transformers knows, and come back as that family.

Unverified, for want of the released files: eps; and YaRN, which differs between releases: factor 32 and beta_fast 1 in
public copies of the first, as here; factor 64 and beta_fast 1 or 32 in those of later ones. A config.json's own values
are what is read.
"""

from __future__ import annotations

from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.deepseek_v3 import (
    ARCHITECTURE,
    config_from_hf,
    config_to_hf,
    experts,
    first_dense,
    key_rules,
    latent,
    small,
    small_latent,
    yarn,
)
from nanovl.models.hf_keys import MTP_BEHIND
from nanovl.spec import HuggingFaceSpec, ModelFamily

FLAVORS = {
    "1t-a32b": lambda: first_dense(
        latent(64, yarn(32.0, 4096, theta=5e4, beta_fast=1.0)),  # unverified
        experts(384, 8, 2048, scale=2.827),
        layers=61,
        dense_layers=1,
        hidden=7168,
        ffn=18432,
        vocab=163840,
        context=131072,
    ),
    "debug": lambda: small(
        small_latent(yarn(4.0, 32, theta=5e4, beta_fast=1.0)), experts(12, 2, 32, scale=2.827)
    ),
}


FAMILY = ModelFamily(
    name="kimi_k2",
    summary="Kimi K2: DeepSeek-V3 with 384 experts and no groups",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "kimi_k2", config_from_hf, config_to_hf, key_rules, mtp=MTP_BEHIND),
)

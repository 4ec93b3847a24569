"""Multi-token prediction against transformers' MtpModel, which reads the directories that are written here.

It finds modules by the layer numbers of released models: 61 for DeepSeek-V3, 46 for GLM-4.5-Air. For Qwen3-Next and
Qwen3.5 transformers has none: `qwen_module` puts one together of its layers and norms, in the order of vLLM's
qwen3_next_mtp.py and SGLang's file of that name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from nanovl.checkpoint.hf import load_hf_weights, save_hf, spec_of_directory
from nanovl.checkpoint.tensors import named_weights
from nanovl.config.schema import Model
from nanovl.errors import CheckpointError, ConfigError
from nanovl.models.blocks.mtp import MtpConfig, with_ahead
from nanovl.registry import resolve_model
from nanovl.spec import Model as AnyModel
from nanovl.spec import ModelSpec, run_batch

VOCAB, TOKENS = 96, 24
LAYERS = {"glm4_moe": 46, "deepseek_v3": 61}
NAMES = ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
AUTO = {
    "qwen3_next": transformers.AutoModelForCausalLM,
    "qwen3_5": transformers.Qwen3_5ForCausalLM,
    "qwen3_5_moe": transformers.Qwen3_5MoeForCausalLM,
}
LIMIT = 2e-5
"""Of a logit; positions that are one further turn queries and keys alike, to rounding."""


def spec_of(name: str, layers: int = 0, depths: int = 1, **overrides: Any) -> ModelSpec:
    sizes = {"num_hidden_layers": layers or LAYERS[name], "hidden_size": 32}
    mtp = {"mtp": {"num_layers": depths}} if depths else {}
    return resolve_model(Model(name=name, flavor="debug", overrides={**sizes, **mtp, **overrides}), VOCAB)


def drawn(spec: ModelSpec) -> AnyModel:
    model = spec.family.model(spec.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in named_weights(model).items():
            start = 1.0 if value.ndim == 1 and "norm" in name else 0.0
            # many layers: small steps, so that rounding does not grow
            nn.init.normal_(value, start, 0.3 if "mtp" in name else 0.05, generator=generator)
    return model


def tokens_BT() -> Tensor:
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def logits_of_depths(model: AnyModel) -> list[Tensor]:
    """Of each depth, at the places that have a target."""
    tokens = tokens_BT()
    batch = {
        "tokens_BT": tokens,
        "targets_BT": tokens.roll(-1, 1),
        "positions_BT": torch.arange(TOKENS).expand_as(tokens),
        "doc_ids_BT": torch.zeros_like(tokens),
        "weights_BT": torch.ones(tokens.shape),
    }
    depths = model.mtp_layers
    found: list[Tensor] = run_batch(
        model, with_ahead(batch, depths), lambda head, x, batch, *ahead: [head(each) for each in ahead]
    )
    return [logits[:, : TOKENS - k] for k, logits in enumerate(found, 1)]


def assert_returns(folder: Path, model: AnyModel, depths: int) -> None:
    """What was written of `model` is read bit-equal, as many modules as there are."""
    again = spec_of_directory(folder)
    assert again.config.mtp == MtpConfig(num_layers=depths)
    back = again.family.model(again.config)
    load_hf_weights(folder, back, again)
    for key, value in named_weights(back).items():
        assert torch.equal(value, named_weights(model)[key]), key


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_the_first_depth_and_checkpoints(name: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    model = drawn(spec)
    save_hf(tmp_path, named_weights(model), spec, torch.float32)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    module = MtpModel.from_pretrained(theirs).eval()
    tokens = tokens_BT()
    hidden = theirs.model(tokens).last_hidden_state
    assert (theirs(tokens).logits - model(tokens)).abs().max() < LIMIT
    positions = torch.arange(1, TOKENS).expand(2, -1)
    ahead = module.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
    expected = module._project_to_logits(ahead)
    (found,) = logits_of_depths(model)
    assert (found - expected).abs().max() < LIMIT
    assert expected.std() > 0.1

    assert_returns(tmp_path, model, depths=1)


@pytest.mark.slow
@torch.no_grad()
def test_depths_are_chained_behind_the_norm(tmp_path: Path) -> None:
    spec = spec_of("glm4_moe", depths=2)
    model = drawn(spec)
    tokens, modules = tokens_BT(), []
    for place in ("46", "47"):  # each as the one module of a directory of its own
        one = spec_of("glm4_moe")
        weights = {
            key.replace(f"mtp.{place}", "mtp.46"): value
            for key, value in named_weights(model).items()
            if not key.startswith("mtp") or key.startswith(f"mtp.{place}")
        }
        save_hf(tmp_path / place, weights, one, torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place)
        modules.append(MtpModel.from_pretrained(theirs).eval())
    hidden = theirs.model(tokens).last_hidden_state
    for k, (module, found) in enumerate(zip(modules, logits_of_depths(model), strict=True), 1):
        positions = torch.arange(k, TOKENS).expand(2, -1)
        hidden = module.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, k:])
        assert (found - module._project_to_logits(hidden)).abs().max() < LIMIT


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "deepseek_v32"])
def test_a_checkpoint_returns(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, layers=3, depths=2)
    model = drawn(spec)
    save_hf(tmp_path, named_weights(model), spec, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    for place in (3, 4):
        assert torch.equal(stored[f"model.layers.{place}.embed_tokens.weight"], model.embed_tokens.weight)
        assert torch.equal(stored[f"model.layers.{place}.shared_head.head.weight"], model.lm_head.weight)
        shared = model.get_submodule(f"mtp.{place}").norm.weight
        assert torch.equal(stored[f"model.layers.{place}.shared_head.norm.weight"], shared)
    assert_returns(tmp_path, model, depths=2)


QWEN = ["qwen3_next", "qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)]


def qwen_module(theirs: Any, stored: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the tokens after the next ones, [B, T - 1, V]."""
    inner, config = theirs.model, theirs.config
    norm_class, layer = type(inner.norm), type(inner.layers[-1])(config, config.num_hidden_layers - 1)
    found = {n.removeprefix("mtp.layers.0."): v for n, v in stored.items() if n.startswith("mtp.layers.0.")}
    if hasattr(config, "num_experts"):
        gate, up, down = (
            torch.stack([found.pop(f"mlp.experts.{e}.{name}.weight") for e in range(config.num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        found |= {"mlp.experts.gate_up_proj": torch.cat((gate, up), 1), "mlp.experts.down_proj": down}
    layer.load_state_dict(found)

    def normed(name: str, x: Tensor) -> Tensor:
        norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        norm.load_state_dict({"weight": stored[f"mtp.{name}.weight"]})
        return norm(x)

    embedded = normed("pre_fc_norm_embedding", inner.embed_tokens(tokens[:, 1:]))
    hidden = normed("pre_fc_norm_hidden", inner(tokens).last_hidden_state[:, :-1])
    x = torch.cat((embedded, hidden), -1) @ stored["mtp.fc.weight"].T
    positions = torch.arange(x.shape[1])[None]
    x = layer.eval()(x, inner.rotary_emb(x, positions), position_ids=positions)
    return theirs.lm_head(normed("norm", x))


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_the_module_of_qwen_and_its_checkpoints(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, layers=4, norm={"eps": 1e-4})
    model = drawn(spec)
    save_hf(tmp_path, named_weights(model), spec, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    theirs, info = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # it does not load `mtp.*`, and says nothing
    expected, (found,) = qwen_module(theirs.eval(), stored, tokens_BT()), logits_of_depths(model)
    assert (theirs(tokens_BT()).logits - model(tokens_BT())).abs().max() < 5e-5
    assert (found - expected).abs().max() < 5e-5
    assert expected.std() > 0.1

    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("num_nextn_predict_layers" if name == "qwen3_next" else "mtp_num_hidden_layers") == 1
    (tmp_path / "config.json").write_text(json.dumps(config))  # as released: the tensors say it
    assert_returns(tmp_path, model, depths=1)


def test_modules_of_qwen_that_share_more_than_is_computed_are_refused(tmp_path: Path) -> None:
    spec = spec_of("qwen3_next", layers=4)
    save_hf(tmp_path, named_weights(drawn(spec)), spec, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {**stored, "mtp.layers.1.self_attn.k_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"num_nextn_predict_layers = 2: modules .* share one `mtp\.fc`"
    ):
        spec_of_directory(tmp_path)
    spec = spec_of("qwen3_next", layers=4, depths=2)
    assert spec.family.hf is not None
    with pytest.raises(ConfigError, match=r"model\.mtp\.num_layers = 2: cannot be written"):
        spec.family.hf.config_to_hf(spec.config)


def test_modules_that_are_not_there_are_not_asked_for(tmp_path: Path) -> None:
    """transformers leaves them out when it saves, and their number in config.json."""
    config = transformers.Glm4MoeConfig(
        num_hidden_layers=2,
        hidden_size=32,
        head_dim=8,
        n_routed_experts=8,
        moe_intermediate_size=16,
        vocab_size=VOCAB,
    )
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert spec_of_directory(tmp_path).config.mtp is None


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    spec = spec_of("glm4_moe", layers=2)
    model = drawn(spec)
    save_hf(tmp_path, named_weights(model), spec, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.2.shared_head.head.weight"][0, 0] += 1
    del stored["model.layers.2.hnorm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(tmp_path, model, spec_of_directory(tmp_path))
    assert str(error.value).splitlines()[1:] == [
        "  missing model.layers.2.hnorm.weight",
        "  model.layers.2.shared_head.head.weight is not equal to lm_head.weight, which multi-token prediction shares "
        "here; a module with an embedding or a head of its own cannot be read",
    ]


@pytest.mark.parametrize(
    ("mtp", "named"),
    [
        ({"hidden": "pre_norm"}, r"model\.mtp\.hidden = 'pre_norm'"),
        ({"block": "dense"}, r"mtp\.block = 'dense'"),
    ],
)
def test_what_transformers_computes_otherwise_is_not_written(mtp: dict[str, Any], named: str) -> None:
    spec = spec_of("deepseek_v3", layers=2, mtp=mtp)
    assert spec.family.hf is not None
    with pytest.raises(ConfigError, match=named):
        spec.family.hf.config_to_hf(spec.config)


def test_families_without_modules_in_transformers_refuse_them() -> None:
    spec = spec_of("qwen3", layers=2)
    assert spec.family.hf is not None
    with pytest.raises(ConfigError, match=r"model\.mtp\.num_layers = 1: cannot be written"):
        spec.family.hf.config_to_hf(spec.config)

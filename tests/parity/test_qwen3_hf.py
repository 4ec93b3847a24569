"""Qwen3 against transformers: logits, gradients, packed documents, checkpoints both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from nanovl.checkpoint.hf import load_hf_weights, save_hf, spec_of_directory
from nanovl.errors import CheckpointError
from nanovl.spec import ModelSpec

CASES = {
    "grouped": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    },
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True},
    "one_kv_head": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 5e5},
}


def hf_model(case: str, seed: int = 0) -> transformers.Qwen3ForCausalLM:
    config = transformers.Qwen3Config(
        **{
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "max_position_embeddings": 128,
            "rope_theta": 1e6,
            "eos_token_id": None,
            "pad_token_id": None,
            "bos_token_id": None,
            **CASES[case],
        }
    )
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # its own init is too small for mistakes to show
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def imported(folder: Path) -> tuple[nn.Module, ModelSpec]:
    spec = spec_of_directory(folder)
    model = spec.family.model(spec.config)
    load_hf_weights(folder, model, spec)
    return model, spec


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_equal_transformers(tmp_path: Path, case: str, seed: int) -> None:
    theirs = hf_model(case, seed)
    theirs.save_pretrained(tmp_path)
    ours, _ = imported(tmp_path)
    tokens = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(seed))
    expected, actual = theirs(tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 2e-5
    assert actual.dtype == torch.float32
    for logits in (expected, actual):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = dict(theirs.named_parameters())
    assert (grads["model.embed_tokens.weight"].grad - ours.embed_tokens.weight.grad).abs().max() < 1e-6
    assert (
        grads["model.layers.0.self_attn.q_norm.weight"].grad - ours.layers["0"].mixer.q_norm.weight.grad
    ).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(tmp_path: Path, case: str) -> None:
    from nanovl.inference.engine import Engine

    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    ours, _ = imported(tmp_path)
    prompts = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(3))
    expected = theirs.generate(prompts, max_new_tokens=20, do_sample=False)[:, 12:]
    completions = Engine(ours).generate(prompts.tolist(), max_tokens=20)
    assert [c.ids for c in completions] == expected.tolist()


def test_packed_documents_equal_separate_ones(tmp_path: Path) -> None:
    hf_model("grouped").save_pretrained(tmp_path)
    ours, _ = imported(tmp_path)
    tokens = torch.randint(0, 131, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    doc_ids = torch.tensor([[0] * 12 + [1] * 8])
    packed = ours(tokens, positions, doc_ids)
    separate = torch.cat((ours(tokens[:, :12]), ours(tokens[:, 12:])), dim=1)
    assert (packed - separate).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_returns_bit_equal_and_loads_in_transformers(tmp_path: Path, case: str) -> None:
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "in")
    ours, spec = imported(tmp_path / "in")
    save_hf(tmp_path / "out", dict(ours.named_parameters()), spec, torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(again, transformers.Qwen3ForCausalLM)
    for (name, a), (_, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert spec_of_directory(tmp_path / "out").config == spec.config


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    theirs = hf_model("grouped")
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours, _ = imported(tmp_path)
    assert torch.equal(ours.norm.weight, theirs.model.norm.weight)


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf_model("grouped").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path)
    for line in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unknown model.layers.0.mlp.extra.weight",
        "model.norm.weight is (7,), the model wants (48,)",
    ):
        assert line in str(error.value)


def test_a_config_this_family_does_not_compute_is_refused(tmp_path: Path) -> None:
    hf_model("grouped").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    with pytest.raises(CheckpointError, match="hidden_act = 'gelu'"):
        spec_of_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["FooForCausalLM"]}')
    with pytest.raises(CheckpointError, match=r"FooForCausalLM is none of .*Qwen3ForCausalLM"):
        spec_of_directory(tmp_path)

"""Weights in 8-bit floats by blocks, against those that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from nanovl.checkpoint.float8 import FromBlocks
from nanovl.checkpoint.hf import load_hf_weights, save_hf, spec_of_directory
from nanovl.checkpoint.tensors import Held, named_weights
from nanovl.errors import CheckpointError
from nanovl.registry import family
from nanovl.spec import ModelSpec

BLOCK = 16
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def test_blocks_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 0.5]]).to(torch.float8_e4m3fn)
    factors = torch.tensor([[10.0, 100.0], [0.5, 0.25]])
    read = FromBlocks(Held({"a.weight": values, "a.weight_scale_inv": factors, "b": torch.ones(2)}), (2, 2))
    assert read.described.keys() == {"a.weight", "b"}
    expected = [[10.0, 20.0, 300.0], [40.0, 50.0, 600.0], [3.5, 4.0, 0.125]]
    assert read.read("a.weight").tolist() == expected
    assert read.read("a.weight").dtype == read.described["a.weight"].dtype == torch.bfloat16
    assert read.read("b").tolist() == [1.0, 1.0]
    flat = FromBlocks(Held({"a.weight": values, "a.weight_scale_inv": factors[:, :1]}), (2, 3))
    assert flat.read("a.weight").tolist() == [[10.0, 20.0, 30.0], [40.0, 50.0, 60.0], [3.5, 4.0, 0.25]]


def quantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers writes them: linears whose sizes the blocks divide; others, embeddings and routers stay."""
    config = SimpleNamespace(weight_block_size=[BLOCK, BLOCK], scale_fmt="float")
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    found = {}
    for name, value in weights.items():
        linear = name.endswith("_proj.weight") or "kv_a_proj" in name
        found |= quantizer._quantize_one(name, value) if linear else {name: value}
    return found


def quantized(folder: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """A small DeepSeek-V3 in float8, and its tensors."""
    found = family("deepseek_v3")
    config = found.flavors["debug"]()
    spec = ModelSpec(found, config)
    model = found.model(config)
    generator = torch.Generator().manual_seed(0)
    for weight in named_weights(model).values():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    save_hf(folder, named_weights(model), spec, torch.float32)
    tensors = quantize(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": FP8}))
    return spec, tensors


def test_a_float8_checkpoint_is_read_as_by_transformers(tmp_path: Path) -> None:
    spec, tensors = quantized(tmp_path)
    scaled = [name for name in tensors if f"{name}_scale_inv" in tensors]
    assert len(scaled) > 80
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in scaled
    dequantize = Fp8Dequantize(None)._dequantize_one
    plain = {n: v for n, v in tensors.items() if not n.endswith("_scale_inv")}
    for name in scaled:
        plain[name] = dequantize(tensors[name], tensors[f"{name}_scale_inv"], torch.bfloat16)
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    said = json.loads((tmp_path / "config.json").read_text())
    del said["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(said))
    models = []
    for folder in (tmp_path, tmp_path / "plain"):
        assert spec_of_directory(folder).config == spec.config
        models.append(spec.family.model(spec.config))
        load_hf_weights(folder, models[-1], spec)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    spec, tensors = quantized(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    other = "model.layers.0.self_attn.o_proj.weight"
    tensors[f"{other}_scale_inv"] = torch.ones(3, 4)
    wider = "model.layers.0.mlp.down_proj.weight"  # the other float8
    tensors[wider] = tensors[wider].float().to(torch.float8_e5m2)
    del tensors[f"{wider}_scale_inv"]
    flat = "model.norm.weight"
    tensors[f"{flat}_scale_inv"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = spec.family.model(spec.config)
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(tmp_path, model, spec)
    assert f"{name} is float8, and {name}_scale_inv is missing" in str(error.value)
    assert f"{other}_scale_inv is (3, 4), {other} has (4, 4) blocks" in str(error.value)
    assert f"{wider} is float8, and {wider}_scale_inv is missing" in str(error.value)
    assert f"{flat} is ({spec.config.hidden_size},), and matrices alone have blocks" in str(error.value)


@pytest.mark.parametrize("said", [{"quant_method": "compressed-tensors"}, {"quant_method": "fp8"}])
def test_other_kinds_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    spec, _ = quantized(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(
        CheckpointError, match=f"quant_method = '{said['quant_method']}', weight_block_size = None"
    ):
        load_hf_weights(tmp_path, spec.family.model(spec.config), spec)

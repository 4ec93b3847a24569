"""The language model of transformers' own models with images, taken out and compared with the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_family import every_family
from hf_pairs import pair
from safetensors.torch import load_file, save_file

import nanovl
from nanovl.checkpoint.locate import find_source
from nanovl.convert_tools import main
from nanovl.errors import CheckpointError
from nanovl.registry import family
from nanovl.tokenizer.bpe import Tokenizer

VOCAB = 300
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    },
    "qwen3_5": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48},
}  # fmt: skip
CLASSES = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
    "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
}
FAMILIES = every_family()


def with_images(name: str, folder: Path) -> Any:
    """A small random model of transformers' class, and its directory."""
    theirs = FAMILIES[name]
    text = {**pair(theirs, next(iter(theirs.cases))).theirs.config.to_dict(), "vocab_size": VOCAB}
    vision = VISION.get(name, VISION["qwen3_5"])
    config = CLASSES[name].config_class(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )
    torch.manual_seed(0)
    model = CLASSES[name](config).eval()
    model.save_pretrained(folder)
    Tokenizer([]).save(folder)
    return model


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
@torch.no_grad()
def test_text_alone_is_as_in_the_whole(name: str, tmp_path: Path) -> None:
    whole = with_images(name, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"has more than text .*`nanovl convert --text-only`"):
        nanovl.convert(tmp_path / "whole", tmp_path / "no", to="run")
    nanovl.convert(tmp_path / "whole", tmp_path / "run", to="run", text_only=True)
    nanovl.convert(tmp_path / "run", tmp_path / "hf", to="hf")
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = whole(tokens).logits
    assert (nanovl.load(tmp_path / "run", device="cpu").model(tokens) - expected).abs().max() <= 5e-5
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (alone(tokens).logits - expected).abs().max() <= 5e-5
    for path, said in (("hf", "has no text_config"), ("run", "has nothing but text to take out")):
        with pytest.raises(CheckpointError, match=said):
            nanovl.convert(tmp_path / path, tmp_path / "no", to="run", text_only=True)


def test_the_command_says_what_is_left_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_images("gemma3", tmp_path / "whole")
    assert main([str(tmp_path / "whole"), "--to", "run", "--text-only", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    gone = [line for line in lines if line.endswith(" -> left away")]
    assert gone
    assert all("vision_tower" in line or "multi_modal_projector" in line for line in gone)
    assert f"; {len(gone)} tensors of images or sound left away; nothing written" in lines[-1]


def test_names_as_transformers_4_wrote_them(tmp_path: Path) -> None:
    with_images("gemma3", tmp_path / "whole")
    nanovl.convert(tmp_path / "whole", tmp_path / "new", to="safetensors", text_only=True)
    file = tmp_path / "whole" / "model.safetensors"
    old = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("lm_head.", "language_model.lm_head."): value
        for name, value in load_file(file).items()
    }
    assert any(name.startswith("language_model.model.layers.") for name in old)
    save_file(old, file)
    nanovl.convert(tmp_path / "whole", tmp_path / "old", to="safetensors", text_only=True)
    save_file({**old, "lm_head.weight": old["language_model.model.embed_tokens.weight"].clone(),
               "language_model.lm_head.weight": torch.zeros(1)}, file)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"twice, under two names: lm_head\.weight"):
        nanovl.convert(tmp_path / "whole", tmp_path / "no", to="run", text_only=True)
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("new", "old"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_that_no_family_computes_is_refused(tmp_path: Path) -> None:
    with_images("gemma3", tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["model_type"] = "gpt2"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"text_config\.model_type = 'gpt2': is none of nanochat"):
        nanovl.convert(tmp_path / "whole", tmp_path / "no", to="run", text_only=True)


def test_what_released_files_leave_to_the_class(tmp_path: Path) -> None:
    """text_config as it is said to stand in the 4B's config.json."""
    files = family("gemma3").hf
    assert files is not None
    assert files.text_defaults.items() <= transformers.Gemma3TextConfig().to_dict().items()
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"a": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    source, left_away = find_source(tmp_path).text_only()
    assert source.spec.config == family("gemma3").flavors["4b"]()
    assert left_away == []

"""A Hugging Face directory: `AutoModelForCausalLM` and `AutoTokenizer` load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovl.checkpoint.front_matter import CARD_FILE
from nanovl.checkpoint.hf import config_of, under_their_names
from nanovl.checkpoint.safetensors_files import write_safetensors
from nanovl.checkpoint.tensors import Tensors
from nanovl.conversion.card import model_card
from nanovl.conversion.target import Model, Target
from nanovl.tokenizer.bpe import AnyTokenizer, Tokenizer
from nanovl.tokenizer.files import CONFIG_FILE, TOKENIZER_FILE
from nanovl.tokenizer.template import CHAT_TEMPLATE, TEMPLATE_FILE

GENERATION_FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HuggingFaceTarget(Target):
    """config.json, generation_config.json, safetensors, tokenizer and chat template, README.md."""

    has_shards = True

    def tensors(self, model: Model) -> Tensors:
        config_of(model.spec, model.weights)  # raises where transformers' class cannot say the same
        return under_their_names(model.weights, model.spec)

    def write(self, model: Model, tensors: Tensors, folder: Path, final: Path) -> None:
        model.tokenizer.save(folder)
        if isinstance(model.tokenizer, Tokenizer):
            (folder / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")
        if not (folder / GENERATION_FILE).exists():  # a directory that was read may have brought its own
            _write_json(folder / GENERATION_FILE, _generation(model.tokenizer, folder))
        generation = json.loads((folder / GENERATION_FILE).read_text(encoding="utf-8"))
        ids = {key: generation[key] for key in IDS if key in generation}
        _write_json(folder / "config.json", {**config_of(model.spec, model.weights), **ids})
        card = model_card(model, final.name, bos_first=_puts_bos_first(folder, model.tokenizer))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        write_safetensors(folder, tensors, model.shard_bytes, {})


def _puts_bos_first(folder: Path, tokenizer: AnyTokenizer) -> bool:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode("").ids == [tokenizer.bos_id]


def _generation(tokenizer: AnyTokenizer, folder: Path) -> dict[str, Any]:
    """Where texts begin and what ends them: for ours the end of an answer, or the next document."""
    if isinstance(tokenizer, Tokenizer):
        ends: Any = [tokenizer.special_ids["<|assistant_end|>"], tokenizer.bos_id]
    else:
        file = folder / CONFIG_FILE
        said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        token = said.get("eos_token")
        ends = tokenizer.special_ids.get(token["content"] if isinstance(token, dict) else token)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

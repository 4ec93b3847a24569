"""config.json of transformers, read key by key: of the right type, or a mistake; and no key that nobody reads.

A family asks for the keys of its class. What is wrong is collected, and a stand-in of the right type is handed out, so
that one look finds all mistakes. Every key keeps one meaning in all classes, so its type stands here once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovl.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """What a key's value may be."""

    wanted: str
    fits: Callable[[Any], bool]
    stand_in: Any
    """Handed out instead of a wrong value."""
    null: bool = False
    """null says something; elsewhere it is the same as no key."""


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(kind: type[Any]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


COUNT = Kind("wants a whole number above 0", lambda value: _whole(value, 1), 1)
COUNT_OR_NULL = Kind("wants a whole number above 0, or null", COUNT.fits, None, null=True)
WHOLE = Kind("wants a whole number, 0 or more", lambda value: _whole(value, 0), 0)
POSITIVE = Kind("wants a number above 0", lambda value: _number(value) and value > 0, 1.0)
POSITIVE_OR_NULL = Kind("wants a number above 0, or null", POSITIVE.fits, None, null=True)
FACTOR = Kind("wants a number, 1 or more", lambda value: _number(value) and value >= 1, 1.0)
NUMBER = Kind("wants a number, 0 or more", lambda value: _number(value) and value >= 0, 1.0)
FLAG = Kind("wants true or false", lambda value: isinstance(value, bool), False)
TEXT = Kind("wants text", lambda value: isinstance(value, str), "")
TEXTS = Kind("wants a list of texts", _list_of(str), ())
NUMBERS = Kind("wants a list of whole numbers", _list_of(int), ())
TABLE = Kind("wants a table", lambda value: isinstance(value, dict), {})

_KEYS = (
    (
        COUNT,
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings query_pre_attn_scalar num_experts num_local_experts n_routed_experts "
        "n_shared_experts num_experts_per_tok n_group topk_group moe_intermediate_size shared_expert_intermediate_size "
        "decoder_sparse_step kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_n_heads index_head_dim "
        "index_topk linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
        "linear_conv_kernel_dim "
        "full_attention_interval no_rope_layer_interval sliding_window_pattern _sliding_window_pattern "
        "original_max_position_embeddings attn_temperature_len",
    ),
    (COUNT_OR_NULL, "sliding_window q_lora_rank"),
    (WHOLE, "first_k_dense_replace num_nextn_predict_layers mtp_num_hidden_layers"),
    (
        POSITIVE,
        "rms_norm_eps rope_theta rope_local_base_freq partial_rotary_factor routed_scaling_factor attention_factor",
    ),
    (FACTOR, "factor"),
    (POSITIVE_OR_NULL, "final_logit_softcapping"),
    (NUMBER, "low_freq_factor high_freq_factor beta_fast beta_slow mscale mscale_all_dim"),
    (FLAG, "tie_word_embeddings attention_bias mlp_bias norm_topk_prob use_qk_norm truncate"),
    (TEXT, "rope_type type"),
    (TEXTS, "layer_types"),
    (NUMBERS, "mlp_only_layers no_rope_layers"),
    (TABLE, "rope_parameters rope_scaling full_attention sliding_attention"),
)
KINDS = {key: kind for kind, keys in _KEYS for key in keys.split()}
"""Key of config.json, or of a rotation in it -> what it may be."""

_HARMLESS = {
    "every config class of transformers": "architectures model_type auto_map dtype torch_dtype transformers_version "
    "use_cache output_attentions output_hidden_states output_router_logits return_dict attn_implementation "
    "cache_implementation problem_type id2label label2id num_labels tokenizer_class prefix finetuning_task "
    "task_specific_params use_bfloat16 torchscript tf_legacy_loss",
    "tokens": "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id model_max_length "
    "max_sequence_length tokenizer_model_max_length",
    "generation": "do_sample temperature top_k top_p min_p typical_p max_length min_length max_new_tokens "
    "repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams "
    "num_beam_groups num_return_sequences early_stopping bad_words_ids suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id output_scores return_dict_in_generate remove_invalid_values "
    "exponential_decay_length_penalty",
    "training": "initializer_range router_aux_loss_coef aux_loss_alpha seq_aux neftune_noise_alpha",
    "devices and kernels": "ep_size pretraining_tp mamba_ssm_dtype",
    "tools": "unsloth_fixed unsloth_version is_llama_config transformers.js_config",
    "said again elsewhere": "max_window_layers initial_context_length",
    "images": "mrope_section mrope_interleaved",
    "checkpoint/float8.py": "quantization_config",
}
"""By what they are about, or who reads them."""
HARMLESS = frozenset(" ".join(_HARMLESS.values()).split())
"""Keys that change nothing of what a model computes, or are checked elsewhere."""


class ConfigJson(Mapping[str, Any]):
    """A config.json, or a table in it.

    `hf[key]` has to be there, `hf.get(key, default)` need not; both note what is wrong with it, and `finish` raises.
    """

    def __init__(self, said: Mapping[str, Any], family: str, prefix: str = "") -> None:
        """`family` is named in mistakes; `prefix` stands before their keys."""
        self._said, self.family, self._prefix = said, family, prefix
        self._wrong: dict[str, str] = {}
        self._read: set[str] = set()
        self._tables: list[ConfigJson] = []

    def __getitem__(self, key: str) -> Any:
        kind = self._kind(key)
        if key not in self._said:
            self._wrong[key] = f"{self._prefix}{key}: missing; {kind.wanted}"
            return kind.stand_in
        return self._checked(key, kind)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` where there is none, or null."""
        kind = self._kind(key)
        value = self._said.get(key)
        if key not in self._said or (value is None and not kind.null):
            return default
        return self._checked(key, kind)

    def __contains__(self, key: object) -> bool:
        return key in self._said

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    def table(self, key: str, **silent: Any) -> ConfigJson:
        """The table `key`, read in the same way; `silent` stands for keys that it lacks."""
        below = ConfigJson({**silent, **self.get(key, {})}, self.family, f"{self._prefix}{key}.")
        self._tables.append(below)
        return below

    def expect(self, **wanted: Any) -> None:
        """Keys that need not be there, but ask for something that is not computed if they differ from this."""
        for key, value in wanted.items():
            self._read.add(key)
            if self._said.get(key) is not None and self._said[key] != value:
                self.refuse(key, f"{self.family} here computes {shown(value)} alone")

    def ignore(self, *keys: str) -> None:
        """Keys that the class of this family does not compute with."""
        self._read.update(keys)

    def refuse(self, key: str, why: str) -> None:
        """Note that the value of `key` will not do."""
        self._wrong.setdefault(key, f"{self._prefix}{key} = {shown(self._said.get(key))}: {why}")

    def sound(self, key: str) -> bool:
        """Whether nothing is wrong with `key` so far."""
        return key not in self._wrong

    def a_layer_each(self, key: str) -> bool:
        """Whether the list `key` has an entry for each layer; a mistake if not."""
        layers, given = self["num_hidden_layers"], self[key]
        if len(given) != layers and self.sound("num_hidden_layers") and self.sound(key):
            self.refuse(key, f"has {len(given)} entries; wants {layers}, one for each of num_hidden_layers")
        return len(given) == layers

    def finish(self, fields: Sequence[str] = ()) -> None:
        """Raises ConfigError with everything that is wrong, keys that nobody asked for included.

        `fields` are the mistakes of the config that came of it: keys by the same names, and maybe a stand-in's fault.
        """
        wrong = self._mistakes()
        lines = dict.fromkeys(re.sub(r"^(\w+\.)+", "", line) for line in fields)  # templates share keys
        if wrong:
            at_fault = {line.partition(" ")[0].strip(":").rpartition(".")[2] for line in wrong}
            lines = {
                line: None
                for line in lines
                if line.partition(" ")[0] in self and not at_fault & set(re.findall(r"\w+", line))
            }
        if wrong or lines:
            raise ConfigError([*wrong, *lines])

    def _kind(self, key: str) -> Kind:
        self._read.add(key)
        return KINDS[key]

    def _checked(self, key: str, kind: Kind) -> Any:
        value = self._said[key]
        if kind.fits(value) or (value is None and kind.null):
            return value
        self.refuse(key, kind.wanted)
        return kind.stand_in

    def _mistakes(self) -> list[str]:
        for key, value in self._said.items():
            harmless = key in self._read or key in HARMLESS or key.startswith("_")
            if not harmless and value not in (None, False, 0, "", [], {}):  # those ask for nothing
                self.refuse(key, self._unknown(key))
        return [*self._wrong.values(), *(line for below in self._tables for line in below._mistakes())]

    def _unknown(self, key: str) -> str:
        open_ones = sorted(name for name in self._read if self._said.get(name) is None)
        near = difflib.get_close_matches(key, open_ones, 1, cutoff=0.8)
        meant = f"did you mean {near[0]!r}? else " if near else ""
        return f"{self.family} here knows no such key; {meant}take it out if the model computes the same without it"


def shown(value: Any, most: int = 80) -> str:
    """`value` as Python writes it, not longer than `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."

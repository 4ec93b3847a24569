"""config.json files as they are out there, and everything that can be wrong with one."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASS_NAMES

from nanovl.checkpoint.hf import spec_of_directory
from nanovl.config.config_json import HARMLESS, KINDS
from nanovl.errors import CheckpointError, ConfigError
from nanovl.registry import MODELS, family

# copies of released files, from public repositories; what all have is in COMMON
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 106],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
RELEASED: dict[str, dict[str, Any]] = {
    "qwen3:8b": QWEN3,
    "deepseek_v3:671b-a37b": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 0,  # 1, but the sizes here are without the module
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_head_dim": 192,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rope_interleave": True,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt_oss:120b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "gemma3:1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "unsloth_fixed": True,
        "vocab_size": 262144,
    },
    "smollm3:3b": {
        "architectures": ["SmolLM3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "qwen3_5:27b": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 0,  # as above
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "output_gate_type": "swish",
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
}


CLASSES = [
    name for name in MODELS if (hf := family(name).hf) and CLASS_NAMES.get(hf.model_type) == hf.architecture
]
"""Families whose class transformers has under their `model_type`."""


@pytest.mark.parametrize("size", RELEASED)
def test_released_files_give_the_sizes_here(size: str) -> None:
    name, _, flavor = size.partition(":")
    assert family(name).config_from_hf({**COMMON, **RELEASED[size]}) == family(name).flavors[flavor]()


def test_which_families_transformers_lacks() -> None:
    assert MODELS.keys() - CLASSES == {"nanochat", "kimi_k2", "grok2"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_the_class_is_known(name: str) -> None:
    hf = family(name).hf
    assert hf is not None
    said = CONFIG_MAPPING[hf.model_type]().to_dict()
    # 4096 channels over GLM's 96 heads are 42.67, of which half cannot turn in pairs
    family(name).config_from_hf({**said, "head_dim": said["head_dim"] if said.get("head_dim") else 64})


def test_no_key_is_both_read_and_harmless() -> None:
    assert not KINDS.keys() & HARMLESS


@pytest.mark.parametrize(
    ("name", "change", "lines"),
    [
        (
            "qwen3",
            {
                "attention_dropout": 0.5,
                "hidden_act": "gelu",
                "layer_types": ["full_attention"] * 3,
                "num_attention_heads": "eight",
                "hidden_size": -64,
                "vocab_size": 512.0,
                "rms_norm_eps": "1e-6",
                "attention_bias": "false",
                "rope_parameters": "x",
                "final_logit_softcapping": 30.0,
                "tie_word_embedings": True,
                "tie_word_embeddings": None,
            },
            [
                "attention_dropout = 0.5: qwen3 here computes 0.0 alone",
                "hidden_act = 'gelu': qwen3 here computes 'silu' alone",
                "layer_types = ['full_attention', 'full_attention', 'full_attention']: has 3 entries; wants 36, one "
                "for each of num_hidden_layers",
                "num_attention_heads = 'eight': wants a whole number above 0",
                "hidden_size = -64: wants a whole number above 0",
                "vocab_size = 512.0: wants a whole number above 0",
                "rms_norm_eps = '1e-6': wants a number above 0",
                "attention_bias = 'false': wants true or false",
                "rope_parameters = 'x': wants a table",
                "final_logit_softcapping = 30.0: qwen3 here knows no such key; take it out if the model computes the "
                "same without it",
                "tie_word_embedings = True: qwen3 here knows no such key; did you mean 'tie_word_embeddings'? else "
                "take it out if the model computes the same without it",
            ],
        ),
        (
            "qwen3",  # what does not fit together is said too, where no stand-in is at fault
            {"num_key_value_heads": 5, "rope_scaling": {"type": "yarn", "factr": 4, "beta_fast": -1}},
            [
                "rope_scaling.beta_fast = -1: wants a number, 0 or more",
                "rope_scaling.factr = 4: qwen3 here knows no such key; did you mean 'factor'? else take it out if the "
                "model computes the same without it",
                "num_key_value_heads = 5: wants a divisor of num_attention_heads = 32",
            ],
        ),
        (
            "qwen3",
            {"num_key_value_heads": 5},
            ["num_key_value_heads = 5: wants a divisor of num_attention_heads = 32"],
        ),
        ("qwen3", {"num_hidden_layers": "4", "layer_types": ["full_attention"]}, ["num_hidden_layers = '4'"]),
        (
            "gpt_oss",
            {"sliding_window": None},
            ["sliding_window = None: wants a whole number above 0, since some layers"],
        ),
        (
            "gpt_oss",
            {"rope_parameters": {"rope_type": "yarn", "factor": 16.0}},
            [
                "rope_parameters = {'rope_type': 'yarn', 'factor': 16.0}: rope_scaling, which transformers prefers"
            ],
        ),
        ("gpt_oss", {"layer_types": 3}, ["layer_types = 3: wants a list of texts"]),
        ("gpt_oss", {"experts_per_token": 8}, ["experts_per_token = 8: gpt_oss here computes 4 alone"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers = [1, 0]: has 2 entries; wants 36"]),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": 4}, "rope_scaling": {"rope_type": "linear", "factor": 8}},
            [
                "rope_scaling = {'rope_type': 'linear', 'factor': 8}: rope_parameters are there too; say it in those",
                "rope_parameters.full_attention = 4: wants a table",
            ],
        ),
    ],
)
def test_everything_wrong_is_said_at_once(name: str, change: dict[str, Any], lines: list[str]) -> None:
    size = next(size for size in RELEASED if size.startswith(f"{name}:"))
    said = {**COMMON, **RELEASED[size], **change}
    with pytest.raises(ConfigError) as caught:
        family(name).config_from_hf(said)
    found = caught.value.mistakes
    assert len(found) == len(lines), found
    for line in lines:
        assert any(have.startswith(line) for have in found), (line, found)


@pytest.mark.parametrize("name", CLASSES)
def test_no_value_ends_in_a_traceback(name: str) -> None:
    """Every key of a file, and of its tables, with values of every type: read or refused, and if refused by its key."""
    found = family(name)
    assert found.hf is not None
    assert found.hf.config_to_hf is not None
    said = found.hf.config_to_hf(next(reversed(found.flavors.values()))())
    unnamed = []
    paths = [[key] for key in said]
    paths += [[key, below] for key, table in said.items() if isinstance(table, dict) for below in table]
    for path in paths:
        for value in ("x", "4", -1, 0, None, [], {}, 1.5, True, [1], ["x"], {"a": 1}, math.nan):
            wrong = copy.deepcopy(said)
            table = wrong[path[0]] if len(path) == 2 else wrong
            table[path[-1]] = value
            try:
                found.config_from_hf(wrong)
            except ConfigError as error:
                if not any(key in str(error) for key in path):
                    unnamed.append((path, value, str(error)))
    assert not unnamed


def test_the_file_is_named(tmp_path: Path) -> None:
    said: dict[str, Any] = {**COMMON, **QWEN3, "hidden_size": None, "head_dim": 0}
    del said["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError) as caught:
        spec_of_directory(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/config.json: ",
        "  num_hidden_layers: missing; wants a whole number above 0",
        "  hidden_size = None: wants a whole number above 0",
        "  head_dim = 0: wants a whole number above 0",
    ]
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **QWEN3, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="json: model_type = 'llama': Qwen3ForCausalLM wants qwen3"):
        spec_of_directory(tmp_path)

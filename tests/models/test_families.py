from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovl.config.schema import Job, Model, Parallelism, Tokenizer, Training
from nanovl.errors import ConfigError
from nanovl.models.blocks.indexer import IndexerConfig
from nanovl.models.decoder import DecoderConfig
from nanovl.registry import family, family_of, resolve_model, spec_from_dict, spec_to_dict
from nanovl.shrink import shrink

COUNTS = {
    ("llama3", "1b"): 1_235_814_400,
    ("llama3", "3b"): 3_212_749_824,
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("llama3", "405b"): 405_853_388_800,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("qwen3", "32b"): 32_762_123_264,
    ("olmo2", "7b"): 7_298_617_344,
    ("olmo2", "13b"): 13_716_198_400,
    ("olmo2", "32b"): 32_234_279_936,
    ("olmo3", "7b"): 7_298_011_136,
    ("olmo3", "32b"): 32_233_522_176,
    ("smollm3", "3b"): 3_075_098_624,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 3_880_263_168,
    ("gemma3", "12b"): 11_766_034_176,
    ("gemma3", "27b"): 27_009_346_304,
    ("qwen3_moe", "30b-a3b"): 30_532_122_624,
    ("qwen3_moe", "235b-a22b"): 235_093_634_560,
    ("deepseek_v3", "671b-a37b"): 671_026_404_352,
    ("deepseek_v3", "16b-a3b"): 15_960_108_544,
    ("deepseek_v32", "671b-a37b"): 671_877_929_216,
    ("kimi_k2", "1t-a32b"): 1_026_408_209_408,
    ("glm4_moe", "106b-a12b"): 106_852_245_504,
    ("glm4_moe", "355b-a32b"): 352_797_814_784,
    ("gpt_oss", "20b"): 20_914_757_184,
    ("gpt_oss", "120b"): 116_829_156_672,
    ("grok2", "270b-a115b"): 269_515_497_472,
}
"""Parameters of the same sizes built by transformers, see tests/parity/test_flavors_hf.py; Grok-2's as published."""
INDEXER = IndexerConfig(index_n_heads=16, index_head_dim=16, index_topk=4)
NAMES = sorted({name for name, _ in COUNTS})


def debug(name: str) -> DecoderConfig:
    config: DecoderConfig = family(name).flavors["debug"]()
    return config


@pytest.mark.parametrize("name", NAMES)
def test_flavors_have_the_published_parameters(name: str) -> None:
    found = family(name)
    assert [*found.flavors] == [f for n, f in COUNTS if n == name] + ["debug"]
    for flavor, make in found.flavors.items():
        config = make()
        config.validate()
        if flavor != "debug":
            with torch.device("meta"):
                model = found.model(config)
            assert sum(p.numel() for p in model.parameters()) == COUNTS[name, flavor], flavor


def test_last_layers_of_gemma_are_local_and_of_the_others_full() -> None:
    def kinds(name: str, flavor: str) -> list[str]:
        return [n[0] for n in family(name).flavors[flavor]().layer_names()]

    assert kinds("gemma3", "1b") == list("sssssf" * 4 + "ss")
    assert kinds("olmo3", "7b") == list("sssf" * 8)
    assert kinds("smollm3", "3b") == list("rrrn" * 9)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_config_returns(name: str) -> None:
    for flavor in family(name).flavors:
        spec = resolve_model(Model(name=name, flavor=flavor), 512)
        again = spec_from_dict(spec_to_dict(spec))
        assert again.config == spec.config
        assert type(again.config.blocks) is dict


@pytest.mark.parametrize("name", NAMES)
def test_shrunk_released_sizes_still_build(name: str) -> None:
    flavor = next(iter(family(name).flavors))
    training = Training(seq_len=4096, global_batch_size=8, steps=10)
    job = Job(
        model=Model(name=name, flavor=flavor),
        tokenizer=Tokenizer(vocab_size=family(name).flavors[flavor]().vocab_size),
        training=training,
        parallelism=Parallelism(),
    )
    spec = resolve_model(job.model, job.tokenizer.vocab_size)
    small = shrink(job, spec.config, 1)
    config = resolve_model(small.model, small.tokenizer.vocab_size).config
    assert {b.norm_placement for b in config.layers()} == {b.norm_placement for b in spec.config.layers()}
    assert set(config.layer_names()) == set(spec.config.layer_names())
    model = family(name).model(config)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    model(torch.randint(0, config.vocab_size, (1, small.training.seq_len)))


def test_shrunk_groups_still_hold_a_tokens_experts() -> None:
    groups = {"blocks": {"moe": {"ffn": {"n_group": 2, "topk_group": 1}}}}
    job = Job(model=Model(name="kimi_k2", overrides=groups), tokenizer=Tokenizer(vocab_size=163840))
    small = shrink(job, resolve_model(job.model, 163840).config, 1)
    assert resolve_model(small.model, small.tokenizer.vocab_size).config.blocks["moe"].ffn.num_experts == 16


@pytest.mark.parametrize(
    ("name", "block", "change", "message"),
    [
        ("llama3", "full", {"sinks": True}, r"model\.blocks\.full\.mixer\.sinks = True: cannot be written"),
        ("qwen3", "full", {"sliding_window": 5}, r"sliding_window = 5: .* Qwen3ForCausalLM has None"),
        ("olmo2", "full", {"qk_norm": "head"}, "qk_norm = 'head': .* Olmo2ForCausalLM has 'full'"),
        ("olmo3", "full", {"sliding_window": 9}, r"blocks\.full\.mixer\.sliding_window = 9"),
        ("smollm3", "nope", {"sliding_window": 9}, r"blocks\.nope\.mixer\.sliding_window = 9"),
        ("gemma3", "sliding", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("qwen3_moe", "full", {"qk_norm": "none"}, r"blocks\.full\.mixer\.qk_norm = 'none'"),
        ("deepseek_v3", "dense", {"v_head_dim": 8}, r"dense\.mixer\.v_head_dim = 8: .* has 16 there"),
        ("deepseek_v3", "moe", {"sliding_window": 9}, r"blocks\.moe\.mixer\.sliding_window = 9"),
        (
            "deepseek_v3",
            "moe",
            {"indexer": INDEXER},
            r"moe\.mixer\.indexer\.index_topk = 4: cannot be written",
        ),
        ("deepseek_v32", "dense", {"indexer": INDEXER}, r"dense\.mixer\.indexer\.index_topk = 4: .* has 16"),
        ("kimi_k2", "moe", {"latent_norm_eps": 1e-5}, "latent_norm_eps = 1e-05: .* has 1e-06 there"),
        ("glm4_moe", "moe", {"o_bias": True}, r"blocks\.moe\.mixer\.o_bias = True"),
        ("gpt_oss", "full", {"sinks": False}, "sinks = False: .* GptOssForCausalLM has True"),
    ],
)
def test_what_transformers_cannot_say_is_refused(
    name: str, block: str, change: dict[str, object], message: str
) -> None:
    found, config = family(name), debug(name)
    assert found.hf is not None
    config.init.std = 0.006  # weights of a checkpoint have begun already
    assert found.hf.config_to_hf(config)["model_type"]
    config.blocks[block].mixer = replace(config.blocks[block].mixer, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        found.hf.config_to_hf(config)


MOE_CHANGES: list[tuple[str, str, dict[str, object], str]] = [
    ("qwen3_moe", "full", {"scoring": "sigmoid"}, r"full\.ffn\.scoring = 'sigmoid': .* has 'softmax' there"),
    (
        "deepseek_v3",
        "moe",
        {"load_balancing": "none"},
        r"moe\.ffn\.load_balancing = 'none': cannot be written",
    ),
    ("deepseek_v3", "moe", {"shared_expert_intermediate_size": 48}, "size = 48: .* has 32 there"),
    ("glm4_moe", "moe", {"shared_expert_intermediate_size": 0}, "size = 0: .* has 32 there"),
]


@pytest.mark.parametrize(("name", "block", "change", "message"), MOE_CHANGES)
def test_experts_that_transformers_cannot_say_are_refused(
    name: str, block: str, change: dict[str, object], message: str
) -> None:
    found, config = family(name), debug(name)
    assert found.hf is not None
    config.blocks[block].ffn = replace(config.blocks[block].ffn, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        found.hf.config_to_hf(config)


def test_other_templates_than_those_of_transformers_are_refused() -> None:
    qwen, deepseek, glm = (family(name).hf for name in ("qwen3_moe", "deepseek_v3", "glm4_moe"))
    assert qwen is not None
    assert deepseek is not None
    assert glm is not None
    with pytest.raises(ConfigError, match="wants `full`, of attention and moe, as Qwen3MoeForCausalLM"):
        qwen.config_to_hf(debug("qwen3"))
    with pytest.raises(ConfigError, match="wants kind = 'mla', as DeepseekV3ForCausalLM has"):
        deepseek.config_to_hf(debug("glm4_moe"))
    with pytest.raises(ConfigError, match="wants kind = 'attention', as Glm4MoeForCausalLM has"):
        glm.config_to_hf(debug("deepseek_v3"))
    config = debug("deepseek_v3")
    config.prefix, config.suffix = [], ["dense"]
    with pytest.raises(ConfigError, match="DeepseekV3ForCausalLM has its dense layers first"):
        deepseek.config_to_hf(config)
    config.blocks["dense"].ffn = config.blocks["moe"].ffn
    with pytest.raises(ConfigError, match="wants `dense`, with an mlp, and `moe`, with a moe"):
        deepseek.config_to_hf(config)


def test_families_of_one_class_are_told_apart_by_model_type() -> None:
    assert family_of("DeepseekV3ForCausalLM", "kimi_k2").name == "kimi_k2"
    assert family_of("DeepseekV3ForCausalLM", "deepseek_v3").name == "deepseek_v3"
    assert family_of("Qwen3ForCausalLM", "").name == "qwen3"
    with pytest.raises(
        ConfigError, match="model_type = 'k3': DeepseekV3ForCausalLM wants deepseek_v3 or kimi_k2"
    ):
        family_of("DeepseekV3ForCausalLM", "k3")
    with pytest.raises(ConfigError, match="model_type = 'qwen2': Qwen3ForCausalLM wants qwen3"):
        family_of("Qwen3ForCausalLM", "qwen2")
    with pytest.raises(ConfigError, match="Foo is none of"):
        family_of("Foo", "")
    kimi = family("kimi_k2")
    assert kimi.hf is not None
    said = kimi.hf.config_to_hf(debug("kimi_k2"))
    back = family_of(said["architectures"][0], said["model_type"])
    assert back.name == "deepseek_v3"  # the type that transformers knows
    assert back.hf is not None
    assert back.config_from_hf(said) == debug("kimi_k2")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type = 'dynamic': wants default",
        ),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3", {"layer_types": ["linear_attention"] * 6}, "linear_attention is none of"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, "one for full_attention"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 8, "truncate": False}}},
            "rope_parameters.full_attention.truncate = False: transformers 5.23 ignores it",
        ),
        ("olmo3", {"rope_parameters": None, "rope_theta": 12345}, "of which layers"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"scoring_func": "softmax", "topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts = 0: wants a whole number above 0"),
    ],
)
def test_what_is_not_computed_here_is_refused(name: str, change: dict[str, object], message: str) -> None:
    found = family(name)
    assert found.hf is not None
    given = {**found.hf.config_to_hf(debug(name)), **change}
    with pytest.raises(ConfigError, match=message):
        found.config_from_hf({key: value for key, value in given.items() if value is not None})


def test_configs_of_transformers_4_are_read() -> None:
    gemma, olmo, llama = (family(name) for name in ("gemma3", "olmo3", "llama3"))
    said = gemma.hf.config_to_hf(debug("gemma3"))
    old = {k: v for k, v in said.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert gemma.config_from_hf(old) == debug("gemma3")
    said = olmo.hf.config_to_hf(debug("olmo3"))
    old = {k: v for k, v in said.items() if k not in ("rope_parameters", "layer_types")}
    assert olmo.config_from_hf({**old, "rope_theta": 5e5}) == debug("olmo3")
    said = llama.hf.config_to_hf(debug("llama3"))
    assert said["rope_scaling"]["rope_type"] == "llama3"
    old = {**said, "rope_scaling": {**said["rope_scaling"], "type": "llama3"}}
    assert llama.config_from_hf(old) == debug("llama3")

from __future__ import annotations

from pathlib import Path

import pytest

from nanovl.config.load import job_from_dict, job_to_dict, load_job
from nanovl.errors import ConfigError
from nanovl.registry import read_job, resolve_model

GOOD = """
[[data.sources]]
kind = "stdlib"
holdout = 0.02
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.toml", GOOD)


def mistakes(*args: object, **kwargs: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_job(*args, **kwargs)  # type: ignore[arg-type]
    return error.value.mistakes


def test_files_merge_left_to_right_and_flags_come_last(tmp_path: Path, good: Path) -> None:
    one = write(tmp_path / "one.toml", "[training]\nsteps = 5\nseq_len = 64\n")
    two = write(tmp_path / "two.toml", "[training]\nsteps = 6\n")
    job = load_job([good, one, two], ["--training.seq_len=32", "--training.max_norm", "2"])
    assert (job.training.steps, job.training.seq_len, job.training.max_norm) == (6, 32, 2.0)


def test_every_mistake_of_files_and_flags_is_reported_at_once(tmp_path: Path) -> None:
    bad = write(
        tmp_path / "bad.toml",
        '[training]\nsteps = "twenty"\nsteqs = 3\nmixed_precision_param = "bfloat"\n'
        '[[data.sources]]\nkind = "stdlib"\nweight = "lots"\n[moddel]\nx = 1\n',
    )
    found = "\n".join(mistakes([bad], ["--training.seq_len=long", "--data.sources.0.wieght=3", "--foo"]))
    for line in (
        "training.steps = 'twenty' (from bad.toml): wants a whole number",
        "training.steqs: no such key (from bad.toml); did you mean 'steps'?",
        "training.mixed_precision_param = 'bfloat' (from bad.toml): wants 'auto', 'bfloat16' or 'float32'; "
        "did you mean 'bfloat16'?",
        "data.sources.0.weight = 'lots' (from bad.toml): wants a number",
        "moddel: no such key (from bad.toml); did you mean 'model'?",
        "training.seq_len = 'long' (from flag): wants a whole number",
        "data.sources.0.wieght: no such key (from flag); did you mean 'weight'?",
        "--foo: not a setting; settings are written --section.key=value",
    ):
        assert line in found, line


def test_types_are_strict_in_files_and_read_from_text_in_flags(tmp_path: Path, good: Path) -> None:
    quoted = write(tmp_path / "quoted.toml", '[training]\nsteps = "10"\n[job]\ndescription = 3\n')
    found = mistakes([good, quoted])
    assert "training.steps = '10' (from quoted.toml): wants a whole number" in found
    assert "job.description = 3 (from quoted.toml): wants text" in found
    job = load_job(
        [good], ["--training.steps=10", "--job.description=3", "--data.shuffle=False", "--optimizer.lr=1e-3"]
    )
    assert (job.training.steps, job.job.description, job.data.shuffle, job.optimizer.lr) == (
        10,
        "3",
        False,
        1e-3,
    )


def test_lists_of_tables_are_indexed_by_number_and_grow_at_their_end(good: Path) -> None:
    flags = ["--data.sources.0.weight=3", "--data.sources.1.kind=text", "--data.sources.1.path=docs"]
    job = load_job([good], flags)
    assert [(s.kind, s.weight) for s in job.data.sources] == [("stdlib", 3.0), ("text", 1.0)]
    assert mistakes([good], ["--data.sources.5.kind=text"]) == [
        "--data.sources.5.kind: '5' is no index of a list of 1"
    ]
    assert mistakes([good], ["--training.steps.x=1"])[0].startswith("training.steps = {'x': 1}")


def test_flags_accept_hyphens_negative_numbers_lists_and_equals_signs(good: Path) -> None:
    flags = [
        "--training.seq-len=16",
        "--parallelism.data_parallel_shard_degree",
        "-1",
        '--sampling.prompts=["a=b"]',
    ]
    job = load_job([good], flags)
    assert job.training.seq_len == 16
    assert job.parallelism.data_parallel_shard_degree == -1
    assert job.sampling.prompts == ["a=b"]
    assert mistakes([good], ["--training.steps"]) == [
        "--training.steps: needs a value, as in --training.steps=..."
    ]


def test_keys_of_the_model_section_go_to_its_family(good: Path) -> None:
    job = load_job(
        [good], ["--model.name=qwen3", "--model.flavor=0.6b", "--model.blocks.full.mixer.head_dim=64"]
    )
    assert job.model.flavor == "0.6b"
    assert job.model.overrides == {"blocks": {"full": {"mixer": {"head_dim": 64}}}}


def test_a_resolved_job_reads_back_equal(good: Path) -> None:
    job = load_job(
        [good], ["--model.depth=3", "--optimizer.groups.0.match=.*", "--optimizer.groups.0.lr=0.1"]
    )
    assert job_from_dict(job_to_dict(job)) == job
    with pytest.raises(ConfigError, match=r"training\.stps: no such key; did you mean 'steps'"):
        job_from_dict({"training": {"stps": 1}})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "quickstart.toml", GOOD)
    assert mistakes([tmp_path / "quikstart.toml"]) == [
        f"--config {tmp_path / 'quikstart.toml'}: no such file; did you mean {tmp_path / 'quickstart.toml'}?"
    ]
    write(tmp_path / "quickstar.toml", "[project]\nname = 'x'\n")  # nearer, but no job
    assert mistakes([tmp_path / "quickstar_.toml"])[0].endswith("quickstart.toml?")
    assert mistakes([tmp_path / "nope.toml"]) == [f"--config {tmp_path / 'nope.toml'}: no such file"]
    broken = write(tmp_path / "broken.toml", "[training\nsteps = 1")
    assert "not valid TOML" in mistakes([broken])[0]
    assert "Is a directory" in mistakes([tmp_path])[0]


def test_mistakes_of_all_kinds_come_together(tmp_path: Path) -> None:
    """Unknown keys, wrong types, rules over sections, and rules of the model; none that only follows from another."""
    flags = [
        "--training.steqs=3",
        "--training.seq_len=-1",
        "--data.sources.0.weight=lots",
        "--training.steps=x",
    ]
    flags += [
        "--model.name=qwen3",
        "--model.hiden_size=64",
        "--model.blocks.full.mixer.num_key_value_heads=3",
    ]
    flags += ["--model.blocks.full.ffn.intermediate_size=wide", "--data.sources.0.kind=stdlib"]
    with pytest.raises(ConfigError) as error:
        read_job([], flags)
    assert error.value.mistakes == [
        "data.sources.0.weight = 'lots' (from flag): wants a number",
        "training.steps = 'x' (from flag): wants a whole number",
        "training.steqs: no such key (from flag); did you mean 'steps'?",
        "training.seq_len = -1: wants a number above 0",
        "validation.freq: there is no held-out text; set data.sources.N.holdout (such as 0.02), add "
        "[[validation.sources]], or set validation.freq = 0",
        "model.blocks.full.ffn.intermediate_size = 'wide': wants a whole number",
        "model.hiden_size: no such key; did you mean 'hidden_size'?",
        "model.blocks.full.mixer.num_key_value_heads = 3: wants a divisor of num_attention_heads = 16",
    ]
    # an item of a list takes the list with it: nothing is said of an empty one
    job = write(tmp_path / "job.toml", "[training]\nseq_len = 0\n[data]\nsources = [3]\n")
    assert mistakes([job]) == [
        "data.sources.0 = 3 (from job.toml): wants a table",
        "training.seq_len = 0: wants a number above 0",
    ]


def test_a_misspelt_block_is_told_from_a_new_one() -> None:
    source = ["--data.sources.0.kind=stdlib", "--data.sources.0.holdout=0.1", "--model.name=qwen3"]
    with pytest.raises(ConfigError) as error:
        read_job([], [*source, "--model.blocks.ful.mixer.num_heads=2"])
    assert error.value.mistakes == [
        "model.blocks.ful: the flavor has no such block; did you mean 'full'? A new one needs "
        "mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim, ffn too",
        "model.blocks.ful.mixer.num_heads: no such key; did you mean 'num_key_value_heads'?",
    ]
    with pytest.raises(ConfigError) as error:  # a section that may be none has keys too
        read_job([], [*source, "--model.mtp.depth=2", "--model.blocks.full.mixer.rope.thta=1"])
    assert error.value.mistakes == [
        "model.blocks.full.mixer.rope.thta: no such key; did you mean 'theta'?",
        "model.mtp.depth: no such key; choose from num_layers, block, hidden, loss_weight",
    ]
    with pytest.raises(ConfigError) as error:  # nor is a word a section
        read_job([], [*source, "--model.blocks.full.mixer=mla", "--model.blocks.full.ffn.kind=[1]"])
    assert error.value.mistakes == [
        "model.blocks.full.mixer = 'mla': wants a table with a `kind` that is 'attention' or 'mla' or "
        "'gated_delta_net'",
        "model.blocks.full.ffn = {'kind': [1]}: wants a table with a `kind` that is 'mlp' or 'moe'",
    ]
    with pytest.raises(ConfigError) as error:  # a misspelt section takes nothing from the one that is there
        read_job([], [*source, "--model.hiden_size=8", "--modle.name=qwen3"])
    assert [line.partition(":")[0] for line in error.value.mistakes] == ["modle", "model.hiden_size"]
    with pytest.raises(
        ConfigError,
        match=r"blocks\.x: the flavor has no such block; it has full\. A new one needs .*, ffn too",
    ):
        read_job([], [*source, '--model.blocks.x.mixer={kind = "mla"}'])
    whole = ["num_attention_heads = 2", "num_key_value_heads = 2", "head_dim = 8"]
    new = [f"--model.blocks.x.mixer={{{', '.join(whole)}}}", "--model.blocks.x.ffn={intermediate_size = 8}"]
    assert "x" in read_job([], [*source, *new]).model.overrides["blocks"]


def test_checks_of_other_rooms_join_the_list(good: Path) -> None:
    found = mistakes([good], ["--training.seq_len=0"], checks=[lambda job: ["model.depth = -1: wants more"]])
    assert found == ["training.seq_len = 0: wants a number above 0", "model.depth = -1: wants more"]


def test_none_is_a_word_where_the_schema_has_it_and_else_no_value() -> None:
    flags = ["--data.sources.0.kind=stdlib", "--data.sources.0.holdout=0.1", "--model.name=qwen3"]
    flags += ["--model.norm.weight=none", "--model.blocks.full.mixer.qk_norm=none", "--model.mtp=none"]
    job = read_job([], [*flags, "--model.blocks.full.mixer.sliding_window=none"])
    config = resolve_model(job.model, None).config
    assert (config.norm.weight, config.blocks["full"].mixer.qk_norm) == ("none", "none")
    assert (config.mtp, config.blocks["full"].mixer.sliding_window) == (None, None)


def test_numbers_that_a_model_cannot_have_are_refused() -> None:
    flags = ["--data.sources.0.kind=stdlib", "--data.sources.0.holdout=0.1", "--model.name=qwen3"]
    wrong = {
        "final_logit_softcapping": "0",
        "embed_scale": "-1",
        "norm.eps": "-1",
        "max_position_embeddings": "0",
    }
    with pytest.raises(ConfigError) as error:
        read_job([], [*flags, *(f"--model.{key}={value}" for key, value in wrong.items())])
    assert [line.partition(" =")[0] for line in error.value.mistakes] == [
        f"model.{key}"
        for key in ("final_logit_softcapping", "max_position_embeddings", "embed_scale", "norm.eps")
    ]
    with pytest.raises(ConfigError, match=r"model\.logit_scale = inf: wants a finite number"):
        read_job([], [*flags, "--model.logit_scale=inf"])

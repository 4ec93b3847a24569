from __future__ import annotations

from pathlib import Path

import pytest

from nanovl.config.load import job_from_dict, job_to_dict, load_job
from nanovl.errors import ConfigError

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
    broken = write(tmp_path / "broken.toml", "[training\nsteps = 1")
    assert "not valid TOML" in mistakes([broken])[0]
    assert "Is a directory" in mistakes([tmp_path])[0]


def test_checks_of_other_rooms_join_the_list(good: Path) -> None:
    found = mistakes([good], ["--training.seq_len=0"], checks=[lambda job: ["model.depth = -1: wants more"]])
    assert found == ["training.seq_len = 0: wants a number above 0", "model.depth = -1: wants more"]

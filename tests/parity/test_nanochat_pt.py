"""nanochat's own files: which are read, written, and refused."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nanochat_reference import ERAS, Reference, imported, random_tokens, reference, write, write_tokenizer

from nanovl.checkpoint.locate import find_source
from nanovl.cli import main
from nanovl.conversion.convert import convert, plan
from nanovl.errors import CheckpointError, ConfigError
from nanovl.inference.load import load


@pytest.mark.parametrize("day", ["2025-10-13", "2026-03-14"])
@pytest.mark.parametrize("padding", [True, False])
def test_prefixes_and_padding(tmp_path: Path, day: str, padding: bool) -> None:
    theirs = reference(day, padding=padding)
    ours, spec = imported(write(tmp_path, theirs, prefix="_orig_mod."))
    assert spec.config.vocab_size == 131
    tokens = random_tokens(20)
    assert (theirs(tokens) - ours(tokens)).abs().max() <= 2e-5


@pytest.mark.parametrize("through", [None, "run", "dcp", "safetensors"])
def test_first_release_returns_bit_equal(tmp_path: Path, through: str | None) -> None:
    theirs = reference("2025-10-13", vocab=267, padding=False)
    here = write(tmp_path / "in", theirs, step=650)
    write_tokenizer(here / "tokenizer")
    if through is not None:
        here = convert(here, tmp_path / "through", to=through)
    convert(here, tmp_path / "out", to="nanochat")
    read, written = tmp_path / "in", tmp_path / "out"
    assert sorted(os.listdir(written)) == ["meta_000650.json", "model_000650.pt", "tokenizer"]
    before, after = (torch.load(place / "model_000650.pt", weights_only=True) for place in (read, written))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    for name in ("meta_000650.json", "tokenizer/tokenizer.pkl"):
        assert (written / name).read_bytes() == (read / name).read_bytes()
    again = Reference(
        ERAS["2025-10-13"], json.loads((written / "meta_000650.json").read_text())["model_config"], 267
    )
    again.load_state_dict(after)
    assert torch.equal(again(random_tokens(9)), theirs(random_tokens(9)))


def test_what_nanochat_would_compute_differently_is_not_written(tmp_path: Path) -> None:
    """transformers' own epsilon; an era whose files are only read; a tokenizer of another kind."""
    write_tokenizer(write(tmp_path / "pt", reference("2025-10-13", vocab=267)))
    hf = convert(tmp_path / "pt", tmp_path / "hf", to="hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(
        ConfigError, match=r"model\.norm\.eps = 1e-06: cannot be written; nanochat's own code has 1\.19"
    ):
        plan(hf, to="nanochat")
    (hf / "config.json").write_text(json.dumps(config))
    split = (hf / "tokenizer.json").read_text().replace("{1,2}", "{1,3}")
    (hf / "tokenizer.json").write_text(split)
    with pytest.raises(CheckpointError, match=r"hf: holds a tokenizer that nanochat cannot read"):
        plan(hf, to="nanochat")
    write_tokenizer(write(tmp_path / "later", reference("2026-03-14", vocab=267)))
    with pytest.raises(
        CheckpointError, match=r"nanochat: of nanochat's files only those of its first release"
    ):
        plan(tmp_path / "later", to="nanochat")


@pytest.mark.parametrize("day", ["2025-10-13", "2026-03-14"])
def test_load_generate_and_convert_take_such_a_folder(
    tmp_path: Path, day: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = reference(day, vocab=267)
    folder = write(tmp_path / "pt", theirs)
    encoding = write_tokenizer(folder / "tokenizer")
    loaded = load(folder)
    text = "the other day"
    ids = [encoding.encode_single_token("<|bos|>"), *encoding.encode_ordinary(text)]
    assert loaded.tokenizer.encode(text, bos=True) == ids
    assert (loaded.model(torch.tensor([ids])) - theirs(torch.tensor([ids]))).abs().max() <= 2e-5
    assert main(["generate", str(folder), "--prompt", text, "--max-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert main(["convert", str(folder), "--to", "run", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    run = load(tmp_path / "run")
    assert run.path.name == "step_000012"
    assert main(["generate", str(tmp_path / "run"), "--prompt", text, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == said
    assert main(["chat", str(folder), "-p", text, "--temperature", "0", "--max-tokens", "4"]) == 0


def test_the_newest_step_or_the_one_that_is_named(tmp_path: Path) -> None:
    write(tmp_path, reference("2025-10-13", seed=1), step=5)
    write(tmp_path, reference("2025-10-13", seed=2), step=12)
    (tmp_path / "model_000099_backup.pt").touch()
    tokens = random_tokens(5)
    for path, seed in ((tmp_path, 2), (tmp_path / "model_000005.pt", 1)):
        ours, _ = imported(path)
        assert (ours(tokens) - reference("2025-10-13", seed=seed)(tokens)).abs().max() <= 2e-5
    with pytest.raises(
        CheckpointError, match=r"meta_000005\.json: neither a run folder, .*folder of nanochat's checkpoints"
    ):
        imported(tmp_path / "meta_000005.json")


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    write(tmp_path, reference("2026-03-14"))
    state = torch.load(tmp_path / "model_000012.pt", weights_only=True)
    state["bigram_embed.embed.weight"] = torch.zeros(3, 64)
    state["x0_lambdas"] = torch.zeros(4)
    state["transformer.h.3.attn.c_q.weight"] = torch.zeros(63, 64)
    state["transformer.h.2.mlp.c_fc.weight"] = torch.zeros(64, 64)
    del state["value_embeds.2.weight"], state["smear_lambda"]
    torch.save(state, tmp_path / "model_000012.pt")
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/model_000012.pt does not fit nanochat:",
        "  missing smear_lambda",
        "  missing value_embeds.2.weight",
        "  transformer.h.2.mlp.c_fc.weight is (64, 64), the model wants (256, 64)",
        "  transformer.h.3.attn.c_q.weight is (63, 64), which cannot be rearranged into "
        "layers.3.mixer.q_proj.weight (64, 64)",
        "  unknown bigram_embed.embed.weight",
        "  x0_lambdas is (4,), which cannot be rearranged into "
        + ", ".join(f"layers.{i}.blend.embedding (1,)" for i in range(5)),
    ]


class Touches:
    """Unpickling it makes a file: what must not happen."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


def test_code_in_the_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    write(tmp_path, reference("2025-10-13"))
    torch.save({"lm_head.weight": Touches(tmp_path / "touched")}, tmp_path / "model_000012.pt")
    with pytest.raises(CheckpointError, match=r"could run code, so it is not read: .*system"):
        imported(tmp_path)
    (tmp_path / "model_000012.pt").write_bytes(pickle.dumps(Touches(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match=r"model_000012.pt: damaged, or not written by torch.save"):
        imported(tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    file = write(tmp_path, reference("2025-10-13")) / "model_000012.pt"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"model_000012\.pt: damaged, or not written by torch\.save"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(2)], "is a list, not a dict of tensors"),
        ({"step": 3}, "step is no tensor of floating-point numbers"),
        ({"wte": torch.zeros(2, dtype=torch.int32)}, "wte is no tensor of floating-point numbers"),
        ({"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}, "a is there twice, once with _orig_mod."),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    write(tmp_path, reference("2025-10-13"))
    torch.save(state, tmp_path / "model_000012.pt")
    with pytest.raises(CheckpointError, match=message):
        imported(tmp_path)


def test_both_files_must_be_of_one_step(tmp_path: Path) -> None:
    write(tmp_path, reference("2025-10-13"))
    (tmp_path / "meta_000012.json").rename(tmp_path / "meta_000020.json")
    with pytest.raises(
        CheckpointError, match=r"has no meta_000012\.json beside it \(meta_000020\.json is there\)"
    ):
        imported(tmp_path)
    (tmp_path / "meta_000020.json").rename(tmp_path / "meta_000012.json")
    write(tmp_path, reference("2025-10-13"), step=20)
    (tmp_path / "model_000020.pt").rename(tmp_path / "model_000030.pt")
    (tmp_path / "meta_000020.json").rename(tmp_path / "meta_000030.json")
    with pytest.raises(
        CheckpointError, match=r"meta_000030\.json: is of step 20, the weights are of step 30"
    ):
        imported(tmp_path)


def test_a_missing_or_broken_meta_file_is_named(tmp_path: Path) -> None:
    meta = write(tmp_path, reference("2025-10-13")) / "meta_000012.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[1]", "holds no object"),
        ("{}", "the meta file has no model_config"),
        ('{"step": 13}', "is of step 13, the weights are of step 12"),
    ):
        meta.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            imported(tmp_path)
    meta.unlink()
    with pytest.raises(CheckpointError, match=r"has no meta_000012\.json beside it \(no other is there\)"):
        imported(tmp_path)


def test_a_meta_file_of_reinforcement_learning_names_no_step(tmp_path: Path) -> None:
    theirs = reference("2026-03-14")
    write(tmp_path, theirs)
    (tmp_path / "meta_000012.json").write_text(json.dumps({"model_config": theirs.config}))
    imported(tmp_path)


def test_sizes_that_cannot_be_are_all_listed(tmp_path: Path) -> None:
    theirs = reference("2025-10-13")
    config = {**theirs.config, "n_layer": 0, "n_embd": "64", "frozen_embd": True}
    del config["n_kv_head"]
    theirs.config = config
    with pytest.raises(CheckpointError) as error:
        imported(write(tmp_path, theirs))
    assert str(error.value).splitlines() == [
        f"{tmp_path}/meta_000012.json and model_000012.pt:",
        "  model_config.n_layer = 0: wants a number above 0",
        "  model_config.n_kv_head = None: wants a number above 0",
        "  model_config.n_embd = '64': wants a number above 0",
        "  model_config.frozen_embd = True: no nanochat has it",
    ]


@pytest.mark.parametrize(
    ("day", "changes", "message"),
    [
        ("2025-10-13", {"n_head": 3}, r"n_embd = 64: is not a multiple of n_head = 3"),
        ("2025-10-13", {"window_pattern": "SL"}, r"nanochat had none before resid_lambdas"),
        ("2026-01-11", {"sequence_len": 401}, r"sequence_len = 401: half of it, the short window"),
        (
            "2026-01-11",
            {"window_pattern": "SX"},
            r"window_pattern = 'SX': wants letters S \(short\) and L \(long\)",
        ),
        (
            "2026-01-11",
            {"n_layer": 70, "n_embd": 64},
            r"no channels a layer make n_embd = 64 of n_layer = 70",
        ),
        ("2026-01-18", {}, r'does not say how logits are capped.*add "softcap": 15 or "softcap": 20'),
    ],
)
def test_configs_that_no_nanochat_had(
    tmp_path: Path, day: str, changes: dict[str, Any], message: str
) -> None:
    theirs = reference(day)
    theirs.config = {**theirs.config, **changes}
    with pytest.raises(CheckpointError, match=message):
        imported(write(tmp_path, theirs))


@pytest.mark.parametrize("cap", ["20", 0])
def test_a_cap_is_a_number(tmp_path: Path, cap: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"softcap = {cap!r} in the meta file: wants a number above 0"):
        imported(write(tmp_path, reference("2026-01-18"), softcap=cap))


@pytest.mark.parametrize("day", ["2025-10-13", "2026-03-14"])
def test_a_stated_cap_counts_in_every_era(tmp_path: Path, day: str) -> None:
    theirs = reference(day)
    theirs.era = replace(theirs.era, cap=7.0)
    ours, _ = imported(write(tmp_path, theirs, softcap=7))
    tokens = random_tokens(20)
    assert (theirs(tokens) - ours(tokens)).abs().max() <= 2e-5


def test_a_gate_of_no_era_is_refused(tmp_path: Path) -> None:
    write(tmp_path, reference("2026-03-09"))
    state = torch.load(tmp_path / "model_000012.pt", weights_only=True)
    state["transformer.h.0.attn.ve_gate.weight"] = torch.zeros(2, 16)
    torch.save(state, tmp_path / "model_000012.pt")
    with pytest.raises(CheckpointError, match=r"attn\.ve_gate reads 16 channels, and no nanochat's does"):
        imported(tmp_path)


def test_a_part_of_the_model_takes_what_it_has(tmp_path: Path) -> None:
    """As a stage of a pipeline, which holds some of the layers, and of the lambdas that are one vector there."""
    source = find_source(write(tmp_path, reference("2026-03-14")))
    whole, _ = imported(tmp_path)
    part = source.spec.family.model(source.spec.config)
    for name in ("0", "1", "4"):
        del part.layers[name]
    del part.embed_tokens, part.smear
    source.fill(part)
    assert "layers.2.blend.stream" in dict(part.named_parameters())
    for name, value in part.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)), name


def test_windows_of_a_silent_meta_file_are_long(tmp_path: Path) -> None:
    theirs = reference("2026-01-11")
    del theirs.config["window_pattern"]
    ours, spec = imported(write(tmp_path, theirs))
    assert spec.config.window_pattern == "L"
    tokens = random_tokens(300)
    assert (theirs(tokens) - ours(tokens)).abs().max() <= 2e-5


def test_where_the_tokenizer_is_looked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "base_checkpoints" / "d5", reference("2025-10-13"))
    with pytest.raises(
        CheckpointError, match=r"no tokenizer\.pkl or tokenizer\.json in .*d5/tokenizer, .*d5, "
    ):
        _ = find_source(folder).tokenizer
    for place in (tmp_path / "tokenizer", folder, folder / "tokenizer"):
        place.mkdir(exist_ok=True)
        (place / "tokenizer.pkl").touch()
        assert find_source(folder).tokenizer.resolve() == place.resolve()
        assert find_source(folder / "model_000012.pt").tokenizer.resolve() == place.resolve()

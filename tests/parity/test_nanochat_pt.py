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
from nanochat_reference import ERAS, Reference, imported, random_tokens, reference, write

from nanovl.checkpoint.nanochat_pt import (
    is_nanochat,
    save_nanochat,
    tokenizer_folder,
)
from nanovl.errors import CheckpointError


@pytest.mark.parametrize("day", ["2025-10-13", "2026-03-14"])
@pytest.mark.parametrize("padding", [True, False])
def test_prefixes_and_padding(tmp_path: Path, day: str, padding: bool) -> None:
    theirs = reference(day, padding=padding)
    ours, spec = imported(write(tmp_path, theirs, prefix="_orig_mod."))
    assert spec.config.vocab_size == 131
    tokens = random_tokens(20)
    assert (theirs(tokens) - ours(tokens)).abs().max() <= 2e-5


def test_first_release_returns_bit_equal(tmp_path: Path) -> None:
    theirs = reference("2025-10-13", vocab=192)
    ours, spec = imported(write(tmp_path / "in", theirs, step=650))
    save_nanochat(tmp_path / "out", dict(ours.named_parameters()), spec, 650)
    assert sorted(os.listdir(tmp_path / "out")) == ["meta_000650.json", "model_000650.pt"]
    before, after = (
        torch.load(tmp_path / name / "model_000650.pt", weights_only=True) for name in ("in", "out")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    meta = json.loads((tmp_path / "out" / "meta_000650.json").read_text())
    assert meta == {"step": 650, "model_config": theirs.config}
    again = Reference(ERAS["2025-10-13"], meta["model_config"], 192)
    again.load_state_dict(after)
    assert torch.equal(again(random_tokens(9)), theirs(random_tokens(9)))


def test_an_embedding_that_bfloat16_would_round_is_written_whole(tmp_path: Path) -> None:
    ours, spec = imported(write(tmp_path / "in", reference("2025-10-13", vocab=192)))
    with torch.no_grad():
        ours.get_parameter("embed_tokens.weight")[0, 0] = 1 / 3
    save_nanochat(tmp_path / "out", dict(ours.named_parameters()), spec, 3)
    wte = torch.load(tmp_path / "out" / "model_000003.pt", weights_only=True)["transformer.wte.weight"]
    assert torch.equal(wte, ours.get_parameter("embed_tokens.weight"))


def test_what_nanochat_would_compute_differently_is_not_written(tmp_path: Path) -> None:
    ours, spec = imported(write(tmp_path / "in", reference("2025-10-13")))
    spec.config.norm.eps = 1e-6
    with pytest.raises(
        ValueError, match=r"model\.norm\.eps = 1e-06: cannot be written; nanochat's own code has 1\.19"
    ):
        save_nanochat(tmp_path / "out", dict(ours.named_parameters()), spec, 3)
    ours, spec = imported(write(tmp_path / "later", reference("2026-03-14")))
    with pytest.raises(CheckpointError, match="only nanochat's first release, nanochat_v1, is written"):
        save_nanochat(tmp_path / "out", dict(ours.named_parameters()), spec, 3)


def test_the_newest_step_or_the_one_that_is_named(tmp_path: Path) -> None:
    write(tmp_path, reference("2025-10-13", seed=1), step=5)
    write(tmp_path, reference("2025-10-13", seed=2), step=12)
    (tmp_path / "model_000099_backup.pt").touch()
    tokens = random_tokens(5)
    for path, seed in ((tmp_path, 2), (tmp_path / "model_000005.pt", 1)):
        assert is_nanochat(path)
        ours, _ = imported(path)
        assert (ours(tokens) - reference("2025-10-13", seed=seed)(tokens)).abs().max() <= 2e-5
    assert not is_nanochat(tmp_path / "meta_000005.json")


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    write(tmp_path, reference("2026-03-14"))
    state = torch.load(tmp_path / "model_000012.pt", weights_only=True)
    state["bigram_embed.embed.weight"] = torch.zeros(3, 64)
    state["x0_lambdas"] = torch.zeros(4)
    state["transformer.h.3.attn.c_q.weight"] = torch.zeros(63, 64)
    del state["value_embeds.2.weight"], state["smear_lambda"]
    torch.save(state, tmp_path / "model_000012.pt")
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/model_000012.pt does not fit nanochat:",
        "  missing smear_lambda",
        "  missing value_embeds.2.weight",
        "  transformer.h.3.attn.c_q.weight is (63, 64); layers.3.mixer.q_proj.weight wants (64, 64)",
        "  unknown bigram_embed.embed.weight",
        "  x0_lambdas is (4,); layers.0.blend.embedding wants (1,)",
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
        ([torch.zeros(2)], "it is a list, not a dict of tensors"),
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
        tokenizer_folder(folder)
    for place in (tmp_path / "tokenizer", folder, folder / "tokenizer"):
        place.mkdir(exist_ok=True)
        (place / "tokenizer.pkl").touch()
        assert tokenizer_folder(folder).resolve() == place.resolve()
        assert tokenizer_folder(folder / "model_000012.pt").resolve() == place.resolve()

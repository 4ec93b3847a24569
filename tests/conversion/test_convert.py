"""Conversions lose nothing, transformers reads what comes out, and what cannot be converted is refused whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import nanovl
from nanovl.checkpoint.manager import read_meta, save_weights
from nanovl.checkpoint.tensors import Held, named_weights
from nanovl.conversion.convert import plan
from nanovl.convert_tools import main
from nanovl.errors import CheckpointError, ConfigError, NanovlError, RunError
from nanovl.registry import family, spec_to_dict
from nanovl.spec import ModelSpec
from nanovl.tokenizer.bpe import Tokenizer

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, as the library reads them."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


def test_round_trip_through_every_format(experts_directory: Path, tmp_path: Path) -> None:
    path = experts_directory
    for to in ("run", "safetensors", "dcp", "hf"):
        path = nanovl.convert(path, tmp_path / to, to=to, shard_size="40kb" if to == "hf" else None)
        loaded = nanovl.load(path, device="cpu", dtype=torch.bfloat16)
        assert loaded.tokenizer.hash() == Tokenizer([]).hash()
        weights = {name: w.detach() for name, w in named_weights(loaded.model).items()}
        if to == "safetensors":
            assert same(stored(tmp_path / to), weights)  # plain: our names, one file
    assert same(stored(experts_directory), stored(tmp_path / "hf"))
    assert len(list((tmp_path / "hf").glob("model-*"))) > 2
    for file in (tmp_path / "hf").glob("model-*"):
        assert sum(value.nbytes for value in load_file(file).values()) <= 40_000
    assert read_meta(tmp_path / "dcp")["parents"] == [
        str(experts_directory),
        str(tmp_path / "run" / "checkpoints" / "step_000000"),
        str(tmp_path / "safetensors"),
    ]
    theirs, again = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (experts_directory, tmp_path / "hf")
    )
    assert again.dtype == torch.bfloat16
    tokens = torch.arange(40)[None]
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_checkpoint_that_was_converted_holds_plain_dcp(experts_directory: Path, tmp_path: Path) -> None:
    """Read by torch's own tool."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    nanovl.convert(experts_directory, tmp_path / "dcp", to="dcp")
    nanovl.convert(tmp_path / "dcp", tmp_path / "plain", to="safetensors")
    dcp_to_torch_save(tmp_path / "dcp" / "state", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)["model"]
    assert same(found, stored(tmp_path / "plain"))


def test_what_was_converted_says_that_it_is_weights_alone(experts_directory: Path, tmp_path: Path) -> None:
    """Also where it was a run's, whose stage stays known."""
    nanovl.convert(experts_directory, tmp_path / "dcp", to="dcp")
    meta = json.loads((tmp_path / "dcp" / "meta.json").read_text())
    assert meta["weights_only"]
    (tmp_path / "dcp" / "meta.json").write_text(
        json.dumps({**meta, "stage": "pretrain", "weights_only": False})
    )
    nanovl.convert(tmp_path / "dcp", tmp_path / "again", to="dcp")
    again = json.loads((tmp_path / "again" / "meta.json").read_text())
    assert (again["stage"], again["weights_only"]) == ("pretrain", True)


def test_dtype(experts_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "half")
    assert main([str(experts_directory), "--to", "hf", "--out", out, "--dtype", "float16"]) == 0
    assert "MB, float16, as asked\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    whole = stored(experts_directory)
    assert same(stored(tmp_path / "half"), {name: value.half() for name, value in whole.items()})


def test_what_transformers_finds_beside_the_weights(experts_directory: Path, tmp_path: Path) -> None:
    nanovl.convert(experts_directory, tmp_path / "hf", to="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer([])
    ids = ours.special_ids
    assert model.generation_config.eos_token_id == [ids["<|assistant_end|>"], ours.bos_id]
    assert model.generation_config.bos_token_id == model.config.bos_token_id == ours.bos_id
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert "Licence: not stated." in card
    assert "nanovl begins a text with `<|bos|>`, and so does this tokenizer" in card
    assert tokenizer.encode("hi") == ours.encode("hi", bos=True)
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "So "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": " it is."},
            ],
        },
        {"role": "user", "content": "ok"},
    ]
    # nanochat's render_conversation, by hand
    expected = [ids["<|bos|>"], ids["<|user_start|>"], *ours.encode("S\n\n2+2?"), ids["<|user_end|>"]]
    expected += [ids["<|assistant_start|>"], *ours.encode("So ")]
    expected += [ids["<|python_start|>"], *ours.encode("2+2"), ids["<|python_end|>"]]
    expected += [ids["<|output_start|>"], *ours.encode("4"), ids["<|output_end|>"], *ours.encode(" it is.")]
    expected += [ids["<|assistant_end|>"], ids["<|user_start|>"], *ours.encode("ok"), ids["<|user_end|>"]]
    expected += [ids["<|assistant_start|>"]]
    found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert found == expected
    for wrong, said in (
        (turns[2:], "user and assistant take turns"),
        ([turns[1], {"role": "assistant", "content": [{"type": "x"}]}], "part of type x"),
    ):
        with pytest.raises(Exception, match=said):
            tokenizer.apply_chat_template(wrong)


def test_files_of_another_tokenizer_travel(experts_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    file = source / "tokenizer.json"
    text = file.read_text().replace(r"\\p{N}{1,2}", r"\\p{N}{1,3}")  # no longer ours
    file.write_text(json.dumps({**json.loads(text), "post_processor": None}))
    said = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**said, "eos_token": "<|user_end|>"}))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "generation_config.json").unlink()
    nanovl.convert(source, tmp_path / "run", to="run")
    nanovl.convert(tmp_path / "run", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert "tokenizer.json does not put it there by itself" in (tmp_path / "hf" / "README.md").read_text()
    end = Tokenizer([]).special_ids["<|user_end|>"]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == end
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_k": 7}')
    nanovl.convert(source, tmp_path / "again", to="hf")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["top_k"] == 7
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [3, 4]
    for text, said in (("{", "not valid JSON"), ("[]", "holds a list, not an object")):
        (source / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=f"generation_config.json: {said}"):
            nanovl.convert(source, tmp_path / "broken", to="hf")


def test_numbers_beyond_float16_are_refused(experts_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    file = next(f for f in sorted(source.glob("model-*")) if NORM in load_file(f))
    save_file({**load_file(file), NORM: torch.full((32,), 1e6)}, file)
    with pytest.raises(CheckpointError, match=r"holds numbers up to 1e.06, float16 none above 65504; choose"):
        nanovl.convert(source, tmp_path / "out", to="hf", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]
    nanovl.convert(source, tmp_path / "out", to="hf", dtype="bfloat16")


def test_dry_run_prints_the_mapping_and_writes_nothing(
    experts_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x")
    assert main([str(experts_directory), "--to", "run", "--dry-run", "--out", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.embed_tokens.weight -> embed_tokens.weight  (265, 32) bfloat16" in lines
    experts = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert (
        f"{experts.format(0)} ... {experts.format(3)} (4) -> layers.1.ffn.experts.up_proj  (4, 16, 32) bfloat16"
        in lines
    )
    assert lines[-1].endswith("bfloat16, as stored; nothing written")
    assert main([str(experts_directory), "--to", "run", "--dry-run", "--out", out, "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.embed_tokens.weight -> embed_tokens.weight  (265, 32) float32" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "run"])
def test_every_weight_at_fault_is_listed_and_nothing_is_written(
    experts_directory: Path, tmp_path: Path, to: str
) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    weights = stored(source)
    for file in source.glob("model*"):
        file.unlink()
    del weights["model.layers.0.mlp.experts.2.up_proj.weight"]
    weights |= {"mtp.10.weight": torch.zeros(2), "mtp.2.weight": torch.zeros(2)}
    weights[NORM] = torch.zeros(7)
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        nanovl.convert(source, tmp_path / "out", to=to)
    assert str(error.value).splitlines() == [
        f"{source} does not fit qwen3_moe:",
        "  missing model.layers.0.mlp.experts.2.up_proj.weight",
        "  model.layers.1.mlp.experts.0.up_proj.weight + model.layers.1.mlp.experts.1.up_proj.weight is (16, 32), "
        "(3, 32), which cannot be rearranged into layers.1.ffn.experts.up_proj (4, 16, 32)",
        f"  {NORM} is (7,), the model wants (32,)",
        "  unknown mtp.2.weight",
        "  unknown mtp.10.weight",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def cut(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def garbage(folder: Path) -> None:
    sorted(folder.glob("model-*"))[0].write_bytes(b"x" * 100)


def no_header(folder: Path) -> None:
    sorted(folder.glob("model-*"))[0].write_bytes((2).to_bytes(8, "little") + b"xx")


def overlapping(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[0]
    data = file.read_bytes()
    at = data.index(b'"data_offsets":[0,') + len(b'"data_offsets":[')
    file.write_bytes(data[:at] + b"2" + data[at + 1 :])


def empty(folder: Path) -> None:
    sorted(folder.glob("model-*"))[0].write_bytes(b"")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lost(folder: Path) -> None:
    sorted(folder.glob("model-*"))[2].unlink()


def index_broken(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def index_lies(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))


def there_twice(folder: Path) -> None:
    files = sorted(folder.glob("model-*"))
    save_file({**load_file(files[0]), **load_file(files[1])}, files[0])


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def complex_numbers(folder: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, sorted(folder.glob("model-*"))[0])


def negative(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}).encode()
    file = sorted(folder.glob("model-*"))[0]
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")


def wordy(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": ["F32"], "shape": "1", "data_offsets": [0, 4]}}).encode()
    file = sorted(folder.glob("model-*"))[0]
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")


def two_sets(folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": "fp8"}))


def sees(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 8}}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"copy it again:\n  model-00002-of-\d+.safetensors is damaged: it has \d+ bytes of \d+"),
        (garbage, r"model-00001-of-\d+.safetensors is damaged: it has 100 bytes, its header alone \d+"),
        (no_header, r"model-00001-of-\d+.safetensors is damaged: no header of safetensors: JSONDecodeError"),
        (empty, r"model-00001-of-\d+.safetensors is damaged: it has 0 bytes, its header alone 8$"),
        (no_config, "has weights, but no config.json, which says of what model; copy it there"),
        (overlapping, r"is damaged: lm_head.weight has not the place that its shape needs"),
        (lost, r"names files that are not there: model-00003-of-\d+.safetensors"),
        (index_broken, "model.safetensors.index.json: names no files: JSONDecodeError"),
        (index_lies, r"index.json names model.extra.weight in model-\d+-of-\d+.safetensors, which lacks it"),
        (there_twice, r"is in model-00001-of-\d+.safetensors and in model-00002-of-\d+.safetensors"),
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
        (complex_numbers, "has tensors of dtype C64, which no model here has"),
        (negative, "is damaged: x has a negative size"),
        (wordy, "is damaged: no header of safetensors: TypeError"),
        (
            two_sets,
            "has two sets of weights, model.safetensors and the files that model.safetensors.index.json",
        ),
        (quantized, "quantization_config = 'fp8': wants a table"),
        (sees, "has more than text .vision_config.*weights would be lost"),
    ],
)
def test_damaged_directories_are_refused(
    experts_directory: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    damage(source)
    with pytest.raises(CheckpointError, match=said):
        nanovl.convert(source, tmp_path / "out", to="run")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_source_cut_short_while_it_is_read_leaves_nothing(experts_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    planned = plan(source, to="run")
    cut(source)
    with pytest.raises(CheckpointError, match="became shorter while it was read; copy it again"):
        planned.write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_what_a_kill_left_is_removed_and_never_read(experts_directory: Path, tmp_path: Path) -> None:
    draft = tmp_path / ".out.unfinished"
    (draft / "state").mkdir(parents=True)
    (draft / "state" / "old").write_text("")
    nanovl.convert(experts_directory, tmp_path / "out", to="dcp")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "state" / "old").exists()
    with pytest.raises(RunError, match="out is in use; name a new folder"):
        nanovl.convert(experts_directory, tmp_path / "out", to="dcp")


def test_families_that_transformers_lacks(experts_directory: Path, tmp_path: Path) -> None:
    nanovl.convert(experts_directory, tmp_path / "dcp", to="dcp")
    found = family("nanochat")
    spec = ModelSpec(found, found.flavors["d4"]())
    meta = {**read_meta(tmp_path / "dcp"), "model": spec_to_dict(spec)}
    shutil.rmtree(tmp_path / "dcp" / "state")
    save_weights(tmp_path / "dcp", Held(named_weights(found.model(spec.config))), meta, plain=True)
    with pytest.raises(
        CheckpointError, match="nanochat: transformers has no such architecture, so there is no"
    ):
        nanovl.convert(tmp_path / "dcp", tmp_path / "out", to="hf")
    meta["model"]["config"]["depth"] = 3
    (tmp_path / "dcp" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError) as error:
        nanovl.convert(tmp_path / "dcp", tmp_path / "out", to="run")
    assert "dcp does not fit the model:\n  " in str(error.value)
    assert "\n  unknown layers.3." in str(error.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"to": "gguf"}, "to = 'gguf': wants one of hf, run, dcp, safetensors"),
        ({"to": "hf", "dtype": "int8"}, "dtype = 'int8': wants one of float32, bfloat16, float16"),
        ({"to": "hf", "shard_size": "5"}, "shard_size = '5': wants a size above 0 such as 500MB or 5GB"),
        ({"to": "hf", "shard_size": "0GB"}, "wants a size above 0"),
        ({"to": "run", "shard_size": "5GB"}, "shard_size = '5GB': only hf has shards; leave it out"),
    ],
)
def test_wrong_options(experts_directory: Path, tmp_path: Path, args: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nanovl.convert(experts_directory, tmp_path / "out", **args)  # type: ignore[arg-type]


def test_wrong_command_lines(experts_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out DIR: wanted, the new folder to write; or --dry-run"):
        main([str(experts_directory), "--to", "run"])
    (tmp_path / "file").write_text("")
    with pytest.raises(NanovlError, match="file is in use"):
        main([str(experts_directory), "--to", "run", "--out", str(tmp_path / "file")])
    with pytest.raises(CheckpointError, match="cannot be written: "):
        main([str(experts_directory), "--to", "run", "--out", str(tmp_path / "file" / "below")])

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nanovl import data_tools
from nanovl.config.load import load_job
from nanovl.data.documents import heldout_texts, training_texts
from nanovl.data.lanes import Lanes, LaneState, Plan
from nanovl.data.sources import training_sources
from nanovl.errors import ConfigError, DataError, RunError
from nanovl.run import Run
from nanovl.tokenizer.bpe import Tokenizer


@pytest.fixture
def config(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> Path:
    """A job over the corpus, as a file."""
    path = tmp_path / "job.toml"
    path.write_text(
        f"""
[model]
name = "qwen3"
flavor = "debug"
[tokenizer]
path = "{tokenizer_folder}"
[[data.sources]]
kind = "text"
path = "{corpus}"
holdout = 0.2
[training]
steps = 1
seq_len = 64
local_batch_size = 2
global_batch_size = 4
"""
    )
    return path


def test_show_prints_every_piece_with_its_place(config, tokenizer_folder, capsys):
    assert data_tools.main(["show", "--config", str(config), "--rows=6", "--data.overflow=pad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("row")] == [
        *(f"row {r} of step 0" for r in range(4)),
        *(f"row {r} of step 1" for r in range(2)),
    ]
    assert re.fullmatch(r'  document 0, positions 0-63: "<\|bos\|>.*"', lines[1])
    assert re.fullmatch(
        r"\d+ documents read to fill 8 rows; 100.0% of the positions have a loss, \d+.\d% .* were cropped",
        lines[-1],
    )


def test_show_marks_what_has_no_loss():
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    row = {
        "tokens_BT": np.array([0, 1, 2, 0, 1, 25, 25]),
        "doc_ids_BT": np.array([0, 0, 0, 1, 1, 2, 2]),
        "positions_BT": np.array([0, 1, 2, 0, 1, 0, 1]),
        "weights_BT": np.array([1, 1, 1, 1, 0, 0, 0]),
    }
    assert list(data_tools.row_lines(row, Letters(), color=False)) == [
        'document 0, positions 0-2: "abc"',
        'document 1, positions 0-0: "a"',
        'document 1, positions 1-1: (no loss) "b"',
        'document 2, positions 0-1: (no loss) "zz"',
    ]
    assert list(data_tools.row_lines(row, Letters(), color=True))[2].endswith('\033[90m"b"\033[0m')


def test_show_reads_a_run(config, tokenizer_folder, tmp_path, capsys):
    run = Run(tmp_path / "run")
    with pytest.raises(
        RunError, match=r"run is no run folder: it has no config.json; give a run, or --config FILE"
    ):
        data_tools.main(["show", str(run.folder)])
    run.write_job(load_job([config]), [])
    Tokenizer.load(tokenizer_folder).save(run.tokenizer)
    data_tools.main(["show", str(run.folder), "--rows=2"])
    of_run = capsys.readouterr().out
    data_tools.main(["show", "--config", str(config), "--rows=2"])
    assert capsys.readouterr().out == of_run


def test_pack_and_the_job_it_prints_give_the_same_text(config, tmp_path, capsys):
    out = tmp_path / "packed"
    assert data_tools.main(["pack", "--config", str(config), f"--out={out}", "--shard-tokens=20000"]) == 0
    printed = capsys.readouterr().out.split("a job reads it with\n\n")[1]
    job = load_job([config])
    shards = sorted((out / "source_0").iterdir())
    assert len(shards) > 2
    sizes = [len(load_file(shard)["tokens"]) for shard in shards]
    assert all(size >= 20_000 for size in sizes[:-1])
    packed_config = tmp_path / "packed.toml"
    packed_config.write_text(printed)
    packed = load_job([packed_config])
    tokenizer = Tokenizer.load(packed.tokenizer.path)
    (source,) = training_sources(packed, tokenizer.hash())
    documents = [d for unit in range(source.num_units) for d in source.documents(unit)]
    assert sorted(tokenizer.decode(d.tolist()) for d in documents) == sorted(training_texts(job))
    assert list(heldout_texts(packed)) == list(heldout_texts(job))
    lanes = Lanes([source], Plan(2, 1, True, 32, "concat", "crop", 1), tokenizer, {0: LaneState()})
    assert lanes.next_rows()[0].pieces[0][0] == tokenizer.bos_id


def test_pack_without_a_tokenizer_learns_one_and_keeps_it(config, tmp_path, capsys):
    out = tmp_path / "packed"
    flags = ["--tokenizer.path=", "--tokenizer.vocab_size=300", "--tokenizer.train_characters=20000"]
    data_tools.main(["pack", "--config", str(config), *flags, f"--out={out}"])
    assert "training a tokenizer of 300 entries" in capsys.readouterr().out
    assert Tokenizer.load(out / "tokenizer").vocab_size == 300
    with pytest.raises(ConfigError, match=r"--out = .*packed: exists already; remove it, or choose another"):
        data_tools.main(["pack", "--config", str(config), f"--out={out}"])
    again = [
        "--data.sources.0.kind=tokens",
        f"--data.sources.0.path={out}",
        f"--tokenizer.path={out}/tokenizer",
    ]
    with pytest.raises(
        DataError, match=r'data.sources.0: kind "tokens" is packed already; leave this source out'
    ):
        data_tools.main(["pack", "--config", str(config), *again, f"--out={tmp_path / 'twice'}"])


def test_a_pack_that_fails_leaves_nothing_that_a_job_could_read(config, corpus, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.txt").write_text("fine")
    (broken / "b.txt").write_bytes(b"\0")
    flags = [f"--data.sources.0.path={broken}", "--data.sources.0.holdout=0", "--validation.freq=0"]
    with pytest.raises(DataError, match=r"b.txt: holds NUL bytes"):
        data_tools.main(["pack", "--config", str(config), *flags, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_wrong_command_lines(config):
    for argv, message in (
        (["sho"], "data sho: no such verb; did you mean 'show'?"),
        (["pack", "--config", str(config)], "data pack: needs --out=DIR, a new folder for the shards"),
        (["show", "--config", str(config), "--rows=0"], "--rows = '0': wants a whole number above 0"),
        (
            ["pack", "--config", str(config), "--out=x", "--shard-tokens=many"],
            "--shard-tokens = 'many': wants",
        ),
        (["show", "--row=3"], "--row=3: unknown option; did you mean --rows?"),
        (["get", "climbmix", "--shards=7000", "--out=x"], "--shards = 7000: the data set has 6543"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            data_tools.main(argv)
    with pytest.raises(SystemExit):
        data_tools.main(["get", "nowhere", "--out=x"])


def test_usage(capsys):
    assert data_tools.main([]) == data_tools.main(["--help"]) == 0
    assert capsys.readouterr().out.count("nanovl data pack --config FILE") == 2


def test_get_from_another_server(server, tmp_path, capsys):
    flags = ["--shards=2", "--holdout=0.02", f"--out={tmp_path}", f"--base-url={server.url}/folder"]
    assert data_tools.main(["get", "climbmix", *flags]) == 0
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_00039.parquet"]
    assert sorted(path for path, _ in server.seen) == [f"/folder/{name}" for name in names]
    assert all((tmp_path / name).read_bytes() == server.body for name in names)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: 3 files of climbmix"

"""A job that begins from the weights of another: what comes along, what begins anew, what is refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nanovl.build import check_parallelism
from nanovl.conversion.convert import convert
from nanovl.errors import CheckpointError, ConfigError, NanovlError
from nanovl.inference.load import load
from nanovl.initial import check_initial, find_initial, tokenizer_folder
from nanovl.registry import read_job, resolve_model
from nanovl.run import Run
from nanovl.tokenizer.bpe import Tokenizer
from nanovl.trainer import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
AUX = "--model.blocks.full.ffn.aux_loss_coef"


def run(folder: Path, flags: list[str], begin: Path | None = None, *, resume: bool = False) -> str:
    """The log of a run of one step."""
    begins = [f"--checkpoint.initial_load_path={begin}"] if begin else []
    given = ["--model.name=qwen3_moe", "--training.steps=1", *flags, f"--job.run_dir={folder}", *begins]
    train(read_job([CONFIG], given), resume=resume)
    return (folder / "logs" / "rank_0.log").read_text()


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A run whose routers remember loads for their auxiliary loss."""
    folder = tmp_path_factory.mktemp("balanced") / "run"
    run(folder, [*tiny_flags, f"{AUX}=0.01"])
    return folder


@pytest.fixture
def no_tokenizer(tiny_flags: list[str]) -> list[str]:
    """Flags that name none."""
    return [flag for flag in tiny_flags if not flag.startswith("--tokenizer.path")]


def refused(folder: Path, flags: list[str], begin: Path, *messages: str) -> None:
    """A run is refused with each of `messages`, in their order, and leaves nothing."""
    with pytest.raises(NanovlError) as caught:
        run(folder, flags, begin)
    said, after = str(caught.value), 0
    for message in messages:
        assert message in said[after:], said
        after = said.index(message, after)
    assert not folder.exists()


def test_the_tokenizer_comes_along_and_a_loss_may_come_and_go(
    balanced: Path, tmp_path: Path, no_tokenizer: list[str]
) -> None:
    flags = [*no_tokenizer, "--optimizer.lr=0"]
    said = run(tmp_path / "off", [*flags, f"{AUX}=0"], balanced)
    assert f"tokenizer {balanced / 'checkpoints' / 'step_000001' / 'tokenizer'}: 512 entries\n" in said
    assert f"weights   {balanced}; not used: layers.*.ffn.router.load (x2)\n" in said
    before, after = (load(folder, device="cpu").model.state_dict() for folder in (balanced, tmp_path / "off"))
    loads = {name for name in before if name.endswith("router.load")}
    assert before.keys() - after.keys() == loads
    assert all(torch.equal(after[name], before[name]) for name in after)

    convert(tmp_path / "off", tmp_path / "plain", to="safetensors")
    said = run(tmp_path / "on", [*flags, f"{AUX}=0.01"], tmp_path / "plain")
    assert f"tokenizer {tmp_path / 'plain' / 'tokenizer'}: 512 entries\n" in said
    assert f"weights   {tmp_path / 'plain'}; fresh: layers.*.ffn.router.load (x2)\n" in said
    assert "another one" not in said
    again = load(tmp_path / "on", device="cpu").model.state_dict()
    assert again.keys() - after.keys() == loads
    assert all(torch.equal(again[name], after[name]) for name in after)
    assert all(float(again[name].sum()) == pytest.approx(1.0) for name in loads)


def test_a_loss_may_come_and_go_on_resuming(balanced: Path, tmp_path: Path, tiny_flags: list[str]) -> None:
    shutil.copytree(balanced, tmp_path / "run")
    for steps, coefficient, what in ((2, 0, "not used"), (3, 0.01, "fresh")):
        flags = [*tiny_flags, f"{AUX}={coefficient}", f"--training.steps={steps}"]
        said = run(tmp_path / "run", flags, resume=True)
        assert f"step_00000{steps - 1} (step {steps - 1}); {what}: layers.*.ffn.router.load (x2)\n" in said
    loads = load(tmp_path / "run", device="cpu").model.state_dict()
    assert loads["layers.0.ffn.router.load"].sum() == pytest.approx(1.0)


def test_a_run_goes_on_with_its_own_model_alone(
    balanced: Path, tmp_path: Path, tiny_flags: list[str]
) -> None:
    folder = shutil.copytree(balanced, tmp_path / "run")
    before = (folder / "config.json").read_bytes()
    flags = [*tiny_flags, f"{AUX}=0.01", "--training.steps=2"]
    other = ["--model.blocks.full.mixer.rope.theta=500", "--model.mtp.num_layers=1"]
    with pytest.raises(ConfigError) as caught:
        run(folder, [*flags, *other], resume=True)
    checkpoint = folder / "checkpoints" / "step_000001"
    assert f"--resume: {checkpoint} holds another model than [model]" in str(caught.value)
    assert caught.value.mistakes == [
        "model.blocks.full.mixer.rope.theta = 500.0: it has 1000000.0",
        "model.mtp.hidden = 'post_norm': it has None",
        "model.mtp.num_layers = 1: it has None",
        "a run goes on with the model it began with; start another with checkpoint.initial_load_path",
    ]
    assert (folder / "config.json").read_bytes() == before

    meta = json.loads((checkpoint / "meta.json").read_text())
    for model, message in (
        ({**meta["model"], "name": "gone"}, "meta.json.*\n.*model.name = 'gone': no such architecture"),
        (5, "step_000001: not a complete checkpoint: meta.json says of no model: TypeError"),
        (None, "step_000001: not a complete checkpoint: meta.json says of no model: TypeError"),
    ):
        (checkpoint / "meta.json").write_text(json.dumps({**meta, "model": model}))
        with pytest.raises(NanovlError, match=message):
            run(folder, flags, resume=True)


def test_files_of_hugging_face_have_a_tokenizer_and_no_counters(
    balanced: Path, tmp_path: Path, no_tokenizer: list[str]
) -> None:
    convert(balanced, tmp_path / "hf", to="hf")
    begins = [f"--checkpoint.initial_load_path={tmp_path / 'hf'}", "--model.name=qwen3_moe", f"{AUX}=0.01"]
    job = read_job([CONFIG], [*no_tokenizer, *begins])
    check_initial(job)
    assert tokenizer_folder(job) == tmp_path / "hf"
    found = find_initial(job, resolve_model(job.model, 512))
    assert found.fresh == {"layers.0.ffn.router.load", "layers.1.ffn.router.load"}
    assert not found.unused


def test_another_model_is_refused_by_its_name_or_fields_and_then_by_its_tensors(
    balanced: Path, tmp_path: Path, no_tokenizer: list[str]
) -> None:
    new = tmp_path / "new"
    refused(new, no_tokenizer, tmp_path / "nowhere", "initial_load_path: ", "nowhere: no such folder")
    other = [*no_tokenizer, "--model.name=qwen3"]
    fields = (
        "model.blocks.full.ffn.kind = 'mlp': it has 'moe'\n  tensors that it lacks: layers.*.ffn.gate_proj"
    )
    refused(new, other, balanced, "model.name = 'qwen3': it is a qwen3_moe", fields)
    wider = [*no_tokenizer, "--model.hidden_size=96"]
    shape = "tensors of another shape: embed_tokens.weight (512, 64), not (512, 96)"
    refused(new, wider, balanced, "model.hidden_size = 96: it has 64", shape)
    rope = [*no_tokenizer, "--model.blocks.full.mixer.rope.theta=5.0"]
    with pytest.raises(ConfigError) as caught:
        run(new, rope, balanced)
    assert caught.value.mistakes == ["model.blocks.full.mixer.rope.theta = 5.0: it has 1000000.0"]


def test_parts_that_one_lacks_are_refused_with_what_to_do(
    balanced: Path, tmp_path: Path, no_tokenizer: list[str]
) -> None:
    new, ahead = tmp_path / "new", ["--model.mtp.num_layers=1"]
    asked = "model.mtp.num_layers = 1: it has None", "tensors that it lacks: mtp.*"
    refused(new, [*no_tokenizer, *ahead], balanced, *asked, "set checkpoint.initial_load_grow = true: what")
    run(tmp_path / "ahead", [*no_tokenizer, *ahead, "--checkpoint.initial_load_grow=true"], balanced)
    refused(new, no_tokenizer, tmp_path / "ahead", "model.mtp.num_layers = None", "convert --without-mtp`")
    convert(tmp_path / "ahead", tmp_path / "less", to="run", without_mtp=True)
    run(new, no_tokenizer, tmp_path / "less")


def test_weights_or_a_tokenizer_that_are_not_there_are_refused(
    balanced: Path, tmp_path: Path, tiny_flags: list[str], no_tokenizer: list[str]
) -> None:
    new, bare = tmp_path / "new", tmp_path / "bare"
    shutil.copytree(balanced / "checkpoints" / "step_000001", bare)
    shutil.rmtree(bare / "tokenizer")
    refused(new, no_tokenizer, bare, f"{bare} brings no tokenizer that can be read", "in tokenizer.path")
    (bare / "state" / "__0_0.distcp").unlink()
    refused(new, tiny_flags, bare, "__0_0.distcp has 0 bytes")


def test_another_tokenizer_must_fit_and_is_said(
    balanced: Path, tmp_path: Path, no_tokenizer: list[str]
) -> None:
    few, many = Tokenizer([]), Tokenizer([(b"%c" % i, b"a") for i in range(256)])
    few.save(tmp_path / "few")
    many.save(tmp_path / "many")
    flags = [*no_tokenizer, f"--tokenizer.path={tmp_path / 'many'}"]
    said = f"tokenizer.path = '{tmp_path / 'many'}': has 521 entries, the weights at {balanced} 512; leave"
    refused(tmp_path / "new", flags, balanced, said)
    own = shutil.copytree(balanced / "checkpoints" / "step_000001", tmp_path / "own")
    shutil.rmtree(own / "tokenizer")
    many.save(own / "tokenizer")
    beyond = (
        f"the tokenizer in {own / 'tokenizer'}: has 521 entries, the weights at {own} 512; take added tokens"
    )
    refused(tmp_path / "new", no_tokenizer, own, beyond)
    # what a new tokenizer would have had does not matter
    flags = [
        *no_tokenizer,
        f"--tokenizer.path={tmp_path / 'few'}",
        f"{AUX}=0.01",
        "--tokenizer.vocab_size=600",
    ]
    refused(tmp_path / "new", flags, balanced, "model.vocab_size = 265: it has 512")
    cut = ["--model.name=qwen3_moe", "--parallelism.tensor_parallel_degree=2"]
    few_on_2 = read_job([CONFIG], [*flags, *cut], world_size=2)
    with pytest.raises(ConfigError, match="265 parts cannot be shared by 2 ranks"):
        check_parallelism(few_on_2, 2, torch.device("cpu"))
    log = run(tmp_path / "other", [*flags, "--model.vocab_size=512"], balanced)
    assert f"  tokenizer {tmp_path / 'few'}: 265 entries\n" in log
    assert f"warning:   tokenizer.path is another one than that of the weights, {balanced}" in log


def test_a_converted_run_that_is_not_resumed_stays_as_it_was(
    balanced: Path, tmp_path: Path, tiny_flags: list[str]
) -> None:
    convert(balanced, tmp_path / "run", to="run")
    before = {file: file.is_file() and file.read_bytes() for file in (tmp_path / "run").rglob("*")}
    with pytest.raises(CheckpointError, match="was converted, so it holds no optimizer"):
        run(tmp_path / "run", [*tiny_flags, f"{AUX}=0.01"], resume=True)
    assert before == {file: file.is_file() and file.read_bytes() for file in (tmp_path / "run").rglob("*")}


def test_a_refused_resume_leaves_the_job_as_it_was(
    balanced: Path, tmp_path: Path, tiny_flags: list[str]
) -> None:
    shutil.copytree(balanced, tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(NanovlError, match=r"debug\.seed is 7, the checkpoint's data was read with"):
        run(tmp_path / "run", [*tiny_flags, f"{AUX}=0.01", "--debug.seed=7"], resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert Run(tmp_path / "run").sessions()[-1]["exit_reason"].startswith("failed: --resume: debug.seed")


@pytest.mark.parametrize(
    ("inside", "reason"), [("file/run", "Not a directory"), ("x" * 300, "File name too long")]
)
def test_a_folder_that_cannot_be_written_is_a_mistake_of_the_job(
    inside: str, reason: str, tmp_path: Path, tiny_flags: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"job.run_dir = '.*': cannot be written to \({reason}\); choose"):
        run(tmp_path / inside, tiny_flags)


def test_a_resume_that_fails_early_leaves_the_session_before_it_as_it_ended(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    job = read_job([CONFIG], [*tiny_flags, f"--job.run_dir={tmp_path}"])
    run = Run(tmp_path)
    run.write_job(job, [])
    run.begin("cpu", 1, "one rank")
    run.end("finished")
    (tmp_path / "logs").write_text("")  # where a folder should be
    with pytest.raises(FileExistsError):
        train(job, resume=True)
    assert [session["exit_reason"] for session in run.sessions()] == ["finished"]

"""What README and docs name exists: commands, settings, files, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanovl.cli import COMMANDS
from nanovl.config.schema import Job
from nanovl.config.types import field_names

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_name_on_the_page_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"link to {target}"
    for path in re.findall(
        r"\b(?:configs|benchmarks|nanovl|models|parallelisms|tests)/[\w./]+\.(?:toml|py)\b", text
    ):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"(?:^|`|python -m )nanovl ([a-z]+)\b", text, re.MULTILINE):
        assert command in COMMANDS, f"nanovl {command}"
    for section, key in re.findall(r"--([a-z_]+)\.([a-z_]+)", text):
        if section not in ("model", "section"):
            assert key in field_names(Job, [section]), f"--{section}.{key}"


def test_readme_starts_with_the_two_commands() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [line.split()[0] for line in blocks[0].splitlines()] == ["./run_train.sh", "./run_tests.sh"]
    assert "nanovl chat runs/quickstart" in blocks[1]


def test_the_error_in_the_readme_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovl.config.load import load_job
    from nanovl.errors import ConfigError

    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text(
        '[training]\nsteps = "twenty"\nsteqs = 1\n[[data.sources]]\nkind = "stdlib"\nholdout = 0.1\n'
    )
    flags = ["--training.global_batch_size=500", "--training.local_batch_size=4"]
    with pytest.raises(ConfigError) as error:
        load_job(["bad.toml"], flags, world_size=8)
    assert f"```\nnanovl train: {error.value}\n```" in (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"nanovl {command}" in readme, command

"""nanovl: one trainer from raw text to a served chat model.

`nanovl.load`, `nanovl.Engine`, `nanovl.train` and `nanovl.convert` are imported on first use, so that `import nanovl`
stays cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovl.conversion.convert import convert as convert
    from nanovl.inference.engine import Engine as Engine
    from nanovl.inference.load import load as load
    from nanovl.trainer import train as train

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "convert", "load", "train"]

_LAZY = {
    "convert": "nanovl.conversion.convert",
    "load": "nanovl.inference.load",
    "Engine": "nanovl.inference.engine",
    "train": "nanovl.trainer",
}

if (Path(__file__).parent / "models").is_file():  # git wrote the link as a text file
    raise ImportError(
        "nanovl/models is not a link but a text file: this checkout was made without symbolic links; "
        "run `git config core.symlinks true && git checkout -- nanovl`"
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanovl' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)

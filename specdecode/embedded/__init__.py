"""The models that come with the package: a name such as tiny/target in, its folder out."""

from pathlib import Path


def resolve_model(name_or_path: str) -> str:
    """Turns an embedded model's name into its folder; leaves every other name as it is."""
    folder = Path(__file__).parent / name_or_path
    is_embedded = name_or_path.startswith("tiny/") and folder.is_dir()
    return str(folder) if is_embedded else name_or_path

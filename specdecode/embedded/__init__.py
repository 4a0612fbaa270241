"""The models that come with the package: a name such as tiny/target in, its folder out."""

from pathlib import Path

from specdecode.errors import ModelError

FAMILY = "tiny"
ROUTER = f"{FAMILY}/router"


def resolve_model(name_or_path: str) -> str:
    """Turns an embedded model's name into its folder; leaves every other name as it is.

    Raises:
        ModelError: the name is one of the embedded family, which has no such member.
    """
    family, _, member = name_or_path.partition("/")
    if family != FAMILY or Path(name_or_path).is_dir():
        return name_or_path
    if name_or_path not in embedded_models():
        models = ", ".join(name for name in embedded_models() if name != ROUTER)
        raise ModelError(f"model {name_or_path!r} does not exist: the embedded models are {models}; their router is {ROUTER}")
    return str(Path(__file__).parent / FAMILY / member)


def embedded_models() -> list[str]:
    """The names of the family's members, its router among them."""
    return sorted(f"{FAMILY}/{folder.name}" for folder in Path(__file__).parent.glob(f"{FAMILY}/*") if folder.is_dir())

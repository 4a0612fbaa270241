"""`specdecode models`, `synthetic` and `push`: models looked at, made, and given to others."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdecode.commands.options import Commands, add_command, add_json, add_set
from specdecode.commands.tables import make_table, print_json, print_tables
from specdecode.config import check_config, with_overrides


def add_models(commands: Commands) -> None:
    models = add_command(
        commands,
        "models",
        _models,
        "say what models are: the embedded ones, those of a file, or any by name",
        "specdecode models tiny/target checkpoints/draft-code/best",
    )
    models.add_argument(
        "names", nargs="*", metavar="NAME", help="Hugging Face names, folders, or embedded models; all of these if none"
    )
    models.add_argument(
        "--config", metavar="FILE", help="a configuration file, such as configs/tiny/serve.yaml: the models it names"
    )
    add_json(models)


def add_synthetic(commands: Commands) -> None:
    synthetic = add_command(
        commands,
        "synthetic",
        _synthetic,
        "make a target and a draft of any shape that agree as often as you say",
        "specdecode synthetic --output pair --set num_layers=24 --set agreement=0.8",
    )
    synthetic.add_argument("--output", required=True, metavar="FOLDER", help="where the folders target and draft are written")
    add_set(synthetic, "num_layers=24 or seed=1")
    add_json(synthetic)


def add_push(commands: Commands) -> None:
    push = add_command(
        commands,
        "push",
        _push,
        "upload a model's folder to the Hugging Face Hub",
        "HF_TOKEN=... specdecode push checkpoints/draft-code/best me/draft-code --private",
    )
    push.add_argument("folder", help="such as checkpoints/draft-code/best")
    push.add_argument("name", help="the repository, such as me/draft-code; made if there is none")
    push.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    push.add_argument("--revision", metavar="BRANCH", help="a branch that is there, instead of main")
    push.add_argument("--message", metavar="TEXT", help="of the commit")


def _models(parsed: argparse.Namespace) -> None:
    from specdecode.backends.memory import readable_bytes

    rows = [{"name": name, **_facts(name, place)} for place, name in _named_models(parsed)]
    if parsed.json:
        print_json(rows)
        return
    table = make_table(("name", "kind", "architecture", "parameters", "vocabulary", "context", "on disk"), num_left=3)
    for row in rows:
        counts = (row[count] for count in ("num_parameters", "vocab_size", "max_length"))
        size = row["num_bytes"]
        table.add_row(
            row["name"],
            row["kind"],
            row["architecture"],
            *("" if count is None else f"{count:,}" for count in counts),
            "" if size is None else readable_bytes(size),
        )
    print_tables(table)


def _named_models(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """Models, each with the place where it is named."""
    from specdecode.commands.config import check_file, find_kind, models_of, read_file
    from specdecode.embedded import embedded_models

    if parsed.config is None:
        return [("", name) for name in parsed.names or embedded_models()]
    kind = find_kind(read_file(parsed.config), parsed.config)
    values = check_file(parsed.config, kind, [])
    routers = [("routing", values["routing"]["checkpoint"])] if values.get("routing") else []
    found = [
        *((place, model.model) for place, model in models_of(kind, values)),
        *routers,
        *(("", name) for name in parsed.names),
    ]
    return list({name: (place, name) for place, name in reversed(found)}.values())[::-1]


def _facts(name: str, place: str) -> dict[str, Any]:
    """What is shown of a model; its kind is by where a file names it, or by the embedded family's names."""
    from specdecode.backends.facts import ModelFacts, read_facts, size_on_disk
    from specdecode.embedded import resolve_model
    from specdecode.routing.model import AcceptanceModel

    if (Path(resolve_model(name)) / "router.json").is_file():
        router = AcceptanceModel.load(name)
        facts: dict[str, Any] = dict.fromkeys(ModelFacts.__dataclass_fields__)
        layers = f"perceptron of {', '.join(router.about.arms)}"
        return {
            "kind": "router",
            **facts,
            "architecture": layers,
            "num_parameters": router.num_parameters,
            "num_bytes": size_on_disk(name),
        }
    kinds = [kind for kind in ("target", "draft") if kind in (place or name.removeprefix("tiny/"))]
    return {"kind": kinds[0] if kinds else "model", **asdict(read_facts(name))}


def _synthetic(parsed: argparse.Namespace) -> None:
    from transformers.utils import logging

    from specdecode.backends.synthetic import SyntheticConfig, save_pair

    logging.disable_progress_bar()
    config = check_config(with_overrides({}, parsed.set), SyntheticConfig, where="synthetic")
    target, draft, figures = save_pair(config, parsed.output)
    if parsed.json:
        print_json({"target": str(target), "draft": str(draft), "figures": figures})
        return
    print(f"target     {target}  ({figures.num_target_parameters / 1e6:.1f} M parameters)")
    print(f"draft      {draft}  ({figures.num_draft_parameters / 1e6:.1f} M parameters)")
    print(f"agreement  {figures.agreement:.3f}  (likeliest tokens; {config.agreement} was asked for)")
    print(f"overlap    {figures.overlap:.3f}  (of the distributions at temperature 1)")
    print(f"entropy    {figures.entropy:.2f} nats; the later layers are scaled by {figures.residual_scale:.4f}")


def _push(parsed: argparse.Namespace) -> None:
    from specdecode.training.hub import push

    print(push(parsed.folder, parsed.name, is_private=parsed.private, revision=parsed.revision, message=parsed.message))

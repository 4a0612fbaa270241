"""`specdecode synthetic` and `push`: models made, and models given to others."""

import argparse

from specdecode.commands.options import Commands
from specdecode.config import check_config, with_overrides


def add_synthetic(commands: Commands) -> None:
    synthetic = commands.add_parser("synthetic", help="make a target and a draft of any shape that agree as often as you say")
    synthetic.set_defaults(run=_synthetic)
    synthetic.add_argument("--output", required=True, metavar="FOLDER", help="where the folders target and draft are written")
    synthetic.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as num_layers=24 or seed=1")


def add_push(commands: Commands) -> None:
    push = commands.add_parser("push", help="upload a model's folder to the Hugging Face Hub")
    push.set_defaults(run=_push)
    push.add_argument("folder", help="such as checkpoints/draft-code/best")
    push.add_argument("name", help="the repository, such as me/draft-code; made if there is none")
    push.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    push.add_argument("--revision", metavar="BRANCH", help="a branch that is there, instead of main")
    push.add_argument("--message", metavar="TEXT", help="of the commit")


def _synthetic(parsed: argparse.Namespace) -> None:
    from transformers.utils import logging

    from specdecode.backends.synthetic import SyntheticConfig, save_pair

    logging.disable_progress_bar()
    config = check_config(with_overrides({}, parsed.set), SyntheticConfig, where="synthetic")
    target, draft, figures = save_pair(config, parsed.output)
    print(f"target     {target}  ({figures.num_target_parameters / 1e6:.1f} M parameters)")
    print(f"draft      {draft}  ({figures.num_draft_parameters / 1e6:.1f} M parameters)")
    print(f"agreement  {figures.agreement:.3f}  (likeliest tokens; {config.agreement} was asked for)")
    print(f"overlap    {figures.overlap:.3f}  (of the distributions at temperature 1)")
    print(f"entropy    {figures.entropy:.2f} nats; the later layers are scaled by {figures.residual_scale:.4f}")


def _push(parsed: argparse.Namespace) -> None:
    from specdecode.training.hub import push

    print(push(parsed.folder, parsed.name, is_private=parsed.private, revision=parsed.revision, message=parsed.message))

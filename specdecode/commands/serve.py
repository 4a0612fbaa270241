"""`specdecode serve` and `demo`: a Serve config file in, an application out."""

import argparse

from specdecode.commands.options import Commands, add_command


def add_serve(commands: Commands) -> None:
    serve = add_command(
        commands,
        "serve",
        _serve,
        "deploy on Ray Serve, and stay up until Ctrl-C",
        "specdecode serve --config configs/tiny/serve.yaml --port 8000",
    )
    serve.add_argument("--config", metavar="FILE", required=True, help="a Serve config file, such as configs/tiny/serve.yaml")
    serve.add_argument("--port", type=int, help="the HTTP port, instead of the file's")


def add_demo(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        _demo,
        "deploy, compare three answers with plain decoding, and serve a page to try more",
        "specdecode demo --once",
    )
    demo.add_argument(
        "--config", metavar="FILE", default="configs/tiny/demo.yaml", help="a Serve config file (default %(default)s)"
    )
    demo.add_argument("--port", type=int, help="the HTTP port, instead of the file's")
    demo.add_argument("--once", action="store_true", help="end after the table instead of staying up")


def _serve(parsed: argparse.Namespace) -> None:
    from serve.local import deployed, load_deployment, wait_for_signal

    deployment = load_deployment(parsed.config, parsed.port)
    with deployed(deployment) as dashboard:
        print(f"endpoint   {deployment.url}/v1  (model {deployment.config.model_name})")
        print(f"dashboard  {dashboard}", flush=True)
        wait_for_signal()


def _demo(parsed: argparse.Namespace) -> None:
    from serve.demo import run_demo

    run_demo(parsed.config, parsed.port, stay=not parsed.once)

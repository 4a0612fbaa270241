"""`specdecode serve`, `demo` and `config`: a Serve config file in, an application out."""

import argparse

from specdecode.commands.options import Commands


def add_serve(commands: Commands) -> None:
    serve = commands.add_parser("serve", help="deploy on Ray Serve, and stay up until Ctrl-C")
    serve.set_defaults(run=_serve)
    serve.add_argument("--config", required=True, help="a Serve config file, such as configs/tiny/serve.yaml")
    serve.add_argument("--port", type=int, help="the HTTP port, instead of the file's")


def add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="deploy, stream three prompts, and compare with plain decoding")
    demo.set_defaults(run=_demo)
    demo.add_argument("--config", default="configs/tiny/serve.yaml", help="a Serve config file")
    demo.add_argument("--port", type=int, help="the HTTP port, instead of the file's")
    demo.add_argument("--once", action="store_true", help="end after the table instead of staying up")


def add_config(commands: Commands) -> None:
    config = commands.add_parser("config", help="check a Serve config file, and print it whole with the memory it takes")
    config.set_defaults(run=_config)
    config.add_argument("file", help="such as configs/tiny/serve.yaml")


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


def _config(parsed: argparse.Namespace) -> None:
    import yaml

    from serve.config import DeployedModel
    from serve.local import load_deployment
    from specdecode.backends.memory import estimate_memory

    config = load_deployment(parsed.file).config
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    for name, model in {"target": config.target, **config.drafts}.items():
        if isinstance(model, DeployedModel):
            print(f"# {name}: {estimate_memory(model.model_config_only()).describe()}")

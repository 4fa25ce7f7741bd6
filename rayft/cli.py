"""The command line: reads arguments, loads the run, calls what does the work, and turns errors into exit codes.

Nothing heavy is imported before a command needs it, so that `rayft --help` answers at once on any machine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayft.config.environment import prepare_process
from rayft.errors import ConfigError, RayftError
from rayft.observe.startup import begin

if TYPE_CHECKING:
    from rayft.config.schema import AnyRun, SftRun

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

OVERRIDE = re.compile(r"[\w.-]+=.*", re.DOTALL)
INTERRUPTED = 130
AS_WRITTEN = argparse.RawDescriptionHelpFormatter
ABOUT = """rayft fine-tunes language models on Ray.

example:
  rayft train recipes/configs/tiny/demo.yaml optim.lr=1e-4 --local
"""
EXIT_CODES = (
    "exit codes: 2 configuration, 3 data, 4 resources, 5 training, 6 infrastructure; 143 stopped on request; 4, 6 and 143 are worth a retry"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that rayft does not explain propagate."""
    begin()
    args = _arguments(argv)
    prepare_process(os.environ)
    try:
        args.run(args)
        sys.stdout.flush()
    except RayftError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error ({error.kind}): {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails on exit
        return 1
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("rayft", description=ABOUT, epilog=EXIT_CODES, formatter_class=AS_WRITTEN)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_config_commands(commands)
    _add_other_commands(commands)
    # argparse gives up on `train run.yaml --local key=value`: what it leaves over belongs to the configuration too.
    args, rest = parser.parse_known_args(argv)
    if rest and ("config" not in args or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "config" in args:
        args.config += rest
    return args


def _add_config_commands(commands: Commands) -> None:
    train = _add(commands, "train", _train, "train, or resume the run of this name", "train run.yaml optim.lr=1e-4 --local")
    train.add_argument("--recipe", metavar="FILE.py", help="your own driver: a file that defines main(cfg, local)")
    preprocess = _add(commands, "preprocess", _preprocess, "only write the packed shards", "preprocess run.yaml data.seq_len=4096")
    evaluate = _add(commands, "evaluate", _evaluate, "loss or reward on the evaluation sources", "evaluate run.yaml --model runs/a/export")
    generate = _add(commands, "generate", _generate, "answer a prompt", 'generate run.yaml --prompt "What is 2 + 2?"')
    export = _add(commands, "export", _export, "write a Hugging Face folder from a checkpoint", "export run.yaml --step 200 --merge")
    clean = _add(commands, "clean", _clean, "delete old checkpoints and unused packed shards", "clean run.yaml --keep 1 --dry-run")
    push = _add(commands, "push", _push, "put the run's export on the Hugging Face hub", "push run.yaml --repo me/my-model --dry-run")
    engines = _add(commands, "engines", _engines, "add or remove engines of an online run under way", "engines run.yaml --count 3")
    engines.add_argument("--count", type=_at_least_one, required=True, metavar="N", help="engines that the run is to have")
    _add(commands, "validate", _validate, "check the configuration and import user functions", "validate run.yaml")
    _add(commands, "plan", _plan, "print sizes, steps and a memory estimate", "plan run.yaml parallel.workers=4")
    trace = _add(commands, "trace", _trace, "who did what when in an online run, for chrome://tracing", "trace run.yaml --step 20")
    samples = _add(commands, "samples", _samples, "answers that the run wrote down", "samples run.yaml --step 20")
    for parser in (trace, samples):
        parser.add_argument("--step", type=int, metavar="N", help="of this step; samples shows the newest by default, trace all")
    trace.add_argument("--out", metavar="FILE", default="trace.json", help="where to write (default trace.json)")
    for parser in (train, preprocess, evaluate):
        parser.add_argument("--local", action="store_true", help="run in this process, without Ray")
    for parser in (evaluate, generate):
        parser.add_argument("--model", metavar="MODEL", help="a model's folder or id of the hub; the run's own result by default")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer, in tokens (default 128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    export.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest by default")
    export.add_argument("--best", action="store_true", help="the checkpoint with the lowest evaluation loss (checkpoint.keep_best)")
    export.add_argument("--out", metavar="FOLDER", help="where to write; the run's export folder by default")
    export.add_argument("--merge", action="store_true", help="also write the base model with the adapter added")
    clean.add_argument("--keep", type=_at_least_one, default=1, metavar="N", help="checkpoints to keep, the newest ones (default 1)")
    clean.add_argument("--dry-run", action="store_true", help="only show what would be deleted, with sizes")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository, made when there is none")
    push.add_argument("--merged", action="store_true", help="the merged export of a run with an adapter")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--dry-run", action="store_true", help="write the model card and list the files, send nothing")


def _add_other_commands(commands: Commands) -> None:
    reference = _add(commands, "config-schema", _schema, "explain the keys of a configuration", "config-schema --field optim", False)
    reference.add_argument("--method", choices=("sft", "grpo"), default="sft", help="of this training method (default sft)")
    reference.add_argument("--field", metavar="A.B", help="only this key or section")
    reference.add_argument("--format", choices=("yaml", "json"), default="yaml", help="yaml (default) or JSON schema")
    check = _add(commands, "check", _check, "try a model: load, adapt, first loss", "check Qwen/Qwen3-0.6B --seq-len 4096", False)
    check.add_argument("model", help="model folder, or id in the local cache")
    check.add_argument("--adapter-targets", metavar="T", help="adapter.targets to try")
    check.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens in the row that is tried (default 2048)")


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], about: str, example: str, takes_config: bool = True
) -> argparse.ArgumentParser:
    text = f"{about[0].upper()}{about[1:]}.\n\nexample:\n  rayft {example}"
    parser = commands.add_parser(name, help=about, description=text, formatter_class=AS_WRITTEN)
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if takes_config:
        parser.add_argument("config", nargs="+", metavar="CONFIG", help="YAML files, later ones winning, then overrides a.b=value")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        metadata = importlib.import_module("importlib.metadata")
        try:
            print(f"rayft {metadata.version('rayft')}")
        except metadata.PackageNotFoundError:
            print("rayft, not installed")
        parser.exit()


def _load(args: argparse.Namespace) -> AnyRun:
    from rayft.config.load import load

    files = [Path(item) for item in args.config if not OVERRIDE.fullmatch(item)]
    return load(files, [item for item in args.config if OVERRIDE.fullmatch(item)])


def _load_rows(args: argparse.Namespace) -> SftRun:
    """The run of a command that is about packed rows."""
    from rayft.config.schema import SftRun

    cfg = _load(args)
    if not isinstance(cfg, SftRun):
        rule = "has no packed rows, which this command is about"
        raise ConfigError("method", cfg.method, rule, "Use rayft train; prompts are rendered there")
    return cfg


def _train(args: argparse.Namespace) -> None:
    from rayft.config.functions import load_function, resolve

    cfg = _load(args)
    if args.recipe:
        load_function(resolve(f"{args.recipe}:main"))(cfg, args.local)
    else:
        importlib.import_module(f"rayft.recipes.{cfg.method}").main(cfg, args.local)


def _preprocess(args: argparse.Namespace) -> None:
    from rayft.commands import preprocess

    preprocess(_load_rows(args), args.local)


def _evaluate(args: argparse.Namespace) -> None:
    from rayft.commands import evaluate

    evaluate(_load(args), args.model, args.local)


def _generate(args: argparse.Namespace) -> None:
    from rayft.commands import generate

    generate(_load(args), args.prompt, args.model, args.max_tokens, args.temperature)


def _export(args: argparse.Namespace) -> None:
    from rayft.commands import export

    export(_load(args), args.step, args.out, args.merge, args.best)


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _clean(args: argparse.Namespace) -> None:
    from rayft.commands import clean

    clean(_load(args), args.keep, args.dry_run)


def _push(args: argparse.Namespace) -> None:
    from rayft.commands import push

    push(_load(args), args.repo, args.merged, args.private, args.dry_run)


def _engines(args: argparse.Namespace) -> None:
    from rayft.commands import engines
    from rayft.config.schema import GrpoRun

    cfg = _load(args)
    if not isinstance(cfg, GrpoRun):
        raise ConfigError("method", cfg.method, "has no engines", "Name the configuration of a run with method grpo")
    engines(cfg, args.count)


def _trace(args: argparse.Namespace) -> None:
    from rayft.commands import trace

    trace(_load(args), args.step, Path(args.out))


def _samples(args: argparse.Namespace) -> None:
    from rayft.commands import samples

    samples(_load(args), args.step)


def _plan(args: argparse.Namespace) -> None:
    from rayft.commands import plan

    plan(_load(args))


def _check(args: argparse.Namespace) -> None:
    from rayft.commands import check

    check(args.model, args.adapter_targets, args.seq_len)


def _validate(args: argparse.Namespace) -> None:
    from rayft.config.functions import load_function, resolve
    from rayft.config.schema import SftRun
    from rayft.observe.trackers import check_installed

    cfg = _load(args)
    for name in cfg.run.callbacks:
        load_function(resolve(name))
    if not isinstance(cfg, SftRun):
        from rayft.actors.refusals import check_engine, has_engine
        from rayft.config.paths import absolute
        from rayft.experience.judge import reward_functions
        from rayft.rollout.stage import maker_of, scene_of

        for function in reward_functions(absolute(cfg)).values():
            load_function(function)
        if (scene := scene_of(cfg)) is not None:
            maker_of(scene)
        if has_engine(cfg):
            check_engine(cfg)
        else:
            print("rollout.engine=vllm was not checked: vllm is not installed here; rayft train checks it before it starts anything")
    check_installed(cfg.trackers.names)
    print(f"{cfg.run.name}: a valid {cfg.method} run of {cfg.model.path} on {', '.join(cfg.data.train)}")


def _schema(args: argparse.Namespace) -> None:
    from rayft.config.load import schema

    print(schema(args.field, args.format, args.method), end="")


def _reader_is_gone() -> bool:
    """Whether the broken pipe is our own standard output, as in `rayft plan run.yaml | head -1`, and not some socket."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))

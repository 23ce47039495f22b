"""The command line: arguments to config, config to run, errors to one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dist_export.errors import ConfigError, DistExportError, StepFailedError, UserError, printable
from dist_export.runtime.interrupts import EXIT_CODE as INTERRUPTED
from dist_export.runtime.interrupts import INTERRUPTS
from dist_export.runtime.terminal import SCREEN

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_COMMANDS = ("export", "plan", "inspect", "verify")


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0 good, 1 a failed export or an unsound package, 2 the user's mistake or a bad source, 130 Ctrl-C."""
    if list(argv) == ["--version"]:
        from dist_export._version import VERSION

        print(f"dist_export {VERSION}")
        return 0
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        return _fail(
            ConfigError(
                f"{argv[0]!r} is no command; the commands are {', '.join(_COMMANDS)}, and --config FILE exports"
            )
        )
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in _COMMANDS else ("export", argv)
    _configure_logging()
    with INTERRUPTS:
        try:
            code = _run(command, list(rest))
        except KeyboardInterrupt:
            _tell_interrupt(INTERRUPTS.describe() if os.environ.get("LOCAL_RANK", "0") == "0" else "")
            return INTERRUPTED
        except Exception as error:
            if not INTERRUPTS.has_come:
                raise
            _tell_interrupt(f"{INTERRUPTS.describe()} ({type(error).__name__})")  # what code of the model made of it
            return INTERRUPTED
        return INTERRUPTED if code and INTERRUPTS.has_come else code


def _run(command: str, argv: list[str]) -> int:
    """Return the exit code of a command, where it failed for a reason that is told in one line."""
    try:
        return {"export": _export, "plan": _plan, "inspect": _inspect, "verify": _verify}[command](argv)
    except DistExportError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if "://" not in str(error.filename):  # what is no store's answer is a bug, and keeps its traceback
            raise
        return _fail(UserError(f"{error.filename}: {error.strerror}"))


def _export(argv: list[str]) -> int:
    from dist_export.config.loader import build_parser, parse_settings
    from dist_export.config.schema import ExportConfig

    parser = build_parser("dist_export", has_help=_wants_text(argv))
    if _wants_text(argv):
        _print_text(parser, argv)
    if not argv:
        print(
            "dist_export: nothing to do; give --config FILE, or --ckpt_dir and --export_dir (--help)", file=sys.stderr
        )
        return 2

    def work() -> list[str]:
        from dist_export.model.user_objects import build_objects
        from dist_export.pipeline.run import run_export

        config = ranks.run("read the settings", lambda: parse_settings(parser, argv))
        objects = ranks.run("build the model and the dataset", lambda: build_objects(config), may_block=True)
        return run_export(ranks, config, objects, is_shown=config.progress)[1]

    from dist_export.runtime.ranks import join

    # The settings are read again once the ranks know each other: so even a misspelt key is told once, by rank 0.
    try:
        timeout_secs = parse_settings(parser, argv).timeout
    except ConfigError:
        timeout_secs = ExportConfig.timeout
    ranks = join(timeout_secs=timeout_secs, is_own_process=True)
    INTERRUPTS.describe = ranks.describe_interrupt
    try:
        summary = work()
    except KeyboardInterrupt:
        _tell_interrupt(ranks.leave_interrupted())
        return INTERRUPTED
    except DistExportError as error:
        failure = error
        is_shared = isinstance(error, StepFailedError) or ranks.world_size == 1
        if is_shared:
            ranks.tell_once(lambda: _tell(failure, rank=ranks.rank))
        else:
            _tell(error, rank=ranks.rank)
        return error.exit_code
    finally:
        ranks.close()
    if ranks.rank == 0:
        _print_lines(summary)
    return 0


def _plan(argv: list[str]) -> int:
    from dist_export.config.loader import build_parser, parse_with_extras
    from dist_export.pipeline.dry_run import make_report, render_report

    parser = build_parser("dist_export plan", has_help=_wants_text(argv))
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--world_size", type=int, default=None, help="ranks to plan for; default $WORLD_SIZE or 1")
    if _wants_text(argv):
        _print_text(parser, argv)
    config, asked = parse_with_extras(parser, argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if asked["world_size"] is None else asked["world_size"]
    if world_size < 1:
        raise ConfigError(f"--world_size is {world_size}; give a number from 1 up")
    report = make_report(config, world_size=world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_json(report) if asked["json"] else _print_lines(render_report(report))
    return 0


def _inspect(argv: list[str]) -> int:
    from dist_export.checkpoint.tensor_settings import TensorSettings
    from dist_export.config.loader import build_path_parser, parse_path
    from dist_export.inspect.describe import describe, render
    from dist_export.pipeline.run_listing import describe_run, render_run

    parser = build_path_parser("dist_export inspect", "Show a checkpoint, the checkpoints of a run, or a package.")
    parser.add_argument("--follow_links", action="store_true", help="read files that are links out of the directory")
    formats = ("auto", "recis", "dcp", "safetensors", "torch", "dynamicemb", "dcp+dynamicemb")
    parser.add_argument(
        "--format", choices=formats, default="auto", help="default: as its files tell, of DCP and a dump both"
    )
    for option, what in (("--treat_as_tables", "tables"), ("--optimizer_slots", "optimizer state")):
        text = f"where the checkpoint does not say it: a pattern of further {what}; may be given several times"
        parser.add_argument(option, action="append", default=[], metavar="PATTERN", help=text)
    text = "of a checkpoint with several states, such as a model and its EMA, the path of the one to show; default: the model's"
    parser.add_argument("--state_root", default=None, metavar="PATH", help=text)
    text = "of a DynamicEmb dump: dimensions of tables by pattern, as YAML such as '{user: 16}'"
    parser.add_argument("--dynamicemb_dims", type=dict[str, int], default={}, help=text)
    arguments = parse_path(parser, argv)
    path = _resolve(arguments)
    options = {
        "follow_links": arguments.follow_links,
        "asked": arguments.format,
        "settings": TensorSettings(
            tuple(arguments.treat_as_tables), tuple(arguments.optimizer_slots), state_root=arguments.state_root
        ),
    }
    run = describe_run(path, arguments.storage_options, **options)
    if run is not None:
        _print_json(run) if arguments.json else _print_lines(render_run(run))
        return 0
    found = describe(path, arguments.storage_options, **options, dynamicemb_dims=arguments.dynamicemb_dims)
    _print_json(found) if arguments.json else _print_lines(render(found))
    return 0


def _verify(argv: list[str]) -> int:
    from dist_export.config.loader import build_path_parser, parse_path
    from dist_export.config.schema import ExportConfig, parse_bytes
    from dist_export.runtime.ranks import join
    from dist_export.verify.verify import verify

    parser = build_path_parser(
        "dist_export verify",
        "Check a package, or a directory that RecIS wrote: exit 0 sound, 1 unsound, 2 neither of the two, or none that can be "
        "read. Under torchrun the ranks share the work.",
    )
    parser.add_argument("--finite", action="store_true", help="also read all float values, to find NaN and infinities")
    parser.add_argument("--max_memory", default=ExportConfig.max_memory, help="of each rank")
    parser.add_argument("--threads", type=int | None, default=None, help="of each rank; null: its cores, 4 at most")
    parser.add_argument("--timeout", type=float, default=ExportConfig.timeout, help="seconds to wait for another rank")
    arguments = parse_path(parser, argv)
    max_memory = parse_bytes(arguments.max_memory, setting="max_memory")
    if not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout is {arguments.timeout}; give seconds above 0")
    ranks = join(timeout_secs=arguments.timeout, is_own_process=True)
    INTERRUPTS.describe = ranks.describe_interrupt
    try:
        path = ranks.broadcast("find the package", lambda: _resolve(arguments))
        report = verify(
            path,
            arguments.storage_options,
            finite=arguments.finite,
            max_memory=max_memory,
            threads=arguments.threads,
            ranks=ranks,
        )
        ranks.tell_once(lambda: _print_json(report.as_json()) if arguments.json else _print_lines(report.render()))
    except KeyboardInterrupt:
        _tell_interrupt(ranks.leave_interrupted())
        return INTERRUPTED
    except DistExportError as error:
        failure = error
        ranks.tell_once(lambda: _tell(failure, rank=ranks.rank))
        return error.exit_code
    finally:
        ranks.close()
    return 1 if report.count() else 0


def _resolve(arguments: Any) -> str:
    """Return the directory that the path means: itself, or what a registry says."""
    from dist_export.registry import base

    return base.resolve(arguments.path, arguments.registry_options).directory


def _print_text(parser: ArgumentParser, argv: list[str]) -> None:
    """Let the parser print help or the config, and exit."""
    from dist_export.config.loader import join_nested

    try:
        parser.parse_args(join_nested(argv))
    except (ValueError, TypeError) as error:  # it has exited unless an argument is wrong
        raise ConfigError(" ".join(str(error).split())) from None


def _wants_text(argv: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") or argument.startswith("--print_config") for argument in argv)


def _configure_logging() -> None:
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(f"%(asctime)s rank {rank} %(stage)s%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_name_stage)
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("torch", "fsspec", "asyncio", "s3fs", "aiobotocore", "botocore", "aiohttp", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _name_stage(record: logging.LogRecord) -> bool:
    """Give a record the stage that the export is in; the line of a stage's end names it itself."""
    from dist_export.runtime.io_activity import current_stage

    stage = current_stage()
    record.stage = f"[{stage}] " if stage else ""
    return True


class _OneLine(logging.Formatter):
    """Makes messages printable, for they may quote foreign names; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        return printable(super().formatMessage(record))


def _fail(error: DistExportError) -> int:
    _tell(error, rank=int(os.environ.get("RANK", "0")))
    return error.exit_code


def _tell(error: DistExportError, *, rank: int) -> None:
    is_remade = error.exit_code == 2 and "TORCHELASTIC_RUN_ID" in os.environ
    note = " (exit code 2, of which torchrun makes 1)" if is_remade else ""
    where = "" if rank == 0 else f"rank {rank}: "
    print(f"{SCREEN.prefix()}dist_export: {where}{error}{note}", file=sys.stderr, flush=True)


def _tell_interrupt(text: str) -> None:
    """Say why this process ends; nothing where another one does."""
    if text:
        print(f"{SCREEN.prefix()}dist_export: {text}", file=sys.stderr, flush=True)


def _print_lines(lines: Iterable[str]) -> None:
    """Print lines that may hold foreign names, each of them as one line."""
    for line in lines:
        print(printable(line))


def _print_json(value: object) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    # outside of texts JSON is printable, and within them an escape says the same
    print("\n".join(line if line.isprintable() else _escape(line) for line in text.split("\n")))


def _escape(line: str) -> str:
    import json

    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)

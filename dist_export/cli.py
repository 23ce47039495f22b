"""The command line: turns arguments into a config, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_export.errors import ConfigError, DistExportError, StepFailedError, UserError
from dist_export.reporting.printing import configure_logging, print_json, print_lines
from dist_export.runtime.interrupts import EXIT_CODE as INTERRUPTED
from dist_export.runtime.interrupts import INTERRUPTS
from dist_export.runtime.terminal import SCREEN

if TYPE_CHECKING:
    from dist_export.runtime.ranks import Ranks

_COMMANDS = (
    *("export", "init", "plan", "inspect", "verify", "diff", "report"),
    *("compact", "score", "serve", "watch", "versions", "rollback"),
)


def main(argv: Sequence[str]) -> int:
    """Run a command; return 0 (good), 1 (failed export, unsound package), 2 (user's mistake, bad source) or 130 (Ctrl-C)."""
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        return _fail(
            ConfigError(
                f"{argv[0]!r} is no command; the commands are {', '.join(_COMMANDS)}, and --config FILE exports"
            )
        )
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in _COMMANDS else ("export", argv)
    if list(argv) == ["--version"]:
        command = "version"
    configure_logging()
    with INTERRUPTS:
        try:
            code = _run(command, list(rest))
        except KeyboardInterrupt:
            _tell_interrupt(INTERRUPTS.describe() if os.environ.get("LOCAL_RANK", "0") == "0" else "")
            return INTERRUPTED
        except Exception as error:
            if not INTERRUPTS.has_come:
                raise
            _tell_interrupt(f"{INTERRUPTS.describe()} ({type(error).__name__})")  # the model's code may convert Ctrl-C
            return INTERRUPTED
        return INTERRUPTED if code and INTERRUPTS.has_come else code


def _run(command: str, argv: list[str]) -> int:
    """Run a command and return its exit code. Known errors are printed in one line."""
    try:
        from dist_export.kernels.selection import check_choice

        check_choice()
        commands = {
            "version": _version,
            "export": _export,
            "init": _init,
            "plan": _plan,
            "inspect": _inspect,
            "verify": _verify,
            "diff": _diff,
            "compact": _compact,
            "serve": _serve,
            "watch": _watch,
        }
        return commands[command](argv) if command in commands else _run_module(command, argv)
    except DistExportError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of the output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if "://" not in str(
            error.filename
        ):  # an error that does not come from a store is a bug, and keeps its traceback
            raise
        return _fail(UserError(f"{error.filename}: {error.strerror}"))


def _version(_: list[str]) -> int:
    from dist_export._version import VERSION
    from dist_export.kernels.selection import select_kernels

    print(f"dist_export {VERSION}\nkernels: {select_kernels().description}")
    return 0


def _export(argv: list[str]) -> int:
    from dist_export.config.loader import parse_settings
    from dist_export.config.schema import ExportConfig

    if not argv:
        raise ConfigError("nothing to do; give --config FILE, or --ckpt_dir and --export_dir (--help)")
    if _is_answered(argv, {}) or _has_printed_config(argv, {}):
        return 0

    summary: list[str] = []

    def work(ranks: Ranks) -> int:
        from dist_export.pipeline.config_agreement import build_and_digest
        from dist_export.pipeline.run import run_export

        config = ranks.run("read the settings", lambda: parse_settings(argv))
        objects, digests = build_and_digest(ranks, config)
        _, lines = run_export(ranks, config, objects, is_shown=config.progress, digests=digests)
        summary.extend(lines if ranks.rank == 0 else ())
        return 0

    # The settings are read again after the ranks have joined, so that only rank 0 reports a mistake in them.
    try:
        timeout_secs = parse_settings(argv).timeout
    except ConfigError:
        timeout_secs = ExportConfig.timeout
    code = _run_on_ranks(timeout_secs, work, tells_each=True)
    print_lines(summary)
    return code


def _init(argv: list[str]) -> int:
    from dist_export.config.loader import INIT_OPTIONS, parse_path

    usage = (
        "usage: dist_export init CKPT [--out FILE] [--key value ...]\n\nWrite a commented config that exports the tables of a "
        "checkpoint.\nSettings that are given as --key value go into it."
    )
    if _is_answered(argv, {"Options": {"out": INIT_OPTIONS["out"]}}, usage=usage):
        return 0
    arguments = parse_path("init", argv, INIT_OPTIONS, has_defaults=False)
    from dist_export.pipeline.draft_config import draft_config, write_draft

    path, out = arguments.pop("path"), arguments.pop("out", None)
    if out is not None and os.path.lexists(out):
        raise ConfigError(f"{out}: File exists. Nothing was written; give another --out")
    lines = draft_config({"ckpt_dir": path, "export_dir": "package", **arguments})
    if int(os.environ.get("RANK", "0")) == 0:
        if out is None:
            print("\n".join(lines))
        else:
            write_draft(lines, out)
            print(f"{out} is written. Next: python -m dist_export plan --config {shlex.quote(out)}")
    return 0


def _plan(argv: list[str]) -> int:
    from dist_export.config.describe import Option
    from dist_export.config.loader import parse_with_extras
    from dist_export.pipeline.dry_run import make_report, render_report

    options = {
        "json": Option(hint=bool, default=False, is_flag=True, text="Print the plan as JSON."),
        "world_size": Option(hint=int | None, default=None, text="Ranks to plan for. Null takes $WORLD_SIZE, or 1."),
    }
    if _is_answered(argv, {"Options of plan": options}) or _has_printed_config(argv, options):
        return 0
    config, arguments = parse_with_extras(argv, options)
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if arguments["world_size"] is None else arguments["world_size"]
    if world_size < 1:
        raise ConfigError(f"--world_size is {world_size}; give a number from 1 up")
    report = make_report(config, world_size=world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        print_json(report) if arguments["json"] else print_lines(render_report(report))
    return 0


def _inspect(argv: list[str]) -> int:
    from dist_export.checkpoint.tensor_settings import TensorSettings
    from dist_export.config.loader import PATH_OPTIONS, SOURCE_OPTIONS, parse_path
    from dist_export.inspect.describe import describe, render
    from dist_export.pipeline.run_listing import describe_run, render_run

    usage = "usage: dist_export inspect PATH [--key value ...]\n\nShow a checkpoint, the checkpoints of a run, or a package."
    options = {**PATH_OPTIONS, **SOURCE_OPTIONS}
    if _is_answered(argv, {"Options": options}, usage=usage):
        return 0
    arguments = parse_path("inspect", argv, options)
    path = _resolve(arguments)
    source = {
        "follow_links": arguments["follow_links"],
        "asked": arguments["format"],
        "settings": TensorSettings(
            tuple(arguments["treat_as_tables"]), tuple(arguments["optimizer_slots"]), state_root=arguments["state_root"]
        ),
    }
    run = describe_run(path, arguments["storage_options"], **source)
    if run is not None:
        print_json(run) if arguments["json"] else print_lines(render_run(run))
        return 0
    found = describe(path, arguments["storage_options"], **source, dynamicemb_dims=arguments["dynamicemb_dims"])
    print_json(found) if arguments["json"] else print_lines(render(found))
    return 0


def _verify(argv: list[str]) -> int:
    from dist_export.config.byte_sizes import parse_bytes
    from dist_export.config.loader import parse_path
    from dist_export.verify.options import OPTIONS, USAGE
    from dist_export.verify.verify import verify

    if _is_answered(argv, {"Options": OPTIONS}, usage=USAGE):
        return 0
    arguments = parse_path("verify", argv, OPTIONS)
    max_memory = parse_bytes(arguments["max_memory"], setting="max_memory")

    def work(ranks: Ranks) -> int:
        path = ranks.broadcast("find the package", lambda: _resolve(arguments))
        below = arguments["base"] and ranks.broadcast(
            "find the base", lambda: _resolve({**arguments, "path": arguments["base"]})
        )
        report = verify(
            path,
            arguments["storage_options"],
            finite=arguments["finite"],
            max_memory=max_memory,
            threads=arguments["threads"],
            ranks=ranks,
            base=below,
        )
        ranks.tell_once(lambda: print_json(report.as_json()) if arguments["json"] else print_lines(report.render()))
        return 1 if report.count() else 0

    return _run_on_ranks(arguments["timeout"], work)


def _diff(argv: list[str]) -> int:
    from dist_export.config.loader import parse_path
    from dist_export.diff.command import NAMES, OPTIONS, USAGE, compare
    from dist_export.diff.text import render_diff

    if _is_answered(argv, {"Options": OPTIONS}, usage=USAGE):
        return 0
    arguments = parse_path("diff", argv, OPTIONS, names=NAMES)

    def work(ranks: Ranks) -> int:
        found = compare(arguments, ranks)
        ranks.tell_once(lambda: print_json(found.as_json()) if arguments["json"] else print_lines(render_diff(found)))
        return 0 if found.is_equal else 1

    return _run_on_ranks(arguments["timeout"], work)


def _run_on_ranks(
    timeout_secs: float, work: Callable[[Any], int], *, tells_each: bool = False, lasts: bool = False
) -> int:
    """Join the ranks of this job, and return what ``work`` returns, or the exit code of its error, which one rank prints.

    With ``tells_each``, a rank prints its own error if the others may not have it. With ``lasts``, the ranks outlast an export.
    """
    from dist_export.runtime.joining import join_as
    from dist_export.runtime.lasting_ranks import LastingRanks
    from dist_export.runtime.ranks import Ranks

    if not 0 < timeout_secs < float("inf"):
        raise ConfigError(f"--timeout is {timeout_secs}; give seconds above 0")
    ranks = join_as(LastingRanks if lasts else Ranks, timeout_secs=timeout_secs, is_own_process=True)
    INTERRUPTS.describe = ranks.describe_interrupt
    try:
        return work(ranks)
    except KeyboardInterrupt:
        _tell_interrupt(ranks.leave_interrupted())
        return INTERRUPTED
    except DistExportError as error:
        failure = error
        if tells_each and ranks.world_size > 1 and not isinstance(error, StepFailedError):
            _tell(error, rank=ranks.rank)
        else:
            ranks.tell_once(lambda: _tell(failure, rank=ranks.rank))
        return error.exit_code
    finally:
        ranks.close()


def _compact(argv: list[str]) -> int:
    from dist_export.config.loader import parse_path
    from dist_export.pipeline.compact_command import NAMES, OPTIONS, USAGE, compact

    if _is_answered(argv, {"Options": OPTIONS}, usage=USAGE):
        return 0
    arguments = parse_path("compact", argv, OPTIONS, names=NAMES)
    summary: list[str] = []

    def work(ranks: Ranks) -> int:
        _, lines = compact(ranks, arguments)
        summary.extend(lines if ranks.rank == 0 else ())
        return 0

    code = _run_on_ranks(arguments["timeout"], work, tells_each=True)
    print_lines(summary)
    return code


def _serve(argv: list[str]) -> int:
    from dist_export.config.loader import parse_path
    from dist_export.serve.options import SERVE_OPTIONS, SERVE_USAGE
    from dist_export.serve.run import serve

    if _is_answered(argv, {"Options": SERVE_OPTIONS}, usage=SERVE_USAGE):
        return 0
    arguments = parse_path("serve", argv, SERVE_OPTIONS)
    if not arguments["poll_secs"] > 0:
        raise ConfigError(f"--poll_secs is {arguments['poll_secs']}; give seconds above 0")
    path, host, port, workers = (arguments.pop(name) for name in ("path", "host", "port", "workers"))
    serve(
        path, host=host, port=port, workers=workers, watching=arguments, announce=lambda line: print(line, flush=True)
    )
    return 0


def _watch(argv: list[str]) -> int:
    from dist_export.watch.command import OPTIONS, USAGE, read_rules, watch

    if _is_answered(argv, {"Options of watch": OPTIONS}, usage=USAGE):
        return 0
    timeout_secs = read_rules(argv).config.timeout
    return _run_on_ranks(timeout_secs, lambda ranks: watch(ranks, argv), tells_each=True, lasts=True)


def _run_module(command: str, argv: list[str]) -> int:
    """Run a command whose module has its options, usage, names of paths, and what it does."""
    from dist_export.config.loader import parse_path

    rooms = {"report": "report.command", "score": "serve.score_command"}
    module = import_module(f"dist_export.{rooms.get(command, 'pipeline.version_commands')}")
    options = module.OPTIONS[command]
    if not _is_answered(argv, {"Options": options}, usage=module.USAGE[command]):
        module.run(command, parse_path(command, argv, options, names=module.NAMES[command], num_needed=1))
    return 0


def _resolve(arguments: Mapping[str, Any]) -> str:
    """Return the directory of a path: the path itself, or the directory that a registry gives."""
    from dist_export.registry import base

    return base.resolve(arguments["path"], arguments["registry_options"]).directory


def _is_answered(argv: Sequence[str], groups: Mapping[str, Mapping[str, Any]], *, usage: str = "") -> bool:
    """Print the help of a command if it is requested; return whether it was. Without ``usage`` it includes the settings."""
    wanted = {argument.replace("_", "-") for argument in argv} & {"-h", "--help", "--help-all"}
    if wanted:
        from dist_export.config.describe import read_groups, render_help
        from dist_export.config.loader import USAGE

        groups = groups if usage else {**groups, **read_groups()}
        print_lines(render_help(usage or USAGE, groups, shows_all="--help-all" in wanted))
    return bool(wanted)


def _has_printed_config(argv: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Print the resulting settings as YAML if requested; return whether they were. ConfigError if an export refuses them."""
    rest = [argument for argument in argv if argument not in ("--print_config", "--print-config")]
    if len(rest) == len(argv):
        return False
    import yaml

    from dist_export.config.loader import parse_with_extras

    print(yaml.safe_dump(vars(parse_with_extras(rest, options)[0]), sort_keys=False), end="")
    return True


def _fail(error: DistExportError) -> int:
    _tell(error, rank=int(os.environ.get("RANK", "0")))
    return error.exit_code


def _tell(error: DistExportError, *, rank: int) -> None:
    is_remade = error.exit_code == 2 and "TORCHELASTIC_RUN_ID" in os.environ
    note = " (exit code 2, of which torchrun makes 1)" if is_remade else ""
    where = "" if rank == 0 else f"rank {rank}: "
    print(f"{SCREEN.prefix()}dist_export: {where}{error}{note}", file=sys.stderr, flush=True)


def _tell_interrupt(text: str) -> None:
    """Print why this process ends; print nothing if another process does."""
    if text:
        print(f"{SCREEN.prefix()}dist_export: {text}", file=sys.stderr, flush=True)

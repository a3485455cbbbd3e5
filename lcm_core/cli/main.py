"""The command line: `python -m lcm_core generate | compare | interpolate | serve | export | info`.

Importing this loads neither torch nor any other library, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from lcm_core import __version__
from lcm_core.cli import compare, export, generate, info, interpolate, serve
from lcm_core.cli.common import note, one_line
from lcm_core.cli.imports import leave_out_unused
from lcm_core.errors import InputError, is_out_of_memory

USER_ERROR = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that reads options in full only, since --n would be taken for --negative; its subcommands' likewise."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and message."""
        self.exit(USER_ERROR, one_line(f"error: {message}; see {self.prog} --help") + "\n")


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        """Say also what is wrong most often."""
        if message.startswith("unrecognized arguments"):
            message += " (put a prompt of several words in quotes)"
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; `parse_args(...).run` is the chosen command's function."""
    parser = _Parser(
        prog="python -m lcm_core",
        description="Latent Consistency Models: text to image in 1 to 4 steps.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m lcm_core generate "a panda, noto style" --output panda.png',
    )
    parser.add_argument("--version", action="version", version=f"lcm-suite {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (generate, compare, interpolate, serve, export, info):
        command.add_to(commands)
    return parser


def start() -> NoReturn:
    """Run this process's command line, and end it."""
    leave_out_unused()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 for a mistake in the input, 130 when interrupted."""
    return run_command(
        build_parser().parse_args(argv),
        interrupted="interrupted; nothing was left half-written",
        out_of_memory="use a smaller --size, --batch 1, or --dtype float16 or bfloat16",
    )


def run_command(args: argparse.Namespace, interrupted: str, out_of_memory: str) -> int:
    """Run the command that was parsed, with every mistake of the user's as one line. Returns the exit code.

    Args:
        args: `args.run(args)` is the command.
        interrupted: what to say after Ctrl-C.
        out_of_memory: what to do against that.
    """
    _accept_all_letters()
    try:
        with warnings.catch_warnings():
            # The libraries' talk to developers is not for users; our own warnings become notes of one line.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: note(str(message))
            args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        return _fail(USER_ERROR, f"error: {error}")
    except OSError as error:  # what no door has foreseen: a file that is too long in name, locked, or gone meanwhile
        return _fail(USER_ERROR, f"error: cannot use {error.filename or 'a file'}: {error.strerror}; check the path")
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, interrupted)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(USER_ERROR, f"error: out of memory; {out_of_memory}")
    return 0


def _accept_all_letters() -> None:
    """Let letters that the terminal does not have come out as escapes, not as an error after the work is done."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(code: int, message: str) -> int:
    print(one_line(message), file=sys.stderr)
    return code

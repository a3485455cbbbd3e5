"""`serve`: a page that paints while you draw, and the web APIs that other programs know."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lcm_core.cli.common import add_command


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "serve",
        "Open a page that paints while you draw; also answers OpenAI's and A1111's clients.",
        "serve --models ~/models --loras ~/loras",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", default="emoji", help="'emoji' (default), a diffusers folder, or a .safetensors file"
    )
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="further models to choose from")
    parser.add_argument("--loras", type=Path, metavar="FOLDER", help="LoRAs to choose from")
    parser.add_argument(
        "--embedding", action="append", metavar="PATH", help="textual inversion that prompts may name; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--token", help="what every request has to give; required with --host")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one here)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest one here)")
    group = parser.add_argument_group("limits of one request")
    group.add_argument("--max-side", type=int, default=1024, metavar="PIXELS", help="default 1024")
    group.add_argument("--max-steps", type=int, default=50, metavar="N", help="default 50")
    group.add_argument("--max-waiting", type=int, default=32, metavar="N", help="requests in the queue (default 32)")


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from lcm_core.serve.fields import Limits
    from lcm_core.serve.run import serve

    serve(
        args.model,
        args.models,
        args.loras,
        args.host,
        args.port,
        args.token,
        browser=not args.no_browser,
        limits=Limits(side=args.max_side, steps=args.max_steps, waiting=args.max_waiting),
        load_options={"device": args.device, "dtype": args.dtype, "embedding": args.embedding or ()},
    )

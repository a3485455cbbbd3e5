"""How long the command line takes to its first picture, beside the same without `lcm_core/cli/imports.py`.

    python benchmarks/startup.py

starts `generate` and `serve` on the embedded model in processes of their own, by turns, and prints medians: seconds
from the start to the picture, or to the address, which is printed when the model is loaded; and seconds of CPU.
What `import torch` takes alone stands beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

PLAIN = "import sys; from lcm_core.cli.main import main; sys.exit(main())"
WAYS = {"now": ("-m", "lcm_core"), "all that is imported": ("-c", PLAIN)}


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds until the first line of output, and seconds of CPU that the process has taken when it is ended then."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit(f"{' '.join(command)} printed nothing")
    seconds = time.perf_counter() - start
    process.terminate()
    used = os.wait4(process.pid, 0)[2]
    process.stdout.close()
    return seconds, used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    commands = {("import torch", ""): ["-c", "import torch; print()"]}
    with tempfile.TemporaryDirectory() as folder:
        generate = ["generate", "a red apple, noto style", "--steps", "4", "--output", os.path.join(folder, "a.png")]
        for name, arguments in (("generate", generate), ("serve", ["serve", "--no-browser"])):
            commands |= {(name, way): [*first, *arguments] for way, first in WAYS.items()}
        found = [{key: measure(command) for key, command in commands.items()} for _ in range(runs)]
    for name, way in commands:
        seconds, used = (statistics.median(run[name, way][place] for run in found) for place in (0, 1))
        print(f"{name:13}{way:22}{seconds:6.2f} s, {used:5.2f} s of CPU")


if __name__ == "__main__":
    main()

"""``python -m benchmarks``: run the contestants side by side and print what came out."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict, replace

from benchmarks import arguments, machine, report, save, session
from benchmarks.config import DTYPES, MODELS, QUICK_MODEL, SessionConfig
from benchmarks.names import DEFAULT, KNOWN, processes

EXPECTED_BYTES_PER_PROCESS = 1.1e9  # of the model of 25 M parameters


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
    parser.add_argument("--contestants", type=arguments.names, default=DEFAULT, help=f"from: {','.join(KNOWN)}")
    parser.add_argument("--rounds", type=arguments.positive, help="measured rounds, after one that is discarded (8)")
    parser.add_argument("--steps", type=arguments.positive, help="steps of each contestant in a round (3)")
    parser.add_argument("--model", choices=MODELS, default="25m", help="a GPT of so many parameters (25m)")
    parser.add_argument("--layers", type=arguments.positive, help="layers of the model, if not its own")
    parser.add_argument("--batch", type=arguments.positive, help="batch of each rank (2)")
    parser.add_argument("--ranks", type=arguments.positive, help="processes of each contestant that communicates (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the order of turns")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 rounds: does it run at all?")
    parser.add_argument("--json", action="store_true", help="print the raw result instead of tables")
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    parser.add_argument("--save", nargs="?", const=today, metavar="NAME", help="keep it (default: the date)")
    return parser.parse_args(words)


def configure(options: argparse.Namespace) -> SessionConfig:
    """Defaults, or those of ``--quick``; what was given on the command line wins."""
    model = QUICK_MODEL if options.quick else MODELS[options.model]
    sizes = {key: getattr(options, key) for key in ("layers", "batch") if getattr(options, key)}
    config = SessionConfig(options.contestants, replace(model, **sizes), seed=options.seed)
    if options.quick:
        config = replace(config, rounds=2, steps=1, timeout_s=120.0)
    counts = {key: getattr(options, key) for key in ("ranks", "rounds", "steps") if getattr(options, key)}
    return replace(config, **counts)


def warn_of_memory(config: SessionConfig) -> None:
    """All contestants stay in memory; a machine that swaps measures its disk."""
    needed = sum(processes(name, config.ranks) for name in config.contestants) * EXPECTED_BYTES_PER_PROCESS
    available = machine.available_bytes()
    if config.model != QUICK_MODEL and available is not None and needed > available:
        print(
            f"warning: the contestants need about {needed / 1e9:.0f} GB together and "
            f"{available / 1e9:.0f} GB are free; choose fewer with --contestants",
            file=sys.stderr,
        )


def main() -> int:
    """Run, print, save; 1 when a contestant could not run."""
    options = parse()
    config = configure(options)
    warn_of_memory(config)
    description = machine.describe()
    dtypes = DTYPES if options.dtype == "both" else (options.dtype,)
    runs = {dtype: session.run(dtype, config) for dtype in dtypes}
    result = {"name": options.save or "", "machine": description, "config": asdict(config), "runs": runs}
    text = report.document(result)
    print(json.dumps(result) if options.json else text)
    if options.save:
        print(f"saved {save.save(result, text).name}", file=sys.stderr)
    failed = any("failed" in contestant for run in runs.values() for contestant in run["contestants"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

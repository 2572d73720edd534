"""Writes the target's hidden states for the training data of a run: `python -m specjax.capture CONFIG OUT [key=value]`.

Training with `data.taps=OUT` then reads them instead of running the target: the same losses, in less time from the
second epoch on. A second call with the same folder goes on where the first one stopped; several processes share the
work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from specjax.cli import add_share_arguments, check_share
from specjax.config import load_config
from specjax.errors import exit_on_input_error


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m specjax.capture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML run config, such as configs/qwen3-8b-dflash.yaml")
    parser.add_argument("out", help="folder of the cache")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    add_share_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    check_share(args)
    config = load_config(args.config, args.overrides)

    from specjax.training.capture import capture

    out = capture(config, args.out, print, num_processes=args.num_processes, process_id=args.process_id)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

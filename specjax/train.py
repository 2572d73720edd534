"""Trains a drafter or a target: `python -m specjax.train CONFIG [section.key=value ...] [--resume]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from specjax.config import dump_config, load_config
from specjax.errors import InputError, exit_on_input_error


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specjax.train", description=__doc__)
    parser.add_argument("config", help="YAML run config, such as configs/qwen3-8b-dflash.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file")
    parser.add_argument("--resume", action="store_true", help="continue the run in output_dir, or start it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    pod = parser.add_argument_group("several processes", "one process a host; start the same command on each")
    pod.add_argument("--distributed", action="store_true", help="find the other processes through the pod or scheduler")
    pod.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where nothing finds it")
    pod.add_argument("--num-processes", type=int)
    pod.add_argument("--process-id", type=int)
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(config), end="")
        return
    given = [args.coordinator, args.num_processes, args.process_id]
    if any(x is not None for x in given):
        if None in given:
            raise InputError("--coordinator, --num-processes and --process-id go together; give all three")
        _initialize(coordinator_address=args.coordinator, num_processes=args.num_processes, process_id=args.process_id)
    elif args.distributed:
        _initialize()

    from specjax.decoding import generate
    from specjax.training.run import train

    train(config, generate=generate, resume=args.resume)


def _initialize(**settings: object) -> None:
    import jax

    try:
        jax.distributed.initialize(**settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(
            f"--distributed: JAX finds no pod or scheduler here ({error}); give --coordinator, --num-processes and "
            "--process-id"
        ) from error
    except RuntimeError as error:  # what the distributed runtime raises: no answer within its time, a name unknown
        raise InputError(
            f"the processes do not find each other ({error}); check --coordinator on every host"
        ) from error


if __name__ == "__main__":
    main()

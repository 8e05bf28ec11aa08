"""``bgkernels bench``."""

from __future__ import annotations

import importlib

from bgkernels.training.commands.shared import Console, reported, typer
from bgkernels.training.errors import OptionError


def bench(context: typer.Context) -> None:
    """Measure the library beside its peers, as `make bench` does.

    Run it in a checkout of the repository: the suite is not part of the installed package. Options
    are those of `python -m benchmarks.run`, which `bgkernels bench -- --help` lists. Results go to
    `benchmarks/results`, and `python -m benchmarks.publish` makes tables and pictures of them.

    **Examples**

    ```
    bgkernels bench
    bgkernels bench --suite pairs --also
    bgkernels bench --cases "no gradient" --entries fused-128 dense
    ```
    """
    with reported(Console(stderr=True)):
        try:
            run = importlib.import_module("benchmarks.run")
        except ModuleNotFoundError as error:
            raise OptionError(
                f"the benchmark suite cannot be imported ({error}); "
                "run this in a checkout of the repository"
            ) from error
        run.main(context.args)

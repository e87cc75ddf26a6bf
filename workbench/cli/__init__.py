"""The command line: one command per step of the loop. Steps run as jobs in the worker that `workbench up` starts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from workbench import __version__
from workbench.cli import champions, frames, jobs, machine, models, training
from workbench.cli.options import InOrder
from workbench.config import Config
from workbench.errors import Invalid, WorkbenchError


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--home", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of everything the workbench keeps (WORKBENCH_HOME; ~/.workbench).")
@click.option("--debug", is_flag=True, help="Show where in the code an error came from.")
@click.version_option(__version__, prog_name="workbench")
@click.pass_context
def cli(context: click.Context, home: Path | None, debug: bool) -> None:
    """A labeling-and-retraining workbench: raw frames in, a better detector out, over and over.

    \b
      upload -> annotate -> review -> evaluate -> version -> retrain -> promote -> deploy
         ^                                                                        |
         +------------------- the deployed model annotates the next upload -------+

    Start with `workbench demo`, or with `workbench up` and a browser. Reviewing happens in the browser; every other
    step has a command here too.
    """
    context.obj = Config.read(home)

# In the order of the loop, with what belongs to a step beside it.
for command in (
    machine.up, machine.doctor, machine.demo, frames.upload, frames.annotate, frames.undo, frames.evaluate,
    frames.version, frames.diff, frames.checkout, training.retrain, training.sweep, training.rerun, champions.promote,
    champions.rollback, champions.champion, champions.deploy, champions.redeploy, champions.drift, training.rules_group,
    models.quantize, models.certify, machine.watch, jobs.jobs, frames.datasets, models.models, machine.notify,
    machine.worker, machine.part,
):
    cli.add_command(command)


def main() -> None:
    """Every failure is one sentence on stderr; exit code 2 for wrong input, 1 for any other failure."""
    is_debug = "--debug" in sys.argv
    try:
        code = cli(standalone_mode=False)
    except click.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except WorkbenchError as error:
        if is_debug:
            raise
        click.echo(str(error), err=True)
        code = 2 if isinstance(error, Invalid) else 1
    except Exception as error:
        if is_debug:
            raise
        click.echo(f"Unforeseen {type(error).__name__}: {error}. Run it again with `workbench --debug ...` and report "
                   "what it prints.", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)

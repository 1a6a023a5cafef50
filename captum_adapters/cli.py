"""Command line: evaluate attribution methods on a data set, and report the results."""

import dataclasses
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, get_args, get_type_hints

import click

from captum_adapters.evaluation.config import Evaluation, make_evaluation
from captum_adapters.evaluation.names import CONTROLS, stands_for
from captum_adapters.evaluation.presets import PRESETS
from zennit_resnet import __version__
from zennit_resnet._text import one_line, printable
from zennit_resnet.cli.group import Commands
from zennit_resnet.cli.options import Several

# Commands import what they need, so that help is there at once, and reports need no PyTorch
if TYPE_CHECKING:
    from captum_adapters.evaluation import Run


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Evaluate attribution methods on images, from a folder to ImageNet."""


def _evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of an evaluation, with its default in the help."""
    types = get_type_hints(Evaluation)
    for item in reversed(dataclasses.fields(Evaluation)):
        text, flag = item.metadata["help"], item.metadata.get("flag")
        choices = [each for each in item.metadata.get("choices", ()) if each]
        default, kind = item.default, get_args(types[item.name])
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if default not in (None, False, True, (), dataclasses.MISSING):
            text += f"  [default: {shown}]"
        # no default here, so that those of a preset can be told from what was given
        settings: dict[str, Any] = {"default": None, "help": text}
        if item.name in ("preset", "cross"):
            settings["multiple"] = True
        elif isinstance(default, tuple):
            settings["type"] = Several(kind[0])
        elif choices:
            settings["type"] = click.Choice(choices)
        elif int in (types[item.name], *kind):
            settings["type"] = int
        if item.name == "preset":
            settings["type"] = click.Choice([*PRESETS])
        if flag is not None:
            settings["is_flag"] = True
        settings["required"] = default is dataclasses.MISSING
        name = flag or f"--{item.name.replace('_', '-')}"
        command = click.option(name, item.name, **settings)(command)
    return command


def _list_methods(context: click.Context, _: Any, value: bool) -> None:
    """Print names of methods."""
    if value and not context.resilient_parsing:
        from captum_adapters.evaluation.methods import find_entries

        click.echo("\n".join(find_entries()))
        context.exit()


@main.command("evaluate")
@_evaluation_options
@click.option(
    "--dry-run", is_flag=True, help="Say what is left, and how long it takes."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_methods,
    help="List names of methods, and exit.",
)
def evaluate_command(dry_run: bool, quiet: bool, **given: Any) -> None:
    """Evaluate methods on images, and keep a record of each image and method.

    Started again, the same command goes on where it was interrupted. To use several
    devices, start it by torchrun: torchrun --nproc-per-node N -m captum_adapters
    evaluate ...
    """
    from captum_adapters.evaluation import Process, RunError, evaluate

    try:
        evaluation, process = make_evaluation(given), Process.current()
        progress = evaluate(evaluation, process=process, quiet=quiet, dry_run=dry_run)
    except (ValueError, RunError) as error:
        raise click.ClickException(one_line(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException(
            "interrupted: records are kept, and the same command goes on"
        ) from None
    left = progress.total - progress.done
    if quiet or process.rank > 0:
        return
    text = f"{progress.done} of {progress.total} records"
    if progress.skipped:
        text += f" ({progress.skipped} images left out, see the report)"
    if dry_run:
        text += f", {left} left, about {duration(progress.seconds / process.world)}"
        if process.world > 1:
            text += f" by {process.world} processes"
    click.echo(text)
    if not dry_run and not left:
        out = one_line(shlex.quote(evaluation.out))
        click.echo(f"report: python -m captum_adapters report {out}")


@main.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the page, tables, figures."
)
@click.option(
    "--format", "style", type=click.Choice(["terminal", "markdown", "csv", "latex"]),
    default="terminal", show_default=True, help="What is printed.",
)
@click.option(
    "--preset", "names", type=click.Choice([*PRESETS]), multiple=True,
    help="Methods of a paper's table and its printed figures; may be repeated"
    "  [default: all methods, and the presets of the runs]",
)
@click.option("--methods", type=Several(str), help="Methods to report, besides controls.")
@click.option("--baseline", help="Method to compare with  [default: the best baseline]")
@click.option("--primary", default="id", show_default=True, help="Score to compare by.")
@click.option(
    "--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95, show_default=True, help="Level of confidence intervals.",
)
@click.option(
    "--clusters", type=click.Choice(["none", "class"]), default="none",
    show_default=True, help="Draw single images, or whole classes, in the bootstrap.",
)
def report_command(
    runs: tuple[Path, ...], out: Optional[Path], style: str, names: tuple[str, ...],
    methods: Optional[tuple[str, ...]], **options: Any,
) -> None:
    """Summarize runs: tables, significance, curves, examples and warnings.

    With --out, also writes a page that opens without a network, tables as CSV, Markdown
    and LaTeX, and figures.
    """
    from captum_adapters.evaluation import RunError, read_run, summarize

    try:
        presets = [PRESETS[name] for name in names] or None
        results = [read_run(run) for run in runs]
        evaluated = sorted({name for run in results for name in run.records.index.levels[1]})
        for name in methods or ():
            if not any(stands_for(method, name) for method in evaluated):
                known = ", ".join(evaluated) or "no method"
                raise ValueError(f"there are no records of {name!r}, but of {known}")
        chosen = {name for preset in presets or () for name in preset.rows}
        chosen.update(methods or ())
        if chosen:
            selected = [select_methods(run, chosen) for run in results]
            # runs of other methods have nothing to say
            results = [run for run in selected if len(run.records)] or selected
        report = summarize(results, presets=presets, **options)
        readable = style in ("terminal", "markdown")
        text = report.text(style) if readable else report.table(style)
    except (ValueError, RunError) as error:
        raise click.ClickException(one_line(error)) from error
    if out is not None:
        try:
            paths = report.write(out)
        except OSError as error:
            reason = error.strerror or error
            raise click.ClickException(f"cannot write to {out}: {reason}") from error
        for path in paths:
            click.echo(f"written {one_line(path)}", err=True)
    click.echo(printable(text))


def select_methods(run: "Run", chosen: Collection[str]) -> "Run":
    """A run with the records of these methods, baselines with any options, and controls."""
    identity = run.settings["identity"]
    methods = [
        text
        for text in identity["methods"]
        if text in CONTROLS or any(stands_for(text, name) for name in chosen)
    ]
    kept = run.records.index.isin(methods, level="method")
    return run._replace(
        records=run.records[kept],
        # so that others are not missed
        settings={**run.settings, "identity": {**identity, "methods": methods}},
    )


def duration(seconds: float) -> str:
    """A time for people, such as `2 h 5 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(0, round(seconds))} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

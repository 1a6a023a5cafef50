"""Command line: evaluate attribution methods on a data set, and report the results."""

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, Callable, Optional

import click

from captum_adapters.evaluation.controls import CONTROLS
from captum_adapters.evaluation.measures import NAMES
from captum_adapters.evaluation.methods import names as method_names
from captum_adapters.evaluation.methods import stands_for
from captum_adapters.evaluation.presets import PRESETS, find_preset
from captum_adapters.evaluation.records import Run, RunError, read_run
from captum_adapters.evaluation.report import summarize
from captum_adapters.evaluation.runner import Process, evaluate
from captum_adapters.evaluation.settings import CHOICES, Evaluation
from zennit_resnet import __version__
from zennit_resnet.messages import Commands, one_line, printable

DEFAULTS = {item.name: item.default for item in dataclasses.fields(Evaluation)}


class _List(click.ParamType):
    """Names separated by commas, except within the options of a method."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts: list[str] = []
        for part in value.split(","):
            # resnet_lrp_ratio:first_layer=ones,maxpool=average
            if parts and ":" in parts[-1] and "+" not in parts[-1] and _is_option(part):
                parts[-1] += f",{part}"
            else:
                parts.append(part)
        found = tuple(part.strip() for part in parts if part.strip())
        return found or self.fail(f"there are no names in {value!r}")


def _is_option(text: str) -> bool:
    """Whether this is `key=value`, and not the name of a method."""
    return "=" in text and ":" not in text.partition("=")[0]


class _Percents(click.ParamType):
    """Percentages separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not made of numbers separated by commas")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Evaluate attribution methods on images, from a folder to ImageNet."""


def _option(name: str, text: str, **settings: Any) -> Callable[..., Any]:
    """An option for a field of an evaluation, with the field's default."""
    field = name.partition("/")[0].lstrip("-").replace("-", "_")
    if field in CHOICES and "type" not in settings:
        settings["type"] = click.Choice([item for item in CHOICES[field] if item])
    default = DEFAULTS.get(field)
    if default not in (None, False, (), dataclasses.MISSING):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f"  [default: {shown}]"
    # no default here, so that those of a preset can be told from what was given
    return click.option(name, field, default=None, help=text, **settings)


@main.command("evaluate")
@_option("--data", "Folder or CSV file of images.", required=True)
@_option("--out", "Folder of the run. The same command goes on with it.", required=True)
@_option(
    "--methods",
    "Names separated by commas, such as resnet_lrp_ratio+quantize8,grad_cam. See"
    " --list for all of them.",
    type=_List(),
)
@_option("--metrics", f"Among {', '.join(NAMES)}.", type=_List())
@_option(
    "--preset",
    "Methods and protocol of a paper's table or figure; may be repeated. What is given"
    " besides replaces that, except that --methods +NAME adds methods.",
    type=click.Choice([*PRESETS]),
    multiple=True,
)
@_option("--model", "Model of torchvision  [default: embedded ResNet-50]")
@_option("--weights", "Name of weights in torchvision, or a file.")
@_option("--size", "Side of the images, for weights from a file.", type=int)
@_option("--layout", "Layout of the data, if it is not recognized.")
@_option("--split", "Split of the data.")
@_option("--labels", "Use labels of the data, or none.")
@_option("--limit", "Largest number of images, chosen at random.", type=int)
@_option("--seed", "Seed of this choice.", type=int)
@_option("--explain", "Class that is explained.")
@_option("--score", "Class whose probability is measured.")
@_option("--published", "The same for published protocols of insertion and deletion.")
@_option("--initial", "What relevance starts from.")
@_option("--step", "Pixels between two points of curves.", type=int)
@_option("--percents", "Percentages of the most relevant pixels.", type=_Percents())
@_option("--rank-by", "What is most relevant, for accuracy, pointing and distance.")
@_option("--fill", "What replaces deleted pixels.")
@_option(
    "--cross",
    "Another network for the metric cross, such as vgg16=DEFAULT; may be repeated.",
    multiple=True,
    metavar="NAME=WEIGHTS",
)
@_option("--batch-size", "Images that are explained together.", type=int)
@_option("--forward-batch", "Images in a forward pass of metrics.", type=int)
@_option("--workers", "Processes that read images.", type=int)
@_option("--device", "Device, such as cuda or cpu.")
@_option("--amp", "Half precision for the forward passes of metrics.")
@_option("--pictures", "Images of which pictures are kept for the report.", type=int)
@_option("--channels-last/--channels-first", "Memory format of images.")
@_option("--compile", "Compile the network for the passes of metrics.", is_flag=True)
@_option("--controls/--no-controls", "Add random, constant, gaussian and sobel maps.")
@click.option(
    "--dry-run", is_flag=True, help="Say what is left, and how long it takes."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, value: _list_methods(context, value),
    help="List names of methods, and exit.",
)
def evaluate_command(dry_run: bool, quiet: bool, **given: Any) -> None:
    """Evaluate methods on images, and keep a record of each image and method.

    Started again, the same command goes on where it was interrupted. To use several
    devices, start it by torchrun: torchrun --nproc-per-node N -m captum_adapters
    evaluate ...
    """
    try:
        evaluation = make_evaluation(given)
        process = Process.current()
        progress = evaluate(
            evaluation, process=process, quiet=quiet, dry_run=dry_run
        )
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
    "--format",
    "style",
    type=click.Choice(["terminal", "markdown", "csv", "latex"]),
    default="terminal",
    show_default=True,
    help="What is printed.",
)
@click.option(
    "--preset",
    "names",
    type=click.Choice([*PRESETS]),
    multiple=True,
    help="Methods of a paper's table and its printed figures; may be repeated  [default:"
    " all methods, and the presets of the runs]",
)
@click.option("--methods", type=_List(), help="Methods to report, besides controls.")
@click.option("--baseline", help="Method to compare with  [default: the best baseline]")
@click.option("--primary", default="id", show_default=True, help="Score to compare by.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Level of confidence intervals.",
)
@click.option(
    "--clusters",
    type=click.Choice(["none", "class"]),
    default="none",
    show_default=True,
    help="Draw single images, or whole classes, in the bootstrap.",
)
def report_command(
    runs: tuple[Path, ...],
    out: Optional[Path],
    style: str,
    names: tuple[str, ...],
    methods: Optional[tuple[str, ...]],
    **options: Any,
) -> None:
    """Summarize runs: tables, significance, curves, examples and warnings.

    With --out, also writes a page that opens without a network, tables as CSV, Markdown
    and LaTeX, and figures.
    """
    try:
        presets = [find_preset(name) for name in names] or None
        results = [read_run(run) for run in runs]
        chosen = {name for preset in presets or () for name in preset.rows}
        chosen.update(methods or ())
        evaluated = {method: None for run in results for _, method in run.records}
        for name in methods or ():
            if not any(stands_for(method, name) for method in evaluated):
                known = ", ".join(evaluated) or "no method"
                raise ValueError(f"there are no records of {name!r}, but of {known}")
        if chosen:
            selected = [select_methods(run, chosen) for run in results]
            # runs of other methods have nothing to say
            results = [run for run in selected if run.records] or selected
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


def select_methods(run: Run, chosen: Collection[str]) -> Run:
    """A run with the records of some methods only.

    Args:

        run (Run): The run.
        chosen (collection of str): Names of methods. Those of others are meant with any
                options. Controls are always kept.

    Returns:
        Run: The run without the others.
    """
    listed = [*(run.settings.get("methods") or ())]
    kept = {
        text
        for text in {*listed, *(method for _, method in run.records)}
        if text in CONTROLS or any(stands_for(text, name) for name in chosen)
    }
    records = {key: record for key, record in run.records.items() if key[1] in kept}
    # such that others are not missed
    methods = [text for text in listed if text in kept]
    return run._replace(records=records, settings={**run.settings, "methods": methods})


def make_evaluation(given: dict[str, Any]) -> Evaluation:
    """Combine what is given with a preset.

    Args:

        given (dict): Fields of :class:`Evaluation`, `None` if not given.

    Returns:
        Evaluation: The evaluation.

    Raises:
        ValueError: If a preset is unknown, or two can not be run together.
    """
    given = {name: value for name, value in given.items() if value not in (None, ())}
    fields: dict[str, Any] = {}
    for name in given.get("preset", ()):
        preset = find_preset(name)
        # which is nothing without a file
        rows = [method for method in preset.rows if method != "abn"]
        names = {
            key: tuple(dict.fromkeys([*fields.pop(key, ()), *values]))
            for key, values in (("methods", rows), ("metrics", preset.metrics))
        }
        if fields and fields != preset.options:
            raise ValueError(
                f"the presets {given['preset'][0]} and {name} differ in their protocol:"
                " run them one by one"
            )
        fields = {**names, **preset.options}
    if given.get("methods", ("",))[0].startswith("+"):
        if not fields:
            raise ValueError(
                f"{given['methods'][0]} is for what a preset has besides: name a --preset"
            )
        fields["methods"] += tuple(name.lstrip("+") for name in given.pop("methods"))
    return Evaluation(**{**fields, **given})


def duration(seconds: float) -> str:
    """A time for people, such as `2 h 5 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(0, round(seconds))} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _list_methods(context: click.Context, value: bool) -> None:
    """Print names of methods."""
    if not value or context.resilient_parsing:
        return
    for name in method_names():
        click.echo(name)
    context.exit()


__all__ = ["duration", "main", "make_evaluation"]

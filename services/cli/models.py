"""`fusion models`: models on this machine; `fusion upcycle`: a dense one as a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import err, print_line, user_errors
from services.recipes.recipe import RecipeError

app = typer.Typer(help="Models on this machine.", no_args_is_help=True)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names of the catalogue, hf://ORG/NAME@REVISION or s3://BUCKET/FOLDER; default all known."),
    ] = None,
) -> None:
    """Make local Hugging Face folders of models: of the catalogue, of a hub, or of an object store."""
    from services.base.progress_bars import model_progress
    from services.models.catalogue import MODELS
    from services.models.fetch import fetch as fetch_model
    from services.models.reference import is_reference

    with user_errors():
        for name in names or list(MODELS):
            if name not in MODELS and not is_reference(name):
                raise RecipeError(f"{name}: not a known model; known are {', '.join(MODELS)}, and URLs (hf://, s3://)")
            with model_progress(err, name) as progress:
                folder = fetch_model(name, progress)
            print_line(f"{name}: {folder}")


def upcycle(
    model: Annotated[str, typer.Argument(help="Dense model: name of a fetched one, URL, or Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="New folder for the mixture of experts.")],
    shards: Annotated[int, typer.Option(min=2, help="Parts that a feed-forward block is cut into.")] = 8,
    shared: Annotated[int, typer.Option(min=1, help="Parts of them that every token uses.")] = 2,
    copies: Annotated[int, typer.Option(min=1, help="Experts for each of the other parts.")] = 4,
    init: Annotated[
        Literal["residual", "split"],
        typer.Option(
            help="residual: the whole block stays, experts start with zero output; split: they are its parts."
        ),
    ] = "residual",
    dense_layers: Annotated[int, typer.Option(min=0, help="The first so many layers stay dense.")] = 0,
    router_std: Annotated[float, typer.Option(min=0, help="Standard deviation of the routers' rows.")] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routers' rows.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Compare the folder's logits with the dense model's.")] = False,
    bound: Annotated[float, typer.Option(min=0, help="Largest difference that --check accepts.")] = 1e-3,
) -> None:
    """Make a DeepSeekMoE model that starts with the function of a dense one (Llama, Mistral or Qwen2)."""
    with user_errors():
        from fusion_core.moe.upcycle import Upcycling
        from services.commands.upcycle import upcycle_folder

        upcycling = Upcycling(shards, shared, copies, init, dense_layers, router_std)
        difference = upcycle_folder(model, out, upcycling, seed=seed, bound=bound if check else None)
        print_line(f"{out}: {upcycling.num_experts} experts a layer, {upcycling.num_active} active")
        if difference is not None:
            print_line(f"largest difference of a logit from the dense model: {difference:.3g}, allowed {bound:g}")


@app.command()
def convert(
    layout: Annotated[Literal["internlm2"], typer.Argument(help="Layout of the checkpoint.")],
    folder: Annotated[str, typer.Argument(help="Folder of the checkpoint, or a model that was fetched.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits and ids with the original's; needs 4 bytes a weight.")
    ] = False,
    back: Annotated[bool, typer.Option("--back", help="From a converted folder to the original layout.")] = False,
    original: Annotated[
        Path | None, typer.Option(help="With --back: folder with the original's config.json and tokenizer.model.")
    ] = None,
) -> None:
    """Write an InternLM2 checkpoint as a Llama folder, without running its Python code; or the other way round."""
    from services.base.progress_bars import model_progress
    from services.models.catalogue import resolve_model

    with user_errors():
        if original and not back:
            raise RecipeError("--original: only with --back")
        source = resolve_model(folder)
        from services.models.internlm2.convert import to_internlm2, to_llama

        with model_progress(err, out.name) as progress:
            done = (
                to_internlm2(source, out, original, check=verify, report=progress)
                if back
                else to_llama(source, out, check=verify, report=progress)
            )
        print_line(f"{out}: {done.num_values:,} weights, {'with' if done.has_template else 'no'} chat template")
        if done.verified:
            measured = done.verified
            print_line(f"logits differ from the reference by {measured.difference:.1e}, largest {measured.largest:.3g}")
            print_line("ids are SentencePiece's" if measured.tokenizer else "ids not compared: no sentencepiece here")

"""`python -m services.distill`: a training run under `ray job submit`; see services/commands/distill_job.py."""

import typer

from services.commands.distill_job import main

if __name__ == "__main__":
    typer.run(main)

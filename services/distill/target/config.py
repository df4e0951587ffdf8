"""Configuration of the target model and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator, model_validator

from fusion_core.moe.upcycle import Init, Upcycling
from services.base.settings import Settings
from services.models.chat_template import read_chosen

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class DecoderConfig(Settings):
    """Shape of a Llama-style decoder that starts from random weights. The defaults make about 5M parameters together
    with a vocabulary of 4,096 ids."""

    hidden_size: int = Field(256, ge=8)
    num_layers: int = Field(5, ge=1)
    num_heads: int = Field(4, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1, description="num_heads when not set")
    intermediate_size: int = Field(688, ge=8)
    max_positions: int = Field(2048, ge=16, description="longest window in tokens, BOS included")
    rope_theta: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: must be a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.hidden_size}"
            )
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(f"num_key_value_heads: must divide num_heads = {self.num_heads}")
        return self


class TokenizerTraining(Settings):
    """A byte-level BPE tokenizer trained on the corpus' train split."""

    vocabulary_size: int = Field(
        4096, ge=300, le=1_000_000, description="ids, the 256 bytes and 3 special ones included"
    )


class TokenizerConfig(Settings):
    """The tokenizer of a target from scratch, taken from a folder or trained; a plain string means `folder`."""

    folder: Text | None = Field(None, description="a folder with a fast tokenizer, such as a source's")
    train: TokenizerTraining | None = None

    @model_validator(mode="before")
    @classmethod
    def _folder_as_string(cls, value: Any) -> Any:
        return {"folder": str(value)} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_way_only(self) -> TokenizerConfig:
        if (self.folder is None) == (self.train is None):
            raise ValueError("give either a folder or train: {vocabulary_size: N}")
        return self


class TargetConfig(Settings):
    """The model that learns: a pretrained one (`model`), or one from scratch with a `tokenizer`: a Llama by its shape
    (`config`), or any causal language model of transformers (`architecture`)."""

    model: Text | None = Field(None, description="name of a fetched model, or a Hugging Face folder")
    config: DecoderConfig | None = None
    architecture: dict[str, Any] | None = Field(
        None, description="model_type and any other keys of its config.json; the ids come from the tokenizer"
    )
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = Field(
        None,
        description="how the target reads conversations: model, plain, a file or its text, as a source's; by default "
        "plain for a target from scratch, else model",
    )

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        return read_chosen(value)

    @model_validator(mode="after")
    def _one_way_only(self) -> TargetConfig:
        if [self.model, self.config, self.architecture].count(None) != 2:
            raise ValueError("give exactly one of model (pretrained), config and architecture (from scratch)")
        if self.architecture is not None and not isinstance(self.architecture.get("model_type"), str):
            raise ValueError("architecture.model_type: required, such as llama, qwen3 or gpt2")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: a pretrained model brings its own; leave it out")
        if self.model is None and self.tokenizer is None:
            raise ValueError("tokenizer: required for a target from scratch: a folder or {train: {vocabulary_size: N}}")
        return self


class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2022) on a pretrained target, whose own weights stay as they are."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Text | tuple[Text, ...] = Field(
        "all-linear", description="names of linear layers; all-linear for every one but the lm_head"
    )


class BalanceConfig(Settings):
    """DeepSeekMoE's balance losses (Dai et al. 2024), added up over layers; 0 leaves one out."""

    expert: float = Field(0.01, ge=0, description="weight of the expert-level loss")
    device: float = Field(0.0, ge=0, description="weight of the device-level loss, over `groups`")
    groups: int = Field(1, ge=1, description="groups of neighbouring experts, such as those of one device")
    bias: float = Field(0.0, ge=0, description="step of the routers' biases; only for routers that have them")

    @model_validator(mode="after")
    def _groups_with_device(self) -> BalanceConfig:
        if (self.device > 0) != (self.groups > 1):
            raise ValueError("groups: at least 2 with a device-level loss (device above 0), and only then")
        return self


class MoeConfig(Settings):
    """A dense target as a mixture of experts (DeepSeekMoE, Dai et al. 2024) that starts with the target's function."""

    shards: int = Field(8, ge=2, description="equal parts that a feed-forward block is cut into")
    shared: int = Field(2, ge=1, description="parts that the shared expert holds; with init residual it holds all")
    copies: int = Field(4, ge=1, description="routed experts for each of the other parts, all of which are active once")
    init: Init = Field("residual", description="split keeps the cost of a token, residual survives any routing")
    dense_layers: int = Field(0, ge=0, description="the first so many layers stay dense")
    router_std: float = Field(0.02, ge=0, description="standard deviation of the routers' random rows")
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="losses that keep experts equally busy")

    @model_validator(mode="after")
    def _parts_left(self) -> MoeConfig:
        assert self.upcycling  # names the setting where it cannot be
        return self

    @property
    def upcycling(self) -> Upcycling:
        """The shape of the mixture."""
        return Upcycling(self.shards, self.shared, self.copies, self.init, self.dense_layers, self.router_std)

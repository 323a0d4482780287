"""What does bundle.json hold? Its shape, for whoever reads a bundle that somebody else made."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, model_validator

from quantkit.artifacts import FileRecord
from quantkit.speculation import Plan, Profile

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Role = Literal["target", "draft", "report"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Stage(_Part):
    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    finished: str


class _Pin(_Part):
    base: str | None
    target: _Digest
    draft: _Digest | None
    draft_trained_for: str | None


class _Cache(_Part):
    dtype: str
    scales: str | None
    layers_at_16_bits: list[NonNegativeInt]
    bytes_per_token: dict[_Role, NonNegativeInt]
    bytes_per_sequence: NonNegativeInt


class _Quantization(BaseModel):
    model_config = ConfigDict(extra="allow")
    quant_method: str


class _Decision(_Part):
    tokens: NonNegativeInt
    why: str


class _Speculation(BaseModel):
    decisions: dict[Profile, _Decision]
    plans: dict[Profile, Plan]


class _Architecture(BaseModel):
    model_config = ConfigDict(extra="allow")
    architectures: list[str] | None = None


class Record(BaseModel):
    """bundle.json. What was measured, and the settings, have shapes of their own."""

    format: Literal[1]
    digests: dict[_Role, _Digest]
    inputs: dict[_Role, dict[str, str]]
    stages: dict[_Role, _Stage]
    pin: _Pin
    architecture: _Architecture
    quantization_config: _Quantization | None
    draft_quantization_config: _Quantization | None
    kv_cache: _Cache
    settings: dict[str, Any]
    sources: dict[str, str]
    measured: dict[_Role, dict[str, Any]]
    warnings: list[str]
    left_out: dict[_Role, list[str]]
    versions: dict[str, str]
    engine: Annotated[str, StringConstraints(pattern=r"^vllm \S{1,40}$")]
    speculation: _Speculation
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _names_a_target(self) -> "Record":
        if "target" not in self.digests:
            raise ValueError("no digest of the target")
        return self

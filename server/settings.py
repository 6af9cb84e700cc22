"""Everything an operator can set: declared once, read once, frozen.

Flags win over the environment (`SOSTENUTO_...`), the environment over a TOML file, the file over the defaults. A key
that nobody knows is an error wherever it stands. Nobody else reads the environment.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from engine.config import EngineConfig
from server.api_keys import ApiKeyError, read_api_keys

ENV_PREFIX = "SOSTENUTO_"
CONFIG_ENV = ENV_PREFIX + "CONFIG"
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "models" / "default"
WEIGHT_SUFFIXES = frozenset({".pth", ".safetensors"})
LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain"})

DAY_SECONDS = 86_400.0


class Settings(BaseSettings):
    """The configuration of one server."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, allow_inf_nan=False, validate_default=True
    )

    model: str | None = Field(None, description="weights: .pth, .safetensors, or a directory that holds one")
    served_model_name: Annotated[str | None, Field(min_length=1)] = Field(
        None, description="the model's name in the API; default: the file's or directory's name"
    )
    tokenizer: str = Field("auto", description="auto, bytes, world, or the path of a tokenizer.json")
    template: str = Field(
        "auto", description="chat template by name, or auto: what the model's sostenuto.json says, else world"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field("auto", description="of the weights")
    state_dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the states' matrices; float16 halves a state, at a small loss"
    )
    head_norm_eps: PositiveFloat | None = Field(
        None, description="epsilon of the heads' group norm; default: 1e-5 x head size"
    )
    num_threads: int = Field(
        0, ge=0, description="CPU threads of the engine; 0: one a core, or just one for a small model"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(
        None, description="clients must send it as a bearer token; better set in the environment or a file"
    )
    api_key_file: Path | None = Field(None, description="file that holds the API key")
    api_keys_file: Path | None = Field(
        None, description="TOML file of several API keys, each of a tenant with limits of its own"
    )
    insecure_no_auth: bool = Field(False, description="allow listening beyond loopback without an API key")
    openapi: bool = Field(True, description="describe the API at /openapi.json")

    requests_per_minute: PositiveInt | None = Field(None, description="of one tenant; beyond: 429")
    tokens_per_minute: PositiveInt | None = Field(
        None, description="prompt and output tokens of one tenant; when they are used up: 429"
    )
    max_running: PositiveInt | None = Field(None, description="generations of one tenant at once; beyond: 429")

    max_num_seqs: PositiveInt = Field(64, description="sequences that run at once")
    max_num_batched_tokens: PositiveInt = Field(512, description="tokens consumed by one step, decodes included")
    max_num_queued_reqs: int = Field(1024, ge=0, description="sequences that may wait for a slot; beyond: 503")
    max_logprobs: int = Field(20, ge=0, description="most likely tokens a request may ask for, a position")
    max_output_tokens: PositiveInt = Field(
        8192, description="most tokens one choice may generate; the limit of a chat that names none"
    )
    max_body_bytes: PositiveInt = Field(4 << 20, description="largest request body")
    max_import_bytes: PositiveInt = Field(64 << 20, description="largest conversation that can be imported as a file")
    body_seconds: PositiveFloat = Field(30.0, description="time a client may take to send its body")
    shutdown_timeout: float = Field(30.0, ge=0, description="seconds that running turns get to finish after SIGTERM")

    data_dir: Path = Field(Path("sostenuto-data"), description="directory of the embedded ledger and state files")
    ledger_url: str | None = Field(
        None, description="sqlite:///PATH or redis://HOST:PORT/DB; default: ledger.sqlite in the data directory"
    )
    state_url: str | None = Field(
        None, description="memory:, file:///DIR or redis://HOST:PORT/DB; default: states/ in the data directory"
    )
    lease_seconds: PositiveFloat = Field(15.0, description="how long a dead server keeps its conversations busy")
    conversation_ttl_seconds: PositiveFloat = Field(30 * DAY_SECONDS, description="unused conversations expire")
    checkpoint_ttl_seconds: PositiveFloat = Field(DAY_SECONDS, description="stored states expire; costs time only")
    max_checkpoints: PositiveInt = Field(
        4, description="stored states a conversation keeps: the newest, and thinned out"
    )
    hot_state_bytes: int = Field(1 << 30, ge=0, description="host memory for states between turns")
    prefix_states: bool = Field(True, description="begin prompts at states that equal beginnings left")
    prefix_min_tokens: PositiveInt = Field(16, description="shortest beginning of a prompt whose state is kept")
    prefix_store_min_tokens: PositiveInt = Field(
        256, description="shortest beginning of a prompt whose state is shared through the state store"
    )

    initial_states: Path | None = Field(
        None, description="directory of tuned states that conversations may begin from: NAME.safetensors or NAME.pth"
    )

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(lambda value: str(value).lower())
    ] = Field("info", description="debug, info, warning or error")

    # -- where values come from ----------------------------------------------------------------------------------------

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `Settings(...)` reads nothing, `load` reads everything."""
        return (init_settings,)

    @classmethod
    def load(cls, flags: dict[str, Any], config: Path | None = None) -> Self:
        """Return the settings of flags over environment over `config` over defaults.

        Raises `SettingsError` with one line for every key that is unknown or does not fit.
        """
        try:
            return cls._from_sources(flags, config or _config_from_environment())
        except ValueError as error:  # pydantic's ValidationError, and what TOML and file sources raise
            raise SettingsError.explaining(error) from error
        except OSError as error:
            raise SettingsError([f"{error.filename}: {error.strerror}"]) from error

    @classmethod
    def _from_sources(cls, flags: dict[str, Any], config: Path | None) -> Self:
        unknown = _unknown_environment(set(cls.model_fields))
        if unknown:
            raise SettingsError([f"{name}: there is no such setting" for name in unknown])
        file: dict[str, Any] = {}
        if config is not None:
            config.stat()  # the source takes an absent file for an empty one
            file = TomlConfigSettingsSource(cls, config)()
        return cls(**(file | EnvSettingsSource(cls)() | flags))

    @model_validator(mode="before")
    @classmethod
    def _read_key_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        path = values.get("api_key_file")
        if path is not None and values.get("api_key") is None:
            values = {**values, "api_key": Path(path).read_text(encoding="utf-8").strip()}
        return values

    # -- what must hold ------------------------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.api_key is not None and not self.api_key.get_secret_value().strip():
            raise ValueError("api_key: must not be empty")
        if self.api_keys_file is not None:
            _check_api_keys(self.api_keys_file)
        has_key = self.api_key is not None or self.api_keys_file is not None
        if not has_key and not self.insecure_no_auth and not is_loopback(self.host):
            raise ValueError(
                "host: without an API key the server listens on loopback only; "
                "set api_key or api_keys_file, or insecure_no_auth to serve everybody who can reach this address"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens: must be at least max_num_seqs: every running sequence takes one in every step"
            )
        _check_scheme("ledger_url", self.resolved_ledger_url, ("sqlite", "redis", "rediss", "unix"))
        _check_scheme("state_url", self.resolved_state_url, ("memory", "file", "redis", "rediss", "unix"))
        return self

    # -- what follows from them ----------------------------------------------------------------------------------------

    @property
    def model_path(self) -> Path:
        """The weights to serve: the given ones, else the bundled default model."""
        return DEFAULT_MODEL if self.model is None else Path(self.model)

    @property
    def has_model(self) -> bool:
        """Whether there is something at `model_path`; a directory without weights is nothing."""
        path = self.model_path
        return path.is_file() or (path.is_dir() and any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir()))

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return "sostenuto-default"
        path = self.model_path
        return path.stem if path.suffix in WEIGHT_SUFFIXES else path.resolve().name

    @property
    def resolved_ledger_url(self) -> str:
        """The ledger's URL, spelled out."""
        return self.ledger_url or f"sqlite:///{self.data_dir.resolve() / 'ledger.sqlite'}"

    @property
    def resolved_state_url(self) -> str:
        """The state store's URL, spelled out."""
        return self.state_url or f"file://{self.data_dir.resolve() / 'states'}"

    @property
    def engine_config(self) -> EngineConfig:
        """What the engine is told."""
        return EngineConfig(
            model_path=str(self.model_path),
            tokenizer=self.tokenizer,
            device=self.device,
            dtype=self.dtype,
            state_dtype=self.state_dtype,
            head_norm_eps=self.head_norm_eps,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_queued_reqs=self.max_num_queued_reqs,
            max_logprobs=self.max_logprobs,
            num_threads=self.num_threads,
            state_url=self.resolved_state_url,
            checkpoint_ttl_seconds=self.checkpoint_ttl_seconds,
            hot_state_bytes=self.hot_state_bytes,
            prefix_min_tokens=self.prefix_min_tokens,
            prefix_store_min_tokens=self.prefix_store_min_tokens,
            initial_states=None if self.initial_states is None else str(self.initial_states),
        )

    def printable(self) -> dict[str, str | int | float | bool | None]:
        """Return the effective configuration with its secrets masked."""
        values = self.model_dump(mode="json")
        values["model"] = str(self.model_path)
        values["served_model_name"] = self.model_name
        values["ledger_url"] = mask_password(self.resolved_ledger_url)
        values["state_url"] = mask_password(self.resolved_state_url)
        return values


class SettingsError(ValueError):
    """The configuration cannot be used. `problems` names every one of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(["cannot use this configuration:", *(f"  - {problem}" for problem in problems)]))

    @classmethod
    def explaining(cls, error: ValueError) -> SettingsError:
        """Return `error` as problems that name keys and never repeat values: one of them may be a secret."""
        from pydantic import ValidationError

        if isinstance(error, SettingsError):
            return error
        if not isinstance(error, ValidationError):
            return cls([str(error)])
        return cls([_problem(dict(part)) for part in error.errors(include_input=False, include_url=False)])


def _problem(part: dict[str, Any]) -> str:
    if part["type"] == "value_error":  # ours, and it names its key
        return str(part["ctx"]["error"])
    name = ".".join(str(step) for step in part["loc"])
    return f"{name}: " + ("there is no such setting" if part["type"] == "extra_forbidden" else part["msg"])


def api_key_in_environment() -> str | None:
    """Return the API key that a client of a server finds in the environment, under the server's own name for it."""
    return os.environ.get(ENV_PREFIX + "API_KEY") or None


def _config_from_environment() -> Path | None:
    path = os.environ.get(CONFIG_ENV)
    return Path(path) if path else None


def _unknown_environment(known: set[str]) -> list[str]:
    names = sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() != CONFIG_ENV)
    return [name for name in names if name[len(ENV_PREFIX) :].lower() not in known]


def _check_api_keys(path: Path) -> None:
    try:
        read_api_keys(path)
    except ApiKeyError as error:
        raise ValueError(f"api_keys_file: {error}") from error


def _check_scheme(name: str, url: str, schemes: tuple[str, ...]) -> None:
    if urlsplit(url).scheme not in schemes:
        raise ValueError(f"{name}: must begin with one of {', '.join(f'{scheme}:' for scheme in schemes)}")


def is_loopback(host: str) -> bool:
    """Say whether nobody outside this machine can reach a server that listens on `host`."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def mask_password(url: str) -> str:
    """Return `url` without what it proves its bearer's identity with."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    netloc = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:**********@{netloc}").geturl()

"""The server's settings: flags over environment (``RMD_*``) over a YAML file over defaults."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.core.costs import CostTable
from server.core.policies import make_policy
from server.core.stages import ALL, Stages, check_covered, parse_stages
from server.front.auth import KeyRing
from server.front.quotas import parse_rates
from server.logs import LogFormat
from server.objects.place import read_place

CONFIG_VARIABLE = "RMD_CONFIG"
# Of the command line, the load test and compose.
_OTHERS = ("RMD_TRACEBACK", "RMD_API_KEY", "RMD_BIND", "RMD_COMMIT", "RMD_EXTRAS", "RMD_GPU", "RMD_MODELS", "RMD_TAG")


class ServerSettings(BaseSettings):
    """Everything that can be set about one server.

    Precedence: values given to the constructor (the command line's flags), then ``RMD_*`` variables, then the
    YAML file named by ``RMD_CONFIG`` (or ``--config``), then the defaults below.
    """

    # A wrong input may be an API key, or sit in a file beside one.
    model_config = SettingsConfigDict(env_prefix="RMD_", extra="forbid", frozen=True, hide_input_in_errors=True)

    checkpoint: Annotated[tuple[Path, ...], NoDecode] = Field(
        (Path("models/embedded"), Path("models/embedded-video")),
        min_length=1,
        description="checkpoint folders, served side by side",
    )
    model_name: str | None = Field(
        None, description="the id on the wire of a server's one model; default: the folder's name"
    )
    engines: Path = Field(Path("engines-cache"), description="the folder of built engines")
    backend: str = Field("auto", description="engine backend, or 'eager' for none")
    device: str = Field("cpu", description="torch device of the one engine; devices says several")
    devices: Annotated[tuple[str, ...], NoDecode] = Field((), description="one engine each, such as cuda:0,cuda:1")
    stages: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="of each of devices, such as low,high+decode; low is every size but the last; default: all"
    )
    policy: str = Field("stagewise", description="scheduler: stagewise, fifo, dynamic:8:0.02, continuous:8")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto", description="of the networks; auto: the device's own"
    )
    threads: int | None = Field(None, ge=1, description="torch threads of an engine; default: torch's own")
    decoder: str | None = Field(
        None, description="a small decoder's folder, or 'full'; default: what the checkpoint names"
    )
    build_missing: bool = Field(True, description="build missing engines beside serving, at low priority")
    serve_teacher: bool = Field(True, description="offer schedule 'teacher' where its folder is found")
    measure_teacher: bool = Field(True, description="time the teacher's guided step at start and in idle moments")

    host: str = "127.0.0.1"
    allow_open: bool = Field(False, description="listen beyond this machine though there are no api_keys")
    port: int = Field(8000, ge=0, le=65535)
    public_url: str | None = Field(None, description="base of the URLs of response_format=url, behind a proxy")
    root_path: str = Field(
        "", pattern=r"^(/[\w.~-]+)*$", description="prefix of all paths behind a proxy, such as /rmd"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names this server goes by, beside IP addresses and localhost; *.example.org, * for any"
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="other sites whose pages may use it, such as https://example.org; * for any"
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="accepted keys, each KEY or NAME=KEY; none: open"
    )
    key_rate: str | None = Field(None, description="requests for work that one key may send, such as 60/minute")
    key_requests: int | None = Field(None, ge=1, description="requests for work that one key may have under way")
    model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="further names of models: NAME, of what a route takes first, or NAME=MODEL"
    )
    nearest_size: bool = Field(False, description="draw the nearest size where another is asked for; replies say which")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field("text", description="json: an object a line")
    tracing: bool = Field(False, description="send OpenTelemetry traces, as OTEL_* variables say")

    max_body_bytes: int = Field(112 * 1024, ge=1024)  # two of the longest prompts, all emoji, escaped (\ud83d\ude00)
    max_prompt_characters: int = Field(4000, ge=1)
    max_images: int = Field(10, ge=1, le=10)
    queue_items: int = Field(64, ge=1, description="pictures admitted at once, waiting or running")
    queue_megapixels: float = Field(256.0, gt=0, description="their pixels at full size, in millions")
    key_share: float = Field(0.75, gt=0, le=1, description="of each queue, that one of several API keys may hold")
    deadline_seconds: float = Field(120.0, gt=0, description="from admission to reply, checked at every step")
    videos: Path = Field(Path("videos"), description="the folder of the jobs' database, and of objects")
    objects: str | None = Field(
        None, description="where films and linked pictures lie: a folder, s3://, gs:// or az://; default: videos"
    )
    presigned_seconds: float = Field(
        0.0, ge=0, description="send clients to the bucket by links that are good for so long; 0: bytes come from here"
    )
    video_database: SecretStr | None = Field(
        None, description="SQLAlchemy URL of the jobs' database, such as postgresql+psycopg://; default: SQLite"
    )
    video_queue: int = Field(64, ge=1, description="films that may wait or be made at once; they outlast restarts")
    videos_together: int = Field(8, ge=1, description="films given to the scheduler at once, to share batches")
    video_deadline_seconds: float = Field(3600.0, gt=0, description="of work on a film; waiting is not counted")
    video_seconds: float = Field(86400.0, gt=0, description="life of a finished film")
    video_gigabytes: float = Field(10.0, gt=0, description="of all finished films; the oldest leave first")
    drain_seconds: float = Field(60.0, ge=0, description="longest wait for accepted requests at SIGTERM")
    buckets: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, NoDecode] = Field(
        None, description="batch sizes of the engines"
    )
    max_batch: int = Field(8, ge=1, description="widest batch tried at warm-up where no engine fixes it")
    tracks: int = Field(2, ge=1, le=2, description="batches at a time on a CPU's engines while queues are long")
    prompt_megabytes: float = Field(64.0, ge=0, description="memory for encoded prompts, which are kept")
    watchdog_seconds: float = Field(10.0, gt=0, description="least time after which a silent engine is ended")
    watchdog_factor: float = Field(20.0, gt=1, description="a batch may take this many times what it should")
    package_threads: int = Field(2, ge=1, description="threads that compress pictures")
    idempotency_seconds: float = Field(600.0, gt=0)
    idempotency_replies: int = Field(128, ge=1)
    idempotency_megabytes: float = Field(64.0, gt=0, description="memory kept for those replies' pictures")
    files_seconds: float = Field(3600.0, gt=0, description="life of a response_format=url picture")
    files_megabytes: float = Field(1000.0, gt=0, description="of all those pictures; the oldest leave first")

    @field_validator("allowed_hosts", "allowed_origins", "model_aliases", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """An empty variable means none."""
        return () if value is None else split_commas(value)

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """As browsers write them: lower case, no slash at the end."""
        return tuple(origin.rstrip("/").lower() for origin in value)

    @field_validator("key_rate")
    @classmethod
    def _known_rate(cls, value: str | None) -> str | None:
        if value:
            parse_rates(value)
        return value or None

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        """An empty variable means none."""
        return () if value is None else split_commas(value)

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """An empty key would let in every caller who sends 'Bearer ' and nothing after it."""
        if not all(key.get_secret_value().strip() for key in value):
            raise ValueError("an API key is empty; leave it out")
        return value

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _split_checkpoints(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Path) else split_commas(value)

    @field_validator("devices", "stages", mode="before")
    @classmethod
    def _split_devices(cls, value: Any) -> Any:
        """An empty variable means the one device."""
        return () if value is None else split_commas(value)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        make_policy(value, CostTable({}))
        return value

    @field_validator("buckets", mode="before")
    @classmethod
    def _split_buckets(cls, value: Any) -> Any:
        """An empty variable means the backend's own."""
        return split_commas(value) or None if isinstance(value, str) else value

    @field_validator("objects")
    @classmethod
    def _known_place(cls, value: str | None) -> str | None:
        if value:
            read_place(value)
        return value or None

    @model_validator(mode="after")
    def _links_lead_to_a_bucket(self) -> ServerSettings:
        if self.presigned_seconds and "://" not in (self.objects or ""):
            raise ValueError("presigned_seconds: a folder has no links of its own; give a bucket as objects")
        return self

    @model_validator(mode="after")
    def _queue_holds_one_request(self) -> ServerSettings:
        if self.queue_items < self.max_images:
            raise ValueError(
                f"queue_items ({self.queue_items}) must hold at least one full request: max_images is {self.max_images}"
            )
        return self

    @model_validator(mode="after")
    def _every_stage_has_an_engine(self) -> ServerSettings:
        if self.stages and len(self.stages) != len(self.engine_devices):
            raise ValueError(
                f"stages has {len(self.stages)} entries, and there are {len(self.engine_devices)} engines: "
                "say one for each of devices, such as devices=cuda:0,cuda:1 and stages=low,high+decode"
            )
        try:
            check_covered(self.engine_stages)
        except ValueError as error:
            raise ValueError(f"stages: {error}") from None
        return self

    @model_validator(mode="after")
    def _models_differ(self) -> ServerSettings:
        if self.model_name is not None and len(self.checkpoint) > 1:
            raise ValueError("model_name names one model, and there are several checkpoints: leave it out")
        names = [name for _, name in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two checkpoints would both be the model '{twice[0]}', after their folders; rename one of the folders"
            )
        return self

    @model_validator(mode="after")
    def _aliases_are_free(self) -> ServerSettings:
        names = [name for _, name in self.models]
        for alias, model in self.aliases.items():
            if alias in names:
                raise ValueError(f"model_aliases: '{alias}' is a model's own name")
            if model is not None and model not in names:
                raise ValueError(f"model_aliases: '{alias}' is to mean '{model}', and there are {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _open_on_purpose(self) -> ServerSettings:
        if not (self.api_keys or self.allow_open or _is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} is reached from other machines and there are no api_keys: set some, "
                "or allow_open (RMD_ALLOW_OPEN=true, --allow-open) to serve whoever comes"
            )
        return self

    @property
    def aliases(self) -> dict[str, str | None]:
        """Further names of models, and whose each is; None: of whatever a route takes first."""
        pairs = (entry.partition("=") for entry in self.model_aliases)
        return {alias: model or None for alias, _, model in pairs}

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """Names that requests may call this server by. A page that points its own name here has none of the keys."""
        if self.allowed_hosts or not self.api_keys:
            own = urlsplit(self.public_url or "").hostname
            return tuple(name for name in (*self.allowed_hosts, self.host, own) if name)
        return ("*",)

    @property
    def known_origins(self) -> tuple[str, ...]:
        """Of the pages that may use the API, beside those that have the request's own host."""
        own = urlsplit(self.public_url or "")
        return (*self.allowed_origins, *([f"{own.scheme}://{own.netloc}".lower()] if own.netloc else []))

    @property
    def share(self) -> float:
        """Of the queues, that one account may hold: of all, where there is no other."""
        return self.key_share if len(KeyRing(self.api_keys).names) > 1 else 1.0

    @property
    def engine_devices(self) -> tuple[str, ...]:
        """The device of each engine."""
        return self.devices or (self.device,)

    @property
    def engine_stages(self) -> tuple[Stages, ...]:
        """The stages of each engine."""
        return tuple(map(parse_stages, self.stages)) or (ALL,) * len(self.engine_devices)

    @property
    def video_database_url(self) -> str:
        """The SQLAlchemy URL of the database of video jobs."""
        if self.video_database is not None:
            return self.video_database.get_secret_value()
        return f"sqlite:///{self.videos.resolve() / 'jobs.sqlite3'}"

    @property
    def models(self) -> tuple[tuple[Path, str], ...]:
        """Each checkpoint's folder, and its id on the wire."""
        return tuple((folder, self.model_name or folder.resolve().name) for folder in self.checkpoint)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; the YAML file joins only where one is named."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        named = os.environ.get(CONFIG_VARIABLE)
        if named:
            if not Path(named).is_file():
                raise FileNotFoundError(f"settings file {named} (from {CONFIG_VARIABLE} or --config) does not exist")
            sources += (InitSettingsSource(settings_cls, _read_yaml(Path(named))),)
        return sources

    def describe(self) -> str:
        """Return the settings as YAML with every secret hidden."""
        plain = self.model_dump(mode="json")
        names = ", ".join(KeyRing(self.api_keys).names)
        plain["api_keys"] = f"{len(self.api_keys)} key(s), hidden: {names}" if names else "none: the API is open"
        return yaml.safe_dump(plain, sort_keys=False).rstrip()


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of ``RMD_*`` variables that look like settings and are none: they change nothing."""
    known = {f"RMD_{name.upper()}" for name in ServerSettings.model_fields} | {CONFIG_VARIABLE, *_OTHERS}
    return sorted(
        name for name in environment
        if name.startswith("RMD_") and not name.startswith("RMD_DISTILL_") and name not in known
    )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_commas(value: Any) -> Any:
    """Accept a comma-separated string, which is how an environment variable says a list."""
    if isinstance(value, str):
        return tuple(entry for entry in (part.strip() for part in value.split(",")) if entry)
    return value


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return a settings file's values; an empty file has none.

    Raises:
        ValueError: it is not YAML, or not a mapping; the message names the file.
    """
    try:
        values = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        # Only the place: the parser's own message quotes the file, and the file may hold API keys.
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"settings file {file} is not valid YAML{place}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"settings file {file} must hold a mapping such as 'port: 8000', not a {type(values).__name__}"
        )
    return values

"""`rmd serve`'s settings, and those that only a cluster has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from server.core.stages import Stages, check_covered, parse_stages
from server.start.settings import ServerSettings, split_commas


class ClusterSettings(ServerSettings):
    """See the module. The same sources: arguments of the application over ``RMD_*`` over the file ``RMD_CONFIG``.

    They are read once, where the application is built, and go to all replicas as they are.
    """

    host: str = Field("0.0.0.0", description="where Ray's proxies listen is Ray's to say: taken for anywhere")
    build_missing: bool = Field(False, description="engines are built ahead, by rmd build")
    fronts: int = Field(1, ge=1, description="replicas that speak HTTP; each has a queue of its own")
    min_engines: int = Field(1, ge=1, description="replicas that hold a device")
    max_engines: int = Field(1, ge=1, description="more than min_engines: scaled by admitted work")
    pools: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="replicas by stages instead of whole ones, such as low:1,high:2,decode:1"
    )
    engine_cpus: float = Field(1.0, gt=0, description="of each engine, as Ray counts them")
    engine_seconds: float = Field(10.0, gt=0, description="admitted work that one engine is to have at most")

    @field_validator("pools", mode="before")
    @classmethod
    def _split_pools(cls, value: Any) -> Any:
        """An empty variable means none."""
        return () if value is None else split_commas(value)

    @field_validator("stages")
    @classmethod
    def _stages_are_pools(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            raise ValueError("each engine is a replica here; leave it out, and say pools=low:1,high+decode:1")
        return value

    @model_validator(mode="after")
    def _pools_have_every_stage(self) -> ClusterSettings:
        if not self.pools:
            return self
        if (self.min_engines, self.max_engines) != (1, 1):
            raise ValueError("pools says how many engines there are of each kind: leave min_engines, max_engines out")
        try:
            check_covered(self.engine_pools)
        except ValueError as error:
            raise ValueError(f"pools: {error}") from None
        return self

    @property
    def engine_pools(self) -> dict[Stages, int]:
        """How many replicas do which stages.

        Raises:
            ValueError: an entry is none.
        """
        counts: dict[Stages, int] = {}
        for entry in self.pools:
            stages, _, count = entry.partition(":")
            if not count.strip().isdecimal() or int(count) < 1:
                raise ValueError(f"'{entry}' does not say how many engines: write such as low:1,high:2,decode:1")
            if parse_stages(stages) in counts:
                raise ValueError(f"'{entry}': its stages are named twice; say the number of both")
            counts[parse_stages(stages)] = int(count)
        return counts

    @model_validator(mode="after")
    def _engines_are_rays(self) -> ClusterSettings:
        if self.devices:
            raise ValueError(
                "devices: each engine is a replica with one device here; leave it out, and say min_engines"
            )
        if self.build_missing:
            raise ValueError("build_missing: a front has no device to build for; run rmd build ahead")
        if self.max_engines < self.min_engines:
            raise ValueError(f"max_engines ({self.max_engines}) is less than min_engines ({self.min_engines})")
        return self

    @model_validator(mode="after")
    def _fronts_share_their_stores(self) -> ClusterSettings:
        """Fronts are pods, or on several nodes: what one keeps in a folder of its own, the others answer 404 for."""
        if self.fronts > 1 and (self.objects is None or self.video_database_url.startswith("sqlite")):
            raise ValueError(
                f"fronts: {self.fronts} share films, linked pictures and idempotent replies; "
                "set video_database (not SQLite) and objects to what all of them reach"
            )
        return self

    def of_replicas(self) -> ServerSettings:
        """Return what replicas need of them, with whole paths: they run in folders of Ray's."""
        plain = {name: getattr(self, name) for name in ServerSettings.model_fields}
        folders = {"engines": self.engines.resolve(), "videos": self.videos.resolve()}
        checkpoints = tuple(folder.resolve() for folder in self.checkpoint)
        return ServerSettings.model_construct(**{**plain, **folders, "checkpoint": checkpoints})

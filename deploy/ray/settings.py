"""`rmd serve`'s settings, and those that only a cluster has."""

from __future__ import annotations

from pydantic import Field, model_validator

from server.start.settings import ServerSettings


class ClusterSettings(ServerSettings):
    """See the module. The same sources: arguments of the application over ``RMD_*`` over the file ``RMD_CONFIG``.

    They are read once, where the application is built, and go to all replicas as they are.
    """

    host: str = Field("0.0.0.0", description="where Ray's proxies listen is Ray's to say: taken for anywhere")
    build_missing: bool = Field(False, description="engines are built ahead, by rmd build")
    fronts: int = Field(1, ge=1, description="replicas that speak HTTP; each has a queue of its own")
    min_engines: int = Field(1, ge=1, description="replicas that hold a device")
    max_engines: int = Field(1, ge=1, description="more than min_engines: scaled by admitted work")
    engine_cpus: float = Field(1.0, gt=0, description="of each engine, as Ray counts them")
    engine_seconds: float = Field(10.0, gt=0, description="admitted work that one engine is to have at most")

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

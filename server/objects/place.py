"""Where the objects lie: the setting ``objects``, read."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store, from_url

SCHEMES = ("s3", "gs", "az")
_SECRET = ("key", "secret", "token", "password", "credential", "sas")
_SECONDS = "timeout"


def read_place(text: str) -> Path | str:
    """Return the folder or the bucket's URL that a setting names.

    Raises:
        ValueError: it is neither, or holds a secret.
    """
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"'{parts.scheme}://' is no store that is known: give a folder, s3://, gs:// or az://")
    if not parts.hostname:
        raise ValueError(f"{parts.scheme}:// must be followed by a bucket's name")
    names = [name for name, _ in parse_qsl(parts.query)]
    if "@" in parts.netloc or any(part in name.lower() for name in names for part in _SECRET):
        raise ValueError(
            "the URL of a store holds no secrets, since it is shown: credentials come from the environment, "
            "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return text


def open_bucket(url: str) -> S3Store | GCSStore | AzureStore:
    """Open ``s3://BUCKET/PREFIX?OPTION=VALUE``, or one of ``gs://`` and ``az://``.

    Options are obstore's configuration (``endpoint``, ``region``, ``virtual_hosted_style_request`` ...), and
    ``timeout``: seconds that one request may take (20). Credentials come from the environment, as obstore reads it.

    Raises:
        ValueError: an option is none, or the environment lacks what the store needs.
    """
    parts = urlsplit(url)
    config = dict(parse_qsl(parts.query))
    seconds = config.pop(_SECONDS, "20")
    try:
        store = from_url(
            parts._replace(query="").geturl(),
            config=config,  # type: ignore[call-overload]
            client_options={
                "timeout": timedelta(seconds=float(seconds)),
                "connect_timeout": timedelta(seconds=5),
                "allow_http": config.get("endpoint", "").startswith("http://"),
            },
            # Few and soon: who waits for a film's end, or for a picture's link, is told instead.
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
        )
    except (BaseError, ValueError) as error:
        raise ValueError(f"the store {url} cannot be opened: {str(error).partition(chr(10))[0]} (objects)") from None
    assert isinstance(store, S3Store | GCSStore | AzureStore)
    return store

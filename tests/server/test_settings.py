"""Settings: where they come from, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.start.settings import ServerSettings, unknown_variables


def test_settings_come_from_flags_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nhost: 0.0.0.0\nqueue_items: 30\napi_keys: [from-file]\n")
    monkeypatch.setenv("RMD_CONFIG", str(file))
    monkeypatch.setenv("RMD_PORT", "2")
    monkeypatch.setenv("RMD_QUEUE_ITEMS", "31")
    settings = ServerSettings(port=3)
    assert (settings.port, settings.queue_items, settings.host) == (3, 31, "0.0.0.0")
    monkeypatch.setenv("RMD_API_KEYS", "one, two")
    settings = ServerSettings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    shown = settings.describe()
    assert "2 key(s), hidden" in shown and "one" not in shown.split() and "queue_items: 31" in shown
    assert "two" not in repr(settings)


def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="prot"):
        ServerSettings.model_validate({"prot": 1})
    with pytest.raises(ValidationError, match="queue_items"):
        ServerSettings(queue_items=5, max_images=10)
    monkeypatch.setenv("RMD_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        ServerSettings()


def test_a_variable_that_is_no_setting_is_noticed() -> None:
    environment = {"RMD_DEADLINE_SECOND": "5", "RMD_DEADLINE_SECONDS": "5", "RMD_DISTILL_SEED": "1", "RMD_CONFIG": "x"}
    assert unknown_variables({**environment, "PATH": "/bin"}) == ["RMD_DEADLINE_SECOND"]


def test_keys_and_buckets_are_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in ("", " , "):
        monkeypatch.setenv("RMD_API_KEYS", empty)
        monkeypatch.setenv("RMD_BUCKETS", empty)
        assert ServerSettings().api_keys == () and ServerSettings().buckets is None
    monkeypatch.setenv("RMD_BUCKETS", "1, 4")
    assert ServerSettings().buckets == (1, 4)
    monkeypatch.setenv("RMD_BUCKETS", "0")
    with pytest.raises(ValidationError, match="buckets"):
        ServerSettings()
    monkeypatch.delenv("RMD_BUCKETS")
    monkeypatch.delenv("RMD_API_KEYS")
    file = tmp_path / "serve.yaml"
    monkeypatch.setenv("RMD_CONFIG", str(file))
    for keys in ('[""]', '[good, " "]'):
        file.write_text(f"api_keys: {keys}\n")
        with pytest.raises(ValidationError, match="an API key is empty"):
            ServerSettings()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("port: 1\napi_keys: [very-secret\nhost: x\n", "not valid YAML at line 3"),
        ("- port\n- very-secret\n", "must hold a mapping .* not a list"),
        ("very-secret", "must hold a mapping .* not a str"),
    ],
)
def test_a_settings_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    monkeypatch.setenv("RMD_CONFIG", str(file))
    with pytest.raises(ValueError, match=rf"serve\.yaml.*{problem}") as error:
        ServerSettings()
    assert "very-secret" not in str(error.value)
    file.write_text("# nothing set\n")
    assert ServerSettings().port == 8000

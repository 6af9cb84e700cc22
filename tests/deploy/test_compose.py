"""docker-compose.yml, read as data: order, isolation, and flags that the real server accepts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from server import cli
from tests.conftest import ROOT
from tests.deploy.recipes import environment, read_compose, read_stages

COMPOSE = read_compose(MODEL="model.pth", SOSTENUTO_API_KEY="k", GRAFANA_PASSWORD="p")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OVERRIDE = ROOT / "deploy" / "compose.cuda.yml"


def mounts(service: str) -> dict[str, str]:
    """Return what a service mounts, by its path inside."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in SERVICES[service]["volumes"])}


def flag(service: str, name: str) -> str:
    """Return the value of a flag in a service's command."""
    command = SERVICES[service]["command"]
    value: str = command[command.index(name) + 1]
    return value


def test_the_services_are_the_documented_ones() -> None:
    """One server, two stores, and two to watch them."""
    assert set(SERVICES) == {"server", "redis", "redis-state", "prometheus", "grafana"}


def test_images_are_pinned() -> None:
    """Every foreign image has an exact version; ours is built from this checkout."""
    for name, service in SERVICES.items():
        if name == "server":
            assert service["build"]["dockerfile"] == "deploy/Dockerfile"
            assert service["build"]["target"] in read_stages()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), name


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_locked_down(name: str) -> None:
    """No capabilities, no new privileges, a read-only root, bounded logs, and none is root's by our doing."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    assert service.get("user") != "root"
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


def test_services_start_in_order() -> None:
    """Stores, then the server, then Prometheus, then Grafana: each waits until the one before is healthy."""
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert {name: set(needs) for name, needs in waits.items()} == {
        "redis": set(),
        "redis-state": set(),
        "server": {"redis", "redis-state"},
        "prometheus": {"server"},
        "grafana": {"prometheus"},
    }
    assert all(need == {"condition": "service_healthy"} for needs in waits.values() for need in needs.values())
    for name in SERVICES:
        own = name == "server"  # the image's own health check
        assert own == ("healthcheck" not in SERVICES[name])


def test_only_loopback_is_published() -> None:
    """The stores have no port, the others one on loopback, and the stores' network leads nowhere else."""
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published == {
        "redis": [],
        "redis-state": [],
        "server": ["127.0.0.1:8000:8000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "stores" in service["networks"]} == {
        "server",
        "redis",
        "redis-state",
    }


def test_what_is_mounted_exists() -> None:
    """Files come from the repository, read-only; what must live on is in a declared volume."""
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":")
            if source == "./models":
                assert mode == ["ro"]
            elif source.startswith("./"):
                assert (ROOT / source).is_dir(), source
                assert mode == ["ro"], f"{name}: {volume}"
            else:
                assert source in COMPOSE["volumes"]


def test_the_server_accepts_its_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The image's environment and the service's flags are a configuration that the real server takes, and mean the
    stores beside it.
    """
    for name, value in (environment("cpu") | SERVICES["server"]["environment"]).items():
        if name.startswith("SOSTENUTO_"):
            monkeypatch.setenv(name, value)
    assert cli.run([*SERVICES["server"]["command"], "--check-config"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["host"] == "0.0.0.0"
    assert settings["model"] == "/models/model.pth"
    assert settings["ledger_url"] == "redis://redis:6379/0"
    assert settings["state_url"] == "redis://redis-state:6379/0"
    assert settings["data_dir"] in mounts("server")
    assert "k" not in (settings["api_key"] or "")
    assert float(SERVICES["server"]["stop_grace_period"].removesuffix("s")) > settings["shutdown_timeout"]


def test_without_a_key_the_server_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's defaults alone are refused: it would serve everybody who reaches it."""
    for name, value in environment("cpu").items():
        if name.startswith("SOSTENUTO_"):
            monkeypatch.setenv(name, value)
    assert cli.run(["serve", "/models/model.pth", "--check-config"]) == 2


@pytest.mark.parametrize("missing", ["MODEL", "SOSTENUTO_API_KEY", "GRAFANA_PASSWORD"])
def test_what_has_no_safe_default_must_be_given(missing: str) -> None:
    """Without a model, a key or a password compose stops with a word about what is missing."""
    given = {"MODEL": "m", "SOSTENUTO_API_KEY": "k", "GRAFANA_PASSWORD": "p"}
    del given[missing]
    with pytest.raises(AssertionError, match=missing):
        read_compose(**given)


def test_the_stores_keep_what_they_promise() -> None:
    """The ledger's Redis writes a file and never evicts; the states' Redis is bounded, evicts, and writes none."""
    assert (flag("redis", "--appendonly"), flag("redis", "--maxmemory-policy")) == ("yes", "noeviction")
    assert mounts("redis") == {"/data": "ledger"}
    assert (flag("redis-state", "--appendonly"), flag("redis-state", "--maxmemory-policy")) == ("no", "allkeys-lru")
    assert flag("redis-state", "--maxmemory")


def test_prometheus_scrapes_the_server_where_it_listens() -> None:
    """The target is the service's name and the port inside the network."""
    configuration = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]}
    assert jobs["sostenuto"] == [f"server:{environment('cpu')['SOSTENUTO_PORT']}"]
    assert flag_value("prometheus", "--config.file") == f"{next(iter(mounts('prometheus')))}/prometheus.yml"


def test_the_gpu_file_changes_the_server_only() -> None:
    """On top of the rest it picks the CUDA image and asks for a device."""
    services = yaml.safe_load(OVERRIDE.read_text())["services"]
    assert list(services) == ["server"]
    assert services["server"]["build"]["target"] in read_stages()
    (device,) = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def flag_value(service: str, name: str) -> str:
    """Return the value of a `--name=value` flag in a service's command."""
    (value,) = (word.partition("=")[2] for word in SERVICES[service]["command"] if word.startswith(f"{name}="))
    return str(value)

"""The Helm chart rendered by Helm's own engine, offline, and held to the schemas of Kubernetes and of the operators."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator, ValidationError

from cli.build import command as build_command
from server.films.runner import LAST_JOBS_SECONDS
from server.front.service import LAST_BATCH_SECONDS
from server.start.run import LAST_REPLIES_SECONDS
from server.start.settings import ServerSettings, unknown_variables
from server.telemetry.metrics import Metrics, Snapshot

helm = pytest.importorskip("helm_python", reason="needs Helm: pip install -e '.[kubernetes]'")
kubernetes = pytest.importorskip("kubernetes_validate", reason="needs the extra 'kubernetes'")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/rmd"
CUSTOM = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (json.loads(file.read_text()) for file in (Path(__file__).parent / "crds").glob("*.json"))
}
SETS = {file.stem.removesuffix("-values"): file for file in (CHART / "ci").glob("*-values.yaml")}
KUBERNETES = "1.34"

Object = dict[str, Any]


def render(values: dict[str, Any], chart: Path = CHART, **release: Any) -> list[Object]:
    """The objects that these values make, as `helm template rmd` would."""
    with helm.Chart.load(chart) as loaded:
        files = loaded.render(values=values, **{"name": "rmd", "namespace": "pictures", **release})
    texts = [text for name, text in files.items() if not name.endswith("NOTES.txt")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def values_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(SETS[name].read_text())
    return values


def validate(obj: Object) -> None:
    """Refuse what Kubernetes, or the operator that owns it, does not know."""
    if obj["kind"] in CUSTOM:
        Draft202012Validator(CUSTOM[obj["kind"]]).validate(obj)
        for pod in pods([obj]):
            kubernetes.validate({"apiVersion": "v1", "kind": "Pod", **pod}, KUBERNETES, strict=True)
    else:
        kubernetes.validate(obj, KUBERNETES, strict=True)


def pods(objects: list[Object]) -> Iterator[Object]:
    """Every pod's template, wherever it lies."""
    for node in objects:
        if not isinstance(node, dict):
            continue
        if "containers" in node.get("spec", {}):
            yield {"metadata": node.get("metadata", {}), "spec": node["spec"]}
        else:
            for inner in node.values():
                yield from pods(inner if isinstance(inner, list) else [inner])


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


@pytest.fixture(scope="module", params=sorted(SETS))
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    return render(values_of(request.param))


def test_what_is_rendered_is_valid(rendered: list[Object]) -> None:
    kinds = {each["kind"] for each in rendered}
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= kinds or "RayService" in kinds
    for obj in rendered:
        validate(obj)
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered]
    assert len(set(names)) == len(names) and all(len(name) <= 63 for _, name in names)


@pytest.mark.parametrize("name", sorted(SETS))
def test_helm_s_linter_finds_nothing(name: str) -> None:
    report = helm.lint(CHART, values_of(name), strict=True)
    assert not report["errors"] and all(message["severity"] < 2 for message in report["messages"]), report


def test_every_custom_kind_is_rendered_by_some_set() -> None:
    kinds = {each["kind"] for name in SETS for each in render(values_of(name))}
    assert set(CUSTOM) <= kinds


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("cpu", "servers.yaml", "terminationGracePeriodSeconds", "terminationGracePeriod"),
        ("cpu", "servers.yaml", "failureThreshold: {{", "failureThreshold: a{{"),
        ("scaled", "servers.yaml", "pollingInterval", "pollInterval"),
        ("cpu", "_helpers.tpl", "readOnlyRootFilesystem", "readonlyRootFilesystem"),
        ("gpu", "engines.yaml", "backoffLimit", "backofLimit"),
        ("models", "monitoring.yaml", "jobLabel", "joblabel"),
        ("scaled", "routes.yaml", "hostnames", "hosts"),
        ("ray", "ray.yaml", "workerGroupSpecs", "workerGroups"),
        ("ray", "_ray.tpl", "readinessProbe", "readynessProbe"),
    ],
)
def test_a_chart_with_a_typo_fails(name: str, file: str, right: str, wrong: str, tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "rmd")
    template = chart / "templates" / file
    assert right in template.read_text()
    template.write_text(template.read_text().replace(right, wrong))
    with pytest.raises((ValidationError, kubernetes.ValidationError)):
        for obj in render(values_of(name), chart):
            validate(obj)


def test_helm_refuses_a_misspelt_value() -> None:
    with pytest.raises(helm.HelmError, match="queue_item"):
        render({"allowOpen": True, "server": {"settings": {"queue_item": 1}}})


OPEN = {"allowOpen": True}
SHARED = {
    "database": {"secret": "database"},
    "objects": {"secret": "objects"},
    "networkPolicy": {"egress": [{"ports": [{"port": 5432}]}]},
}


RECREATE = {"strategy": {"type": "Recreate"}}
SCRAPED = {"prometheus": {"address": "http://prometheus:9090"}}
INGRESS = {"ingress": {"className": "nginx"}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "apiKeys.secret"),
        ({**OPEN, "server": {"hardware": "tpu"}}, "no hardware 'tpu'; there are cpu"),
        ({**OPEN, "servers": [{"name": "a"}, {"name": "a"}]}, "two are called 'a'"),
        ({**OPEN, "hardware": [{"name": "cpu"}, {"name": "cpu"}]}, "two are called 'cpu'"),
        ({**OPEN, "server": {"replicas": 2}}, "database.secret and objects.secret"),
        ({**OPEN, "servers": [{"name": "a", "ray": {"enabled": True, "fronts": 2}}]}, "database.secret and obj"),
        ({**OPEN, **SHARED, "networkPolicy": {}}, "networkPolicy.egress"),
        ({**OPEN, **SHARED, "server": {"autoscaling": {"enabled": True}}}, "prometheus.address"),
        ({**OPEN, "server": {"host": "a.example.org"}}, "ingress.className or gateway.parentRefs"),
        ({**OPEN, "server": {"gpus": 2, "ray": {"enabled": True}}}, "an engine of Ray's has one GPU"),
        ({**OPEN, "server": {"gpus": 1, "ray": {"enabled": True}}}, "engines.build for hardware 'cpu'"),
        ({**OPEN, **SHARED, "server": {"replicas": 2, "ray": {"enabled": True}}}, "ray.fronts"),
        (
            {
                **OPEN,
                **SHARED,
                **SCRAPED,
                "server": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
            },
            r"autoscaling.minReplicas \(5\) is more than maxReplicas \(2\)",
        ),
        (
            {**OPEN, "server": {"ray": {"enabled": True, "minEngines": 5, "maxEngines": 2}}},
            r"ray.minEngines \(5\) is more than maxEngines \(2\)",
        ),
        ({**OPEN, "server": {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}}, "cannot begin"),
        ({**OPEN, "servers": [{"name": "a", "strategy": {"rollingUpdate": {"maxUnavailable": "0%"}}}]}, "cannot begin"),
        (
            {**OPEN, "servers": [{"name": "a", "strategy": {"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}}]},
            "Recreate has no rollingUpdate",
        ),
        (
            {**OPEN, **INGRESS, "servers": [{"name": "a", "host": "a.org"}, {"name": "b", "host": "a.org"}]},
            "'a' and 'b' have one host, a.org",
        ),
        ({**OPEN, **INGRESS, "server": {"host": "a..example"}}, "host"),
        ({**OPEN, **INGRESS, "server": {"host": "10.0.0.1"}}, "host"),
        ({**OPEN, "hardware": [{"name": "cpu", "gpuProduct": "NVIDIA H200"}]}, "gpuProduct"),
        ({**OPEN, "server": {"resources": {"limits": {"memory": "1.2.3Gi"}}}}, "memory"),
        ({**OPEN, "server": {"settings": {"policy": "lifo"}}}, "policy"),
        ({**OPEN, "server": {"checkpoints": ["/models/a,/models/b"]}}, "checkpoints"),
        ({**OPEN, "server": {"settings": {"objects": "s3://"}}}, "objects"),
        ({**OPEN, "server": {"settings": {"objects": "s3://films"}}}, "networkPolicy.egress.* s3://films"),
    ],
)
def test_values_that_cannot_work_together_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmError, match=said):
        render(values)


def test_names_that_kubernetes_would_refuse_are_refused() -> None:
    """A release may have 53 characters, a Service and a Job 63."""
    name = "a" * 40
    render({**OPEN, "servers": [{"name": "b" * 18}]}, name=name)
    with pytest.raises(helm.HelmError, match=r"its Service would be called .*at most 63"):
        render({**OPEN, "servers": [{"name": "b" * 19}]}, name=name)
    built = {
        "servers": [{"name": "b", "hardware": "h" * 20}],
        "hardware": [{"name": "h" * 20, "engines": {"build": True}}],
    }
    with pytest.raises(helm.HelmError, match=r"the Job of its engines would be called .*at most 63"):
        render({**OPEN, **built}, name=name)


@pytest.mark.parametrize("values", [{"server": RECREATE}, {"servers": [{"name": "a", **RECREATE}]}])
def test_a_roll_out_that_recreates_has_no_other_parameters(values: dict[str, Any]) -> None:
    (deployment,) = of_kind(render({**OPEN, **values}), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    validate(deployment)


def test_one_front_needs_no_shared_stores() -> None:
    objects = render({**OPEN, "server": {"ray": {"enabled": True}}})
    assert of_kind(objects, "RayService")


def test_pods_have_no_rights_and_write_to_their_volumes_alone(rendered: list[Object]) -> None:
    found = list(pods(rendered))
    assert found
    for pod in found:
        spec = pod["spec"]
        asks_kubernetes = [each["name"] for each in spec["containers"]] == ["head"]  # Ray's autoscaler, beside it
        assert asks_kubernetes or spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in containers(pod):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= set(volumes)
            assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    assert "useradd --uid 10001" in (ROOT / "Dockerfile").read_text()


def servers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each Deployment's pod and its server's container."""
    for deployment in of_kind(objects, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (server,) = pod["containers"]
        yield pod, server


def plain_environment(container: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    def read(container: Object) -> ServerSettings:
        environment = plain_environment(container)
        assert unknown_variables({each["name"]: "" for each in container["env"]}) == []
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if any(each["name"] == "RMD_API_KEYS" for each in container["env"]):
            monkeypatch.setenv("RMD_API_KEYS", "of-the-secret")
        settings = ServerSettings()
        for name in environment:
            monkeypatch.delenv(name)
        monkeypatch.delenv("RMD_API_KEYS", raising=False)
        return settings

    return read


def test_the_server_takes_its_environment_and_has_time_to_drain(rendered: list[Object], settings_of: Any) -> None:
    for pod, server in servers(rendered):
        settings = settings_of(server)
        assert (settings.host, settings.port) == ("0.0.0.0", server["ports"][0]["containerPort"])
        pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
        last = settings.drain_seconds + LAST_BATCH_SECONDS + LAST_JOBS_SECONDS + LAST_REPLIES_SECONDS
        assert pod["terminationGracePeriodSeconds"] > pause + last
        mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
        assert {str(settings.engines), str(settings.videos)} <= set(mounts)
        assert settings.build_missing is not mounts[str(settings.engines)].get("readOnly", False)
        gpus = server["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert settings.engine_devices == {0: ("cpu",), 1: ("cuda",), 2: ("cuda:0", "cuda:1")}[gpus]


def test_settings_come_through_whole(settings_of: Any) -> None:
    ((_, scaled),) = servers(render(values_of("scaled")))
    settings = settings_of(scaled)
    assert settings.idempotency_seconds == 1_000_000 and settings.key_rate == "600/minute"
    ((_, gpu),) = servers(render(values_of("gpu")))
    assert settings_of(gpu).buckets == (1, 2, 4, 8, 16) and settings_of(gpu).serve_teacher is False
    ((_, cpu),) = servers(render(values_of("cpu")))
    assert {"rmd-embedded", "rmd-embedded.pictures.svc"} <= set(settings_of(cpu).known_hosts)


def test_probes_ask_paths_that_the_server_has(rendered: list[Object]) -> None:
    from server.http.routes.health import router

    paths = {route.path for route in router.routes}
    for _, server in servers(rendered):
        asked = [server[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        assert {probe["path"] for probe in asked} <= paths and {probe["port"] for probe in asked} == {"http"}
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200


def test_services_and_budgets_select_their_server_s_pods_alone() -> None:
    objects = render(values_of("models"))
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind(objects, "Deployment")
    }
    builders = [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(objects, "Job")]
    for kind in ("Service", "PodDisruptionBudget"):
        for each in of_kind(objects, kind):
            selector = each["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            own = labels[each["metadata"]["name"]]
            others = [*builders, *(other for name, other in labels.items() if name != each["metadata"]["name"])]
            assert wanted.items() <= own.items()
            assert len(others) == 3 and not any(wanted.items() <= other.items() for other in others)


def test_a_job_for_each_product_builds_what_its_servers_load() -> None:
    objects = render(values_of("models"))
    app = typer.Typer()
    app.command()(build_command)
    build = typer.main.get_command(app)
    jobs = of_kind(objects, "Job")
    assert len(jobs) == 2
    for job in jobs:
        pod = job["spec"]["template"]["spec"]
        product = pod["nodeSelector"]["nvidia.com/gpu.product"]
        built = []
        for container in containers({"spec": pod}):
            name, *arguments = container["args"]
            assert name == "build"
            options = build.make_context("build", list(arguments)).params
            assert str(options["engines"]) == "/engines" and options["device"] == "cuda"
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            built.extend(map(str, options["checkpoint"]))
        claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
        (server,) = (
            (pod, server)
            for pod, server in servers(objects)
            if pod["nodeSelector"]["nvidia.com/gpu.product"] == product
        )
        assert built == plain_environment(server[1])["RMD_CHECKPOINT"].split(",")
        assert {"name": "engines", "persistentVolumeClaim": {"claimName": claim}} in server[0]["volumes"]
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    assert claims == {"rmd-engines-l40s"}  # the other one is the operator's own


def test_a_job_is_a_new_one_where_its_engines_are() -> None:
    def job(values: dict[str, Any], **release: Any) -> str:
        (found,) = of_kind(render(values, **release), "Job")
        return str(found["metadata"]["name"])

    values = values_of("gpu")
    assert job(values) == job(values, revision=7, is_upgrade=True)
    assert job(values) != job({**values, "image": {"tag": "next"}})
    assert job(values) != job({**values, "servers": [{"name": "sdxl", "checkpoints": ["/models/other"]}]})


def test_rules_and_dashboard_arrive_as_they_are() -> None:
    objects = render(values_of("models"))
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    (dashboard,) = of_kind(objects, "ConfigMap")
    assert json.loads(dashboard["data"]["rmd.json"]) == json.loads(
        (ROOT / "deploy/grafana/dashboards/rmd.json").read_text()
    )
    (monitor,) = of_kind(objects, "ServiceMonitor")
    for service in of_kind(objects, "Service"):
        labels = service["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels[monitor["spec"]["jobLabel"]] == "rmd"  # as the alerts select
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_who_scales_decides_the_number_of_replicas() -> None:
    objects = render(values_of("scaled"))
    (deployment,), (scaler,) = of_kind(objects, "Deployment"), of_kind(objects, "ScaledObject")
    assert "replicas" not in deployment["spec"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaler["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert f'service="{deployment["metadata"]["name"]}"' in query and "\n" not in query
    shown = Metrics(lambda: Snapshot(True, False, 1, 0, 0, 0)).render()[0].decode()
    assert (
        {"rmd_admitted_work_seconds"}
        <= set(re.findall(r"rmd_\w+(?={)", query))
        <= set(re.findall(r"# TYPE (\w+)", shown))
    )
    secrets = {each["name"] for each in next(servers(objects))[1]["env"] if "valueFrom" in each}
    assert secrets == {"RMD_API_KEYS", "RMD_VIDEO_DATABASE"}


def test_a_ray_service_is_told_the_server_s_settings() -> None:
    objects = render(values_of("ray"))
    ((service,), route) = of_kind(objects, "RayService"), of_kind(objects, "HTTPRoute")[0]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    arguments = application["args"]
    own = {name: arguments.pop(name) for name in ("fronts", "min_engines", "max_engines", "engine_seconds")}
    settings = ServerSettings(**arguments)  # an unknown one is refused
    assert settings.checkpoint == (Path("/app/models/embedded"),) and settings.engines == Path("/engines")
    assert settings.device == "cuda" and settings.queue_items == 256
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert cluster["enableInTreeAutoscaling"] and not of_kind(objects, "Deployment")
    assert (groups["engines"]["minReplicas"], groups["engines"]["maxReplicas"]) == (
        own["min_engines"],
        own["max_engines"],
    )
    assert groups["fronts"]["replicas"] == own["fronts"] == 2
    limits = {name: pod["template"]["spec"]["containers"][0]["resources"]["limits"] for name, pod in groups.items()}
    assert limits["engines"]["nvidia.com/gpu"] == 1 and "nvidia.com/gpu" not in limits["fronts"]
    assert service["spec"]["serveService"]["metadata"]["name"] == route["spec"]["rules"][0]["backendRefs"][0]["name"]

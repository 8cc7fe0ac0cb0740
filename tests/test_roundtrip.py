"""Spaces, arms and cluster files, valid by construction, are unchanged by writing and reading."""

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz import COUNT, often

from tfkd_ray.launch.check import check, node_types
from tfkd_ray.launch.clusterfile import load_cluster
from tfkd_ray.settings.yaml import dump_yaml, parse_yaml, read_yaml
from tfkd_ray.space.arms import Arms, load_arms, new_comparison, read_comparison
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.experiment import read_experiment, write_experiment

pytestmark = pytest.mark.slow

Tree = dict[str, Any]
counts = st.integers(1, 400)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def fixed_or_searched(
    low: float, high: float, *, complement: bool = False
) -> st.SearchStrategy[Any]:
    """Return a value, a range of any kind, or choices."""
    two = st.lists(numbers(low, high), min_size=2, max_size=2, unique=True).map(sorted)
    kinds = [{}, {"log": True}, *([{"log_complement": True}] if complement else [])]
    ranges = st.builds(
        lambda ends, kind: {"low": ends[0], "high": ends[1], **kind}, two, st.sampled_from(kinds)
    )
    choices = st.lists(numbers(low, high), min_size=1, max_size=4, unique=True).map(
        lambda values: {"choices": values}
    )
    return numbers(low, high) | ranges | choices


students = st.one_of(
    st.builds(lambda hidden, dropout: {"name": "mlp", "hidden": hidden, "dropout": dropout},
              st.lists(st.integers(1, 64), min_size=1, max_size=3), numbers(0, 0.9)),
    st.builds(lambda widths: {"name": "cnn", "widths": widths}, st.lists(st.integers(1, 32), min_size=1, max_size=3)),
    st.just("mlp"),
)  # fmt: skip
alphas, temperatures = fixed_or_searched(0.01, 0.99), fixed_or_searched(0.5, 30.0)
objectives = {
    "ce": st.fixed_dictionaries({"name": st.just("ce")}, optional={"loss_scale": fixed_or_searched(0.01, 2)}),
    "lsr": st.fixed_dictionaries({"name": st.just("lsr"), "alpha": alphas}),
    "kd": st.fixed_dictionaries({"name": st.just("kd"), "alpha": alphas, "temperature": temperatures}),
    "tfkd_reg": st.fixed_dictionaries({"name": st.just("tfkd_reg"), "alpha": alphas, "temperature": temperatures,
                                       "correct_prob": fixed_or_searched(0.2, 0.999, complement=True)}),
}  # fmt: skip
optims = st.fixed_dictionaries(
    {},
    optional={
        "lr": fixed_or_searched(1e-4, 10),
        "weight_decay": fixed_or_searched(1e-7, 0.1),
        "momentum": numbers(0, 0.99),
        "batch_size": st.integers(1, 512) | st.lists(st.integers(1, 512), min_size=1, max_size=3, unique=True).map(lambda v: {"choices": v}),
    },
)  # fmt: skip
schedules = st.sampled_from(
    ["cosine", "constant", {"name": "step", "milestones": [0.5], "gamma": 0.1}]
)
shared = st.fixed_dictionaries(
    {"student": students},
    optional={"epochs": counts, "optim": optims, "schedule": schedules, "seed": st.integers(0, 2**31), "checkpoint_every_s": numbers(0, 100)},
)  # fmt: skip
samplers = st.sampled_from(
    ["tpe", "random", "gp", "qmc", {"name": "tpe", "startup": 4, "multivariate": False}]
)
searches = st.fixed_dictionaries(
    {"num_samples": st.integers(8, 400), "stopping": st.sampled_from(["none", "halving"])},
    optional={
        "sampler": samplers,
        "warm_start": st.booleans(),
        "metric": st.sampled_from(["val_accuracy", "val_nll", "val_ece"]),
        "max_concurrent": counts,
        "time_budget_s": numbers(0.1, 1e6),
        "cpu_hours": numbers(0.1, 1e6),
        "seed": st.integers(0, 2**31),
    },
)


@st.composite
def spaces(draw: st.DrawFn) -> Tree:
    names = draw(st.lists(st.sampled_from(sorted(objectives)), min_size=1, max_size=4, unique=True))
    given_ = [draw(objectives[name]) for name in names]
    tree = {
        **draw(shared),
        "objective": given_ if len(given_) > 1 or draw(st.booleans()) else given_[0],
        "search": draw(searches),
    }
    if "kd" in names:
        tree["teacher"] = {"model": draw(students), "epochs": draw(counts)}
    return tree


@st.composite
def arms_files(draw: st.DrawFn) -> Tree:
    names = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True)
    chosen = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    arms = []
    for number, name in enumerate(chosen):  # all different: two equal arms are refused
        objective = draw(
            st.sampled_from(
                [{"name": "ce"}, {"name": "lsr", "alpha": draw(numbers(0.01, 0.9))}, "tfkd_reg"]
            )
        )
        arm: Tree = {
            "name": name,
            "objective": objective,
            "optim": {"lr": (number + 1) * draw(numbers(0.001, 0.0019))},
        }
        published = draw(st.none() | numbers(0, 100))
        arms.append(arm | ({"published": published} if published is not None else {}))
    about = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "title": st.text(max_size=40),
                "note": st.text(max_size=40),
                "metric": st.sampled_from(["val_accuracy", "val_nll"]),
            },
        )
    )
    return {"student": draw(students), "epochs": draw(counts), **about, "arms": arms}


def written(folder: Path, name: str, tree: Tree) -> Path:
    (folder / name).write_text(dump_yaml(tree), encoding="utf-8")
    assert read_yaml(folder / name) == parse_yaml(dump_yaml(read_yaml(folder / name)), "again")
    return folder / name


@often
@given(tree=spaces())
def test_a_space_reads_back_from_what_its_experiment_keeps(
    tree: Tree, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("space")
    before = copy.deepcopy(tree)
    space = load_space(written(folder, "space.yaml", tree))
    assert tree == before and build_space(tree) == space
    write_experiment(folder, space.tree, ["tfkd", "tune"])
    kept = build_space(read_experiment(folder)["space"])
    assert (kept.tree, kept.parameters, kept.search) == (space.tree, space.parameters, space.search)


@often
@given(tree=arms_files())
def test_arms_read_back_from_what_their_comparison_keeps(
    tree: Tree, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("arms")
    compared = load_arms(written(folder, "arms.yaml", tree))
    assert Arms.model_validate(compared.model_dump(mode="json")) == compared
    new_comparison(compared, [1001, 1002], folder / "c")
    kept = read_comparison(folder / "c")
    assert kept.arms == compared and len(kept.runs) == 2 * len(tree["arms"])


words = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)


@often
@given(name=words, user=words, hosts=st.lists(st.integers(11, 250), min_size=1, max_size=5, unique=True), folder=words,
       ports=st.lists(st.integers(1024, 19999), min_size=2, max_size=2, unique=True), key=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9))  # fmt: skip
def test_a_cluster_file_reads_back(
    name: str,
    user: str,
    hosts: list[int],
    folder: str,
    ports: list[int],
    key: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tree = read_yaml(ROOT / "clusters/onprem.yaml")
    tree |= {
        "cluster_name": name,
        "auth": {"ssh_user": user, "ssh_private_key": f"~/.ssh/{key}"},
        "metadata": {"tfkd": {"storage": f"/mnt/{folder}/x"}},
    }
    tree["provider"]["worker_ips"] = [f"10.0.0.{host}" for host in hosts]
    (line,) = tree["head_start_ray_commands"]
    tree["head_start_ray_commands"] = [
        line.replace("6379", str(ports[0])).replace(
            "--dashboard-port=8265", f"--dashboard-port={ports[1]}"
        )
    ]
    tree["worker_start_ray_commands"] = [
        tree["worker_start_ray_commands"][0].replace("6379", str(ports[0]))
    ]
    path = written(tmp_path_factory.mktemp("cluster"), "mine.yaml", tree)
    file = load_cluster(path)
    assert (
        file.tree == tree
        and file.name == name
        and file.storage == f"/mnt/{folder}/x"
        and (file.port, file.dashboard_port) == tuple(ports)
    )
    assert check(file)


seldom = settings(
    often, max_examples=max(1, COUNT * 12 // 500)
)  # a cluster file takes a quarter of a second to check
RENTED = [
    p for p in sorted((ROOT / "clusters").glob("*-gpu.yaml")) if "\nprovider:" in p.read_text()
]


@seldom
@given(
    path=st.sampled_from(RENTED),
    name=words,
    user=words,
    folder=words,
    most=st.integers(2, 500),
    data=st.data(),
)
def test_a_cluster_file_of_rented_nodes_reads_back(
    path: Path,
    name: str,
    user: str,
    folder: str,
    most: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every shipped file of a cloud, with other names, storages and numbers of nodes."""
    tree = read_yaml(path)
    tree |= {
        "cluster_name": name,
        "max_workers": most,
        "idle_timeout_minutes": data.draw(st.integers(1, 600)),
        "auth": {"ssh_user": user},
        "metadata": {"tfkd": {"storage": f"/mnt/tfkd/{folder}"}},
    }
    for kind, nodes in tree["available_node_types"].items():
        if kind != tree["head_node_type"]:
            high = data.draw(st.integers(1, most))
            least = data.draw(st.integers(0, high if high < most // 4 else 0))
            nodes |= {
                "min_workers": least,
                "max_workers": high,
                "resources": {"CPU": data.draw(counts), "GPU": 1},
            }
    file = load_cluster(written(tmp_path_factory.mktemp("cluster"), "mine.yaml", tree))
    assert (file.tree, file.name, file.storage) == (tree, name, f"/mnt/tfkd/{folder}")
    found = {node.name: (node.least, node.most) for node in node_types(file) or []}
    wanted = {
        kind: (nodes["min_workers"], nodes["max_workers"])
        for kind, nodes in tree["available_node_types"].items()
        if kind != tree["head_node_type"]
    }
    assert found == {tree["head_node_type"]: found[tree["head_node_type"]]} | wanted and check(file)


KUBERAY = sorted((ROOT / "clusters").glob("kuberay-*.yaml"))


@seldom
@given(path=st.sampled_from(KUBERAY), name=words, folder=words, claim=words, data=st.data())
def test_a_file_of_kuberay_reads_back(
    path: Path,
    name: str,
    folder: str,
    claim: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shipped = load_cluster(path)
    tree = copy.deepcopy(shipped.tree)
    tree["metadata"] = {"name": name, "annotations": {"tfkd/storage": f"/mnt/tfkd/{folder}"}}
    inside = tree["spec"].get("rayClusterSpec", tree["spec"])
    wanted = {}
    for group in inside["workerGroupSpecs"]:
        low, replicas, high = sorted(
            data.draw(st.lists(st.integers(0, 99), min_size=3, max_size=3))
        )
        group |= {"minReplicas": low, "replicas": replicas, "maxReplicas": high}
        wanted[group["groupName"]] = (low, high)
    for group in (inside["headGroupSpec"], *inside["workerGroupSpecs"]):
        for volume in group["template"]["spec"]["volumes"]:
            if volume["name"] == "results":
                volume["persistentVolumeClaim"] = {"claimName": claim}
    made = tmp_path_factory.mktemp("cluster") / "mine.yaml"
    made.write_text(
        "---\n".join(dump_yaml(document) for document in (*shipped.others, tree)), encoding="utf-8"
    )
    file = load_cluster(made)
    assert (file.tree, file.others, file.storage) == (
        tree,
        shipped.others,
        f"/mnt/tfkd/{folder}",
    ) and check(file)
    assert {n.name: (n.least, n.most) for n in node_types(file) or [] if n.name != "head"} == wanted

"""The first quarter of an hour on a GPU: python benchmarks/gpu_steps.py [--out DIR] [STEP ...]

Runs steps in the order of `STEPS`, each in a process of its own with a limit of its own: one that
fails, hangs or breaks its CUDA context costs the others nothing. Each step's figures are in
DIR/STEP.json and its output in DIR/STEP.log; DIR/summary.json has one row a step. The exit code is
1 if a step failed. Without a CUDA GPU it runs what simulates one, and says so.

`--rehearse` runs the steps on the CPU, to find mistakes in them; their figures mean nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
REHEARSED = os.environ.get("TFKD_GPU_STEPS") == "rehearse"
"""Whether a step is to run on the CPU."""
Figures = dict[str, Any]


# --- the steps ------------------------------------------------------------------------------------


def driver() -> Figures:
    """Driver, architectures, compilers; one product and one convolution in bfloat16."""
    import torch

    from tfkd_ray.learn.gpu import look_at_gpu

    there = device()
    images = torch.randn(8, 16, 32, 32, device=there, dtype=torch.bfloat16)
    kernel = torch.randn(16, 16, 3, 3, device=there, dtype=torch.bfloat16)
    size = 256 if REHEARSED else 8192
    matrix = torch.randn(size, size, device=there, dtype=torch.bfloat16)
    torch.nn.functional.conv2d(images, kernel).sum().item()
    seconds = timed(lambda: matrix @ matrix, times=3 if REHEARSED else 50)
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": torch.cuda.get_arch_list(),
        "tflops": 2 * size**3 / seconds / 1e12,
        "cc": shutil.which("cc"),
        "g++": shutil.which("g++"),
    }
    if not REHEARSED:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        found["nvidia-smi"] = subprocess.check_output(query, text=True)
        found |= look_at_gpu()._asdict()
        assert found["trouble"] is None, found["trouble"]
    return found


UNCOMPILED = ("tests/test_gpu.py", "-m", "gpu", "-k", "not -on]")
"""Words of pytest for the tests of a GPU but those with `compile: on`."""


def tests() -> Figures:
    """The tests of a GPU that compile nothing: whole epochs of all objectives, without a wait."""
    return pytest(*UNCOMPILED)


def numbers() -> Figures:
    """Judge on the device as on the CPU; fp32 without TF32; a user's own setting of it."""
    import torch

    from tfkd_ray.learn.evaluate import evaluate, tf32
    from tfkd_ray.learn.loop import train

    c = small(student={"name": "cnn", "widths": [32, 64]}, epochs=1)
    val_set = c.data.load()[1]
    assert val_set is not None
    network = c.build_student().eval()
    cpu = evaluate(network, c.data, val_set)
    here = evaluate(network.to(device()), c.data, val_set.on(device()))
    images = torch.randn(64, *c.data.shape, device=device())
    found = []
    for on in (False, True):
        with tf32(device(), on), torch.no_grad():
            found.append(network(images).double().cpu())
    with torch.no_grad():
        exact = network.double().cpu()(images.double().cpu())
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    last = list(train(c))[-1].metrics
    off, on = ((logits - exact).abs().max().item() for logits in found)
    assert off < 1e-3, off
    assert abs(cpu["val_nll"] - here["val_nll"]) < 1e-3, (cpu, here)
    return {"error_fp32": off, "error_tf32": on, "val_nll": here["val_nll"], "trained": last}


def compiled() -> Figures:
    """Three runs of one kind and four others with compile on: graphs, skips, memory, numbers."""
    import torch
    from torch._dynamo.utils import counters

    from tfkd_ray.learn.loop import train

    reserved = []

    def run(compile: str, widths: list[int], seed: int) -> Any:
        student = {"name": "cnn", "widths": widths}
        *_, last = train(small(student=student, compile=compile, seed=seed, epochs=2))
        reserved.append(torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)
        return last

    plain, first, *_ = [run(how, [16, 32], s) for how, s in (("off", 0), ("on", 0), ("on", 1))]
    run("on", [16, 32], 2)
    for widths in [] if REHEARSED else ([8], [16], [24], [8, 16]):
        run("on", widths, 0)
    skips = counters["inductor"]["cudagraph_skips"]
    weights = [epoch.state()["model"] for epoch in (plain, first)]
    unlike = max(
        (weights[0][k].float() - v.float()).abs().max().item() for k, v in weights[1].items()
    )
    assert skips == 0 and unlike < 1e-2, (skips, unlike)
    assert reserved[3] <= 1.05 * reserved[1], reserved
    return {"cudagraph_skips": skips, "unlike": unlike, "reserved": reserved}


def broken_context() -> Figures:
    """A device-side assert in one of four trials through Ray; the others finish."""
    return sweep("breaking", gpus=1)


def packing() -> Figures:
    """Four trials share a GPU and one runs out of memory; then eight runs in one process."""
    import torch

    from tfkd_ray.learn.loop import train

    found = sweep("greedy", gpus=0.25)
    allocated = []
    for seed in range(8):
        list(train(small(seed=seed, epochs=1)))
        allocated.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    assert max(allocated) - allocated[0] < 10e6, allocated
    return {**found, "allocated": allocated}


def resumed() -> Figures:
    """Two epochs on one device and two on the other are four on one."""
    from tfkd_ray.learn.loop import train

    whole = [epoch.metrics["train_loss"] for epoch in train(small(epochs=4))]
    found: Figures = {"whole": whole}
    for first, second in ((0, 1), (1, 0)):
        run = train(small(epochs=4, gpus_per_worker=on_gpu(first)))
        state = [next(run), next(run)][-1].state()
        run.close()
        rest = train(small(epochs=4, gpus_per_worker=on_gpu(second)), state)
        losses = [epoch.metrics["train_loss"] for epoch in rest]
        assert all(abs(a - b) < 1e-2 * b for a, b in zip(losses, whole[2:], strict=True)), losses
        found[f"{first} to {second}"] = losses
    return found


def speed() -> Figures:
    """`step.py` at batch 128; then 1, 2, 4 and 8 trials at once, without and with MPS."""
    words = ["--student", "resnet18", "--teacher", "resnet50", "--batch", "128", "--steps", "40"]
    words += ["--rounds", "5", "--gpu", "--loops", "ours,ours fp32,usual 2,bare,ours ce"]
    if REHEARSED:
        words = ["--student", "cnn", "--teacher", "cnn", "--batch", "8", "--steps", "2"]
        words += ["--rounds", "2", "--loops", "ours,bare"]
    said = subprocess.check_output([sys.executable, str(HERE / "step.py"), *words], text=True)
    print(said)
    found: Figures = {"step.py": said.splitlines()}
    for mps in (False, True):
        with started_mps() if mps else contextlib.nullcontext({}) as env:
            if env is None:
                continue
            for student in ("cnn", "resnet18")[: 1 if REHEARSED else 2]:
                for count in (1, 2) if REHEARSED else (1, 2, 4, 8):
                    rates = at_once(student, count, env)
                    found[f"{student} x {count}{', MPS' if mps else ''}"] = sum(rates)
    return found


def profile() -> Figures:
    """Launches of a step, the share of time in which the GPU is idle, and the largest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from tfkd_ray.learn.loop import train

    c = small(student="mlp" if REHEARSED else "resnet18", epochs=4)
    steps = len(c.data.load()[0]) // c.optim.batch_size
    run = train(c)
    next(run), next(run)
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        next(run)
        seconds = time.perf_counter() - start
    events = profile.key_averages()
    launches = sum(e.count for e in events if "LaunchKernel" in e.key or "GraphLaunch" in e.key)
    busy = {e.key: e.self_device_time_total / 1e6 for e in events if e.device_type.name == "CUDA"}
    largest = sorted(busy.items(), key=lambda item: -item[1])[:10]
    idle = 1 - sum(busy.values()) / seconds
    return {"launches_a_step": launches / steps, "idle": idle, "largest_s": dict(largest)}


def jpeg() -> Figures:
    """Crops of 224 from JPEGs: threads and processes alone, and processes under training of ResNet-50."""
    from data import decode, write_jpegs

    from tfkd_ray.learn.loop import train

    found: Figures = {}
    with tempfile.TemporaryDirectory() as root:
        write_jpegs(Path(root), 40 if REHEARSED else 2000)
        for readers in (2,) if REHEARSED else (4, 8, 16):
            for place in ("threads", "processes"):
                found[f"{readers} {place} alone"] = decode(root, readers, place)
            data = {"name": "image_folder", "root": root, "num_classes": 2, "readers": readers}
            data |= {"decode_in": "processes", "val_fraction": 0.0}
            data |= {"image_size": 32 if REHEARSED else 224}
            student = "cnn" if REHEARSED else "resnet50"
            size = {"batch_size": 16 if REHEARSED else 128}
            tree = {"data": data, "student": student, "epochs": 2, "optim": size}
            tree |= {"recipe": "modern", "cpus_per_worker": readers}
            *_, last = train(small(**tree))
            found[f"{readers} processes, training"] = last.metrics["images_per_s"]
    return found


STEPS: dict[str, tuple[Callable[[], Figures], float]] = {
    "driver": (driver, 60),
    "tests": (tests, 150),
    "numbers": (numbers, 45),
    "compiled": (compiled, 120),
    "broken_context": (broken_context, 75),
    "packing": (packing, 75),
    "resumed": (resumed, 45),
    "speed": (speed, 200),
    "profile": (profile, 45),
    "jpeg": (jpeg, 75),
}
"""Each step with its limit in seconds: 15 minutes in all."""


# --- what they share ------------------------------------------------------------------------------


def on_gpu(share: float) -> float:
    return 0 if REHEARSED else share


def device() -> Any:
    import torch

    return torch.device("cpu" if REHEARSED else "cuda:0")


def timed(work: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call, after a first one."""
    import torch

    def wait() -> None:
        if not REHEARSED:
            torch.cuda.synchronize()

    work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def small(**changes: Any) -> Any:
    """Return a run on the digits of scikit-learn, on the GPU."""
    from tfkd_ray.learn.config import TrainConfig
    from tfkd_ray.settings.schema import validated

    tree = {
        "objective": "ce",
        "data": "digits",
        "student": {"name": "cnn", "widths": [16, 32]},
        "precision": "fp32",
        "gpus_per_worker": on_gpu(1),
        "optim": {"batch_size": 64},
        **changes,
    }
    return validated(TrainConfig, tree)


def pytest(*words: str) -> Figures:
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=0", *words]
    run = subprocess.run(command, cwd=HERE.parent, text=True, stdout=subprocess.PIPE)
    print(run.stdout)
    assert run.returncode == 0 or REHEARSED, run.stdout[-2000:]
    return {"said": run.stdout.strip().splitlines()[-1]}


def once(folder: str) -> bool:
    """Return True for the first call of all processes."""
    with contextlib.suppress(FileExistsError):
        Path(folder, "once").touch(exist_ok=False)
        return True
    return False


def breaking(logits: Any, labels: Any) -> Any:
    """Return CE; the first call of all asks for classes that are not there."""
    from torch.nn import functional as F

    first = logits.requires_grad and len(labels) == 64 and once(os.environ["TFKD_GPU_ONCE"])
    return F.cross_entropy(logits, labels + 1000 if first else labels)


def greedy(logits: Any, labels: Any) -> Any:
    """Return CE; the first call of all wants more memory than there is."""
    import torch
    from torch.nn import functional as F

    if logits.requires_grad and len(labels) == 64 and once(os.environ["TFKD_GPU_ONCE"]):
        if not logits.is_cuda:
            raise torch.OutOfMemoryError("a rehearsal")
        torch.empty(2**44, dtype=torch.uint8, device=logits.device)
    return F.cross_entropy(logits, labels)


def sweep(loss: str, gpus: float) -> Figures:
    """Run four trials with one of the losses above; return how they ended."""
    from tfkd_ray.store.experiment import read_records

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        space = {
            "objective": {"name": "own", "path": f"gpu_steps:{loss}"},
            "student": {"name": "cnn", "widths": [16]},
            "gpus_per_worker": on_gpu(gpus),
            "optim": {"batch_size": 64, "lr": {"choices": [0.01, 0.02, 0.05, 0.1]}},
            "epochs": 3,
            "search": {"num_samples": 4, "stopping": "none", "sampler": "random"},
        }
        (folder / "space.yaml").write_text(json.dumps(space))
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "TFKD_GPU_ONCE": place, "PYTHONPATH": os.pathsep.join(paths)}
        words = ["tune", "space.yaml", "--storage", place, "--name", "sweep"]
        command = [sys.executable, "-m", "tfkd_ray", *words]
        subprocess.run(command, env=env, cwd=folder, check=False)
        records = read_records(folder / "sweep")
        ends = [record.status for record in records]
        lost = [record.lost for record in records]
    assert ends.count("done") >= 3 and (REHEARSED or ends.count("done") == 4), ends
    return {"ends": ends, "lost": lost}


@contextlib.contextmanager
def started_mps() -> Iterator[dict[str, str] | None]:
    """Yield the environment of processes that use NVIDIA MPS meanwhile; None if it is not here."""
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None or REHEARSED:
        yield None
        return
    with tempfile.TemporaryDirectory() as place:
        env = {"CUDA_MPS_PIPE_DIRECTORY": place, "CUDA_MPS_LOG_DIRECTORY": place}
        subprocess.run([program, "-d"], env=os.environ | env, check=True)
        try:
            yield env
        finally:
            quits = {"input": "quit\n", "text": True, "timeout": 20}
            subprocess.run([program], env=os.environ | env, check=False, **quits)  # type: ignore[call-overload]


def at_once(student: str, count: int, env: dict[str, str]) -> list[float]:
    """Return the images a second of each of so many processes that train beside one another."""
    command = [sys.executable, __file__, "--alone", student]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(count)
        ]
        return [float(run.communicate()[0].splitlines()[-1]) for run in runs]


def alone(student: str) -> float:
    """Return the images a second of the last of some epochs."""
    from tfkd_ray.learn.loop import train

    epochs = train(small(student=student, epochs=2 if REHEARSED else 12, precision="auto"))
    return [epoch.metrics["images_per_s"] for epoch in epochs][-1]


# --- running them ---------------------------------------------------------------------------------


def run_step(
    command: list[str], name: str, limit_s: float, out: Path, env: dict[str, str]
) -> Figures:
    """Run one step in a process group of its own; return how it ended."""
    start, place = time.monotonic(), out / f"{name}.json"
    place.unlink(missing_ok=True)
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = {0: "ok", None: f"did not end within {limit_s:g} s"}.get(code, f"failed ({code})")
    if code == 0 and not place.exists():
        ended = "gave no figures"
    return {"step": name, "ended": ended, "seconds": round(time.monotonic() - start, 1)}


def run_all(names: list[str], out: Path, env: dict[str, str]) -> int:
    """Run steps one after another; return the exit code."""
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--out", str(out)]
        limit_s = STEPS[name][1] * (10 if env else 1)  # a rehearsal may be slow
        row = run_step(command, name, limit_s, out, env)
        print(f"gpu_steps: {name:15} {row['seconds']:6.1f} s  {row['ended']}", flush=True)
        rows.append(row)
        (out / "summary.json").write_text(json.dumps(rows, indent=1))
    print(f"gpu_steps: figures and output are in {out}")
    return int(any(row["ended"] != "ok" for row in rows))


def simulated() -> int:
    """Run the tests that simulate a GPU; return their exit code."""
    from tfkd_ray.learn.gpu import why_no_gpu

    print(f"gpu_steps: no CUDA GPU here ({why_no_gpu()}): only what simulates one runs", flush=True)
    tests = ["tests/test_fake_gpu.py", "tests/test_gpu_look.py"]
    # all of them: those that are marked `long`, too, which are most of the objectives
    command = [sys.executable, "-m", "pytest", "-m", "", *tests]
    return subprocess.run(command, cwd=HERE.parent).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "gpu")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--one", choices=STEPS)
    parser.add_argument("--alone", metavar="STUDENT")
    args = parser.parse_args()
    if args.alone:
        print(alone(args.alone))
        return 0
    if args.one:
        figures = STEPS[args.one][0]()
        (args.out / f"{args.one}.json").write_text(json.dumps(figures, indent=1, default=str))
        return 0
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        return simulated()
    # so that a step does not outlive this process, and keep its GPU
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STEPS if not args.steps or name in args.steps]
    return run_all(names, args.out, {"TFKD_GPU_STEPS": "rehearse"} if args.rehearse else {})


if __name__ == "__main__":
    sys.exit(main())

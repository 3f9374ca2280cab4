"""Every stage that a rule calls in miniature, run by forks of one server, and what tells its artefacts from others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np

from rcm.artefact import MANIFEST, beside, content_sha256, read_json, write_json
from rcm.checkpoints import load_dcp
from rcm.checkpoints.flat import state_sha256
from rcm.cli.pictures import encode

ROOT = Path(__file__).parents[2]
LIGHT = ("rcm.cli.data", "rcm.data.prompts", "rcm.data.text_prompts", "rcm.data.prompt_files")
HEAVY = (
    *("torch", "torch._dynamo", "torch._decomp.decompositions_for_jvp", "triton", "flash_jvp", "rapidocr.main"),
    *("encodings.cp437", "encodings.utf_8_sig"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin"),
    *("rcm.cli.train", "rcm.cli.data", "rcm.cli.sample", "rcm.cli.score", "rcm.cli.throughput"),
    *("rcm.cli.precision", "rcm.cli.measure", "rcm.cli.arrange", "rcm.cli.embed", "rcm.cli.checkpoints"),
    *("rcm.report.page", "rcm.report.figures", "rcm.report.tables", "rcm.training.distill", "rcm.checkpoints"),
    *("rcm.data.text_prompts", "rcm.data.unfinished", "rcm.training.pretrain", "rcm.evaluation.small_text"),
)
SMALL = ["network.width=16", "network.mlp_width=16", "network.layers=1", "network.heads=2", "teacher.steps=2"]
REPORT = ["suite=report", "suites.report.per_task=1", "suites.report.samples=1", "inference.batch=2"]
DISTILL = {
    "student_updates": 3, "batch": 4, "state_every": 2, "preview_every": 2, "scm_only": 1, "critic_warmup": 1,
    "student_every": 2, "max_rollout": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Words of the command line, the artefacts that it makes in its folder, and the stages that it takes others of.

    `{NAME}` in a word stands for the folder in which stage NAME was run.
    """

    words: Sequence[Any]
    outputs: Sequence[str]
    needs: Sequence[str] = ()


def _sample(*words: str) -> Stage:
    common = ("--codec", "{pretrain}/codec.pth", "--prompts", "{prompts}/report.jsonl", "--part", "1-of-1")
    words_needed = [need for need in ("export", "convert") if any(f"{{{need}}}" in word for word in words)]
    return Stage(
        ["sample", *SMALL, *REPORT, *words, *common, "--out", "samples"],
        ["samples"],
        ["pretrain", "prompts", *words_needed],
    )


STAGES: dict[str, Stage] = {
    "pretrain": Stage(
        [
            *("pretrain", *SMALL, "pretrain.scenes=32", "pretrain.batch=4", "pretrain.iterations=6"),
            *("pretrain.state_every=2", "--resume", "resume", "--out", "transformer.pth", "--codec-out", "codec.pth"),
        ],
        ["transformer.pth", "codec.pth"],
    ),
    "download": Stage(
        [
            *("download", "checkpoints.transformer.source={pretrain}/transformer.pth"),
            *("checkpoints.transformer.sha256=null", "--name", "transformer", "--out", "transformer.pth"),
        ],
        ["transformer.pth"],
        ["pretrain"],
    ),
    "convert": Stage(
        ["convert", *SMALL, "--checkpoint", "{pretrain}/transformer.pth", "--out", "teacher"], ["teacher"], ["pretrain"]
    ),
    "prompts": Stage(["prompts", *REPORT, "--out", "report.jsonl"], ["report.jsonl"]),
    "embed": Stage(
        ["embed", "--prompts", "{prompts}/report.jsonl", "--out", "text.safetensors"], ["text.safetensors"], ["prompts"]
    ),
    "synthesize": Stage(
        [
            *("synthesize", *SMALL, "inference.batch=2", "--teacher", "{convert}/teacher"),
            *("--prompts", "{prompts}/report.jsonl", "--shard", "1-of-1", "--out", "1-of-1.tar"),
        ],
        ["1-of-1.tar", "1-of-1.tar.json"],
        ["convert", "prompts"],
    ),
    "distill": Stage(
        [
            *("distill", *SMALL, *(f"distillation.{key}={value}" for key, value in DISTILL.items())),
            *("--teacher", "{convert}/teacher", "--data", "{synthesize}/1-of-1.tar"),
            *("--codec", "{pretrain}/codec.pth", "--resume", "resume", "--out", "dcp", "--raw", "raw"),
            *("--metrics", "metrics.jsonl", "--previews", "previews"),
        ],
        ["dcp", "raw", "metrics.jsonl", "previews"],
        ["convert", "synthesize", "pretrain"],
    ),
    "export": Stage(
        ["export", *SMALL, "--student", "{distill}/dcp", "--out", "student.safetensors"],
        ["student.safetensors", "student.pth"],
        ["distill"],
    ),
    "sample_student": _sample("--checkpoint", "{export}/student.safetensors", "--steps", "2"),
    "sample_teacher": _sample("--checkpoint", "{convert}/teacher", "--steps", "2"),
    "sample_control": _sample("--control", "codec", "--steps", "0"),
    "precision": Stage(
        [
            *("precision", *SMALL, "suite=report", "evaluation.precision.times=2", "evaluation.precision.samples=2"),
            *("--checkpoint", "{convert}/teacher", "--teacher", "{convert}/teacher"),
            *("--prompts", "{prompts}/report.jsonl", "--out", "teacher.json"),
        ],
        ["teacher.json"],
        ["convert", "prompts"],
    ),
    "evaluate": Stage(
        [
            *("evaluate", *REPORT, "evaluation.bootstrap=20", "--samples", "{sample_control}/samples"),
            *("--diversity", "{sample_control}/samples", "--prompts", "{prompts}/report.jsonl"),
            *("--out", "codec-0.json", "--results", "codec-0.results.jsonl", "--metrics", "metrics.json"),
        ],
        ["codec-0.json", "codec-0.results.jsonl", "metrics.json"],
        ["sample_control", "prompts"],
    ),
    "throughput": Stage(
        [
            *("throughput", *SMALL, *REPORT, "evaluation.throughput=1", "--checkpoint", "{convert}/teacher"),
            *("--codec", "{pretrain}/codec.pth", "--prompts", "{prompts}/report.jsonl", "--steps", "2"),
            *("--out", "teacher-2.json"),
        ],
        ["teacher-2.json"],
        ["convert", "pretrain", "prompts"],
    ),
    "measure": Stage(
        [
            *("measure", "experiment=cosmos-predict2-2b-images", "suite=text", "inference.device=cpu"),
            *("--samples", "{letters}/samples", "--out", "1-of-1.jsonl"),
        ],
        ["1-of-1.jsonl"],
        ["letters"],
    ),
    "arrange": Stage(
        [
            *("arrange", "experiment=cosmos-predict2-2b-images", "--samples", "{sample_control}/samples"),
            *("--out", "official"),
        ],
        ["official"],
        ["sample_control"],
    ),
    "table": Stage(
        ["table", "--name", "table3", "--published", f"{ROOT}/config/published/table3.csv", "--out-dir", "."],
        ["table3.csv", "table3.md", "table3.tex"],
    ),
    "figure": Stage(
        ["figure", "--name", "figure_training", "--inputs", "{distill}/metrics.jsonl", "--out", "figure.png"],
        ["figure.png"],
        ["distill"],
    ),
    "report": Stage(
        [
            *("report", "--scores", "{evaluate}/codec-0.json", "--results", "{sample_control}", "{figure}"),
            *("--out", "report.html"),
        ],
        ["report.html"],
        ["evaluate", "sample_control", "figure"],
    ),
}  # fmt: skip


class Server:
    """A fork server, and the folders in which the stages were run undisturbed, made when asked for."""

    def __init__(self, folder: Path, modules: Sequence[str] = HEAVY):
        self.folder, self.runs = folder, dict[str, tuple[Path, dict[str, Any]]]()
        address = folder / "server"
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults.server", str(address), *modules]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while not address.exists() and self.process.poll() is None:
            time.sleep(0.02)
        self.idle = [Client(str(address)) for _ in range(2)]

    def close(self) -> None:
        for client in self.idle:
            client.close()
        self.process.kill()
        self.process.wait()

    def words(self, name: str) -> list[str]:
        """The command line of a stage."""
        stage = STAGES[name]
        return [str(word).format(**{need: self.undisturbed(need)[0] for need in stage.needs}) for word in stage.words]

    def run(self, name: str, folder: Path, *more: str, **options: Any) -> dict[str, Any]:
        """Run a stage in `folder`, with `more` words; what `server.ordered` says of it, and what it said."""
        words = [*self.words(name), *more]
        log = folder.parent / f"{folder.name}{options.get('environment', {}).get('RANK', '')}.log"
        log.touch()  # a stage that is killed at once opens none
        client = self.idle.pop()
        try:
            client.send({"words": words, "folder": str(folder), **options})
            told = client.recv()
        finally:
            self.idle.append(client)
        return told | {"said": log.read_text(errors="replace")}

    def undisturbed(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a run that nobody disturbed, and what there is to know of it."""
        if name not in self.runs:
            folder = self.folder / "undisturbed" / name
            folder.mkdir(parents=True)
            if name == "letters":
                _draw_letters(folder / "samples")
                self.runs[name] = folder, {}
                return self.runs[name]
            told = self.run(name, folder)
            assert told["status"] == 0, told["said"]
            self.runs[name] = folder, told | {"made": made(folder)}
        return self.runs[name]


def _draw_letters(folder: Path) -> None:
    """A sample of a suite that asks for small text."""
    (folder / "00000" / "samples").mkdir(parents=True)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps({"prompt": 'a sign that says "A"', "text": "A"}))
    (folder / "00000" / "samples" / "0000.png").write_bytes(encode(np.full((1, 48, 48, 3), 255, np.uint8), ".png"))
    (folder / "sampling.json").write_text(json.dumps({"frames": 1, "part": "1-of-1"}))


def made(folder: Path) -> dict[str, str]:
    """What stands under final names in a stage's folder, by name: what must be equal in all runs of it."""
    paths = (path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name != "resume")
    return {path.name: _identity(path) for path in paths}


def _identity(path: Path) -> str:
    if (path / MANIFEST).is_file():
        return state_sha256(load_dcp(path))
    if path.name.endswith(".run.json"):
        return f"of {read_json(path)['artefact']}"
    if path.name == "metrics.jsonl" and path.read_text() != "older":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{key: value for key, value in row.items() if key != "wall"} for row in rows])
    content = read_json(path) if path.name.startswith("teacher-2.json") and path.read_text() != "older" else {}
    if path.name == "teacher-2.json" and content:  # measured times
        return json.dumps({key: value for key, value in content.items() if not key.endswith(("fps", "seconds"))})
    if path.name == "teacher-2.json.prov.json":  # of these
        return json.dumps(content | {"sha256": ""})
    return content_sha256(path)


def lay_older(folder: Path, outputs: Sequence[str], like: Path) -> None:
    """Finished artefacts of other settings in the places of a stage's outputs, with what is recorded of them."""
    for name in outputs:
        if (like / name).is_dir():
            (folder / name).mkdir()
            (folder / name / "older").write_text("older")
        else:
            (folder / name).write_text("older")
        write_json(beside(folder / name, ".prov.json"), {"sha256": content_sha256(folder / name)})


def hidden(folder: Path) -> list[str]:
    """Names of what is not finished, or was not removed."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*") if path.name != ".metadata")


def run_ranks(server: Server, folder: Path, *more: str, **killed: int) -> list[dict[str, Any]]:
    """Distil on two ranks, of which rank N is killed before its `rankN`-th change of a name."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank: int) -> dict[str, Any]:
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return server.run("distill", folder, *more, before=killed.get(f"rank{rank}"), environment=environment)

    server.words("distill")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


class Victim:
    """A folder in which a stage is hindered again and again, with `older` among artefacts of other settings."""

    def __init__(self, server: Server, name: str, folder: Path, *, older: bool):
        self.server, self.name, self.folder = server, name, folder
        like, known = server.undisturbed(name)
        self.new: Mapping[str, str] = known["made"]
        folder.mkdir(exist_ok=True)
        if older:
            lay_older(folder, STAGES[name].outputs, like)
        self.old = made(folder)

    def killed(self, **options: Any) -> float | None:
        """Kill a run; its seconds where it ended before."""
        told = self.server.run(self.name, self.folder, **options)
        assert told["status"] in (0, -signal.SIGKILL), told["said"]
        self.check(self.new if told["status"] == 0 else None)
        return float(told["seconds"]) if told["status"] == 0 else None

    def check(self, expected: Mapping[str, str] | None) -> None:
        """Nothing that looks finished and is not, nothing lost, nothing that claims something else."""
        found = made(self.folder)
        if expected is not None:
            assert found == expected
            assert hidden(self.folder) == []
            return
        for name, identity in found.items():
            assert identity in (self.new.get(name), self.old.get(name)), name
            if name.endswith(".prov.json"):
                artefact = self.folder / name.removesuffix(".prov.json")
                assert read_json(self.folder / name)["sha256"] == content_sha256(artefact), name
        assert self.old.keys() - found.keys() <= {name for name in self.old if name.endswith(".json")}
        assert len(list(self.folder.glob(".*"))) <= 4  # what one run leaves, not all before it

    def finish(self) -> None:
        told = self.server.run(self.name, self.folder)
        assert told["status"] == 0, told["said"]
        self.check(self.new)

"""The loop on a Wan transformer of one layer and a data set of random numbers."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rcm import networks
from rcm.artefact import UserError, read_json
from rcm.checkpoints.dcp import described, read_parts
from rcm.cli.config import compose
from rcm.data.shards import LatentDataset, Sample
from rcm.networks.discriminator import FakeScore
from rcm.parallel import start
from rcm.training import distill as loop
from rcm.training.batches import Draws, shares
from rcm.training.distill import distill
from rcm.training.learner import Learner
from rcm.training.settings import Parallel, Settings
from rcm.training.signals import EXIT_INTERRUPTED
from rcm.training.state import States

NETWORK = {
    "kind": "wan",
    "width": 16,
    "mlp_width": 16,
    "layers": 1,
    "heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_width": 8,
    "time_width": 16,
    "patch": [1, 1, 1],
    "time_scale": 1000.0,
    "positions": [1, 2, 2],
}
WEIGHTS = {  # consistency loss, and the weights of consistency, DMD and GAN
    "scm": ("scm", 1.0, 0.0, 0.0),
    "dcm": ("dcm", 1.0, 0.0, 0.0),
    "meanflow": ("meanflow", 1.0, 0.0, 0.0),
    "dmd": (None, 0.0, 1.0, 0.0),
    "dmd2": (None, 0.0, 1.0, 1.0),
    "rcm": ("scm", 1.0, 0.5, 0.0),
}
KEYS = "consistency", "consistency_weight", "dmd_weight", "gan_weight"
ROLLOUT_TIMES = {"dmd": [1.2, 0.9, 0.5], "dmd2": [1.2, 0.9, 0.5]}
WORDS, DIM = 3, 4 * 2 * 2


def configuration(name="rcm", **changes):
    sections = {
        "student_updates": 8,
        "batch": 3,
        "guidance": 2.0,
        "guidance_form": "unconditional",
        "prompt_dropout": 0.2,
        "scm_time": {"name": "lognormal", "mean": -0.8, "std": 1.6},
        "dmd_time": {"name": "lognormal", "mean": 0.0, "std": 1.6},
        "derivative": "exact",
        "derivative_step": 1e-4,
        "tangent_constant": 0.1,
        "tangent_normalisation": "norm",
        "tangent_warmup_terms": "both",
        "dcm_steps": 48,
        "dcm_shift": 5.0,
        "dcm_skip": 1,
        "discriminator": {"layers": [0], "heads": 2, "critic_weight": 1.0},
        "max_rollout": 4,
        "rollout_steps": "cycle",
        "tangent_warmup": 2,
        "scm_only": 1,
        "critic_warmup": 2,
        "student_every": 3,
        "phase": "after_warmup",
        "optimizer": "auto",
        "student_lr": 1e-2,
        "critic_lr": 1e-2,
        "lr_warmup": 2,
        "lr_decay": "cosine",
        "beta2": 0.999,
        "weight_decay": 0.01,
        "eps": 1e-8,
        "ema": 0.1,
        "state_every": 4,
        "preview_every": 3,
        "profile": None,
        "wandb": "disabled",
    }
    weights = dict(zip(KEYS, WEIGHTS[name], strict=True))
    return {
        "seed": 5,
        "network": NETWORK,
        "text": {"kind": "words", "words": WORDS, "width": 8},
        "objective": {"name": name, **weights, "rollout_times": ROLLOUT_TIMES.get(name)},
        "distillation": {**sections, **changes},
        "parallel": asdict(Parallel()),
    }


def network(seed, **options):
    torch.manual_seed(seed)
    built = networks.build({**NETWORK, **options})
    nn.init.normal_(built.head.head.weight, std=0.1)
    return built


def run(folder, config, **options):
    """Distil into `folder`; returns the student, which carries the averaged weights."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    data = LatentDataset([Sample(i, f"prompt {i}", i, draw(4, 1, 2, 2), draw(i % 3 + 1, 8)) for i in range(7)], {})
    name, settings = config["objective"]["name"], config["distillation"]
    student, fake = network(1, second_time=name == "meanflow"), network(1)
    if name == "dmd2":
        fake = FakeScore(fake, width=16, layers=[0], heads=settings["discriminator"]["heads"])
    distill(
        config,
        student=student,
        teacher=network(1),
        fake=fake if config["objective"]["dmd_weight"] > 0 else None,
        data=data,
        null_text=torch.zeros(1, WORDS, 8),
        resume_dir=folder / "resume",
        metrics_path=folder / "metrics.jsonl",
        mesh=start(device="cpu"),
        **options,
    )
    return student


def final_state(folder):
    newest = max((folder / "resume").glob("0*"))
    values = read_json(newest / "manifest.json")["values"]
    files = read_json(newest / "manifest.json")["files"]
    tensors = {name: torch.empty_like(value, device="cpu") for name, value in described(newest, files).items()}
    read_parts(newest, tensors)
    return values | tensors


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list):
        return flat(dict(enumerate(tree)), prefix)
    return {prefix: tree}


def assert_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_wall(folder):
    return [{key: value for key, value in row.items() if key != "wall"} for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An rCM run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    previews = []
    noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(3))

    def preview(update, denoise):
        previews.append((update, denoise(noise, torch.full((2,), 1.5, dtype=torch.float64), torch.zeros(2, WORDS, 8))))

    student = run(folder, configuration(), preview=preview)
    return folder, student, previews


class Killer:
    """A progress bar that sends a signal to its own process after a number of iterations."""

    def __init__(self, iterations, number):
        self.left, self.number = iterations, number

    def __call__(self, count, note):
        self.left -= count
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def killed_while_saving(nth):
    """Kill the process when the n-th state is on the disk but for its manifest."""
    complete, count = States._complete, iter(range(1, 1000))

    def die(self, *rest):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, *rest)

    States._complete = die


if __name__ == "__main__":  # a run in a process of its own, which dies as told: FOLDER (step|save) N
    _, place, where, number = sys.argv
    if where == "save":
        killed_while_saving(int(number))
    run(Path(place), configuration(), advance=Killer(int(number), signal.SIGKILL) if where == "step" else None)


@pytest.mark.parametrize(
    "deaths",
    [
        pytest.param([("step", 11)], id="once"),
        pytest.param([("step", 2), ("save", 2)], id="twice", marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_any_step_changes_no_bit(whole, tmp_path, deaths):
    source = Path(loop.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{source}:{source.parent / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for where, number in deaths:
        command = [sys.executable, __file__, str(tmp_path), where, str(number)]
        assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGKILL
        assert not (tmp_path / "metrics.jsonl").exists()
    student = run(tmp_path, configuration())
    assert_equal(student.state_dict(), whole[1].state_dict())
    assert_equal(final_state(tmp_path), final_state(whole[0]))
    assert without_wall(tmp_path) == without_wall(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, capsys, number):
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving:
        run(tmp_path, configuration(), advance=Killer(6, number))  # noticed with the figures of the next one
    assert leaving.value.code == EXIT_INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert "after iteration 7 of 20" in line
    assert "run the same command again" in line
    assert signal.getsignal(number) is handler
    assert final_state(tmp_path)["student.updates"] == 3
    assert_equal(run(tmp_path, configuration()).state_dict(), whole[1].state_dict())


def test_an_interrupted_run_ends_its_trace_and_its_log(tmp_path, monkeypatch):
    ended = []
    log = SimpleNamespace(log=lambda row, step: None, finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: log))
    with pytest.raises(SystemExit):
        run(tmp_path, configuration(profile=[2, 100], wandb="offline"), advance=Killer(2, signal.SIGTERM))
    assert ended == [True]
    trace = json.loads((tmp_path / "resume.trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    done = []
    (tmp_path / "resume").symlink_to(whole[0] / "resume")
    student = run(tmp_path, configuration(), advance=lambda count, note: done.append(count))
    assert done == [20]
    assert_equal(student.state_dict(), whole[1].state_dict())


def test_another_configuration_is_refused(whole, tmp_path):
    (tmp_path / "resume").symlink_to(whole[0] / "resume")
    with pytest.raises(UserError, match=r"batch was 3, is 4; inputs\.data was absent, is abc"):
        run(tmp_path, {**configuration(batch=4, state_every=1), "inputs": {"data": "abc"}})


@pytest.mark.parametrize(("section", "key", "value"), [("network", "time_scale", 10.0), ("text", "words", 4)])
def test_networks_that_only_compute_otherwise_are_refused(whole, tmp_path, section, key, value):
    (tmp_path / "resume").symlink_to(whole[0] / "resume")
    config = configuration()
    with pytest.raises(UserError, match=rf"\({section}\.{key} was \S+, is {value}\)"):
        run(tmp_path, {**config, section: config[section] | {key: value}})


def test_a_machine_that_would_choose_another_optimiser_is_refused(whole, tmp_path, monkeypatch):
    (tmp_path / "resume").symlink_to(whole[0] / "resume")
    monkeypatch.setattr(loop, "optimizer_kind", lambda asked, device: "transformer_engine")
    with pytest.raises(UserError, match=r"\(optimizer was torch, is transformer_engine\)"):
        run(tmp_path, configuration())


def test_rows_tell_what_happened(whole):
    table = rows(whole[0])
    assert [row["iteration"] for row in table] == list(range(1, 21))
    roles = "".join(row["role"][0] for row in table)
    assert roles == "sss" + "cc" + "ccs" * 5  # tangent warm-up and sCM alone, critic warm-up, alternation
    students = [row for row in table if row["role"] == "student"]
    assert [row["update"] for row in students] == list(range(1, 9))
    assert [row["warmup"] for row in students] == [0.5] + [1.0] * 7
    assert ["dmd_loss" in row for row in students] == [False] * 3 + [True] * 5
    assert students[-1]["balance"] == pytest.approx(0.5 * math.sqrt(DIM))
    assert all(row["gradient_norm"] > 0 and row["nonfinite_gradients"] == 0 for row in table)
    assert all(row["wall"]["seconds"] > 0 and row["wall"]["samples_per_second"] > 0 for row in table)
    assert all(math.isfinite(value) for row in table for value in row.values() if isinstance(value, float))


def test_previews_show_the_average(whole):
    assert [update for update, _ in whole[2]] == [3, 6]
    assert all(picture.isfinite().all() for _, picture in whole[2])
    assert not torch.equal(whole[2][0][1], whole[2][1][1])


def test_the_student_carries_the_average(whole):
    state = final_state(whole[0])
    averages = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    assert_equal(dict(whole[1].named_parameters()), averages)
    assert not torch.equal(state["ema.head.head.weight"], state["student.network.head.head.weight"])


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("scm", {"scm_loss"}),
        ("dcm", {"dcm_loss"}),
        ("meanflow", {"meanflow_loss"}),
        ("dmd", {"dmd_loss", "critic_loss"}),
        ("dmd2", {"dmd_loss", "gan_loss", "critic_loss"}),
    ],
)
def test_each_method_learns_alone_and_equally_long(tmp_path, name, losses):
    student = run(tmp_path, configuration(name, student_updates=5))
    table = rows(tmp_path)
    assert sum(row["role"] == "student" for row in table) == 5
    assert len(table) == 5 if losses.isdisjoint({"critic_loss"}) else 2 + 5 * 3
    assert {key for row in table for key in row if key.endswith("_loss")} == losses
    assert not torch.equal(student.head.head.weight, network(1).head.head.weight)
    assert all(math.isfinite(value) for row in table for value in row.values() if isinstance(value, float))


def test_methods_see_the_same_data_and_noise(whole, tmp_path):
    run(tmp_path, configuration("scm", student_updates=3, lr_decay="constant"))
    figures = ("scm_loss", "gradient_norm")
    alone, joint = rows(tmp_path)[0], rows(whole[0])[0]
    assert [alone[key] for key in figures] == [joint[key] for key in figures]


def test_the_seed_decides(tmp_path):
    losses = []
    for number, seed in enumerate((5, 5, 6)):
        run(tmp_path / str(number), {**configuration("scm", student_updates=2), "seed": seed})
        losses.append([row["gradient_norm"] for row in rows(tmp_path / str(number))])
    assert losses[0] == losses[1] != losses[2]


def test_draws_depend_on_the_place_in_the_global_batch():
    settings = Settings.of(configuration(batch=6))

    def drawn(positions):
        draws = Draws(torch.zeros(1, WORDS, 8), settings, positions, torch.device("cpu"))
        rollout = draws.rollout("student", 2, (4, 1, 2, 2))
        assert rollout.times.shape[0] == 3  # the third update: three steps
        text = draws.drop(torch.ones(len(positions), WORDS, 8), "student", 2)
        return text, rollout.times.T, rollout.noises.transpose(0, 1)

    whole_batch = drawn(range(6))
    for one, part in zip(whole_batch, drawn([1, 4]), strict=True):
        assert torch.equal(part, one[[1, 4]])


def test_lengths_of_rollouts():
    def steps(kind):
        settings = Settings.of(configuration(rollout_steps=kind))
        draws = [Draws(torch.zeros(1, WORDS, 8), settings, [k], torch.device("cpu")) for k in (0, 1)]
        lengths = [[one.rollout_steps("student", update) for update in range(400)] for one in draws]
        assert lengths[0] == lengths[1]  # the same for all samples of a batch
        return lengths[0]

    assert steps("cycle") == [1, 2, 3, 4] * 100
    counts = [steps("random").count(n) for n in range(6)]
    assert counts[0] == counts[5] == 0
    assert all(70 < count < 130 for count in counts[1:5])  # 100 each, give or take 3.5 deviations of 8.7


@pytest.mark.parametrize(
    ("batch", "groups", "micro", "expected"),
    [
        (5, 1, None, [[[0, 1, 2, 3, 4]]]),
        (5, 1, 2, [[[0, 1], [2, 3], [4]]]),
        (7, 2, 2, [[[0, 1], [2, 3]], [[4, 5], [6]]]),
        (5, 2, None, [[[0, 1, 2]], [[3, 4]]]),
    ],
)
def test_shares_of_a_batch(batch, groups, micro, expected):
    assert [[list(part) for part in parts] for parts in shares(batch, groups, micro)] == expected


@pytest.mark.parametrize(
    ("batch", "groups", "micro", "message"),
    [(2, 3, None, "batch is 2, but 3 groups"), (5, 2, 1, "do not make 3 micro-batches everywhere")],
)
def test_batches_that_cannot_be_shared_out(batch, groups, micro, message):
    with pytest.raises(UserError, match=message):
        shares(batch, groups, micro)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rcm", {"scm_only": 6}, "leave DMD none of the 8 student_updates"),
        ("dmd", {"max_rollout": 5}, "need 4 rollout_times"),
        ("scm", {"batsh": 3}, "unknown in the sections objective and distillation: batsh"),
        ("scm", {"lr_decay": "linear"}, "constant or cosine"),
        ("scm", {"phase": "late"}, "after_warmup or paper or reference"),
        ("scm", {"student_every": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_one_sentence(name, changes, message):
    with pytest.raises(UserError, match=message):
        Settings.of(configuration(name, **changes))


@pytest.mark.parametrize("key", ["recompute", "tangent_pass", "precision", "device"])
def test_impossible_ways_to_share_the_work_are_one_sentence(key):
    with pytest.raises(UserError, match=rf"parallel\.{key} is 'block'; allowed: \w+ or \w+"):
        Parallel(**{key: "block"})


@pytest.mark.parametrize("experiment", ["tiny-images", "tiny-clips"])
def test_the_shipped_configurations_sit_at_the_balance_of_the_paper(experiment):
    updates = set()
    for name in WEIGHTS:
        config = compose([f"experiment={experiment}", f"objective={name}"])
        settings = Settings.of(config)
        assert settings.name == name
        updates.add(settings.student_updates)
        if name == "rcm":
            latent_frames = 1 + (config["frames"] - 1) // config["codec"]["stride"]
            elements = config["codec"]["channels"] * latent_frames * 3 * 3
            assert 5 <= settings.dmd_weight / settings.consistency_weight * math.sqrt(elements) <= 14.2
    assert len(updates) == 1  # methods are compared at equal student updates


def test_name_and_weights_must_agree():
    config = configuration("scm")
    config["objective"]["dmd_weight"] = 0.5
    with pytest.raises(UserError, match=r"objective scm does not have .* consistency_weight 1, dmd_weight 0\.5"):
        Settings.of(config)


def test_faulty_gradients_are_counted_and_dropped():
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    learner = Learner(layer, 0.1, 10, Settings.of(configuration(lr_warmup=0, lr_decay="constant")))
    layer.weight.grad = torch.tensor([[float("nan"), -4.0, float("inf")]])
    figures = learner.update()
    assert figures == {"lr": 0.1, "gradient_norm": 4.0, "nonfinite_gradients": 2}
    # AdamW with beta1 = 0 takes the sign at its first step, behind the weight decay
    expected = before * (1 - 0.1 * 0.01) - 0.1 * torch.tensor([[0.0, -1.0, 0.0]])
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert layer.weight.grad is None


def test_gradients_are_not_clipped():
    layers = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    for layer, scale in zip(layers, (1.0, 1e6), strict=True):
        learner = Learner(layer, 0.1, 10, Settings.of(configuration()))
        layer.weight.grad = torch.tensor([[3.0, 4.0]]) * scale
        assert learner.update()["gradient_norm"] == pytest.approx(5 * scale)
        moment = learner.state()["optimizer"]["weight"]["exp_avg_sq"]
        torch.testing.assert_close(moment, torch.tensor([[9.0, 16.0]]) * scale**2 * 0.001)

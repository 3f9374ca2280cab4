"""Mistakes in the configuration: one sentence that names the key, what was given and what is allowed."""

import json
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
import yaml

from rcm.artefact import UserError
from rcm.cli.config import PIXELS, compose, config_dir, options, read_schema, validate
from rcm.data import world

ROOT = Path(__file__).parents[2]


WITH_ALL = ("tiny-images", "wan2.1-1.3b-clips")


@pytest.mark.parametrize(
    ("experiment", "objective"),
    [
        pytest.param(e, o, marks=[] if e in WITH_ALL or o == "rcm" else pytest.mark.slow)
        for e in options("experiment")
        for o in options("objective")
    ],
)
def test_every_experiment_composes_with_every_objective(experiment: str, objective: str) -> None:
    tree = compose([f"experiment={experiment}", f"objective={objective}", "seed=3"])
    assert (tree["seed"], tree["objective"]["name"]) == (3, objective.partition("-")[0])
    assert tree["media"] in experiment
    json.dumps(tree)  # plain values, everything resolved


def test_clips_differ_from_images_in_what_their_file_says() -> None:
    images, clips = compose(), compose(["experiment=tiny-clips"])
    assert (images["frames"], clips["frames"]) == (1, 9)
    assert images["codec"] == clips["codec"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.gidance=3", ("teacher.gidance", "3", "teacher.steps", "did you mean 'teacher.guidance'")),
        ("+teacher.extra=3", ("teacher.extra", "3", "teacher.guidance")),
        ("~teacher.steps", ("teacher.steps", "missing")),
        ("teacher.steps=many", ("teacher.steps", '"many"', "an integer of at least 1")),
        ("teacher.steps=2.5", ("teacher.steps", "2.5", "an integer of at least 1")),
        ("seed=1e3", ("seed", "1000.0", "an integer")),
        ("distillation.batch=0", ("distillation.batch", "0", "at least 1")),
        ("distillation.ema=1.0", ("distillation.ema", "1.0", "above 0 and below 0.2886")),
        ("experiment=tiny-image", ("experiment", '"tiny-image"', "tiny-images", "did you mean")),
        ("objective=rmc", ("objective", '"rmc"', "dmd2, meanflow, rcm, rcm-fixed-rollout", "did you mean 'rcm'")),
        ("suite=reprot", ("suite", '"reprot"', "did you mean 'report'")),
        ("objective=gan", ("objective", '"gan"', "dcm, dmd, dmd-random-rollout, dmd2, meanflow, rcm")),
        ("evaluation.scorer=vbench", ("evaluation.scorer", '"vbench"', "shapes, for these images")),
        ("~evaluation.oracle_at_least", ("evaluation.oracle_at_least", "the scorer shapes needs it")),
        ("objective.consistency=null", ("objective.consistency", "null", "scm, dcm or meanflow")),
        ("objective.gan_weight=1", ("objective.gan_weight", "1", "0 for objective.name rcm")),
        ("objective.dmd_weight=0", ("objective.dmd_weight", "0", "a number above 0 for objective.name rcm")),
        ("distillation.derivative=exct", ("distillation.derivative", "did you mean 'exact'")),
        ("distillation.derivative_step=1", ("distillation.derivative_step", "of at most 0.1")),
        ("distillation.dcm_skip=49", ("distillation.dcm_skip", "49", "distillation.dcm_steps (48)")),
        ("distillation.profile=[3,2]", ("distillation.profile", "[3, 2]", "FIRST <= LAST")),
        ("parallel.micro_batch=49", ("parallel.micro_batch", "49", "distillation.batch (48)")),
        ("parallel.shard=0", ("parallel.shard", "0", "an integer of at least 1 or null")),
        ("parallel.precision=float16", ("parallel.precision", '"float16"', "float32, bfloat16")),
        ("parallel.recompute=block", ("parallel.recompute", "none, blocks, matmuls", "did you mean 'blocks'")),
        ("parallel.offload=true", ("parallel.offload", "did you mean 'parallel.offload_teacher'")),
        ("network.kind=wann", ("network.kind", '"wann"', "wan, cosmos")),
        ("+network.rope_scale=[1,1,1]", ("network.rope_scale", "unknown")),
        ("distillation.lr_decay=cosin", ("distillation.lr_decay", "constant, cosine")),
        ("network.patch=[1,1]", ("network.patch", "[1, 1]", "length")),
        ("network.heads=5", ("network.width", "network.heads")),
        ("network.in_channels=16", ("network.in_channels", "16", "codec.channels")),
        ("frames=4", ("frames", "4", "1 for images")),
        ("sampler.mid_times=[1,1.2]", ("sampler.mid_times", "[1, 1.2]", "never rise")),
        ("sampler.mid_times=[1.57]", ("sampler.mid_times", "1.57", "sampler.sigma_max")),
        ("distillation.student_updates=50", ("distillation.scm_only", "200", "(0 + 200)", "student_updates (50)")),
        ("distillation.tangent_warmup=500", ("distillation.tangent_warmup", "500", "distillation.scm_only")),
        ("pretrain.ema=0.3", ("pretrain.ema", "0.3", "below 0.2886")),
        ("distillation.scm_time.name=shifted_uniform", ("distillation.scm_time", "shift: above 0", "~KEY")),
        ("~pretrain.time.std", ("pretrain.time", "{name: lognormal, mean: NUMBER, std: above 0}")),
        ("codec.cell=10", ("codec.cell", "10", "48 x 48 pixels")),
        ("height=96", ("height", "96", "48, the size of the tiny world")),
        ("inference.precision=float16", ("inference.precision", "float32, bfloat16")),
        ("teacher.sampler=unpic", ("teacher.sampler", "did you mean 'unipc'")),
        ("text.windoww=3", ("text.windoww", "did you mean 'text.window'")),
        ("+suites.report.file=prompts_report", ("suites.report.per_task", "unknown", "suites.report.prompts")),
        ("codec.cell=8", ("network.positions", "[3, 3, 3]", "[1, 6, 6]")),
        ("network.patch=[1,2,2]", ("network.patch", "[1, 2, 2]", "[1, 3, 3]")),
        ("prompts.vocabulary=coco", ("prompts.vocabulary", "coco", "tiny")),
        ("checkpoints.codec.sha256=''", ("checkpoints.codec.sha256", "64 hexadecimal digits")),
        ("teacher.guidance.scale=1", ("teacher.guidance.scale", "no keys below")),
        ("teacher", ("teacher",)),
        ("frames=${nothing}", ("nothing",)),
    ],
)
def test_a_mistake_is_one_sentence(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        compose([override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_mistakes_of_several_keys() -> None:
    with pytest.raises(UserError, match=r"'objective.rollout_times' is \[1.3\]; allowed: null, or at least 3 times"):
        compose(["objective=dmd", "sampler.mid_times=[1.3]"])
    for mistake, words in {
        "objective.gan_weight=0": "'objective.gan_weight' is 0; allowed: a number above 0 for objective.name dmd2",
        "objective.consistency=scm": "'objective.consistency' is \"scm\"; allowed: null for objective.name dmd2",
        "distillation.discriminator.layers=[1,4]": r"layers' is \[1, 4\]; allowed: .* from 0 to 3",
        "distillation.discriminator.layers=[3,1]": r"layers' is \[3, 1\]; allowed: .*rising",
        "distillation.discriminator.heads=3": r"heads' is 3; allowed: a divisor of network.width \(128\)",
    }.items():
        with pytest.raises(UserError, match=words):
            compose(["objective=dmd2", mistake])
    tasks = compose()["pretrain"]["weights"]
    with pytest.raises(UserError, match=r"'pretrain.weights'.*at least one above 0"):
        compose([f"pretrain.weights.{task}=0" for task in tasks])


@pytest.mark.parametrize(
    ("experiment", "override", "words"),
    [
        (
            "cosmos-predict2-2b-images",
            "evaluation.scorer=shapes",
            '"shapes"; allowed: geneval-mask2former or geneval-m',
        ),
        ("wan2.1-14b-clips", "evaluation.scorer=geneval-mmdet", "vbench or vbench-long or vbench-native, for these cl"),
        ("cosmos-predict2-14b-images", "~checkpoints.detector", "'checkpoints.detector' is missing; GenEval (HF Mask"),
        ("wan2.1-1.3b-clips", "~checkpoints.vgg", "'checkpoints.vgg' is missing; Diversity needs it"),
        ("cosmos-predict2-2b-images", "~evaluation.known_at_least", "geneval-mask2former needs it"),
    ],
)
def test_a_scorer_fits_what_it_scores(experiment: str, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        compose([f"experiment={experiment}", override])
    assert words in str(error.value)


def test_prompts_of_vbench_are_a_choice() -> None:
    sources = [
        compose(["experiment=wan2.1-1.3b-clips", *words])["checkpoints"]["prompts_report"]["source"].rpartition("/")[2]
        for words in ([], ["prompts_vbench=wan"], ["prompts_vbench=plain"], ["prompts_vbench=self-forcing"])
    ]
    assert sources == [
        *("all_dimension_longer.txt", "all_dimension_aug_wanx_seed42.txt", "all_dimension.txt"),
        "all_dimension_extended.txt",
    ]


def test_what_is_allowed_composes() -> None:
    compose(["distillation.student_updates=50", "distillation.scm_only=20"])  # the example in the documents
    compose(["objective=scm", "distillation.student_updates=50"])
    compose(["sampler.mid_times=[1.5,1.4,1.0]"])  # the code's
    compose(["objective=rcm", "objective.consistency=dcm"])
    compose(["distillation.discriminator.layers=[4]"])  # DMD2's alone
    compose(["parallel.replicate=2", "parallel.shard=4", "parallel.context=2", "distillation.profile=[2, 2]"])
    times = "distillation.scm_time"
    compose([f"{times}.name=shifted_uniform", f"+{times}.shift=3", f"~{times}.mean", f"~{times}.std"])


def test_the_world_has_the_size_that_is_checked() -> None:
    assert world.SIZE == PIXELS


def test_config_dir_can_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCM_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="RCM_CONFIG_DIR"):
        config_dir()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("extra: [1, 2", ("rcm.yaml", "line 6")),
        ("name: rcm", ("rcm.yaml", "duplicate key name")),
        ("nmae: rcm", ("'objective.nmae'", "did you mean 'objective.name'")),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(
    line: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config/objective/rcm.yaml").write_text(
        f"name: rcm\nconsistency_weight: 1\ndmd_weight: 1\n\n\n{line}\n"
    )
    monkeypatch.setenv("RCM_CONFIG_DIR", str(tmp_path / "config"))
    with pytest.raises(UserError) as error:
        compose()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def pipeline() -> dict:
    return yaml.safe_load((ROOT / "config/pipeline.yaml").read_text(encoding="utf-8"))


def pipeline_schema() -> dict:
    return read_schema(ROOT / "workflow/schemas/pipeline.schema.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"foo": 1}, ("'foo'", "1", "unknown", "scale")),
        ({"step": [1]}, ("'step'", "did you mean 'steps'")),
        ({"clips": "most"}, ("'clips'", '"most"', "rcm, all")),
        ({"methods": ["scm", "gan"]}, ("'methods.1'", '"gan"', "scm, dcm, meanflow, dmd, dmd2, rcm")),
        ({"tables": ["table4"]}, ("'tables.0'", '"table4"', "table1, table2, table3, table_text")),
        ({"methods": []}, ("'methods'", "[]", "at least 1")),
        ({"steps": [0]}, ("'steps.0'", "0", "at least 1")),
        ({"nproc": 1.5}, ("'nproc'", "1.5", "an integer of at least 1")),
        ({"steps": 4}, ("'steps'", "4", "a list")),
        ({"seeds": [0, 0]}, ("'seeds'", "all different")),
        ({"scatter": {"synthesize": 2, "embed": 1, "report": 2}}, ("'scatter.diversity'", "missing")),
    ],
)
def test_a_mistake_in_the_pipeline_is_one_sentence(change: dict, words: tuple[str, ...]) -> None:
    validate(pipeline(), pipeline_schema())
    with pytest.raises(UserError) as error:
        validate(pipeline() | change, pipeline_schema())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", [name for name in options("network") if name != "wan-tiny"])
def test_the_networks_of_the_paper_fit_the_schema(name: str) -> None:
    network = yaml.safe_load((ROOT / f"config/network/{name}.yaml").read_text(encoding="utf-8"))
    schema = read_schema(ROOT / "config/schema.json")
    tree = compose()
    validate({**tree, "network": network, "synthesizer": network}, schema)
    with pytest.raises(UserError, match=r"'network\.width' is missing"):
        validate({**tree, "network": {key: network[key] for key in network if key != "width"}}, schema)


def test_each_choice_where_paper_and_code_differ_is_explained() -> None:
    """A comment beside the key names every allowed value; its default is the first that the schema lists."""
    lines = (ROOT / "config/experiment/tiny-images.yaml").read_text(encoding="utf-8").splitlines()
    schema, tree = read_schema(ROOT / "config/schema.json"), compose()
    found = 0
    for section in ("distillation", "parallel"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{section}:"))
        for key, said in schema["properties"][section]["properties"].items():
            if "enum" not in said or key == "lr_decay":
                continue
            at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {key}:"))
            end = next(i for i in range(at + 1, len(lines)) if not lines[i].startswith(" " * 20))
            comment = " ".join(line.partition("#")[2] for line in lines[at:end])
            missing = [value for value in said["enum"] if value not in f"{comment} {tree[section][key]}"]
            assert not missing, (key, missing)
            if key not in ("wandb", "device"):
                assert tree[section][key] == said["enum"][0]
            found += 1
    assert found >= 10


def test_the_map_of_equations_names_what_exists() -> None:
    text = (ROOT / "docs/equations.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert len(tests) > 30
    assert not {name for name in tests if f"def {name}(" not in sources}
    for name in sorted(set(re.findall(r"`(rcm\.[\w.]+)`", text))):
        pkgutil.resolve_name(name)
    choices = set(re.findall(r"^\|[^|]+\| `(\w+)`: `", text, re.MULTILINE))
    tree = compose()
    assert choices <= {*tree["distillation"], *tree["objective"]} and len(choices) == 8


def test_every_key_of_the_pipeline_is_documented() -> None:
    text = (ROOT / "config/README.md").read_text(encoding="utf-8")
    missing = [key for key in pipeline_schema()["properties"] if f"`{key}`" not in text]
    assert not missing

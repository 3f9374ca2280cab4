"""Tables say what the scores say, keep the paper's numbers apart, and refuse when the controls fail."""

import csv
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcm.artefact import UserError
from rcm.evaluation.scores import evaluate
from rcm.report.panels import Panel, panels
from rcm.report.rows import from_csv, to_csv
from rcm.report.scores import CONTROLS
from rcm.report.tables import make_table

from .conftest import CARD

Scores = dict[str, list[dict[str, Any]]]
PAPER = Path(__file__).parents[2] / "config/published"


def split(scores: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [s for s in scores if s["model"] not in CONTROLS], [s for s in scores if s["model"] in CONTROLS]


@pytest.fixture(scope="module")
def made(scores: Scores, published: Path) -> dict[str, dict[str, str]]:
    return {
        "table1": make_table("table1", *split(scores["images"]), published),
        "table2": make_table("table2", *split(scores["clips"]), PAPER / "table2.csv"),
    }


def test_csv_holds_every_number(made: dict[str, dict[str, str]], scores: Scores) -> None:
    rows = list(csv.DictReader(io.StringIO(made["table1"]["csv"])))
    found = {(r["model"], r["seed"], r["steps"], r["metric"]): r for r in rows}
    for score in split(scores["images"])[0]:
        model, _, seed = score["model"].partition("-")
        for metric, entry in score["metrics"].items():
            row = found[model, seed, str(score["steps"]), metric]
            if entry["value"] is None:
                assert row["value"] == row["low"] == row["high"] == ""
                continue
            assert float(row["value"]) == pytest.approx(entry["value"], abs=1e-6)
            assert float(row["low"]) == pytest.approx(entry["low"], abs=1e-6)
            assert row["kind"] == entry["kind"]
    teacher = next(s for s in scores["images"] if s["model"] == "teacher")["metrics"]["shapeeval.overall"]["value"]
    rcm = next(s for s in scores["images"] if s["model"] == "rcm-0" and s["steps"] == 4)
    share = found["rcm", "0", "4", "shapeeval.relative_to_teacher"]
    assert float(share["value"]) == pytest.approx(rcm["metrics"]["shapeeval.overall"]["value"] / teacher, abs=1e-6)
    assert float(share["low"]) < float(share["value"]) < float(share["high"])


def test_csv_is_read_back_as_written(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        assert to_csv(from_csv(texts["csv"])) == texts["csv"]


def test_order_of_inputs_does_not_matter(made: dict[str, dict[str, str]], scores: Scores, published: Path) -> None:
    models, controls = split(scores["images"])
    assert make_table("table1", models[::-1], controls[::-1], published) == made["table1"]


def test_published_numbers_have_panels_of_their_own(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        *own, paper = panels(from_csv(texts["csv"]))
        assert paper.published and not any(panel.published for panel in own)
        assert "other models, another benchmark" in paper.caption
        for panel in own:
            assert "GenEval" not in panel.title and "VBench" not in panel.title
            assert not any("GenEval" in head or "VBench" in head for head in panel.head)
    *_, paper = panels(from_csv(made["table1"]["csv"]))
    assert [cell.text for cell in paper.groups[0][1][2]][:5] == [
        *("Cosmos-Predict2 + rCM", "0.6B, 1360×768", "4", "0.79", "1.00")  # digits as printed
    ]
    assert paper.groups[0][1][1][2].text == "35×2"


def test_shapebench_names_the_kind(made: dict[str, dict[str, str]]) -> None:
    panel = next(p for p in panels(from_csv(made["table2"]["csv"])) if p.title == "ShapeBench")
    assert {line[0].text: line[1].text for _, lines in panel.groups for line in lines} == {
        "Dynamic degree": "substituted model",
        "Temporal flickering": "same formula",
        "Motion": "analogue",
    }


def test_markdown_rows_have_the_columns_of_their_heading(made: dict[str, dict[str, str]]) -> None:
    for texts in made.values():
        for block in texts["md"].split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def test_seeds_get_rows_of_their_own_and_a_mean(
    scored: Callable[..., dict[str, Any]], scores: Scores, published: Path
) -> None:
    _, controls = split(scores["images"])
    models = [scored("rcm-0", 4, "images", 0.8), scored("rcm-1", 4, "images", 0.9, seed=1)]
    rows = from_csv(make_table("table1", models, controls, published)["csv"])
    overall = {row.seed: float(row.value) for row in rows if (row.model, row.metric) == ("rcm", "shapeeval.overall")}
    assert overall["mean"] == pytest.approx((overall["0"] + overall["1"]) / 2, abs=1e-6)
    assert panels(rows)[0].head[1] == "Seed"


@pytest.mark.parametrize(("model", "quality"), [("oracle", 0.90), ("shuffled", 0.30)])
def test_no_table_when_the_controls_fail(
    model: str, quality: float, scored: Callable[..., dict[str, Any]], scores: Scores, published: Path
) -> None:
    models, controls = split(scores["images"])
    controls = [c for c in controls if c["model"] != model] + [scored(model, 0, "images", quality)]
    with pytest.raises(UserError, match=r"ground truth has|renders of other prompts have"):
        make_table("table1", models, controls, published)
    assert make_table("table1", models, controls, published, oracle_at_least=0.5, floor_at_most=0.5)


def test_no_table_without_controls(scores: Scores, published: Path) -> None:
    with pytest.raises(UserError, match="oracle"):
        make_table("table1", split(scores["images"])[0], [], published)


@pytest.mark.parametrize(("media", "name"), [("images", "table1"), ("clips", "table2")])
def test_scores_of_the_evaluation_fit(media: str, name: str, sampled: Callable[..., Path], tmp_path: Path) -> None:
    found = {}
    for model, steps, quality in (("teacher", 20, 1.0), ("rcm-0", 4, 1.0), ("oracle", 0, 1.0), ("shuffled", 0, 0.0)):
        folder = sampled(tmp_path / f"{model}-{steps}" / "report" / "1-of-1", media, quality, per_task=1)
        found[model] = evaluate([folder], media=media, model=model, steps=steps, resamples=50).scores
    made = make_table(
        name, [found["teacher"], found["rcm-0"]], [found["oracle"], found["shuffled"]], PAPER / f"{name}.csv"
    )
    rows = {(row.model, row.metric): row for row in from_csv(made["csv"])}
    assert float(rows["rcm", "shapeeval.relative_to_teacher"].value) == pytest.approx(1.0)
    measured = {row.metric for row in rows.values() if row.block != "published"}
    assert measured == {*found["oracle"]["metrics"], "shapeeval.relative_to_teacher"}
    shown = {(line[0].text) for panel in panels(list(rows.values())) for _, lines in panel.groups for line in lines}
    assert "rCM" in shown and "Ground truth" in shown
    if media == "clips":
        assert {"Dynamic degree", "Temporal flickering", "Spatial relationship strict", "Colour"} <= shown


# --- Real evaluators -----------------------------------------------------------------------------------------------


def shown(made: dict[str, str]) -> dict[str, Panel]:
    return {panel.title: panel for panel in panels(from_csv(made["csv"]))}


def texts(panel: Panel) -> list[list[str]]:
    return [[f"{cell.text} {cell.note}".strip() for cell in line] for _, lines in panel.groups for line in lines]


def of(score: dict[str, Any], **evaluator: Any) -> dict[str, Any]:
    """The score with other facts about its evaluation."""
    return score | {"evaluator": score["evaluator"] | evaluator}


@pytest.fixture(scope="module")
def real(
    genevals: list[dict[str, Any]], vbenches: list[dict[str, Any]], speeds: list[dict[str, Any]]
) -> dict[str, dict[str, str]]:
    return {
        "table1": make_table("table1", genevals, [], PAPER / "table1.csv"),
        "table2": make_table("table2", vbenches, [], PAPER / "table2.csv", throughput=speeds),
        "table3": make_table("table3", [], [], PAPER / "table3.csv"),
    }


def test_panels_of_a_real_scale_stand_in_their_order(real: dict[str, dict[str, str]]) -> None:
    assert list(shown(real["table1"])) == [
        "GenEval (HF Mask2Former)",
        "Beside the paper: GenEval (HF Mask2Former)",
        "Diversity",
        "GenEval, as printed in Table 1 of the rCM paper",
    ]
    assert list(shown(real["table2"])) == [
        "VBench (official code)",
        "Beside the paper: VBench (official code)",
        "VBench (official code): dimensions",
        "VBench, as printed in Table 2 of the rCM paper",
    ]


def test_difference_from_the_paper_is_that_of_hand(real: dict[str, dict[str, str]]) -> None:
    vbench = texts(shown(real["table2"])["Beside the paper: VBench (official code)"])
    assert len(vbench) == 4 * 4
    assert vbench[0] == ["Teacher", "50", "Total", "82.70 [80.70, 84.70]", "83.02", "−0.32", "yes"]  # percent
    assert vbench[1] == ["", "", "Quality", "83.70 [81.70, 85.70]", "83.95", "−0.25", "yes"]
    assert vbench[8] == ["rCM", "2", "Total", "81.00 [79.00, 83.00]", "84.09", "−3.09", "no"]
    assert vbench[11] == ["", "", "Frames/s", "22.6", "23.0", "−0.4", "–"]
    geneval = texts(shown(real["table1"])["Beside the paper: GenEval (HF Mask2Former)"])
    assert len(geneval) == 4 * 7
    assert geneval[21] == ["rCM", "4", "Overall", "0.812 [0.792, 0.832]", "0.81", "+0.002", "yes"]  # fractions
    assert geneval[26] == ["", "", "Position", "0.612 [0.592, 0.632]", "0.58", "+0.032", "no"]


def test_only_models_and_steps_of_the_paper_stand_beside_it(genevals: list[dict[str, Any]]) -> None:
    big = [of(score, paper="14B") for score in genevals]  # of which the paper has no DMD2
    found = {line[0] for line in texts(list(shown(make_table("table1", big, [], PAPER / "table1.csv")).values())[1])}
    assert found == {"Teacher", "rCM", ""}
    for other in ([of(score, paper=None) for score in genevals], [score | {"steps": 3} for score in genevals[2:3]]):
        titles = list(shown(make_table("table1", other, [], PAPER / "table1.csv")))
        assert not any("Beside" in title for title in titles)


def test_published_rows_never_stand_among_measured_ones(real: dict[str, dict[str, str]]) -> None:
    for name in ("table1", "table2"):
        *own, paper = shown(real[name]).values()
        assert paper.published and not any(panel.published for panel in own)
        names = {line[0] for panel in own for line in texts(panel)}
        assert not any("Cosmos" in found or "Wan" in found or "SD" in found for found in names)


def test_captions_say_what_moves_a_score(real: dict[str, dict[str, str]], genevals: list[dict[str, Any]]) -> None:
    panel = shown(real["table1"])["GenEval (HF Mask2Former)"]
    said = f"{panel.caption} {panel.provenance}"
    for fact in (
        "553 prompts, 2212 samples (4 each)",
        "(1000 resamples, seed 0)",
        "not GenEval (mmdet) numbers",
        "mask2former-swin-small-coco-instance abababababab,",
        "on NVIDIA H100 80GB HBM3, torch 2.13.0, transformers 5.23.0",
        "Known-image check: 0.95 (19 of 20 facts).",
        "Prompts: SHA-256 5c48e0813e81 as they were scored, from evaluation_metadata.jsonl.",
        "Size: 1360×768.",
        "Sampler: cosmos, guidance 4.5 (×2 evaluations a step), shift 1 (Teacher).",
        "Times: 1.558 1.3 1 0.6 (DMD2, rCM at 4); 1.558 (rCM at 1).",
        "σ_max: 80 (Teacher); 1600 (DMD2, rCM).",
    ):
        assert fact in said
    clips = shown(real["table2"])["VBench (official code)"].provenance
    assert "SHA-256 7701cd2e9cff as they were scored, from all_dimension_longer.txt, SHA-256 58ed0665de52c1bd." in clips
    assert "Size: 1360×768×81." in clips
    for score in genevals:
        assert score["evaluator"]["sampling"]["checkpoint_sha256"][:12] in said
    for name in ("table1", "table2"):
        assert all(panel.provenance for panel in shown(real[name]).values() if not panel.published)
    assert "14d1253d57725f2f" not in said  # a hash is shown by twelve digits, and whole in the CSV
    row = from_csv(real["table1"]["csv"])[0]
    assert len(row.checkpoint_sha256) == 64 and row.sigma_max == "80" and row.device == "NVIDIA H100 80GB HBM3"


def test_scores_of_two_detectors_get_panels_of_their_own(genevals: list[dict[str, Any]]) -> None:
    official = [of(score, name="GenEval (mmdet)", models={"mmdet": "aa" * 32}) for score in genevals]
    made = make_table("table1", [*genevals, *official], [], PAPER / "table1.csv")
    found = shown(made)
    apart = {title: panel for title, panel in found.items() if title.startswith("GenEval (") and "group" in title}
    assert list(apart) == ["GenEval (HF Mask2Former), group 1 of 2", "GenEval (mmdet), group 2 of 2"]
    first, second = apart.values()
    assert first.provenance.startswith("Not comparable with the other groups: group 2 differs in evaluator and models.")
    assert second.provenance.startswith(
        f"Not comparable with the other groups; in what they differ stands under “{first.title}”."
    )
    assert len(texts(first)) == len(texts(second)) == len(genevals)
    assert make_table("table1", [*official, *genevals], [], PAPER / "table1.csv") == made


def test_how_well_known_images_went_parts_nothing(genevals: list[dict[str, Any]]) -> None:
    teacher, *students = genevals
    other = of(teacher, known={"score": 0.9, "facts": 20, "failed": ["a", "b"], "images": []})
    panel = shown(make_table("table1", [other, *students], [], PAPER / "table1.csv"))["GenEval (HF Mask2Former)"]
    assert "Known-image check: 0.9 (18 of 20 facts) (Teacher); 0.95 (19 of 20 facts) (DMD2, rCM)." in panel.provenance


def sampled_at(score: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return of(score, sampling=score["evaluator"]["sampling"] | facts)


def test_students_of_other_noise_or_size_stand_apart_each_with_the_teacher(genevals: list[dict[str, Any]]) -> None:
    teacher, dmd2, rcm, _ = genevals
    found = shown(make_table("table1", [teacher, dmd2, sampled_at(rcm, sigma_max=80)], [], PAPER / "table1.csv"))
    first, second = (panel for title, panel in found.items() if title.startswith("GenEval ("))
    assert [line[0] for line in texts(first)] == ["Teacher", "DMD2"]
    assert [line[0] for line in texts(second)] == ["Teacher", "rCM"]
    assert "group 2 differs in σ_max." in first.provenance
    found = shown(make_table("table1", [teacher, dmd2, sampled_at(rcm, width=640)], [], PAPER / "table1.csv"))
    assert "group 2 differs in size." in next(iter(found.values())).provenance


def test_totals_of_some_dimensions_are_named_and_never_beside_the_paper(vbenches: list[dict[str, Any]]) -> None:
    missing = ["color", "scene", "object_class", "human_action", *(f"a cat-{index}.mp4" for index in range(7))]
    made = make_table("table2", [of(score, missing=missing) for score in vbenches], [], PAPER / "table2.csv")
    found = shown(made)
    first = found["VBench (official code), 12 of 16 dimensions"]
    assert "12 of 16 dimensions, normalised" in first.caption and "these totals are not VBench's" in first.caption
    assert (
        "Missing: 4 of 16 dimensions (color, scene, object_class, human_action); 7 samples (a cat-0.mp4, a cat-1.mp4, "
        "a cat-2.mp4, … and 4 more)." in first.provenance
    )
    assert not any("Beside" in title for title in found)
    other = [of(vbenches[0], missing=missing), of(vbenches[1], missing=[*missing[:-1], "a dog-0.mp4"])]
    assert from_csv(make_table("table2", other, [], None)["csv"])[-1].comparable == "2"  # by all names, not the first


def test_the_mean_of_seeds_is_the_mean_of_what_they_report(vbenches: list[dict[str, Any]]) -> None:
    def seed(number: int, value: float, by_prompt: list[float]) -> dict[str, Any]:
        metrics = {"vbench.color": {"value": value, "low": value - 0.1, "high": value + 0.1, "kind": "official"}}
        per_prompt = {"tag": ["color"] * 4, "vbench.color": by_prompt}
        return vbenches[2] | {"model": f"rcm-{number}", "metrics": metrics, "per_prompt": per_prompt}

    seeds = [seed(0, 0.9, [1.0, 0.5, 1.0, 0.5]), seed(1, 0.8, [0.5, 0.5, 1.0, 0.5])]
    rows = from_csv(make_table("table2", seeds, [], None)["csv"])
    mean = next(row for row in rows if (row.metric, row.seed) == ("vbench.color", "mean"))
    assert float(mean.value) == pytest.approx(0.85)
    assert float(mean.low) < 0.85 < float(mean.high)


def test_seeds_are_told_apart_only_where_they_differ(genevals: list[dict[str, Any]]) -> None:
    teacher, _, first, _ = genevals
    scores = [teacher, first, of(first | {"model": "rcm-1"}, sampling=first["evaluator"]["sampling"] | {"seed": 7})]
    said = next(iter(shown(make_table("table1", scores, [], None)).values())).provenance
    assert "σ_max: 80 (Teacher); 1600 (rCM)." in said
    assert (
        f"Sampling: seed 43, bfloat16, {CARD} (Teacher, rCM (seed 0)); seed 7, bfloat16, {CARD} (rCM (seed 1))." in said
    )


def test_scores_of_text_and_others_share_no_table(genevals: list[dict[str, Any]]) -> None:
    text = of(genevals[2] | {"metrics": {"text.cer": {"value": 0.3, "low": None, "high": None, "kind": "analogue"}}})
    with pytest.raises(
        UserError, match=r"rcm-0-4\.json holds scores of small text, which belong in table_text, not in"
    ):
        make_table("table1", [genevals[0], text], [], None)
    with pytest.raises(UserError, match=r"teacher-35\.json holds scores of no small text"):
        make_table("table_text", [genevals[0]], [], None)
    panel = next(iter(shown(make_table("table_text", [text], [], None)).values()))
    assert "Brackets" not in panel.caption


def test_the_papers_table_must_be_that_table(genevals: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table2\.csv lacks the column 'overall'"):
        make_table("table1", genevals, [], PAPER / "table2.csv")
    (tmp_path / "latin.csv").write_bytes("group,model\nteacher,\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv cannot be read: it is no text in UTF-8"):
        make_table("table1", genevals, [], tmp_path / "latin.csv")


def test_diversity_counts_prompts_by_a_measure_with_values(genevals: list[dict[str, Any]]) -> None:
    empty = {"value": None, "low": None, "high": None, "n_prompts": 0, "kind": "same_formula"}
    some = {"value": 0.2, "low": 0.1, "high": 0.3, "n_prompts": 24, "kind": "same_formula"}
    metrics = {"geneval.overall": genevals[2]["metrics"]["geneval.overall"], "diversity.clip_distance": empty}
    score = genevals[2] | {"metrics": metrics | {"diversity.vbench2": some}}
    assert " 24 prompts, 480 samples" in shown(make_table("table1", [score], [], None))["Diversity"].caption


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompts_sha256": "01" * 32}, "prompts"),
        ({"missing": ["00012/samples/0003.png", "00013/samples/0000.png"]}, "what is missing"),
        ({"known": None}, "known-image check"),
        ({"versions": {"torch": "2.13.0", "transformers": "4.0.0"}}, "version of the evaluator's package"),
        ({"protocol": "vbench-long"}, "protocol"),
        ({"gpus": 8}, "number of GPUs"),
    ],
)
def test_what_cannot_be_compared_shares_no_column(
    change: dict[str, Any], word: str, genevals: list[dict[str, Any]]
) -> None:
    teacher, *students = genevals
    made = make_table("table1", [of(teacher, **change), *students], [], PAPER / "table1.csv")
    headlines = [panel for title, panel in shown(made).items() if title.startswith("GenEval (")]
    assert [len(texts(panel)) for panel in headlines] == [1, 3]
    assert f"group 2 differs in {word}." in headlines[0].provenance
    if "missing" in change:
        assert "Missing: 2 samples (00012/samples/0003.png, 00013/samples/0000.png)." in headlines[0].provenance


def test_seeds_are_averaged_among_comparable_scores_only(genevals: list[dict[str, Any]]) -> None:
    first = genevals[2]
    second, third = (first | {"model": f"rcm-{seed}"} for seed in (1, 2))
    metrics = third["metrics"] | {"geneval.overall": third["metrics"]["geneval.overall"] | {"value": 0.5}}
    made = make_table("table1", [first, second, of(third | {"metrics": metrics}, gpus=8)], [], PAPER / "table1.csv")
    rows = [row for row in from_csv(made["csv"]) if row.metric == "geneval.overall"]
    assert {(row.seed, row.value) for row in rows} == {
        *(("0", "0.812000"), ("1", "0.812000"), ("mean", "0.812000"), ("2", "0.500000"))
    }


def test_scores_of_another_version_are_refused_by_name(genevals: list[dict[str, Any]]) -> None:
    old = of(genevals[2], version="0")
    with pytest.raises(UserError, match=r"results/images/scores/rcm-0-4\.json is by version 0 of the evaluator"):
        make_table("table1", [*genevals[:2], old], [], PAPER / "table1.csv")
    with pytest.raises(UserError, match=r"rcm-0-4\.json is a second score"):
        make_table("table1", [genevals[2], genevals[2]], [], PAPER / "table1.csv")


def test_diversity_stands_beside_quality_at_one_sigma_max(
    real: dict[str, dict[str, str]], genevals: list[dict[str, Any]], made: dict[str, dict[str, str]]
) -> None:
    panel = shown(real["table1"])["Diversity"]
    assert panel.head == [
        "Model",
        "Steps",
        "GenEval\noverall",
        "CLIP distance",
        "DINO distance",
        "VBench-2.0 diversity",
    ]
    assert texts(panel)[2][2] == "0.777 [0.757, 0.797]"
    assert "480 samples, prompts' SHA-256 eeeeeeeeeeee." in panel.caption
    assert "σ_max: 80 (Teacher); 1600 (DMD2, rCM)." in panel.caption
    assert shown(made["table1"])["Diversity"].head[2] == "ShapeEval\noverall"
    diverse = genevals[2]["evaluator"]["diversity"] | {"sampling": {"sigma_max": 80}}
    with pytest.raises(UserError, match=r"rcm-0-4\.json has quality at sigma_max 1600 and diversity at 80"):
        make_table("table1", [of(genevals[2], diversity=diverse)], [], PAPER / "table1.csv")


def test_native_dimensions_stand_apart_with_their_difference(real: dict[str, dict[str, str]]) -> None:
    panel = shown(real["table2"])["VBench (official code): dimensions"]
    found = {name: [line[:3] for line in lines] for name, lines in panel.groups}
    assert [cell.text for cell in found["Official code"][0]] == ["Subject consistency", "official", "0.9600"]
    assert [cell.text for cell in found["Implemented here"][0]] == ["Subject consistency", "same formula", "0.9588"]
    gaps = found["Implemented here − official code"]
    assert [[cell.text for cell in line] for line in gaps] == [
        ["Subject consistency", "derived", "−0.0012"],
        ["Temporal flickering", "derived", "+3e−08"],
    ]
    assert "dino-vitb16 0d0d0d0d0d0d" in panel.caption


def test_native_dimensions_alone_have_no_total(vbenches: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> None:
    def native(score: dict[str, Any]) -> dict[str, Any]:
        kept = {key: entry for key, entry in score["metrics"].items() if key.startswith("vbench_native.")}
        kept |= {"diversity.clip_distance": {"value": 0.2, "low": 0.1, "high": 0.3, "kind": "same_formula"}}
        return of(score | {"metrics": kept}, name="VBench (native part)", native=None, native_minus_official=None)

    found = shown(make_table("table2", list(map(native, vbenches)), [], PAPER / "table2.csv", throughput=speeds))
    titles = [f"VBench (native part): {what}" for what in ("throughput", "dimensions")]
    assert list(found)[:-1] == [*titles, "Diversity"]
    assert found["Diversity"].head[2:] == ["Subject consistency", "Temporal flickering", "CLIP distance"]
    assert "nothing measured here is a whole score" in list(found.values())[-1].caption
    dimensions = found[titles[1]].caption
    assert "They are implemented here by the official formulas" in dimensions and "Brackets" not in dimensions
    assert texts(found["Diversity"])[0][-1] == "0.200 [0.100, 0.300]" and "Brackets" in found["Diversity"].caption


def test_speed_is_a_column_with_its_card(
    real: dict[str, dict[str, str]], vbenches: list[dict[str, Any]], speeds: list[dict[str, Any]]
) -> None:
    panel = shown(real["table2"])["VBench (official code)"]
    assert panel.head[-1] == "Frames/s"
    assert [line[-1] for line in texts(panel)] == ["0.716", "14.0", "22.6", "14.0"]
    assert "batch 1, sampling and decoding, bfloat16, on NVIDIA H100 80GB HBM3." in panel.caption
    mixed = [*speeds[:-1], speeds[-1] | {"device": "NVIDIA H200"}]
    panel = shown(make_table("table2", vbenches, [], PAPER / "table2.csv", throughput=mixed))["VBench (official code)"]
    assert texts(panel)[2][-1] == "22.6 NVIDIA H200" and texts(panel)[0][-1] == "0.716 NVIDIA H100 80GB HBM3"
    assert "not to be compared across devices" in panel.caption
    other = [speed | {"device": "NVIDIA L40S"} for speed in speeds]
    found = shown(make_table("table2", vbenches, [], PAPER / "table2.csv", throughput=other))
    assert "The paper's are of one H100, so not beside these." in found["VBench (official code)"].caption
    assert not any("Frames/s" in line for line in texts(found["Beside the paper: VBench (official code)"]))
    for wrong in ({"steps": 8}, {"batch": 4}):
        with pytest.raises(UserError, match="rcm-0-"):
            make_table("table2", vbenches, [], PAPER / "table2.csv", throughput=[speeds[2] | wrong])


def test_table3_is_the_papers_own(real: dict[str, dict[str, str]]) -> None:
    (panel,) = shown(real["table3"]).values()
    assert panel.published
    assert "not reproduced: the TI2V network is not part of this version" in panel.caption
    assert texts(panel)[1] == ["Cosmos-Predict2 TI2V + rCM", "2B, 1280×704×93", "4", "4.6", "84.40", "88.2"]
    with pytest.raises(UserError, match="published rows alone"):
        make_table("table3", [], [], None)


def test_small_text_says_that_the_paper_has_none(genevals: list[dict[str, Any]]) -> None:
    metrics = {"text.cer": {"value": 0.31, "low": 0.25, "high": 0.36, "kind": "analogue"}}
    scores = [
        of(score | {"metrics": metrics}, name="Small text (RapidOCR)", paper=None, diversity=None) for score in genevals
    ]
    made = make_table("table_text", scores, [], None)
    assert made["md"].startswith("# Small text\n")
    (panel,) = shown(made).values()
    assert "The paper has no such number" in panel.caption
    assert panel.head == ["Model", "Steps", "CER"] and texts(panel)[2] == ["rCM", "1", "0.310 [0.250, 0.360]"]


def test_every_csv_is_read_back_and_one_of_another_version_refused(real: dict[str, dict[str, str]]) -> None:
    for texts_ in real.values():
        assert to_csv(from_csv(texts_["csv"])) == texts_["csv"]
    with pytest.raises(UserError, match=r"old\.csv has the columns of another version"):
        from_csv("table,block\ntable1,models\n", "old.csv")


def test_mistakes_are_one_sentence(scores: Scores, published: Path, tmp_path: Path) -> None:
    models, controls = split(scores["images"])
    with pytest.raises(UserError, match="table9"):
        make_table("table9", models, controls, published)
    with pytest.raises(UserError, match="no scores"):
        make_table("table1", [], controls, published)
    with pytest.raises(UserError, match="published rows alone"):
        make_table("table3", models, controls, published)
    with pytest.raises(UserError, match="clips"):
        make_table("table2", models, controls, published)
    with pytest.raises(UserError, match="nowhere"):
        make_table("table1", models, controls, tmp_path / "nowhere.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="group"):
        make_table("table1", models, controls, tmp_path / "bad.csv")


def test_latex_escapes_what_it_must(made: dict[str, dict[str, str]], real: dict[str, dict[str, str]]) -> None:
    tex = made["table1"]["tex"] + real["table1"]["tex"]
    assert r"SD\_X \& L" in tex
    assert "×" not in tex and "÷" not in tex and "–" not in tex
    assert tex.count("{") == tex.count("}")
    assert tex.isascii()
    assert (
        r"$\sigma_{\max}$: 80 (Teacher)" in tex
        and r"all\_dimension\_longer.txt" in real["table2"]["tex"]
        and "clip-vit-large" in tex
    )
    assert " & $-$0.004 & yes" in tex


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_within_the_page(
    made: dict[str, dict[str, str]], real: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    body = "\n\\clearpage\n".join(texts["tex"] for texts in (*made.values(), *real.values()))
    head = r"\documentclass{article}\usepackage[margin=2.2cm]{geometry}\usepackage{booktabs}\begin{document}"
    (tmp_path / "page.tex").write_text(head + body + r"\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, errors="replace")
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Overfull \\hbox" not in run.stdout

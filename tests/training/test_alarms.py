import pytest

from rcm.training.alarms import ADVICE, WINDOW, Alarms


def row(**figures):
    return {"role": "student", "update": 7, "gradient_norm": 1.0, "nonfinite_gradients": 0, **figures}


def look(alarms, rows):
    """Every alarm with the number of the row that set it off first."""
    first = {}
    for number, figures in enumerate(rows):
        for name in alarms.look(row(**figures)):
            first.setdefault(name, number)
    return first


@pytest.mark.parametrize(
    ("name", "rows", "number"),
    [
        ("faulty_samples", [{"scm_nan": 1.0}, {"scm_nan": 2.0, "dmd_nan": 0.0}], 1),  # of 12: 8 %, 17 %
        ("faulty_gradients", [{}, {"nonfinite_gradients": 1}], 1),
        ("no_gradient", [{}, {"gradient_norm": 0.0}], 1),
        ("tangent_leap", [{"scm_tangent_norm": 1.0}] * WINDOW + [{"scm_tangent_norm": x} for x in (9.9, 10.1)], 51),
        ("tangent_leap", [{"meanflow_tangent_norm": 2.0}] * WINDOW + [{"meanflow_tangent_norm": 21.0}], 50),
        # the median of 50 is half-way with 25 new values, which is enough for the first, and all the way with 26
        ("dmd_drift", [{"dmd_gap": 1.0}] * WINDOW + [{"dmd_gap": 6.0}] * WINDOW, 74),
        ("critic_drift", [{"critic_loss": 5.0}] * WINDOW + [{"critic_loss": 16.0}] * WINDOW, 75),
    ],
)
def test_each_sign_sets_off_its_alarm_and_no_other(name, rows, number):
    assert look(Alarms(12), rows) == {name: number}


@pytest.mark.parametrize(
    "rows",
    [
        [{"scm_tangent_norm": 100.0 * k} for k in range(20)],  # nothing to compare with yet
        [{"scm_tangent_norm": 100.0 / (1 + k)} for k in range(200)],
        [{"dmd_gap": 1.0 + k / 100} for k in range(150)],
        [{"critic_loss": 100.0 / (1 + k)} for k in range(200)],
        [{"scm_tangent_norm": None, "dmd_gap": float("nan")}] * 100,  # as read from a file, and as computed
    ],
)
def test_a_training_that_goes_well_sets_off_none(rows):
    assert look(Alarms(12), rows) == {}


def test_a_cause_is_said_once_with_advice_also_after_a_resume(capsys):
    faulty = row(nonfinite_gradients=3)
    alarms = Alarms(12)
    assert [alarms.look(faulty) for _ in range(3)] == [["faulty_gradients"]] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"alarm: faulty gradients at student update 7: {ADVICE['faulty_gradients']}"
    resumed = Alarms(12)
    resumed.look(faulty, speak=False)
    assert resumed.look(faulty) == ["faulty_gradients"]
    assert capsys.readouterr().err == ""

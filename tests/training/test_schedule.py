import pytest

from rcm.training.schedule import Schedule, learning_rate

# Table 4 of the paper: tangent warm-up H, student frequency F, iterations, and the updates that Algorithm 1 implies
PAPER = {
    "Wan 1.3B": (1000, 5, 10_000, 2_800, 7_200),
    "Wan 14B": (200, 10, 10_000, 1_180, 8_820),
    "Cosmos 0.6B": (0, 5, 80_000, 16_000, 64_000),
    "Cosmos 2B": (0, 5, 30_000, 6_000, 24_000),
    "Cosmos 14B": (0, 5, 25_000, 5_000, 20_000),
}


@pytest.mark.parametrize("model", PAPER)
def test_alternation_is_that_of_algorithm_1(model):
    warmup, every, iterations, student, critic = PAPER[model]
    schedule = Schedule(student, sole=warmup, every=every)
    assert schedule.iterations == iterations
    assert schedule.critic_updates == critic
    turns = range(1, iterations + 1)
    assert [schedule.is_student(i) for i in turns] == [i <= warmup or i % every == 0 for i in turns]


@pytest.mark.parametrize("phase", ["after_warmup", "paper", "reference"])
@pytest.mark.parametrize(("warmup", "every"), [(0, 5), (4, 3), (6, 3), (7, 4)])
def test_phases_are_those_of_paper_and_code(phase, warmup, every):
    student = warmup + 5
    schedule = Schedule(student, sole=warmup, every=every, phase=phase)
    turns = {
        "after_warmup": lambda i: i <= warmup or (i - warmup) % every == 0,
        "paper": lambda i: i <= warmup or i % every == 0,  # counted from 1
        "reference": lambda i: i - 1 < warmup or (i - 1 - warmup) % every == 0,  # the code counts from 0
    }[phase]
    expected = [i for i in range(1, 100) if turns(i)][:student]
    assert [i for i in range(1, schedule.iterations + 1) if schedule.is_student(i)] == expected
    assert schedule.iterations == expected[-1]
    assert schedule.critic_updates == expected[-1] - student
    # the code's DMD begins when its count from 0 exceeds H
    assert schedule.alone == warmup + (phase == "reference" and warmup > 0)


def test_critic_warms_up_between_the_phases():
    schedule = Schedule(5, sole=2, critic_warmup=3, every=2)
    turns = "".join("S" if schedule.is_student(i) else "c" for i in range(1, schedule.iterations + 1))
    assert turns == "SS" + "ccc" + "cScScS"
    assert schedule.critic_updates == 6


def test_sole_student_needs_no_critic():
    schedule = Schedule(7, sole=7, critic_warmup=3, every=5)
    assert (schedule.iterations, schedule.critic_updates) == (7, 0)


def test_learning_rate():
    constant = [learning_rate(2.0, k, 10, 3, "constant") for k in range(1, 11)]
    assert constant == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 7)
    cosine = [learning_rate(2.0, k, 11, 3, "cosine") for k in range(4, 12)]
    assert cosine[0] == 2.0
    assert cosine[4] == pytest.approx(1.0)  # half-way
    assert 0 < cosine[-1] < 0.1
    assert learning_rate(2.0, 1, 1, 0, "cosine") == 2.0

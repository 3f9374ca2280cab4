"""The plan against the live tensors of real ranks."""

from benchmarks.plan_peak import compare, foretold, live

from rcm.cli.plan import read

OVERRIDES = [
    *("experiment=wan2.1-1.3b-clips", "network.width=64", "network.mlp_width=128", "network.heads=2"),
    *(
        "network.layers=2",
        "frames=5",
        "height=128",
        "width=128",
        "text.tokens=8",
        "text.width=32",
        "network.text_width=32",
    ),
    "synthesizer=${network}",
    *("distillation.batch=4", "distillation.max_rollout=2", "parallel.micro_batch=2", "parallel.context=1"),
]


def step():
    job = read(OVERRIDES)
    choice = job.choice(gpus=2)
    found, planned = live(job, choice, fake=False), foretold(job, choice)
    parts = found.keys() & planned.keys()
    return {part: compare(planned[part], found[part]) for part in parts}


def test_two_gloo_ranks_hold_what_is_planned(ranks):
    first, second = ranks(2, step)
    for parts in (first, second):
        planned, found = (max(rows["total"][k] for rows in parts.values()) for k in (0, 1))
        assert abs(planned / found - 1) < 0.1  # of 3 MB, where small things count
    for rows in first.values():  # which holds what does not divide
        assert all(rows[key][0] == rows[key][1] for key in ("student", "fake score", "teacher", "EMA", "moments"))

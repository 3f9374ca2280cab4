"""A parallelized network against the plain one, in float64: value, tangent and gradients."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from rcm import dual, networks
from rcm.artefact import UserError
from rcm.flow import Wrapped, guided
from rcm.networks.discriminator import FakeScore
from rcm.parallel import COUNTER, RECOMPUTE, constant_weights, parallelize, start
from rcm.sampling import consistency_sample, teacher_sample

SIZES = {"width": 16, "mlp_width": 32, "layers": 2, "heads": 4, "in_channels": 4, "out_channels": 4, "text_width": 8,
         "time_width": 16, "patch": [1, 1, 1], "time_scale": 10.0}  # fmt: skip
COSMOS = {key: size for key, size in SIZES.items() if key != "time_width"} | {"adaln_width": 8}
IMAGE = SIZES | {"in_channels": 7, "image_width": 6}  # image-to-video
BATCH = 2  # the global one


def network(kind="wan", **sizes):
    torch.manual_seed(0)
    settings = {"wan": SIZES, "image": IMAGE, "cosmos": COSMOS}[kind]
    built = networks.build({"kind": "cosmos" if kind == "cosmos" else "wan", **settings, **sizes}).double()
    last = built.head.linear if kind == "cosmos" else built.head.head
    nn.init.normal_(last.weight, std=0.3)
    return built


def case(frames=1, times=1):
    """Inputs (latents of nine tokens, time, text), their tangents, and the weights of a loss, of the global batch."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    latents = BATCH, 4, frames, 3, 3
    return (
        draw(*latents),
        draw(BATCH, times).abs(),
        draw(BATCH, 5, 8),
        draw(*latents),
        draw(BATCH, times),
        draw(*latents),
    )


def conditioned(built):
    """With the image that an image-to-video network needs, the same for all samples."""
    if getattr(built, "img_emb", None) is None:
        return built
    condition, image = (torch.linspace(-1, 1, n, dtype=torch.float64).sin() for n in (27, 24))
    return networks.Conditioned(built, condition_BCTHW=condition.view(1, 3, 1, 3, 3), image_BLD=image.view(1, 4, 6))


def passes(built, inputs):
    """Value and tangent by one forward pass, then the gradients of the value in the parameters and in the latents."""
    x, time, text, tx, ttime, weights = inputs
    x = x.clone().requires_grad_()
    model = conditioned(built)
    value, tangent = dual.jvp(lambda a, b: model(a, b, text), (x, time), (tx, ttime), graph=True)
    (value * weights).sum().backward()
    return value.detach(), tangent, gradients(built), x.grad


def gradients(built):
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return {name: whole(p.grad).clone() for name, p in built.named_parameters() if p.grad is not None}


def on_ranks(sizes, options, frames=1, times=1, kind="wan"):
    mesh = start(**sizes, device="cpu")
    built = network(kind)
    parallelize(built, mesh, **options)
    mine = slice(mesh.data_rank, None, mesh.data_size) if mesh.data_size > 1 else slice(None)
    value, tangent, found, x_grad = passes(built, [x[mine] for x in case(frames, times)])
    return mine, value, tangent, found, x_grad


def plain(frames=1, times=1, kind="wan"):
    return passes(network(kind), case(frames, times))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def compare(results, frames=1, times=1, context=1, kind="wan"):
    value, tangent, found, x_grad = plain(frames, times, kind)
    for mine, one, its_tangent, theirs, _ in results:
        close(one, value[mine])
        close(its_tangent, tangent[mine])
        assert theirs.keys() == found.keys()
        for name in found:
            close(theirs[name], found[name])
    for group in range(0, len(results), context):  # of the latents a rank has the gradient through its own tokens
        parts = results[group : group + context]
        close(sum(part[-1] for part in parts), x_grad[parts[0][0]])


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_compiled_blocks_share_one_graph(alone, recompute, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    built = network(layers=3)
    parallelize(built, alone, recompute=recompute, compile=True)
    x, time, text, *_, weights = case()
    (built(x, time, text) * weights).sum().backward()
    expected = network(layers=3)
    (expected(x, time, text) * weights).sum().backward()
    theirs = gradients(expected)
    for name, gradient in gradients(built).items():
        close(gradient, theirs[name])
    assert counters["stats"]["unique_graphs"] == (2 if recompute == "blocks" else 1)  # with and without a graph


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return start(device="cpu")


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_on_one_process(alone, recompute):
    built = network()
    parallelize(built, alone, recompute=recompute)
    compare([(slice(None), *passes(built, case()))])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_sharded_over_two(ranks, recompute):
    compare(ranks(2, on_ranks, {}, {"recompute": recompute}))


def test_replicated_and_sharded(ranks):
    half = ranks(4, on_ranks, {"replicate": 2, "context": 2}, {"recompute": "blocks"})
    compare(half, context=2)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nine_tokens_over_two(ranks, recompute):
    compare(ranks(2, on_ranks, {"context": 2}, {"recompute": recompute}), context=2)


def test_nine_tokens_over_four(ranks):
    compare(ranks(4, on_ranks, {"context": 4}, {"recompute": "blocks"}), context=4)


def test_a_time_for_every_frame_over_two(ranks):
    compare(ranks(2, on_ranks, {"context": 2}, {}, 3, 3), frames=3, times=3, context=2)


@pytest.mark.parametrize("context", [1, 2])
def test_cosmos_over_two(ranks, context):
    compare(ranks(2, on_ranks, {"context": context}, {"recompute": "blocks"}, 3, 3, "cosmos"), 3, 3, context, "cosmos")


@pytest.mark.parametrize("context", [1, 2])
def test_image_to_video_over_two(ranks, context):
    results = ranks(2, on_ranks, {"context": context}, {"recompute": "blocks"}, 1, 1, "image")
    compare(results, context=context, kind="image")


def sampled(context):
    """A student's few-step sample and a teacher's guided UniPC sample, of nine tokens."""
    built = network()
    if context:
        parallelize(built, start(context=context, device="cpu"))
    x, _, text, *_, other = case()
    model = Wrapped(built)
    velocity = lambda x, r: guided(model.rf_velocity, x, r, text, torch.zeros(1, 5, 8).double(), 2.0)  # noqa: E731
    with torch.no_grad():
        few = consistency_sample(lambda x, t: model.denoise(x, t, text), [1.5, 1.0], [x, other])
        return few, teacher_sample(velocity, x, sampler="unipc", steps=3, shift=3.0, sigma_max=80.0)


def test_sampling_over_two(ranks):
    for found in ranks(2, sampled, 2):
        for one, expected in zip(found, sampled(0), strict=True):
            close(one, expected)


def test_offloaded(ranks):
    compare(ranks(2, on_ranks, {}, {"offload": True}))


def judged(sizes, options):
    """Gradients of a loss on velocity and logits of a fake score with its branch; DMD2."""
    mesh = start(**sizes, device="cpu") if sizes is not None else None
    torch.manual_seed(3)
    fake = FakeScore(network(), width=16, layers=[0, 1], heads=2).double()
    nn.init.normal_(fake.branch.logit.weight)
    if mesh is not None:
        parallelize(fake, mesh, **options)
    mine = slice(mesh.data_rank, None, mesh.data_size) if mesh and mesh.data_size > 1 else slice(None)
    x, time, text, _, _, weights = (a[mine] for a in case())
    with fake.features(x.shape) as features:
        velocity = fake(x, time, text)
    ((velocity * weights).sum() + fake.branch(*features).sum()).backward()
    return gradients(fake)


@pytest.mark.parametrize("sizes", [{}, {"context": 2}], ids=["sharded", "context"])
def test_the_branch_of_dmd2(ranks, sizes):
    expected = judged(None, {})
    assert expected["branch.query"].norm() > 0.01
    for found in ranks(2, judged, sizes, {"recompute": "blocks"}):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name])


@pytest.mark.parametrize(("recompute", "shared", "cost"), [
    ("none", True, 5), ("none", False, 6), ("matmuls", True, 6), ("matmuls", False, 6), ("blocks", True, 6),
    ("blocks", False, 7),
])  # fmt: skip
def test_forward_equivalents(alone, recompute, shared, cost):
    """Dual call 3, plain call 1, recomputation 1, backward 2; with the teacher's 2, 8 against 9 with blocks."""
    built = network()
    parallelize(built, alone, recompute=recompute)
    x, time, text, tx, ttime, weights = case()
    COUNTER.equivalents()
    with COUNTER.part("student", BATCH):
        value, _ = dual.jvp(lambda a, b: built(a, b, text), (x, time), (tx, ttime), graph=shared)
        ((value if shared else built(x, time, text)) * weights).sum().backward()
    assert COUNTER.equivalents() == {"student": pytest.approx(cost)}
    assert COUNTER.equivalents() == {}


@pytest.mark.parametrize(("recompute", "cost"), [("none", 2), ("blocks", 3)])
def test_constant_weights(alone, recompute, cost):
    """The backward pass to the inputs alone is half of a whole one; later passes give weights gradients again."""
    built = network()
    parallelize(built, alone, recompute=recompute)
    x, time, text, *_, weights = case()
    x.requires_grad_()
    COUNTER.equivalents()
    with COUNTER.part("fake", BATCH):
        with constant_weights():
            value = built(x, time, text)
        (found,) = torch.autograd.grad((value * weights).sum(), x)
    assert COUNTER.equivalents() == {"fake": pytest.approx(cost)}
    assert not gradients(built)
    (network()(x, time, text) * weights).sum().backward()
    close(found, x.grad)
    built(x, time, text).sum().backward()
    assert gradients(built)


def test_recomputation_keeps_inputs_alone(alone):
    """Bytes that autograd keeps between the passes: of a recomputed block, its inputs."""

    def kept(recompute):
        built = network(layers=4)
        parallelize(built, alone, recompute=recompute)
        own = {p.data_ptr() for p in built.parameters()}
        sizes = {}

        def pack(x):
            if x.data_ptr() not in own:
                sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        x, time, text, *_ = case()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            built(x.requires_grad_(), time, text)
        return sum(sizes.values())

    none, matmuls, blocks = map(kept, ("none", "matmuls", "blocks"))
    assert blocks < 0.35 * none
    assert matmuls < none


def test_heads_that_do_not_divide_are_refused(ranks):
    message = "parallel.context is 4, which does not divide the network's 6 heads; allowed: 1, 2, 3, 6"
    assert ranks(4, refusal, {"heads": 6, "width": 24}, {"context": 4}, {}) == [message] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat16"}, r"precision=bfloat16 .* rcm\.launch --standalone --nproc-per-node 1"),
        ({"offload": True}, r"offload_teacher .* rcm\.launch --standalone --nproc-per-node 1"),
        ({"compile": True, "recompute": "matmuls"}, "hides the products"),
    ],
)
def test_what_does_not_go_together_is_refused(alone, options, message):
    with pytest.raises(UserError, match=message):
        parallelize(network(), alone, **options)


def refusal(sizes, layout, options):
    try:
        parallelize(network(**sizes), start(**layout, device="cpu"), **options)
    except UserError as error:
        return str(error)
    return None


def rounded(trainable):
    """Data types that the modules compute in, and those of the parameters and gradients at rest."""
    built = network().float()
    parallelize(built, start(device="cpu"), precision="bfloat16", trainable=trainable)
    seen = {}
    for name in ("blocks.0.ffn.0", "time_embedding.0", "head.head"):
        layer = built.get_submodule(name)
        layer.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: out.dtype}))
    x, time, text, tx, ttime, weights = (a.float() for a in case())
    value, _ = dual.jvp(lambda a, b: built(a, b, text), (x, time), (tx, ttime), graph=trainable)
    found = {}
    if trainable:
        (value * weights).sum().backward()
        found = {name: value.dtype for name, value in gradients(built).items()}
    exact = passes(network(), case())
    error = ((value.double() - exact[0]).norm() / exact[0].norm()).item()
    return seen, {p.dtype for p in built.parameters()}, set(found.values()), error


def test_bfloat16_leaves_master_weights_and_the_time_in_float32(ranks):
    seen, kept, found, error = ranks(2, rounded, True)[0]
    assert seen == {"blocks.0.ffn.0": torch.bfloat16, "time_embedding.0": torch.float32, "head.head": torch.bfloat16}
    assert kept == found == {torch.float32}
    assert 1e-4 < error < 3e-2
    seen, kept, _, _ = ranks(2, rounded, False)[0]
    assert seen["time_embedding.0"] == torch.float32
    assert kept == {torch.bfloat16, torch.float32}


def from_meta():
    """A network that is built without memory, sharded, and filled: bytes of parameters on this rank, and its value."""
    with torch.device("meta"):
        built = networks.build({"kind": "wan", **SIZES}).double()
    mesh = start(device="cpu")
    parallelize(built, mesh)
    built.to_empty(device="cpu")
    whole = network().state_dict()
    for name, parameter in built.state_dict().items():
        rows = whole[name].chunk(mesh.world)
        mine = rows[mesh.rank] if mesh.rank < len(rows) else whole[name][:0]
        parameter.to_local().copy_(mine)
    x, time, text, *_ = case()
    with torch.no_grad():
        value = built(x, time, text)
    return sum(p.to_local().numel() for p in built.parameters()), value


def test_built_without_memory_and_filled_by_shards(ranks):
    results = ranks(2, from_meta)
    total = sum(p.numel() for p in network().parameters())
    assert sum(count for count, _ in results) == total
    assert all(count < 0.6 * total for count, _ in results)
    close(results[0][1], plain()[0])

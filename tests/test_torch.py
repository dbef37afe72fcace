"""The modules for PyTorch, against ROBE in torch's own operations; and our numbers against torch itself."""

import copy
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
from conftest import resolved
from recipes import blocks

import robe
from robe.backend import select
from robe.bags import modes
from robe.config import ConfigError, DataSpec
from robe.embeddings import create
from robe.errors import ArrayError
from robe.kernels.pool import POOLINGS
from robe.metrics import auc
from robe.optim import DenseOptimizer, corrections

torch = pytest.importorskip("torch", reason="the extra `torch`")
from torch import nn  # noqa: E402
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag  # noqa: E402

from robe.torch import RobeEmbedding, RobeEmbeddingBag, from_run, replace_embedding_bags  # noqa: E402

CARDINALITIES, WIDTH, BLOCK, B = (50, 300, 7), 8, 4, 32
F = len(CARDINALITIES)
SETTINGS = {"block": BLOCK, "hash_seed": 5, "seed": 3}
# float32 sums of some ten numbers of size 1 in another order, and what 50 steps make of their last bits.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}


def logical(z, n):
    """z >> n of the 64 bits in an int64."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def mix(z):
    z = (z ^ logical(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ logical(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ logical(z, 31)


class PlainRobe(nn.Module):
    """docs/architecture.md's formula with the hash `mix` in torch's operations, whose int64 wraps around."""

    K1, KS = 0x9E3779B97F4A7C15 - 2**64, 0xD1B54A32D192ED03 - 2**64

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, ids):
        """ids (B, F) -> (B, F, D)"""
        token = ids + (torch.arange(F) << 32)
        element = token[..., None] * WIDTH + torch.arange(WIDTH)
        block, position, size = element // BLOCK, element % BLOCK, len(self.weight)
        word = mix(mix(torch.tensor(SETTINGS["hash_seed"] + self.K1)) + block * self.K1)
        start = (logical(word, 32) * size + logical((word & 0xFFFFFFFF) * size, 32)) >> 32
        negative = mix(word + self.KS) >> position & 1
        return self.weight[(start + position) % size] * (1 - 2 * negative)

    def tables(self):
        """The table (n, D) of each feature."""
        return [self(torch.arange(n)[:, None].expand(n, F))[:, f] for f, n in enumerate(CARDINALITIES)]


def module(weights=400, kind=RobeEmbedding, **settings):
    return kind(CARDINALITIES, WIDTH, weights, **SETTINGS, **settings)


def method(weights=400, **optimizer):
    """The method `robe` with the settings of `module`."""
    embedding = {"weights": weights, "block": BLOCK, "hash_seed": SETTINGS["hash_seed"]}
    config = resolved({"width": WIDTH}, embedding, optimizer or {"optimizer": "none"}, seed=SETTINGS["seed"])
    return create(config, DataSpec(0, CARDINALITIES, "dictionary", "", ""), select("cpu"))


def draw(rng, rows=B):
    return torch.from_numpy(np.stack([rng.integers(n, size=rows) for n in CARDINALITIES], axis=1))


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def draw_bags(rng):
    """(values, offsets (B * F + 1,)): bags of 0 to 3 ids."""
    lengths = rng.integers(0, 4, B * F)
    of = np.arange(B * F).repeat(lengths) % F
    values = rng.integers(0, 1000, len(of)) % np.array(CARDINALITIES)[of]
    return torch.from_numpy(values), torch.from_numpy(np.cumsum((0, *lengths)))


def bag(values, offsets, f):
    """(numbers of the values (n,), offsets (B,)) of the bags of one feature."""
    parts = [torch.arange(offsets[k], offsets[k + 1]) for k in range(f, len(offsets) - 1, F)]
    starts = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)
    return torch.cat(parts), starts


@pytest.mark.parametrize("settings", [{}, {"hash": "affine", "sign": False}, {"hashed": True}], ids=str)
def test_weights_and_vectors_are_those_of_the_method(settings, rng):
    made = RobeEmbedding(CARDINALITIES, WIDTH, 400, **SETTINGS, **settings)
    embedding = {"weights": 400, **SETTINGS, **settings}
    data = DataSpec(0, CARDINALITIES, "hash" if embedding.pop("hashed", False) else "dictionary", "", "")
    array = create(resolved({"width": WIDTH}, embedding, seed=embedding.pop("seed")), data, select("cpu"))
    ids, expected = draw(rng), np.empty((B, F, WIDTH), np.float32)
    array.lookup(ids.numpy().astype(np.uint32), expected)
    assert np.array_equal(made.weight.detach().numpy(), array.memory)
    assert np.array_equal(made(ids).detach().numpy(), expected)
    assert np.array_equal(made(ids.int().T.contiguous().T).detach().numpy(), expected)


def test_vectors_and_gradient_are_those_of_plain_torch(rng):
    made, ids = module(), draw(rng)
    plain, d = PlainRobe(made.weight), normal(rng, B, F, WIDTH)
    assert torch.equal(made(ids), plain(ids))
    for subject in (made, plain):
        subject(ids).backward(d.transpose(0, 1).contiguous().transpose(0, 1))  # which is not contiguous
    torch.testing.assert_close(made.weight.grad, plain.weight.grad, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_those_of_plain_torch(name, fused, compiled, rng):
    """Each of the 40 weights is read in each step, so lazy Adam is Adam."""
    rate = {"sgd": 0.2, "adagrad": 0.05, "adam": 0.01}[name]
    options = {} if name == "sgd" else {"eps": 1e-8}
    made = module(40, **({"fused": name, "lr": rate, **options} if fused else {}))
    plain, target = PlainRobe(made.weight), normal(rng, B, F, WIDTH)
    own = None if fused else OPTIMIZERS[name](made.parameters(), rate, **options)
    theirs = OPTIMIZERS[name](plain.parameters(), rate, **options)
    call = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled else made
    before = made.weight.detach().clone()
    for step in range(50):
        ids = draw(np.random.default_rng(step))
        for subject, optimizer in ((call, own), (plain, theirs)):
            loss = ((subject(ids) - target) ** 2).mean()
            loss.backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
    assert made.weight.grad is None
    assert (made.weight - before).abs().mean() > 0.02
    torch.testing.assert_close(made.weight, plain.weight, **CLOSE)
    if fused:
        assert made.steps == 50


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "adagrad", "embedding_l2": 0.1},
        {"optimizer": "rowwise_adagrad"},
        {"optimizer": "adam", "beta1": 0.8, "weight_decay": 0.1},
        {"optimizer": "momentum", "momentum": 0.8},
    ],
    ids=lambda chosen: " ".join(map(str, chosen.values())),
)
def test_a_fused_step_is_that_of_the_method_to_the_bit(optimizer, rng):
    array, rate = method(**optimizer, lr=0.1), 0.1
    made = module(
        fused=optimizer["optimizer"], lr=rate, **{k: v for k, v in optimizer.items() if k != "optimizer"}
    )
    for _ in range(3):
        ids, d = draw(rng), normal(rng, B, F, WIDTH)
        made(ids).backward(d)
        array.update(ids.numpy().astype(np.uint32), d.numpy(), rate)
    assert np.array_equal(made.weight.detach().numpy(), array.memory)
    kept = {name: value for name, value in made.state_dict().items() if name not in ("weight", "lr", "steps")}
    assert kept.keys() == set(array.rule.state)
    for name, value in kept.items():
        assert np.array_equal(value.numpy(), getattr(array, name)), name
    first, second = made(ids), made(ids)
    first.backward(d)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward(d)  # whose weights are no longer those of its look-up
    array.update(ids.numpy().astype(np.uint32), d.numpy(), rate)
    made.lr.fill_(0)
    made(ids).backward(d)
    assert np.array_equal(made.weight.detach().numpy(), array.memory)


# torch weighs sums alone.
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
def test_bags_are_those_of_embedding_bag(mode, weighted, rng):
    """Of all features at once, and of each that took the place of an nn.EmbeddingBag."""
    values, offsets = draw_bags(rng)
    scales = normal(rng, len(values)) if weighted else None
    whole = module(kind=RobeEmbeddingBag, mode=mode, include_last_offset=True)
    tables = nn.ModuleList(nn.EmbeddingBag(n, WIDTH, mode=mode) for n in CARDINALITIES)
    replace_embedding_bags(tables, weights=400, **SETTINGS)
    assert torch.equal(whole.weight, tables[0].weight)
    plain, d = PlainRobe(whole.weight), normal(rng, B, F, WIDTH)

    def pooled(call):
        """Vectors (B, F, D) feature by feature, and the gradient of the weights of the ids."""
        own = None if scales is None else scales.clone().requires_grad_()
        found = []
        for f in range(F):
            numbers, starts = bag(values, offsets, f)
            found.append(call(f, values[numbers], starts, None if own is None else own[numbers]))
        vectors = torch.stack(found, dim=1)
        vectors.backward(d)
        return vectors, own

    full = plain.tables()
    expected, d_scales = pooled(
        lambda f, *bags: embedding_bag(bags[0], full[f], bags[1], mode=mode, per_sample_weights=bags[2])
    )
    single, d_single = pooled(lambda f, *bags: tables[f](*bags))
    own = None if scales is None else scales.clone().requires_grad_()
    vectors = whole(values, offsets, own)
    vectors.backward(d)
    assert (offsets.diff() == 0).any()
    for found, by in ((vectors, whole), (single, tables[0])):
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(by.weight.grad, plain.weight.grad, **CLOSE)
    if weighted:
        torch.testing.assert_close(own.grad, d_scales.grad, **CLOSE)
        torch.testing.assert_close(d_single.grad, d_scales.grad, **CLOSE)


def test_bags_of_one_id_are_looked_up_as_rows(rng):
    """And bags that only are as many as their ids are not."""
    pooled, single, ids = (
        module(kind=RobeEmbeddingBag, fused="sgd", lr=0.5),
        module(fused="sgd", lr=0.5),
        draw(rng),
    )
    offsets = torch.arange(B * F)
    vectors = pooled(ids.flatten(), offsets)
    assert torch.equal(vectors, single(ids))
    for found in (vectors, single(ids)):
        found.backward(torch.ones_like(found))
    assert torch.equal(pooled.weight, single.weight)
    offsets[2] = 1  # so bag 1 is empty, and bag 2 has two ids
    with torch.no_grad():
        moved, rows = pooled(ids.flatten(), offsets).flatten(0, 1), single(ids).flatten(0, 1)
        other = single(ids.roll(1, 1)).flatten(0, 1)[2]  # the id of feature 1 as one of feature 2
    assert not moved[1].any()
    torch.testing.assert_close(moved[2], rows[2] + other, **CLOSE)
    assert torch.equal(moved[3:], rows[3:])


def test_weights_of_a_mean_are_over_the_number_of_ids(rng):
    """Each feature may be pooled in its own way, and a fused step is by that gradient."""
    values, offsets = draw_bags(rng)
    scales, d = normal(rng, len(values)).requires_grad_(), normal(rng, B, F, WIDTH)
    made = module(
        kind=RobeEmbeddingBag, mode=("sum", "mean", "mean"), include_last_offset=True, fused="sgd", lr=0.5
    )
    plain = PlainRobe(made.weight)
    counts = offsets.diff().clamp(min=1).reshape(B, F, 1) * torch.tensor([0, 1, 1])[:, None]
    total = torch.zeros(B * F, WIDTH)
    of = torch.arange(B * F).repeat_interleave(offsets.diff())
    rows = plain(values[:, None].expand(-1, F))[torch.arange(len(values)), of % F]
    expected = total.index_add(0, of, rows * scales[:, None]).reshape(B, F, WIDTH) / counts.clamp(min=1)
    vectors = made(values, offsets, scales)
    torch.testing.assert_close(vectors, expected, **CLOSE)
    (by_plain,) = torch.autograd.grad(expected, scales, d, retain_graph=True)
    expected.backward(d)
    vectors.backward(d)
    torch.testing.assert_close(scales.grad, 2 * by_plain, **CLOSE)
    torch.testing.assert_close(made.weight, plain.weight - 0.5 * plain.weight.grad, **CLOSE)


def test_the_page_runs():
    torch.manual_seed(0)
    exec("\n".join(code for _, code in blocks("pytorch.md", "python")), {"__name__": "page"})


def test_operations_are_what_torch_asks_of_one(rng):
    """Schemas, shapes without data, and gradients through AOTAutograd with sizes that are symbols."""
    made, (values, offsets) = module(kind=RobeEmbeddingBag, mode="max", fused="adam", lr=0.1), draw_bags(rng)
    arguments = made.weight, values, offsets, None, [], made.how
    torch.library.opcheck(torch.ops.robe.look_up.default, arguments)
    tests = "test_schema", "test_faketensor"  # both have no gradient of their own
    d, state = normal(rng, B, F, WIDTH), [getattr(made, name) for name in made.state]
    rest = made.weight.detach(), values, offsets, torch.ones(len(values))
    torch.library.opcheck(torch.ops.robe.gradient.default, (d, *rest, made.how, True), test_utils=tests)
    torch.library.opcheck(torch.ops.robe.step.default, (d, *rest, state, made.how, True), test_utils=tests)


def test_an_exported_module_computes_alike(rng):
    made = module()
    program = torch.export.export(made, (draw(rng),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again, ids = torch.export.load(file).module(), draw(rng, 5)
    assert torch.equal(again(ids), made(ids))


def test_a_training_goes_on_from_its_state(rng):
    """By state_dict, and as a copy or a pickle of the module."""
    made, batches = module(fused="adam", lr=0.1), [(draw(rng), normal(rng, B, F, WIDTH)) for _ in range(4)]
    for ids, d in batches[:2]:
        made(ids).backward(d)
    others = [module(fused="adam", lr=0.3), copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    others[0].load_state_dict(made.state_dict())
    for subject in (made, *others):
        for ids, d in batches[2:]:
            subject(ids).backward(d)
        assert torch.equal(subject.weight, made.weight)
        assert subject.steps == 4


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_features_step_together_by_a_fused_optimizer(name, rng):
    """As one module does, from the gradients in another order; and so does a copy, from what was kept."""
    whole = module(fused=name, lr=0.1)
    tables = nn.ModuleList(nn.EmbeddingBag(n, WIDTH, mode="sum") for n in CARDINALITIES)
    replace_embedding_bags(tables, weights=400, **SETTINGS, fused=name, lr=0.1)
    assert [key for key, _ in tables.named_parameters()] == ["0.weight"]
    for step in range(4):
        ids, d = draw(rng), normal(rng, B, F, WIDTH)
        tables = copy.deepcopy(tables) if step == 2 else tables
        whole(ids).backward(d)
        torch.stack([table(ids[:, f, None]) for f, table in enumerate(tables)], 1).backward(d)
        torch.testing.assert_close(tables[1].weight, whole.weight, **CLOSE)
    assert tables[0].array is tables[2].array
    assert tables[0].array.steps == 4
    assert tables[0].weight.grad is None
    with pytest.raises(Exception, match="cannot be compiled; RobeEmbedding can be"):
        torch.compile(tables[0], backend="aot_eager", fullgraph=True)(ids[:, :1])


def test_features_of_bags_step_together(rng):
    """By sum, mean and max, with weights of ids, whose gradient stays that of the bags."""
    values, offsets, modes = *draw_bags(rng), ("sum", "mean", "max")
    dense, fused = (
        nn.ModuleList(
            nn.EmbeddingBag(n, WIDTH, mode=mode) for n, mode in zip(CARDINALITIES, modes, strict=True)
        )
        for _ in range(2)
    )
    replace_embedding_bags(dense, weights=400, **SETTINGS)
    replace_embedding_bags(fused, weights=400, **SETTINGS, fused="sgd", lr=0.5)
    own, gradients = normal(rng, len(values)), []
    for tables in (dense, fused):
        scales, total = own.clone().requires_grad_(), 0
        for f, mode in enumerate(modes):
            numbers, starts = bag(values, offsets, f)
            weights = scales[numbers] if mode == "sum" else None
            total = total + (tables[f](values[numbers], starts, weights) ** 2).sum()
        total.backward()
        gradients.append(scales.grad)
    expected = dense[0].weight - 0.5 * dense[0].weight.grad
    torch.testing.assert_close(fused[0].weight, expected, **CLOSE)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_bags_of_torchrec_are_replaced(rng):
    """Of an EmbeddingBagCollection that is not sharded, in which two features share a table."""
    torchrec = pytest.importorskip("torchrec")
    mean = torchrec.PoolingType.MEAN
    tables = [
        torchrec.EmbeddingBagConfig(name="a", embedding_dim=WIDTH, num_embeddings=300, feature_names=["x"]),
        torchrec.EmbeddingBagConfig(
            name="b", embedding_dim=WIDTH, num_embeddings=50, feature_names=["y", "z"], pooling=mean
        ),
    ]
    bags = torchrec.EmbeddingBagCollection(tables=tables)
    saved = replace_embedding_bags(bags, weights=400, **SETTINGS, fused="sgd", lr=0.5)
    assert saved == (350 * WIDTH * 4, 1600)
    a, b = bags.embedding_bags["a"], bags.embedding_bags["b"]
    values, lengths = torch.tensor([7, 299, 0, 3, 4, 49, 5]), torch.tensor([1, 2, 0, 3, 1, 0])
    jagged = torchrec.KeyedJaggedTensor.from_lengths_sync(["x", "y", "z"], values, lengths)
    with torch.no_grad():
        expected = a(torch.tensor([7, 299, 0]), torch.tensor([0, 1, 3]))
    before, found = a.weight.detach().clone(), bags(jagged)
    torch.testing.assert_close(found["x"], expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(found["y"][1], b(torch.tensor([[3, 4, 49]]))[0], **CLOSE)
    assert not found["y"][0].any()
    found.values().sum().backward()
    assert (a.weight != before).sum() > WIDTH


class Net(nn.Module):
    """The DLRM of facebookresearch/dlrm: dlrm_s_pytorch.py, with its names."""

    def __init__(self, dense, cardinalities, width, bottom, top):
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum", sparse=True) for n in cardinalities)
        pairs = len(cardinalities) * (len(cardinalities) + 1) // 2
        self.bot_l = self.mlp((dense, *bottom, width), linear_end=False)
        self.top_l = self.mlp((width + pairs, *top, 1), linear_end=True)

    @staticmethod
    def mlp(sizes, linear_end):
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*(layers[:-1] if linear_end else layers))

    def forward(self, dense, lS_o, lS_i):
        x = self.bot_l(dense)
        ly = [
            emb(values, offsets, per_sample_weights=None)
            for emb, values, offsets in zip(self.emb_l, lS_i, lS_o, strict=True)
        ]
        T = torch.stack([x, *ly], dim=1)
        Z = torch.bmm(T, T.transpose(1, 2))
        i, j = torch.tril_indices(T.shape[1], T.shape[1], -1)
        return self.top_l(torch.cat([x, Z[:, i, j]], dim=1))[:, 0]


def test_a_dlrm_whose_bags_are_replaced_learns_as_ours(rng):
    """From the same weights and batches. What differs are the last bits of float32 products, which training
    makes grow: 60 steps leave probabilities within 1e-3, and so the AUC."""
    rows, users = 6000, 200
    ids = np.stack([rng.integers(n, size=rows) for n in (users, 30)], axis=1)
    dense, taste = rng.standard_normal((rows, 3), np.float32), rng.normal(0, 2, users)
    label = (rng.random(rows) < 1 / (1 + np.exp(-taste[ids[:, 0]]))).astype(np.float32)
    sizes = {"width": 8, "bottom": (8,), "top": (8,)}
    hashed = {"compression": 4, "block": 8, "seed": 1}
    model = robe.DLRM((users, 30), 3, **sizes, **hashed, optimizer="adagrad", lr=0.05, backend="cpu")
    net = Net(3, (users, 30), **sizes)
    saved = replace_embedding_bags(net, **hashed)
    assert saved == (230 * 8 * 4, 230 * 8 // 4 * 4)
    assert [key for key, _ in net.named_parameters() if "emb" in key] == ["emb_l.0.weight"]
    assert np.array_equal(net.emb_l[1].weight.detach().numpy(), model.model.embedding.memory)
    with torch.no_grad():
        for part, layers in (("bottom", net.bot_l), ("top", net.top_l)):
            for i, layer in enumerate(layers[::2]):
                layer.weight.copy_(torch.from_numpy(model.model.parameters[f"{part}.{i}.weight"]).T)
                layer.bias.copy_(torch.from_numpy(model.model.parameters[f"{part}.{i}.bias"]))
    optimizer = torch.optim.Adagrad(net.parameters(), 0.05, eps=1e-8)
    tensors = [torch.from_numpy(array) for array in (label, dense, ids)]

    def logits(part):
        _, numbers, columns = (tensor[part] for tensor in tensors)
        offsets = torch.arange(len(numbers))
        return net(numbers, [offsets] * 2, list(columns.T.contiguous()))

    for start in [*range(0, 4000, 200)] * 3:
        part = slice(start, start + 200)
        model.fit([(label[part], dense[part], ids[part])])
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits(part), tensors[0][part]).backward()
        optimizer.step()
    test = slice(4000, None)
    with torch.no_grad():
        theirs = torch.sigmoid(logits(test)).numpy()
    found = model.predict(dense[test], ids[test])
    np.testing.assert_allclose(theirs, found, atol=1e-3)
    assert auc(label[test], found) > 0.75
    assert abs(auc(label[test], found) - auc(label[test], theirs)) < 1e-3


class TestReplaced:
    @pytest.fixture
    def net(self):
        """An EmbeddingBag that is used at two places, and a list of embeddings."""
        net = nn.Module()
        net.bag = net.alias = nn.EmbeddingBag(50, WIDTH, mode="mean", include_last_offset=True)
        net.list = nn.ModuleList([nn.Embedding(300, WIDTH), nn.EmbeddingBag(7, WIDTH, mode="max")])
        net.apart = nn.Embedding(9, WIDTH)  # as of positions in a text
        net.saved = replace_embedding_bags(net, weights=400, **SETTINGS)
        return net

    def test_calls_keep_working(self, net):
        """Each table is a feature in the order of `modules()`."""
        assert net.saved == (357 * WIDTH * 4, 1600)
        assert net.bag is net.alias
        assert type(net.apart) is nn.Embedding
        tables = PlainRobe(net.bag.weight).tables()
        ids = torch.tensor([[3, 4], [5, 5], [6, 0]])
        closed = net.bag(ids.flatten(), torch.tensor([0, 2, 4, 6]))
        torch.testing.assert_close(closed, tables[0][ids].mean(1), **CLOSE)
        torch.testing.assert_close(net.bag(ids), closed, rtol=0, atol=0)
        assert torch.equal(net.list[0](ids), tables[1][ids])
        assert torch.equal(net.list[1](input=ids.int()), tables[2][ids].amax(1))

    def test_gradients_add_up_as_ever(self, net):
        """Of look-ups that meet, in whatever order forward and backward passes come; and without a graph."""
        ids, plain = torch.tensor([[3, 4], [5, 5]]), PlainRobe(net.bag.weight)

        def loss(*tables):
            return sum((table(ids) ** 2).sum() * k for k, table in enumerate(tables, 1))

        full = plain.tables()
        (by_first,) = torch.autograd.grad((full[0][ids].mean(1) ** 2).sum(), plain.weight, retain_graph=True)
        (by_second,) = torch.autograd.grad((full[1][ids] ** 2).sum(), plain.weight)
        weight = net.bag.weight
        both = torch.autograd.grad(loss(net.bag, net.list[0]), weight)[0]
        torch.testing.assert_close(both, by_first + 2 * by_second, **CLOSE)
        one, other = loss(net.bag), loss(net.list[0])
        one.backward(retain_graph=True)
        torch.testing.assert_close(weight.grad, by_first, **CLOSE)
        other.backward()
        one.backward()
        torch.testing.assert_close(weight.grad, 2 * by_first + by_second, **CLOSE)
        with torch.no_grad():
            assert not net.bag(ids).requires_grad
        weight.requires_grad_(False)
        assert not net.bag(ids).requires_grad

    def test_compiled_and_copied_features_share_their_weights(self, net):
        ids = torch.tensor([[3, 4], [5, 5]])

        def loss(net):
            return (net.bag(ids) ** 2).sum() + (net.list[0](ids) ** 2).sum()

        (expected,) = torch.autograd.grad(loss(net), net.bag.weight)
        (found,) = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(net), net.bag.weight
        )
        torch.testing.assert_close(found, expected, **CLOSE)
        loss(net)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert other.bag.weight is other.list[0].weight is not net.bag.weight
            loss(other).backward()
            torch.testing.assert_close(other.bag.weight.grad, expected, **CLOSE)
        assert net.bag.weight.grad is None


@pytest.mark.parametrize(
    ("tables", "settings", "message"),
    [
        ([nn.Linear(2, 2)], {}, "holds no nn.EmbeddingBag"),
        ([nn.EmbeddingBag(9, 4), nn.EmbeddingBag(9, 8)], {}, "tables of one width, in float32"),
        ([nn.EmbeddingBag(9, 4).double()], {}, "tables of one width, in float32"),
        ([nn.EmbeddingBag(9, 4, padding_idx=0)], {}, "an array has no padding_idx"),
        ([nn.Embedding(9, 4, max_norm=1.0)], {}, "an array has no max_norm"),
        (
            [nn.EmbeddingBag(9, 4)],
            {"compression": 2, "weights": 20},
            "give one of weights, megabytes and compr",
        ),
        (
            [nn.EmbeddingBag(9, 4)],
            {"memory": "int8"},
            "memory is no setting of this module; there are block, ",
        ),
    ],
)
def test_what_cannot_be_replaced_is_named(tables, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        replace_embedding_bags(nn.ModuleList(tables), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused": "sgd"}, "give fused, the name of an optimizer, and lr"),
        ({"fused": "none", "lr": 0.1}, "fused must be of sgd, .*, adam, momentum, not 'none'"),
        ({"eps": 0.1}, "eps is no setting of this module"),
        (
            {"weights": 3, "block": 4},
            "3 weights is smaller than one block of 4; give more weights or a smaller block$",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        RobeEmbedding(CARDINALITIES, WIDTH, **({"weights": 400} | settings))


def test_what_kernels_would_misread_is_named():
    single, pooled = module(), module(kind=RobeEmbeddingBag, mode="max", include_last_offset=True)
    feature = nn.ModuleList([nn.EmbeddingBag(9, WIDTH)])
    replace_embedding_bags(feature, weights=400)
    zeros, three = torch.zeros(2, F, dtype=torch.int64), torch.tensor([0, 1, 2])
    for call, message in (
        (lambda: single(zeros[:, 1:]), r"ids: has shape \(2, 2\), but must have \(any, 3\)"),
        (lambda: single(zeros.float()), "ids: holds torch.float32, but must hold integers"),
        (lambda: single(zeros - 1), "ids must be from 0 to"),
        (lambda: single(zeros + 2**32), "ids must be from 0 to"),
        (lambda: pooled(three, torch.tensor([0, 2, 1, 3])), "offsets of the bags: must go from 0 to 3"),
        (lambda: pooled(three, three), "offsets of the bags: have shape"),
        (lambda: pooled(three, torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3])), "must be 1 where"),
        (
            lambda: pooled(three, torch.tensor([0, 1, 2, 3]), torch.ones(3).requires_grad_()),
            "no gradient where",
        ),
        (lambda: pooled(zeros, three), "give ids \\(N,\\) and offsets"),
        (lambda: feature[0](three), "or ids \\(B, L\\)"),
        (lambda: module().double()(zeros), "float32, not torch.float64"),
    ):
        with pytest.raises(ArrayError, match=message):
            call()


@pytest.mark.parametrize("pooling", [None, ("sum", "max", "mean")], ids=str)
def test_a_run_s_array_is_looked_up_as_in_the_run(pooling, tmp_path, rng):
    settings = {"width": WIDTH, "bottom": (4,), "top": (4,), "weights": 400, "block": BLOCK, "backend": "cpu"}
    model = robe.DLRM(CARDINALITIES, 2, pooling=pooling, **settings)
    model.save(tmp_path)
    made, array = from_run(tmp_path, fused="sgd", lr=0.5), model.model.embedding
    values, offsets = draw_bags(rng)
    if pooling is None:
        values, offsets = draw(rng), None
        expected = np.empty((B, F, WIDTH), np.float32)
        array.lookup(values.numpy().astype(np.uint32), expected)
        found = made(values)
    else:
        bags = values.numpy().astype(np.uint32), offsets.numpy(), None
        expected = model.model.interaction.look_up(bags)[:, 1:]
        found = made(values, offsets[:-1])
    assert np.array_equal(found.detach().numpy(), expected)
    found.sum().backward()
    assert not np.array_equal(made.weight.detach().numpy(), array.memory)


def test_a_run_in_halves_is_read_as_floats(tmp_path):
    model = robe.DLRM(CARDINALITIES, 2, width=4, bottom=(4,), top=(4,), weights=400, memory="fp16")
    model.save(tmp_path)
    expected = model.model.embedding.memory.astype(np.float32)
    assert np.array_equal(from_run(tmp_path).weight.detach().numpy(), expected)


@pytest.mark.parametrize("settings", [{"method": "hashing"}, {"method": "robe", "memory": "int8"}], ids=str)
def test_other_runs_are_refused(settings, tmp_path):
    robe.DLRM(CARDINALITIES, 2, width=4, bottom=(4,), top=(4,), weights=400, **settings).save(tmp_path)
    with pytest.raises(ConfigError, match=r"is of --method .* but a module is made of --method robe in fp32"):
        from_run(tmp_path)


class TestOurSide:
    """What the models of this package compute, against torch itself."""

    @pytest.mark.parametrize("name", ["reference", "cpu"])
    @pytest.mark.parametrize("mode", POOLINGS)
    def test_pooling(self, mode, name, rng):
        values, offsets = draw_bags(rng)
        rows, d = normal(rng, len(values), WIDTH).requires_grad_(), normal(rng, B * F, WIDTH)
        scales = normal(rng, len(values)) if mode == "sum" else None
        # A table whose n-th row the n-th value looks up.
        arguments = torch.arange(len(values)), rows, offsets[:-1]
        expected = embedding_bag(*arguments, mode=mode, per_sample_weights=scales)
        expected.backward(d)
        kernels, out = select(name).kernels, np.full((B, F, WIDTH), np.nan, np.float32)
        weights = np.empty(0, np.float32) if scales is None else scales.numpy()
        bags = offsets.numpy(), weights, modes((mode,) * F)
        looked_up = rows.detach().numpy()
        kernels.pool(looked_up, *bags, out)
        np.testing.assert_allclose(out.reshape(-1, WIDTH), expected.detach(), **CLOSE)
        d_rows = np.full_like(looked_up, np.nan)
        kernels.pool_backward(d.numpy().reshape(B, F, WIDTH), looked_up, *bags, d_rows)
        np.testing.assert_allclose(d_rows, rows.grad, **CLOSE)

    @pytest.mark.parametrize(
        ("kind", "theirs", "optimizer"),
        [
            (torch.optim.SGD, {}, {"optimizer": "sgd"}),
            (torch.optim.SGD, {"weight_decay": 0.3}, {"optimizer": "sgd", "l2": 0.3, "embedding_l2": 0.3}),
            # Of SGD decoupled decay is the same as L2.
            (torch.optim.SGD, {"weight_decay": 0.3}, {"optimizer": "sgd", "weight_decay": 0.3}),
            (torch.optim.Adagrad, {"eps": 1e-8}, {"optimizer": "adagrad"}),
            (
                torch.optim.Adagrad,
                {"eps": 1e-8, "weight_decay": 0.3},
                {"optimizer": "adagrad", "l2": 0.3, "embedding_l2": 0.3},
            ),
            (torch.optim.Adam, {}, {"optimizer": "adam"}),
            (
                torch.optim.Adam,
                {"betas": (0.8, 0.9), "weight_decay": 0.3},
                {"optimizer": "adam", "beta1": 0.8, "beta2": 0.9, "l2": 0.3, "embedding_l2": 0.3},
            ),
            (torch.optim.AdamW, {"weight_decay": 0.3}, {"optimizer": "adam", "weight_decay": 0.3}),
        ],
        ids=lambda part: getattr(part, "__name__", None) or " ".join(map(str, part.values())) or "-",
    )
    def test_steps(self, kind, theirs, optimizer, rng):
        """Three, of the dense weights and of an array of which each weight is read."""
        array, rate = method(40, **optimizer, lr=0.1), 0.1
        config, backend = array.optimizer, array.backend
        dense = rng.standard_normal(50, np.float32)
        both = [nn.Parameter(torch.from_numpy(weights.copy())) for weights in (dense, array.memory)]
        expected = kind(both, rate, **theirs)
        step = DenseOptimizer(config, dense, [slice(0, 50)], backend)
        for t in (1, 2, 3):
            ids, d, gradient = draw(rng).numpy().astype(np.uint32), normal(rng, B, F, WIDTH), normal(rng, 50)
            summed = np.zeros_like(array.memory)
            backend.kernels.scatter_add(d.numpy(), *array.slots(ids), 1, summed)
            assert summed.all()
            for parameter, by in zip(both, (gradient, torch.from_numpy(summed)), strict=True):
                parameter.grad = by.clone()
            expected.step()
            step.update(gradient.numpy(), np.float32(rate), corrections(config, t, "float32"))
            array.update(ids, d.numpy(), rate)
            for found, parameter in zip((dense, array.memory), both, strict=True):
                np.testing.assert_allclose(found, parameter.detach(), **CLOSE)

    def test_a_step_of_row_wise_adagrad(self, rng):
        """Of the embedding by FBGEMM's formula (EXACT_ROWWISE_ADAGRAD in fbgemm_gpu/codegen/genscript/
        optimizers.py: the mean of squares of a row's gradient is added to its one sum); the dense weights are
        torch's Adagrad's."""
        array, rate, size = method(128, optimizer="rowwise_adagrad", lr=0.1), 0.1, 64
        dense = rng.standard_normal(50, np.float32)
        parameter = nn.Parameter(torch.from_numpy(dense.copy()))
        expected = torch.optim.Adagrad([parameter], rate, eps=1e-8)
        step = DenseOptimizer(array.optimizer, dense, [slice(0, 50)], array.backend)
        weights, sums = array.memory.astype(float).reshape(-1, size), np.zeros((2, 1))
        for _ in range(3):
            ids, d, gradient = draw(rng).numpy().astype(np.uint32), normal(rng, B, F, WIDTH), normal(rng, 50)
            summed = np.zeros_like(array.memory)
            array.backend.kernels.scatter_add(d.numpy(), *array.slots(ids), 1, summed)
            g = summed.astype(float).reshape(-1, size)
            sums += (g**2).mean(1, keepdims=True)
            weights -= rate * g / (np.sqrt(sums) + 1e-8)
            parameter.grad = gradient.clone()
            expected.step()
            step.update(gradient.numpy(), np.float32(rate))
            array.update(ids, d.numpy(), rate)
            np.testing.assert_allclose(array.memory, weights.ravel(), **CLOSE)
            np.testing.assert_allclose(dense, parameter.detach(), **CLOSE)

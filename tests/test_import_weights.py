"""Published weights: what is read from a state dict computes the published formula, and what does not fit is
named."""

import dataclasses
import json
import os
import sys
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipeline.folders import open_folder
from robe import export_weights, import_weights, run_folder
from robe.cli import main
from robe.config import ConfigError, DataSpec

DENSE, WIDTH, MEMORY, PRIME = 2, 6, 50, 2038074743


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared log of two numbers and three columns of ids that count from 0."""
    folder = tmp_path_factory.mktemp("import")
    rows = "".join(f"{i % 2},{i},{i % 5},u{i % 11},c{i % 3},d{i % 7}\n" for i in range(80))
    (folder / "log.csv").write_text("click,price,age,user,city,day\n" + rows)
    (folder / "own.toml").write_text(
        "label='click'\ndense=['price','age']\n[categorical]\nuser='string'\ncity='string'\nday='string'\n"
    )
    for ids in ("dictionary", "hash"):
        words = ["--schema", f"{folder}/own.toml", "--ids", ids, "--out", f"{folder}/{ids}"]
        main(["prepare", f"{folder}/log.csv", *words])
    return folder


def cardinalities(data):
    return open_folder(data / "dictionary").ids.cardinalities


def state_dict(data, kind="dot", array=False):
    """Tensors of a DLRM as PyTorch names them, of full tables or of an array in all its names."""
    rng, counts = np.random.default_rng(0), cardinalities(data)
    reads = {"dot": WIDTH + 6, "cat": 4 * WIDTH}[kind]
    made = {}
    for part, sizes in (("bot_l", (DENSE, 9, WIDTH)), ("top_l", (reads, 8, 7, 1))):
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            made[f"{part}.{2 * i}.weight"] = rng.standard_normal((n_out, n_in), np.float32) / np.float32(
                n_in**0.5
            )
            made[f"{part}.{2 * i}.bias"] = rng.standard_normal(n_out, np.float32)
    if not array:
        tables = {
            f"emb_l.{f}.weight": rng.standard_normal((n, WIDTH), np.float32) for f, n in enumerate(counts)
        }
        return made | tables
    shared = rng.standard_normal(MEMORY, np.float32)
    drawn = np.random.RandomState(1024).randint(0, PRIME, 50)
    beside = {"random_numbers": np.array([PRIME, *drawn]), "signature": np.zeros(2, np.int64)}
    made["hashed_weight"] = shared
    for f in range(len(counts)):
        made |= {f"emb_l.{f}.{name}": shared for name in ("hashed_weight", "weight")}
        made |= {f"emb_l.{f}.{name}": values for name, values in beside.items()}
    return made


def published(tensors, dense, ids, counts, block):
    """The probability of one row, as dlrm_s_pytorch.py and hashedEmbeddingBag.py compute it, in doubles."""

    def apply_mlp(x, part):
        names = [name for name in tensors if name.startswith(part) and name.endswith("weight")]
        for name in names:
            x = tensors[name].astype(float) @ x + tensors[name.replace("weight", "bias")]
            x = x if name == names[-1] and part == "top_l" else np.maximum(x, 0)
        return x

    def embedded(f, i):
        if "hashed_weight" not in tensors:
            return tensors[f"emb_l.{f}.weight"][i]
        c, b, a = (int(n) for n in np.random.RandomState(1024).randint(0, PRIME, 50)[:3])
        token = sum(counts[:f]) + int(i)
        starts = [(token * a + e // block * b + c) % PRIME % (MEMORY - block + 1) for e in range(WIDTH)]
        return tensors["hashed_weight"][[start + e % block for e, start in enumerate(starts)]]

    x = apply_mlp(dense.astype(float), "bot_l")
    t = np.stack([x, *(embedded(f, i) for f, i in enumerate(ids))])
    pairs = [t[i] @ t[j] for i in range(len(t)) for j in range(i)]
    read = tensors["top_l.0.weight"].shape[1]
    r = np.concatenate([x, pairs]) if read == WIDTH + 6 else t.reshape(-1)
    return 1 / (1 + np.exp(-apply_mlp(r, "top_l")[0]))


def command(*words, capsys):
    """(exit code, output, errors) of a command."""
    capsys.readouterr()
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def require_published(run, tensors, data, block, rng):
    counts = cardinalities(data)
    dense, ids = rng.standard_normal((20, DENSE), np.float32), rng.integers(0, counts, (20, 3))
    ids[0] = np.array(counts) - 1
    found = run_folder.load(run, "cpu").predict(dense, ids)
    expected = [published(tensors, *row, counts, block) for row in zip(dense, ids, strict=True)]
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # float32, of logits of a few units


@pytest.mark.parametrize(
    ("kind", "array", "block"), [("dot", False, 1), ("cat", False, 1), ("dot", True, 1), ("dot", True, 4)]
)
def test_a_state_dict_computes_the_published_formula(kind, array, block, data, tmp_path, rng, capsys):
    tensors = state_dict(data, kind, array)
    save_file(tensors, tmp_path / "dlrm.safetensors")
    words = ("--data", data / "dictionary", "--out", tmp_path / "run")
    options = ("--block", block) if block > 1 else ()
    code, said, _ = command("import", tmp_path / "dlrm.safetensors", *words, *options, capsys=capsys)
    assert code == 0
    weights = MEMORY if array else WIDTH * sum(cardinalities(data))
    assert f"and {weights:,} of embeddings; " in said
    require_published(tmp_path / "run", tensors, data, block, rng)


def test_a_state_dict_gives_the_same_where_negatives_are_thinned(data, tmp_path, rng):
    """Its weights know nothing of a correction of logits, and those that `robe export` writes hold it."""
    tensors, whole = state_dict(data), DataSpec.of(open_folder(data / "dictionary"))
    dense = rng.standard_normal((20, DENSE), np.float32)
    ids = rng.integers(0, whole.cardinalities, (20, 3)).astype(np.uint32)
    thinned = dataclasses.replace(whole, kept_negatives=0.125)
    (_, expected), (config, model) = (import_weights.imported(tensors, each) for each in (whole, thinned))
    assert model.shift == pytest.approx(np.log(0.125))
    # float32 logits of some units, from which 2 is taken and to which it is added.
    np.testing.assert_allclose(model.predict(dense, ids), expected.predict(dense, ids), rtol=0, atol=1e-6)
    again = import_weights.imported(export_weights.state_dict(model, config, thinned), thinned)[1]
    np.testing.assert_allclose(again.predict(dense, ids), expected.predict(dense, ids), rtol=0, atol=1e-6)


def test_an_imported_run_is_a_run_like_any_other(data, tmp_path, capsys):
    save_file(state_dict(data), tmp_path / "dlrm.safetensors")
    run, new = tmp_path / "run", tmp_path / "new"
    words = ("import", tmp_path / "dlrm.safetensors", "--data", data / "dictionary", "--out", run)
    assert command(*words, capsys=capsys)[0] == 0
    assert command("convert", run, "--to", "fp16", "--out", new, capsys=capsys)[0] == 0
    code, said, _ = command("evaluate", run, capsys=capsys)
    summary = json.loads((new / "summary.json").read_text())
    assert (code, json.loads(said)["auc"]) == (0, summary["test_before"]["auc"])
    assert command("predict", new, data / "log.csv", "--out", tmp_path / "p", capsys=capsys)[0] == 0
    assert len(set((tmp_path / "p").read_text().split())) > 50
    code, _, error = command("train", "--resume", run, capsys=capsys)
    assert (code, "is for inference" in error) == (2, True)
    code, _, error = command(*words, capsys=capsys)
    assert (code, "exists and is not an empty folder" in error) == (2, True)


def test_what_does_not_fit_is_named(data):
    full, array = state_dict(data), state_dict(data, array=True)
    spec = DataSpec.of(open_folder(data / "dictionary"))
    wrong = np.full(WIDTH, np.nan, np.float32)
    flat = np.zeros(MEMORY, np.float32)
    helper = {"emb_l.0.helper_Eidx_base": np.arange(WIDTH) // 2}
    other = {"emb_l.2.random_numbers": array["emb_l.2.random_numbers"] + 1}
    for tensors, changes, message in (
        (
            full,
            {"bot_l.0.weight": np.zeros((9, 13), np.float32)},
            r"bot_l.0.weight: has shape \(9, 13\), but",
        ),
        (full, {"bot_l.2.weight": np.zeros((WIDTH, 8), np.float32)}, "bot_l.2.weight: has shape"),
        (full, {"bot_l.0.bias": None}, "bot_l.0.bias: is missing"),
        (full, {"bot_l.2.bias": wrong}, "bot_l.2.bias: holds a value that is not finite"),
        (full, {"top_l.0.weight": np.zeros((8, 16), np.float32)}, "top_l.0.weight: reads 16 numbers; 3 cat"),
        (full, {"top_l.4.weight": None, "top_l.4.bias": None}, "top_l.2.weight: gives 7 numbers, and a prob"),
        (full, {"emb_l.2.weight": None}, "emb_l.2.weight: is missing; these data have 3 categorical"),
        (full, {"emb_l.3.weight": full["emb_l.2.weight"]}, "emb_l.3.weight: is too many"),
        (
            full,
            {"emb_l.1.weight": full["emb_l.0.weight"]},
            r"emb_l.1.weight: has shape .* must have \(4, 6\)",
        ),
        (
            full,
            {"emb_l.1.weight": np.zeros((4, WIDTH), np.int8)},
            "emb_l.1.weight: holds int8, but must hold",
        ),
        (full, {"v_W_l.0": np.ones(4, np.float32)}, "v_W_l.0: is no tensor of such a model"),
        (array, {"emb_l.1.weight": flat}, "emb_l.1.weight: is another array than hashed_weight"),
        (array, {"emb_l.2.random_numbers": None, **other}, "emb_l.2.random_numbers: is not that of --hash-s"),
        (array, helper, "emb_l.0.helper_Eidx_base: is not that of --block 1; give the one"),
    ):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        with pytest.raises(ConfigError, match=f"^{message}"):
            import_weights.imported(changed, spec)
    with pytest.raises(ConfigError, match="--block and --hash-seed are for a ROBE array"):
        import_weights.imported(full, spec, block=8)
    with pytest.raises(ConfigError, match="those of these data are raw values"):
        import_weights.imported(full, DataSpec.of(open_folder(data / "hash")))


def test_a_file_that_is_no_state_dict_is_refused_in_a_line(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "model.pt").write_bytes(b"\x80\x02.")
    monkeypatch.setitem(sys.modules, "torch", None)
    for name, message in (
        ("missing.pt", "missing.pt: No such file or directory"),
        ("text.safetensors", "text.safetensors: not a file of safetensors that NumPy reads ("),
        ("model.pt", "model.pt: to read it takes torch: pip install"),
    ):
        words = ("import", tmp_path / name, "--data", data / "dictionary", "--out", tmp_path / "run")
        code, _, error = command(*words, capsys=capsys)
        assert (code, len(error.splitlines())) == (2, 1)
        assert message in error
        assert not (tmp_path / "run").exists()


def test_files_of_pytorch_give_their_tensors(data, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state_dict(data, array=True).items()}
    torch.save({"iter": 3, "state_dict": tensors}, tmp_path / "whole.pt")
    torch.save(
        {
            name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        },
        tmp_path / "halves.pt",
    )
    whole, halves = (import_weights.read_tensors(tmp_path / name) for name in ("whole.pt", "halves.pt"))
    assert whole.keys() == halves.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(whole[name], tensor.numpy())
        assert halves[name].dtype == whole[name].dtype
        np.testing.assert_allclose(halves[name], whole[name], rtol=1e-3)


class Code:
    """What makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_of_pytorch_runs_nothing(data, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {}, "more": Code(tmp_path / "made")}, tmp_path / "model.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name, message in (
        ("model.pt", "posix.mkdir, which is no tensor, and is not run; of a file"),
        ("list.pt", "holds no state dict"),
        ("text.pt", "text.pt: is damaged or none; of a file of PyTorch only"),
    ):
        words = ("import", tmp_path / name, "--data", data / "dictionary", "--out", tmp_path / "run")
        code, _, error = command(*words, capsys=capsys)
        assert (code, len(error.splitlines())) == (2, 1)
        assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.pt", "model.pt", "text.pt"]
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "made").exists()

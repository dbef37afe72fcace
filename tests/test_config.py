"""Settings: presets, sizes, schedule, and what is refused."""

import dataclasses
import json
import math

import pytest

from robe import config as c
from robe.config import ConfigError, EmbeddingConfig, ModelConfig, OptimizerConfig, TrainConfig, resolve
from robe.model import layer_shapes
from robe.optim import learning_rate
from robe.plan import plan

CRITEO = c.DataSpec(13, (10,) * 26, "hash", "", "test")


def test_presets_are_the_published_sizes():
    def widths(preset):
        shapes = layer_shapes(resolve(TrainConfig(model=ModelConfig(preset))), CRITEO)
        return {part: [n_in for n_in, _ in pairs] + [pairs[-1][1]] for part, pairs in shapes.items()}

    assert widths("kaggle") == {"bottom": [13, 512, 256, 64, 16], "top": [367, 512, 256, 1]}
    assert widths("tb10m") == {"bottom": [13, 512, 256, 64], "top": [415, 512, 512, 256, 1]}
    assert widths("mlperf") == {"bottom": [13, 512, 256, 128], "top": [479, 1024, 1024, 512, 256, 1]}
    recipe = resolve(TrainConfig(model=ModelConfig("mlperf")))
    assert (recipe.optimizer.optimizer, recipe.optimizer.lr, recipe.batch) == ("sgd", 1.0, 2048)


def test_given_settings_override_the_preset():
    config = resolve(
        TrainConfig(
            model=ModelConfig("kaggle", width=8, top=(7,)), optimizer=OptimizerConfig("adagrad", 0.5), batch=9
        )
    )
    assert (config.model.width, config.model.bottom, config.model.top) == (8, (512, 256, 64), (7,))
    assert (config.optimizer.optimizer, config.optimizer.lr, config.batch) == ("adagrad", 0.5, 9)


@pytest.mark.parametrize(
    ("embedding", "weights"),
    [
        ({"weights": 1000}, 1000),
        ({"megabytes": 2}, 500_000),
        ({"megabytes": 2, "memory": "fp16"}, 1_000_000),
        ({"compression": 5}, 832),
        ({"compression": 5, "memory": "fp16"}, 832),
        ({"megabytes": 0.017948, "memory": "int3"}, 641 * 64),  # groups of 28 bytes
        ({"compression": 5, "memory": "int3"}, 832),
        ({}, 41),
    ],
)
def test_size_of_the_array(embedding, weights):
    assert c.robe_weights(EmbeddingConfig(**embedding), 16, CRITEO.cardinalities) == weights


def test_contradicting_or_tiny_sizes_are_refused():
    with pytest.raises(ConfigError, match="one of --weights, --megabytes"):
        c.robe_weights(EmbeddingConfig(weights=10, compression=2), 16, CRITEO.cardinalities)
    with pytest.raises(ConfigError, match="smaller than one block of 32"):
        c.robe_weights(EmbeddingConfig(weights=31, block=32), 16, CRITEO.cardinalities)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (TrainConfig(batch=0), "--batch"),
        (TrainConfig(epochs=-1), "--epochs"),
        (TrainConfig(optimizer=OptimizerConfig(lr=float("nan"))), "--lr"),
        (TrainConfig(optimizer=OptimizerConfig(eps=0.0)), "--eps"),
        (TrainConfig(embedding=EmbeddingConfig(block=0)), "--block"),
        (TrainConfig(embedding=EmbeddingConfig(compression=-1.0)), "--compression"),
        (TrainConfig(model=ModelConfig(bottom=(4, 0))), "--bottom"),
        (TrainConfig(eval_every=0), "--eval-every"),
    ],
)
def test_values_that_are_not_positive_are_refused(config, option):
    with pytest.raises(ConfigError, match=f"{option} must be positive"):
        resolve(config)


# Of each option of EmbeddingConfig a value that is not its default.
OTHER = {
    **{"weights": 1000, "megabytes": 1.0, "compression": 100.0, "init_bound": 0.5, "memory": "fp16"},
    **{"block": 7, "hash": "affine", "sign": False, "hash_seed": 3},
    **{"bits": 4, "cache": 0.1, "policy": "lru", "rounding": "nearest", "combine": "add", "chunks": 2},
    **{"hot_share": 0.5, "importance": "count", "half_life": 50, "online": True},
    **{"alpha": 0.5, "master": "none"},
}
# Option -> what it needs besides, of the methods that have that.
NEEDED = {"master": {"memory": "int8"}, "rounding": {"memory": "int8", "master": "none"}}


def test_every_option_of_an_embedding_has_a_method():
    options = {field.name for field in dataclasses.fields(EmbeddingConfig)} - {"method"}
    assert options == OTHER.keys() == set().union(*(method.options for method in c.METHODS.values()))


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("method", c.METHODS)
def test_options_are_refused_by_the_methods_that_do_not_use_them(method, option):
    needed = {n: x for n, x in NEEDED.get(option, {}).items() if n in c.METHODS[method].options}
    given = TrainConfig(embedding=EmbeddingConfig(method, **{option: OTHER[option]}, **needed))
    takers = [name for name, other in c.METHODS.items() if option in other.options]
    if method in takers:
        assert resolve(resolve(given)) == resolve(given)
        return
    name = "--no-sign" if option == "sign" else f"--{option.replace('_', '-')} {OTHER[option]}"
    message = f"{name} is not for --method {method}; it is for --method {', '.join(takers)}"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolve(given)


def test_recipes_are_the_published_settings():
    bars = resolve(TrainConfig(recipe="bars_criteo_x1"))
    assert (bars.model.width, bars.model.bottom, bars.model.top) == (10, (400,) * 3, (400,) * 3)
    assert (bars.model.dropout, bars.model.bottom_dropout) == (0.2, 0)
    assert bars.optimizer == OptimizerConfig("adam", 1e-3, embedding_l2=1e-5, schedule="plateau")
    assert (bars.batch, bars.patience, bars.eval_every) == (4096, 2, math.ceil(33_003_326 / 4096))
    mlperf = resolve(TrainConfig(recipe="mlperf_v1"))
    assert (mlperf.optimizer, mlperf.batch, mlperf.target_auc) == (OptimizerConfig("sgd", 1.0), 2048, 0.8025)
    second = resolve(TrainConfig(recipe="mlperf_v2"))
    model = ModelConfig("mlperf", 128, (512, 256), (1024, 1024, 512, 256), 0, 0, "cross", 3, 512)
    assert second.model == model
    assert second.optimizer == OptimizerConfig("adagrad", 0.005, eps=1e-8)
    assert (second.batch, second.target_auc) == (65_536, 0.80275)
    assert second.eval_every == 4_195_197_692 // (65_536 * 20)
    kaggle = resolve(TrainConfig(recipe="kaggle_dlrm"))
    assert dataclasses.replace(kaggle, recipe=None) == resolve(TrainConfig(model=ModelConfig("kaggle")))


def test_a_recipe_takes_no_average_where_there_is_none_and_no_rate_of_another_optimizer():
    best = TrainConfig(recipe="best")
    assert resolve(best).average == 0.9
    for changes in ({"patience": 2}, {"epochs": 20}, {"embedding": EmbeddingConfig("cafe", weights=10**6)}):
        assert resolve(dataclasses.replace(best, **changes)).average is None
    sgd = resolve(dataclasses.replace(best, optimizer=OptimizerConfig("sgd")))
    assert (sgd.optimizer.lr, sgd.epochs) == (0.03, 2)  # the rate is that of the preset
    with pytest.raises(ConfigError, match="has to know where the training ends"):
        resolve(dataclasses.replace(best, average=0.5, patience=2))


@pytest.mark.parametrize("recipe", c.RECIPES)
def test_a_recipe_is_for_what_is_left_open_and_survives_json(recipe):
    given = resolve(TrainConfig(recipe=recipe, batch=77, optimizer=OptimizerConfig(lr=0.25), eval_every=5))
    assert (given.batch, given.optimizer.lr, given.eval_every) == (77, 0.25, 5)
    assert resolve(given) == given == resolve(c.from_json(json.loads(json.dumps(c.to_json(given)))))


def test_what_a_method_uses():
    """By hand, so that a row that is wrong in the list is seen."""
    assert set(c.METHODS["full"].options) == {"init_bound", "memory", "master", "rounding"}
    assert set(c.METHODS["robe"].options) >= {"compression", "block", "hash", "sign", "hash_seed"}
    assert set(c.METHODS["mixed_precision"].options) >= {"bits", "cache", "policy", "rounding"}
    assert "memory" not in c.METHODS["mixed_precision"].options
    assert c.METHODS["none"].options == ()
    assert [name for name in c.METHODS if "chunks" in c.METHODS[name].options] == ["compositional", "cce"]


@pytest.mark.parametrize("memory", ["fp32", "fp16", "int3", "int1"])
def test_codes_alone_are_trained_in_8_bits_and_4(memory):
    with pytest.raises(ConfigError, match=rf"^--master none is for --memory int8 and int4, not {memory}: "):
        resolve(TrainConfig(embedding=EmbeddingConfig(memory=memory, master="none")))


def test_what_is_not_rounded_in_training_has_no_rounding():
    with pytest.raises(ConfigError, match="is for --method mixed_precision and for --master none"):
        resolve(TrainConfig(embedding=EmbeddingConfig(memory="int8", rounding="nearest")))


def test_options_of_the_optimizer():
    for optimizer in ("adagrad", "none"):
        assert resolve(TrainConfig(optimizer=OptimizerConfig(optimizer, eps=1e-6))).optimizer.eps == 1e-6
    takers = "adagrad, rowwise_adagrad, adam"
    with pytest.raises(
        ConfigError, match=rf"^--eps 1e-06 is not for --optimizer sgd; it is for --optimizer {takers}$"
    ):
        resolve(TrainConfig(model=ModelConfig("kaggle"), optimizer=OptimizerConfig(eps=1e-6)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "sgd", "beta1": 0.5},
            "--beta1 0.5 is not for --optimizer sgd; it is for --optimizer adam",
        ),
        ({"optimizer": "adam", "beta2": 1.0}, "--beta2 must be at least 0, and less than 1, not 1.0"),
        (
            {"optimizer": "momentum", "momentum": 1.0},
            "--momentum must be at least 0, and less than 1, not 1.0",
        ),
        (
            {"optimizer": "adam", "momentum": 0.5},
            "--momentum 0.5 is not for --optimizer adam; it is for --opt",
        ),
        ({"clip_norm": 0.0}, "--clip-norm must be positive, not 0.0"),
        ({"weight_decay": -1.0}, "--weight-decay must be from 0 to 1e.38, not -1.0"),
        ({"embedding_l2": float("nan")}, "--embedding-l2 must be from 0 to"),
    ],
)
def test_options_of_adam_and_of_decay(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve(TrainConfig(optimizer=OptimizerConfig(**settings)))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"optimizer": "adam"},
            "--optimizer adam cannot step weights in few bits .*; choose of sgd, adagrad",
        ),
        (
            {"optimizer": "momentum"},
            "--optimizer momentum cannot step weights in few bits .*; choose of sgd, adagrad",
        ),
        (
            {"optimizer": "rowwise_adagrad"},
            "--optimizer rowwise_adagrad cannot step weights in few bits .*; choose of sgd, adagrad",
        ),
        (
            {"optimizer": "sgd", "weight_decay": 0.1},
            "--weight-decay and --embedding-l2 do not reach weights in few",
        ),
    ],
)
@pytest.mark.parametrize(
    "embedding", [{"memory": "fp16"}, {"memory": "int8", "master": "none"}, {"method": "mixed_precision"}]
)
def test_weights_in_few_bits_have_neither(embedding, optimizer, message):
    data = c.DataSpec(13, (10,) * 26, "dictionary", "", "test")
    size = {} if "method" in embedding else {"weights": 640}
    config = resolve(
        TrainConfig(embedding=EmbeddingConfig(**embedding, **size), optimizer=OptimizerConfig(**optimizer))
    )
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan(config, data, 1)


def test_a_teacher_teaches_by_cross_entropy():
    with pytest.raises(ConfigError, match=r"^--loss mse is not for --teacher"):
        resolve(TrainConfig(loss="mse", teacher="runs/large"))
    assert resolve(TrainConfig(loss="mse")).loss == "mse"


@pytest.mark.parametrize("embedding", [{"method": "cafe"}, {"method": "adaembed"}, {"method": "hot"}])
def test_rows_that_change_hands_share_no_sum(embedding):
    config = TrainConfig(
        embedding=EmbeddingConfig(**embedding, weights=6400), optimizer=OptimizerConfig("rowwise_adagrad")
    )
    data = c.DataSpec(13, (1000,) * 26, "hash", "", "test")
    with pytest.raises(ConfigError, match=r"^--optimizer rowwise_adagrad is not for rows that change hands"):
        plan(resolve(config), data, 1)


def test_runs_of_before_are_read_without_the_options_that_nothing_used():
    config = resolve(TrainConfig(model=ModelConfig("kaggle"), embedding=EmbeddingConfig("full")))
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    stored["embedding"]["compression"] = 100.0
    stored["optimizer"] |= {"eps": 1e-6, "decay_steps": 5}
    assert resolve(c.from_json(stored)) == config


def test_decay_needs_its_length():
    with pytest.raises(ConfigError, match="--decay-steps"):
        resolve(TrainConfig(optimizer=OptimizerConfig(decay_start=10)))
    with pytest.raises(ConfigError, match="--decay-steps needs --decay-start"):
        resolve(TrainConfig(optimizer=OptimizerConfig(decay_steps=10)))


def test_one_pass_is_fresh_anyway():
    with pytest.raises(ConfigError, match="--fresh-embeddings needs --epochs of 2 or more"):
        resolve(TrainConfig(fresh_embeddings=True))
    assert resolve(TrainConfig(fresh_embeddings=True, epochs=2)).fresh_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ModelConfig(dropout=1.0)}, "--dropout must be from 0 to 0.99, not 1.0"),
        (
            {"model": ModelConfig(dropout=0.1), "precision": "bf16"},
            "--dropout and --bottom-dropout are not for --precision bf16; ",
        ),
        ({"average": 1.5}, "--average must be from 0 to 1, not 1.5"),
        (
            {"average": 0.5, "patience": 2},
            "--average has to know where the training ends; leave out --patience",
        ),
        ({"average": 0.5, "target_auc": 0.8}, "--average has to know .*; leave out --target-auc"),
        (
            {"average": 0.4, "epochs": 2, "fresh_embeddings": True},
            "--average .* drew them anew; .* at 0.5 or",
        ),
        (
            {"average": 0.5, "embedding": EmbeddingConfig("cce")},
            "--average is not for --method cce, .*full, none",
        ),
        (
            {"average": 0.5, "embedding": EmbeddingConfig("mixed_precision")},
            "--average is not for --method mixed",
        ),
        (
            {"average": 0.5, "embedding": EmbeddingConfig(memory="int8", master="none")},
            "--average is for weights, and --master none has codes alone; use --master fp32",
        ),
    ],
)
def test_what_has_no_average_or_dropout(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve(TrainConfig(**settings))


def test_a_weight_needs_a_teacher():
    with pytest.raises(ConfigError, match=r"--teacher-weight 0.5 needs --teacher"):
        resolve(TrainConfig(teacher_weight=0.5))
    with pytest.raises(ConfigError, match=r"--teacher-weight must be from 0 to 1, not 1.5"):
        resolve(TrainConfig(teacher="run", teacher_weight=1.5))
    assert resolve(TrainConfig(teacher="run", teacher_weight=0.5)).teacher_weight == 0.5


def test_learning_rate_schedule():
    schedule = OptimizerConfig("sgd", 2.0, warmup_steps=4, decay_start=10, decay_steps=10)
    rates = [learning_rate(schedule, step) for step in range(22)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[10] == 2.0
    assert rates[15] == pytest.approx(2.0 * 0.5**2)
    assert rates[20:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        ("polynomial", [1, 0.5625, 0.25, 0.0625, 0]),
    ],
)
def test_how_the_rate_falls(schedule, shares):
    given = OptimizerConfig("sgd", 2.0, schedule=schedule, decay_start=10, decay_steps=8)
    assert [learning_rate(given, step) / 2 for step in range(10, 19, 2)] == pytest.approx(shares)
    assert learning_rate(given, 9) == 2
    # By itself from the end of the warm-up, after 4 steps, to that of a training of 12.
    free = OptimizerConfig("sgd", 2.0, schedule=schedule, warmup_steps=4)
    rates = [learning_rate(free, step, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [1] * 4 if schedule == "polynomial" else shares[:-1]
    assert [rate / 2 for rate in rates[4::2]] == pytest.approx(expected)


def test_a_fall_to_the_end_needs_an_end_and_constant_has_none():
    with pytest.raises(ConfigError, match=r"^--schedule cosine has to know where the training ends; "):
        learning_rate(OptimizerConfig("sgd", 2.0, schedule="cosine"), 0)
    with pytest.raises(ConfigError, match=r"^--schedule constant never falls; leave out --decay-start"):
        resolve(TrainConfig(optimizer=OptimizerConfig(schedule="constant", decay_start=1, decay_steps=2)))
    with pytest.raises(ConfigError, match=r"^--schedule plateau falls where .*; leave out --decay-start"):
        resolve(TrainConfig(optimizer=OptimizerConfig(schedule="plateau", decay_start=1, decay_steps=2)))
    plateau = OptimizerConfig("sgd", 2.0, schedule="plateau", warmup_steps=4)
    assert [learning_rate(plateau, step, 9, falls) for step, falls in ((0, 0), (3, 0), (8, 2))] == [
        *(0.5, 2, pytest.approx(0.02, rel=1e-15))
    ]
    with pytest.raises(ConfigError, match=r"^--schedule plateau has to know what evaluations find"):
        learning_rate(plateau, 0, 9)
    for optimizer in OptimizerConfig("sgd", 2.0), OptimizerConfig("sgd", 2.0, schedule="constant"):
        assert learning_rate(optimizer, 10**6, 10**7) == 2.0


def test_configuration_survives_json():
    config = resolve(
        TrainConfig(model=ModelConfig("mlperf"), embedding=EmbeddingConfig(sign=False), target_auc=0.8)
    )
    assert c.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_settings_that_came_later_stand_in_files_only_where_they_are_used():
    """So the files of all other runs keep their bytes, and those of older programs can be read."""
    config = resolve(TrainConfig())
    assert not c.to_json(config).keys() & set(c.LATER)
    assert not c.to_json(config)["embedding"].keys() & set(c.LATER)
    hot = dataclasses.replace(config, embedding=EmbeddingConfig("hot", hot_share=0.5))
    assert c.to_json(hot)["embedding"] == c.to_json(config)["embedding"] | {"method": "hot", "hot_share": 0.5}
    later = dataclasses.replace(hot, patience=3)
    assert c.to_json(later) == c.to_json(hot) | {"patience": 3}
    for each in (config, hot, later):
        assert c.from_json(json.loads(json.dumps(c.to_json(each)))) == each


def test_foreign_configuration_is_refused():
    data = dataclasses.asdict(TrainConfig()) | {"colour": "red"}
    with pytest.raises(ConfigError, match="colour"):
        c.from_json(data)

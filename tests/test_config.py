"""Configs: overrides from text, checks, JSON and back, and every config that is shipped."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import pytest

import dec_diffusion
from dec_diffusion import config as configs
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data import DataConfig
from dec_diffusion.method import DataSpec, Method
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.methods.diec import DiEC
from dec_diffusion.methods.neural_mixture import NeuralMixture
from dec_diffusion.types import InputError
from dec_diffusion.views import View

SHIPPED = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


def make(**fields) -> Config:
    return Config(name="test", method=ClusterDDPM(), **fields)


def module_of(file: pathlib.Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped_variants() -> list[tuple[pathlib.Path, str | None]]:
    return [
        (file, variant)
        for file in SHIPPED
        for variant in [None, *getattr(module_of(file), "VARIANTS", ())]
    ]


# -- overrides --


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "3", 3),
        ("seed", " 3 ", 3),
        ("name", "7", "7"),
        ("method.num_clusters", "12", 12),
        ("method.learning_rate", "1", 1.0),
        ("method.learning_rate", "3e-4", 3e-4),
        ("method.log_snr_mean", "-1.5", -1.5),
        ("method.decay", "false", False),
        ("method.decay", "No", False),
        ("method.flip", None, True),
        ("method.flip", "1", True),
        ("method.multipliers", "1", (1,)),
        ("method.multipliers", "1,2,4", (1, 2, 4)),
        ("method.multipliers", "(1, 2)", (1, 2)),
        ("method.attention", "", ()),
        ("method.network", "official", "official"),
        ("data.drop", "a (kg),b [m]", ("a (kg)", "b [m]")),
        ("data.drop", "(a,b (x))", ("a", "b (x)")),
        ("data.limit", "20", 20),
        ("data.limit", "none", None),
        ("data.path", "a=b,c", "a=b,c"),
        ("data.path", "None", None),
        ("train.resident_gib", "0", 0.0),
    ],
)
def test_override_reads_the_type_of_the_field(name, text, value):
    config = make(data=DataConfig(limit=5, path="x"))
    before = configs.flatten(config)
    after = configs.flatten(configs.override(config, name, text))
    assert after == before | {name: value}
    assert type(after[name]) is type(value)
    assert configs.flatten(config) == before, "the config given must stay as it is"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("seed", "abc", "--config.seed=abc: must be a whole number"),
        ("seed", "1.5", "must be a whole number"),
        ("seed", "", "must be a whole number"),
        ("seed", "none", "must be a whole number"),
        ("seed", None, "--config.seed needs a value"),
        ("method.learning_rate", "nan", "must be a finite number"),
        ("method.learning_rate", "fast", "must be a finite number"),
        ("method.decay", "maybe", "must be true or false"),
        ("method.multipliers", "1,x", "must be a whole number, or several"),
        ("method.multipliers", "1.5", "must be a whole number, or several"),
        ("method.network", "resnet", "must be one of unet, official"),
        ("data.limit", "many", "must be a whole number, or none"),
        ("sed", "1", "did you mean --config.seed?"),
        ("method.kl_wieght", "1", "did you mean --config.method.kl_weight?"),
        ("kl_weight", "1", "did you mean --config.method.kl_weight?"),
        ("metod.latent", "1", "did you mean --config.method.latent?"),
        ("method.limit", "1", "did you mean --config.data.limit?"),
        ("method", "1", "no such field"),
        ("method.latent.x", "1", "no such field"),
        ("", "1", "no such field"),
        ("zzzzz", "1", "--config=... --help lists the fields"),
    ],
)
def test_override_refuses(name, text, words):
    with pytest.raises(InputError) as caught:
        configs.override(make(), name, text)
    assert words in str(caught.value)
    assert f"--config.{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- checks --


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("seed", True),
        ("seed", "0"),
        ("name", ""),
        ("train.batch_size", 0),
        ("train.batch_size", 2.5),
        ("train.sweep_size", -5),
        ("train.evaluate_every", 0),
        ("train.checkpoint_every", 0),
        ("train.keep_checkpoints", 0),
        ("train.resident_gib", -0.5),
        ("train.resident_gib", math.nan),
        ("method.learning_rate", math.inf),
        ("method.learning_rate", "1e-3"),
        ("method.multipliers", [1, 2]),
        ("method.multipliers", (1, "2")),
        ("method.network", "resnet"),
        ("data.limit", 2.0),
        ("data.path", 3),
    ],
)
def test_check_names_the_field(name, value):
    config = configs._replace(make(), name.split("."), value)
    with pytest.raises(InputError, match=f"^--config.{name}="):
        configs.check(config)


def test_check_accepts_the_defaults_and_the_edges():
    configs.check(make())
    configs.check(make(seed=2**32 - 1, train=TrainConfig(resident_gib=0, batch_size=1)))


# -- JSON --


@pytest.mark.parametrize(
    "config",
    [
        make(),
        Config(
            name="été",
            method=ClusterDDPM(multipliers=(1, 2, 3), attention=(2,), learning_rate=1 / 3),
            data=DataConfig(name="npz", path="a b", limit=7),
            train=TrainConfig(batch_size=3, resident_gib=0.1),
            seed=11,
        ),
    ],
)
def test_round_trip_through_json(config):
    plain = configs.to_dict(config)
    again = configs.from_dict(json.loads(json.dumps(plain)))
    assert again == config
    assert type(again.method) is ClusterDDPM
    assert configs.to_dict(again) == plain
    assert configs.from_dict(plain) == config


def edited(**changes) -> dict:
    plain = configs.to_dict(make())
    for name, value in changes.items():
        *groups, last = name.split("__")
        place = plain
        for group in groups:
            place = place[group]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return plain


@pytest.mark.parametrize(
    ("plain", "word"),
    [
        (edited(method__is="os:system"), "os"),
        (edited(method__is="dec_diffusion.methods_evil:run"), "dec_diffusion.methods_evil"),
        (edited(method__is="dec_diffusion.train:fit"), "dec_diffusion.train"),
        (edited(method__is="dec_diffusion.methods.nothere:X"), "nothere"),
        (edited(method__is="dec_diffusion.methods.clusterddpm:view"), "view"),
        # A record that the module imported, not one of its own.
        (edited(method__is="dec_diffusion.methods.clusterddpm:Mixture"), "Mixture"),
        (edited(method__is=3), "3"),
        (edited(method__is=...), "unknown method"),
        (edited(method=3), "int"),
        (edited(data=3), "int"),
        (edited(method__mystery=1), "mystery"),
        (edited(train__mystery=1), "mystery"),
        (edited(data__mystery=1), "mystery"),
        (edited(mystery=1), "mystery"),
        (edited(name=...), "name"),
        (edited(data=...), "data"),
    ],
)
def test_from_dict_refuses_what_this_version_did_not_write(plain, word):
    with pytest.raises(InputError, match=r"config\.json does not fit") as caught:
        configs.from_dict(plain)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resumable_fields_exist():
    assert set(configs.RESUMABLE) <= set(configs.flatten(make()))


# -- what is shipped --


@pytest.mark.parametrize(
    ("file", "variant"),
    shipped_variants(),
    ids=lambda v: v.stem if isinstance(v, pathlib.Path) else str(v),
)
def test_every_shipped_config_builds(file, variant):
    module = module_of(file)
    config = module.get_config() if variant is None else module.get_config(variant)
    configs.check(config)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config
    # The smallest shape of images and of vectors that any source gives.
    for spec in (DataSpec((8, 8, 1), 1797), DataSpec((3,), 200)):
        if not spec.is_image and getattr(config.method, "layer", ""):
            continue  # a layer of the U-Net
        method = config.method.build(spec)
        assert isinstance(method, Method)
        assert all(p.iterations >= 1 and p.steps >= 1 for p in method.phases.values())


def test_configs_are_documented_and_their_runs_named_apart():
    names = [
        module_of(file).get_config(*([] if variant is None else [variant])).name
        for file, variant in shipped_variants()
        if variant is not None
    ]
    assert len(names) == len(set(names))
    for file in SHIPPED:
        assert "--config=" in (module_of(file).__doc__ or ""), f"{file.name}: no command"


def test_an_estimator_is_no_method():
    config = Config(name="mine", method=dec_diffusion.ClusterDDPM(n_clusters=3))
    with pytest.raises(InputError, match=r"--config\.method: ClusterDDPM holds no settings"):
        configs.check(config)


def test_every_field_is_described():
    """The documentation of an option is in its dataclass, and must not fall behind."""
    for kind in (Config, TrainConfig, DataConfig, ClusterDDPM, DiEC, NeuralMixture, View):
        described = configs.attributes(kind)
        for field in dataclasses.fields(kind):
            assert described.get(field.name), f"{kind.__name__}.{field.name}"
